"""The toy world: a catalogue that never changes, tastes that drift, an oracle that is exact."""

import hashlib
import itertools
import json

import numpy as np
import pytest
import torch

from assets.toy_world import (
    TOY_DRIFT,
    mix_traits,
    toy_interactions,
    toy_oracle,
    toy_world,
)

TINY_SIZES = (2, 3)
TINY_ITEMS = 5


@pytest.fixture(scope="module")
def world():
    return toy_world(0)


@pytest.fixture(scope="module")
def tiny_world():
    """Two traits, six types, five items, random laws of choice."""
    rng = np.random.default_rng(0)
    num_types = int(np.prod(TINY_SIZES))
    return {
        "trait_sizes": np.array(TINY_SIZES),
        "taste": np.exp(2 * rng.normal(size=(num_types, TINY_ITEMS))).astype(np.float32),
        "follow": np.exp(rng.normal(size=(TINY_ITEMS, TINY_ITEMS))).astype(np.float32),
    }


@pytest.fixture(scope="module")
def histories(world):
    """Item indices of 100 users in the order of time."""
    return sequences(world, num_users=100, seed=0)


def sequences(world, num_users, seed, drift=TOY_DRIFT):
    """toy_interactions, sorted out: a list of one array of item indices for each user."""
    users, items, _ = toy_interactions(world, num_users, seed, drift)
    indices = items.astype(int) - 1
    return [indices[users == user] for user in range(num_users)]


def transition(types, drift):
    """p(type at the next step | type) of the tiny world, entry by entry. (types, types)"""
    matrix = np.ones((len(types), len(types)))
    for row, before in enumerate(types):
        for column, after in enumerate(types):
            for k, size in enumerate(TINY_SIZES):
                stays = before[k] == after[k]
                matrix[row, column] *= (1 - drift) * stays + drift / size
    return matrix


def choice_law(world, kind, past):
    """p(next item | type, items watched so far) of one user. (I,)"""
    weight = world["taste"][kind].astype(float)
    if past:
        weight = weight * world["follow"][past[-1]]
        weight[past] = 0
    return weight / weight.sum()


def enumerate_paths(world, history, drift):
    """p(next item | history): a sum over every path of types that the user can have taken. (I,)"""
    types = list(itertools.product(*map(range, TINY_SIZES)))
    moves = transition(types, drift)
    total = np.zeros(TINY_ITEMS)
    for path in itertools.product(range(len(types)), repeat=len(history) + 1):
        # p(path) * p(history | path), then what the last type of the path chooses.
        probability = 1 / len(types)
        for before, after in itertools.pairwise(path):
            probability *= moves[before, after]
        for step, item in enumerate(history):
            probability *= choice_law(world, path[step], history[:step])[item]
        total += probability * choice_law(world, path[-1], history)
    return total / total.sum()


# ---- The catalogue ---------------------------------------------------------------------------


