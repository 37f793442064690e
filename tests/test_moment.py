"""A user at a moment: their vector is folded in from what came before, and from nothing else."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import data
from assets.fast.als import solve_short_rows
from assets.plumbing.cf import CFSettings, UserSolver, solve_rows, training_moments
from assets.plumbing.later import whole_vectors

NUM_ITEMS = 30
SETTINGS = {  # every form of the solver: order counts or not, the ridge is flat or grows with a row
    "still, flat": {"recency": 1.0, "reg": 0.7},
    "still, scaled": {"recency": 1.0, "reg": 0.02, "a0": 0.1},
    "recent, flat": {"recency": 0.8, "reg": 0.7},
    "recent, scaled": {"recency": 0.8, "reg": 0.02, "a0": 0.1},
}


@pytest.fixture(params=[4, 40])
def dim(request):
    """E: histories of six items are long for 4 (an E x E system), short for 40 (an L x L system)."""
    return request.param


@pytest.fixture(params=SETTINGS)
def solver(request, dim):
    generator = torch.Generator().manual_seed(dim)
    item_cf = torch.randn(NUM_ITEMS, dim, generator=generator) / 2
    return UserSolver(item_cf, CFSettings(dim=dim, alpha=3.0, **SETTINGS[request.param]))


@pytest.fixture()
def histories():
    """Of 0 to 9 items, in no order of length."""
    rng = np.random.default_rng(0)
    return [rng.permutation(NUM_ITEMS)[:length] for length in (6, 0, 1, 9, 3, 6)]


def by_hand(solver, history):
    """The normal equations as the docstring has them, written out in double precision. (E,)"""
    Y, s = solver.item_cf.double(), solver.settings
    A = Y.T @ Y
    b = torch.zeros(len(A), dtype=torch.double)
    total = 0.0
    for age, item in enumerate(reversed(list(history))):
        weight = s.recency**age
        total += weight
        A = A + s.alpha * weight * torch.outer(Y[item], Y[item])
        b += (1 + s.alpha) * weight * Y[item]
    ridge = s.reg * (total + s.a0 * len(Y)) if s.a0 else s.reg
    return torch.linalg.solve(A + ridge * torch.eye(len(A), dtype=torch.double), b)


def close(a, b):
    torch.testing.assert_close(a.double(), b.double(), atol=2e-5, rtol=2e-4)


# ---- The solver ------------------------------------------------------------------------------


def test_folding_in_solves_the_normal_equations(solver, histories):
    got = solver.of_histories(histories)
    for row, history in zip(got, histories):
        close(row, by_hand(solver, history))


def test_an_empty_history_gives_zeros(solver):
    assert not solver.of_histories([[], np.zeros(0, dtype=int)]).any()
    assert not solver.before(np.array([3, 4]), [0]).any()


def test_no_histories_give_no_rows(solver):
    assert solver.of_histories([]).shape == (0, solver.item_cf.shape[1])


def test_short_rows_give_what_long_rows_give(solver, histories):
    """The L x L system of solve_short_rows against the E x E system of solve_rows."""
    s, Y = solver.settings, solver.item_cf
    history = torch.from_numpy(histories[0])
    age = torch.arange(len(history) - 1, -1, -1)
    w = s.recency**age * torch.ones(len(history))
    rows = Y[history]
    S = (rows * w[:, None]).T @ rows
    long = solve_rows(solver.gram, S[None], (w @ rows)[None], w.sum()[None], s, NUM_ITEMS)
    eigenvalues, basis = torch.linalg.eigh(solver.gram)
    turned = solve_short_rows(
        (rows @ basis)[None], eigenvalues.clamp(min=0), w[None], s, NUM_ITEMS
    )
    close(turned @ basis.T, long)


def test_padding_and_the_order_of_rows_do_not_matter(solver, histories):
    together = solver.of_histories(histories)
    backwards = solver.of_histories(histories[::-1]).flip(0)
    alone = torch.cat([solver.of_histories([history]) for history in histories])
    close(backwards, together)
    close(alone, together)


def test_the_order_of_a_history_matters_where_recency_is_below_1(solver, histories):
    there, back = solver.of_histories([histories[3], histories[3][::-1]])
    if solver.recency < 1:
        assert (there - back).abs().max() > 0.01
    else:
        close(there, back)


def test_before_is_folding_in_each_prefix(solver, histories):
    """Places in any order, some of them twice."""
    history, places = histories[3], [4, 1, 9, 0, 4, 7]
    wanted = torch.stack([by_hand(solver, history[:place]) for place in places])
    close(solver.before(history, places), wanted)


def test_without_is_folding_in_all_but_one_item(dim, histories):
    item_cf = torch.randn(NUM_ITEMS, dim, generator=torch.Generator().manual_seed(1)) / 2
    for ridge in ({"reg": 0.7}, {"reg": 0.02, "a0": 0.1}):
        solver = UserSolver(item_cf, CFSettings(dim=dim, alpha=3.0, **ridge))
        history, places = histories[3], [8, 0, 3, 3]
        wanted = [by_hand(solver, np.delete(history, place)) for place in places]
        close(solver.without(history, places), torch.stack(wanted))


def test_only_the_gram_matrix_of_the_catalogue_is_shared(solver, histories):
    """A solver that is told Y'Y (of other items too: --new) uses what it is told."""
    more = UserSolver(solver.item_cf[:20], solver.settings, gram=solver.gram)
    history = histories[0] % 20
    if solver.settings.a0:  # the scaled ridge counts the items that there are
        assert (more.of_histories([history]) - solver.of_histories([history])).abs().max() > 0
    else:
        close(more.of_histories([history]), solver.of_histories([history]))


# ---- The data set ----------------------------------------------------------------------------


@pytest.fixture(params=[0.9, 1.0])
def dataset(request, toy):
    """The prepared toy data, as it is and as if tastes stood still."""
    prepared = data.load_dataset(toy)
    settings = replace(prepared.solver.settings, recency=request.param)
    prepared.solver = UserSolver(prepared.raw_cf, settings)
    return prepared


def changed(dataset, user, place, ask):
    """Which rows of ask(user) change when another item stands at a place of the history."""
    before = ask(user)
    position = dataset.indptr[user] + place
    old = dataset.sequence[position]
    unused = np.setdiff1d(np.arange(len(dataset.items)), dataset.items_of(user))
    dataset.sequence[position] = unused[0]
    after = ask(user)
    dataset.sequence[position] = old
    return (before - after).abs().amax(1) > 1e-6


def test_no_training_vector_knows_its_target(dataset):
    """Another item at place 5: the vector that predicts place 5 is the same to the last bit of
    meaning. Later ones know it; earlier ones only where order does not matter."""
    places = np.arange(1, len(dataset.items_of(3, "train")))
    moved = changed(dataset, 3, 5, lambda user: dataset.vectors_along(user, places))
    assert not moved[places == 5].any()
    assert moved[places > 5].all()
    assert moved[places < 5].all() == (dataset.solver.recency == 1)
    assert moved[places < 5].any() == (dataset.solver.recency == 1)


@pytest.mark.parametrize("last", [1, 2])
def test_training_vectors_know_neither_validation_nor_test_items(dataset, last):
    places = np.arange(1, len(dataset.items_of(3, "train")))
    end = len(dataset.items_of(3)) - last
    assert not changed(dataset, 3, end, lambda user: dataset.vectors_along(user, places)).any()
    assert not changed(dataset, 3, end, lambda user: whole_vectors(dataset, [user])).any()


def test_vectors_at_validation_and_test_do_not_know_what_is_asked(dataset):
    test_item = len(dataset.items_of(3)) - 1
    known = {}
    for item in (test_item, test_item - 1, test_item - 2):
        for split in ("valid", "test", None):
            moved = changed(dataset, 3, item, lambda user: dataset.vectors_at([user], split))
            known[test_item - item, split] = moved.item()
    assert known == {
        (0, "valid"): False,
        (0, "test"): False,
        (0, None): True,  # now: all of it
        (1, "valid"): False,
        (1, "test"): True,
        (1, None): True,
        (2, "valid"): True,
        (2, "test"): True,
        (2, None): True,
    }


def test_moments_of_many_users_are_those_of_each(dataset):
    users, places = [4, 7, 4, 0], [3, 1, 9, 6]
    each = [dataset.vectors_along(u, np.array([place])) for u, place in zip(users, places)]
    close(dataset.vectors_before(users, places), torch.cat(each))


def test_users_of_all_their_training_items_are_those_of_als(dataset):
    """What new items are folded in with: order plays no part, whatever recency is."""
    everyone = whole_vectors(dataset, range(len(dataset.users)))
    still = replace(dataset.solver.settings, recency=1.0)
    wanted = by_hand(UserSolver(dataset.raw_cf, still), dataset.items_of(5, "train"))
    close(everyone[5], wanted)
    torch.testing.assert_close(everyone.T @ everyone, dataset.user_gram, atol=1e-3, rtol=1e-3)


def test_training_moments_are_all_training_targets_but_the_first(dataset):
    users, places = training_moments(dataset.indptr, 10**9)
    wanted = []
    for user in range(len(dataset.users)):
        wanted += [(user, place) for place in range(1, len(dataset.items_of(user, "train")))]
    assert list(zip(users.tolist(), places.tolist())) == wanted


def test_a_sample_of_training_moments_is_part_of_them_without_repeats(dataset):
    every = set(zip(*(x.tolist() for x in training_moments(dataset.indptr, 10**9))))
    some = list(zip(*(x.tolist() for x in training_moments(dataset.indptr, 50))))
    assert len(some) == len(set(some)) == 50
    assert set(some) < every


def test_users_are_standardised_by_their_training_moments(toy):
    dataset = data.load_dataset(toy)
    moments = training_moments(dataset.indptr, 10_000)
    standard = dataset.standard_users(dataset.vectors_before(*moments))
    torch.testing.assert_close(standard.mean(0), torch.zeros(12), atol=1e-3, rtol=0)
    torch.testing.assert_close(standard.std(0), torch.ones(12), atol=1e-3, rtol=0)


def test_the_folder_holds_no_table_of_users(toy):
    arrays = np.load(toy / "cf.npz")
    assert set(arrays) == {"item", "user_stats", "user_gram"}
    assert arrays["user_stats"].shape == (2, 12)
    assert arrays["user_gram"].shape == (12, 12)


def test_without_leaves_out_an_item_however_often_it_was_bought():
    item_cf = torch.randn(NUM_ITEMS, 4, generator=torch.Generator().manual_seed(0))
    solver = UserSolver(item_cf, CFSettings(dim=4, recency=1.0))
    found = solver.without(np.array([3, 5, 3, 7]), [0])
    torch.testing.assert_close(found, solver.of_histories([np.array([5, 7])]), atol=1e-5, rtol=1e-5)