def test_the_catalogue_is_the_one_that_the_shipped_llm_knows(world):
    text = json.dumps(world["items"], sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    assert digest == "d5343906fbccec93cb9b7ef2b1392ab5f7d676640cab1b3df633e7a1a7ea86b9"


def test_the_shapes_are_those_of_the_docstring(world):
    assert world["trait_sizes"].tolist() == [6, 4, 4, 5, 8, 4]
    assert world["taste"].shape == (15360, 120)
    assert world["follow"].shape == (120, 120)


def test_types_are_numbered_along_the_grid(world):
    """Two types that differ in the genre alone differ at items of the two genres alone."""
    grid = world["taste"].reshape(*world["trait_sizes"], 120)
    genres = np.array([item["attributes"]["genre"] for item in world["items"]])
    changed = grid[0, 1, 2, 3, 4, 3] != grid[1, 1, 2, 3, 4, 3]
    assert set(genres[changed]) == {"comedy", "thriller"}
    assert changed.sum() == 40


# ---- The interactions ------------------------------------------------------------------------


def test_interactions_are_a_function_of_the_seed(world):
    first = toy_interactions(world, 20, seed=0)
    again = toy_interactions(world, 20, seed=0)
    other = toy_interactions(world, 20, seed=1)
    for a, b in zip(first, again):
        np.testing.assert_array_equal(a, b)
    assert first[1][:20].tolist() != other[1][:20].tolist()


def test_every_user_watches_16_to_40_movies_and_none_twice(world, histories):
    lengths = [len(history) for history in histories]
    assert min(lengths) == 16 and max(lengths) == 40
    for history in histories:
        assert len(set(history.tolist())) == len(history)

    users, _, times = toy_interactions(world, 20, seed=0)
    for user in range(20):
        own = times[users == user]
        assert own.tolist() == list(range(len(own)))


def test_tastes_drift(world):
    """Movies that follow each other share their genre more often than movies far apart; in a world
    that stands still the distance tells little."""
    names = [item["attributes"]["genre"] for item in world["items"]]
    genres = np.unique(names, return_inverse=True)[1]

    def share(drift, distance):
        same = []
        for history in sequences(world, 300, seed=0, drift=drift):
            codes = genres[history[:16]]
            same.append(codes[distance:] == codes[:-distance])
        return np.concatenate(same).mean()

    assert share(TOY_DRIFT, 1) > share(TOY_DRIFT, 10) + 0.05
    assert abs(share(0, 1) - share(0, 10)) < 0.03


# ---- The drift of a belief -------------------------------------------------------------------


def test_a_belief_drifts_as_the_transition_matrix_says():
    types = list(itertools.product(*map(range, TINY_SIZES)))
    belief = torch.rand(3, len(types))
    wanted = belief @ torch.tensor(transition(types, 0.3), dtype=torch.float32)
    torch.testing.assert_close(mix_traits(belief, TINY_SIZES, 0.3), wanted)


def test_a_belief_stays_without_drift_and_forgets_all_at_drift_1(world):
    belief = torch.rand(2, 15360).softmax(1)
    before = belief.clone()
    same = mix_traits(belief, world["trait_sizes"], 0)
    forgotten = mix_traits(belief, world["trait_sizes"], 1)
    torch.testing.assert_close(same, belief, rtol=0, atol=0)
    torch.testing.assert_close(forgotten, torch.full_like(belief, 1 / 15360))
    torch.testing.assert_close(belief, before, rtol=0, atol=0)


# ---- The oracle ------------------------------------------------------------------------------


@pytest.mark.parametrize("drift", [0, 0.1, 0.6, 1])
def test_the_oracle_is_bayes_rule_by_enumeration(tiny_world, drift):
    tiny_histories = [[4], [1, 0, 2], [0, 3], [3, 2, 4]]
    got = toy_oracle(tiny_world, [np.array(history) for history in tiny_histories], drift)
    for row, history in zip(got, tiny_histories):
        wanted = torch.tensor(enumerate_paths(tiny_world, history, drift), dtype=torch.float32)
        torch.testing.assert_close(row, wanted, atol=1e-6, rtol=1e-4)


def test_without_drift_the_oracle_is_the_one_of_a_world_that_stands_still(world):
    """Then the belief is a plain product over the history; here in logs and double precision."""
    taste = torch.from_numpy(world["taste"]).double()
    follow = torch.from_numpy(world["follow"]).double()
    few = sequences(world, 4, seed=0, drift=0)
    got = toy_oracle(world, few, drift=0)
    for row, history in zip(got, few):
        log_belief = torch.zeros(len(taste), dtype=torch.double)
        context = torch.ones(120, dtype=torch.double)
        for step, item in enumerate(history):
            log_belief += taste[:, item].log() - (taste @ context).log()
            context = follow[item].clone()
            context[history[: step + 1]] = 0
        wanted = (log_belief.softmax(0) / (taste @ context)) @ taste * context
        torch.testing.assert_close(row.double(), wanted, atol=1e-6, rtol=1e-3)


def test_the_oracle_does_not_depend_on_the_batch(world, histories):
    together = toy_oracle(world, histories[:3])
    alone = torch.cat([toy_oracle(world, [history]) for history in histories[:3]])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-4)


def test_the_oracle_means_what_it_says(world, histories):
    """It is calibrated: the test item is as probable as the oracle expects it to be, and among its
    first ten as often as their probabilities sum up to. A wrong drift makes it worse."""
    pasts = [history[:-1] for history in histories]
    targets = torch.tensor([history[-1] for history in histories])

    def log_probability(oracle):
        return oracle.gather(1, targets[:, None])[:, 0].log()

    oracle = toy_oracle(world, pasts)
    torch.testing.assert_close(oracle.sum(1), torch.ones(len(pasts)), atol=1e-5, rtol=0)
    for row, past in zip(oracle, pasts):
        assert row[past].sum() == 0

    # Within three standard errors of what the oracle expects, sum_i p_i log p_i.
    got = log_probability(oracle)
    expected = torch.special.entr(oracle).sum(1).neg()
    surprise = got - expected
    assert abs(surprise.mean()) < 3 * surprise.std() / len(pasts) ** 0.5

    first_ten = oracle.topk(10)
    hits = (first_ten.indices == targets[:, None]).any(1).float()
    difference = hits - first_ten.values.sum(1)
    assert abs(difference.mean()) < 3 * difference.std() / len(pasts) ** 0.5

    # An oracle that believes in no drift, or in one too large, knows less.
    for wrong_drift in (0, 10 * TOY_DRIFT):
        wrong = log_probability(toy_oracle(world, pasts, wrong_drift))
        assert got.mean() > wrong.mean() + 0.2
