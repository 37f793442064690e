"""The toy world: 120 movies and a law of choice that is known, so that the best recommender is too.

data.py draws the interactions, pretrain.py writes the toy LLM's corpus from the catalogue,
evaluate.py asks the oracle. The taste of a user moves while they watch: what was watched lately
tells more than what was watched long ago."""

import re

import numpy as np
import torch

TOY_ATTRIBUTES = {
    "genre": "comedy thriller romance western mystery fantasy".split(),
    "mood": "tense gentle gloomy playful".split(),
    "era": "fifties seventies nineties future".split(),
    "setting": "harbor desert village mountain island".split(),
    "director": [
        "Ada Stone",
        "Ben Okoro",
        "Carla Ruiz",
        "Dov Levin",
        "Elsa Lind",
        "Farid Khan",
        "Greta Wolf",
        "Hugo Sato",
    ],
}

# One word of its own for every title: a frozen LLM can only rank names that its head can tell
# apart (assets/docs/FINDINGS.md).
TOY_FIRST_WORDS = """
Amber Azure Bitter Blazing Borrowed Brass Broken Burning Candle Captive Cedar Cobalt Copper Coral
Crimson Crooked Crystal Dancing Distant Double Drifting Dusty Echo Electric Ember Emerald Empty
Endless Fading Falcon Feather Fearless Final First Flying Foggy Forgotten Frozen Gilded Glass
Golden Granite Green Hidden Hollow Honest Humble Hungry Icy Indigo Iron Ivory Jade Jagged Kindred
Lantern Last Lavender Lead Leaping Lonely Lost Lucky Lunar Marble Midnight Mirror Misty Mossy
Narrow Nimble Noble Northern Oaken Obsidian Olive Opal Open Orange Painted Paper Patient Pearl
Phantom Plain Polar Proud Purple Quiet Rapid Raven Restless Roaming Rolling Royal Ruby Rusty
Sacred Sapphire Scarlet Secret Seventh Shallow Shining Silent Silver Sleeping Solar Southern
Spiral Stolen Stormy Sudden Tangled Tender Thirsty Twisted Velvet Violet Wandering Wicked Winter
""".split()
TOY_SECOND_WORDS = """
Bridge Crown Letter River Garden Window Promise Road Orchard Signal Mask Clock Voyage Shadow Song
Tower Circle Harvest Stranger Key
""".split()

# What a matching trait adds to the log of a choice's probability. No text mentions the hidden one.
TOY_WEIGHTS = {
    "genre": 3.6,
    "mood": 2.2,
    "era": 1.8,
    "setting": 1.8,
    "director": 2.6,
    "hidden": 3.6,
}
TOY_HIDDEN = 4  # values of the hidden trait
TOY_FOLLOW = 1.5  # what the setting of the last movie adds, if a movie shares it
TOY_POPULARITY = 0.6  # standard deviation of what is the same for all users

# The drift was chosen before any ILM ran: .05 is in the middle of the values (.04 to .06, of eight
# from 0 to .1) at which, on each of five seeds, MF at the moment is .03 HR@10 or more above MF of
# the whole history, while MF as it was still has, on average, twice the HR@10 of popularity.
TOY_DRIFT = 0.05  # probability that a trait is drawn again, for each trait at each step


def toy_world(seed=0, num_items=120):
    """The catalogue and the laws of choice, a pure function of the seed; draws no interaction.

    A user has, at each moment, a *type*: one favourite value of every attribute and of the hidden
    trait. There are 15,360 types, numbered in the order of a grid with an axis for each trait.

        log p(next = i) = the weights of the traits that match + popularity_i
                          + TOY_FOLLOW if i shares the last movie's setting

    up to a constant, over the movies not yet watched. Returns {"items": the catalogue,
    "trait_sizes": (6,) lengths of the grid's axes, "taste": (types, I) exponential of the first
    line, "follow": (I, I) exponential of the second, row = the last movie}.
    """
    rng = np.random.default_rng([seed, 120])
    trait_sizes = [len(values) for values in TOY_ATTRIBUTES.values()] + [TOY_HIDDEN]

    # Every value of a trait belongs to equally many items. (I, traits)
    columns = [rng.permutation(np.arange(num_items) % size) for size in trait_sizes]
    codes = np.stack(columns, axis=1)

    # The catalogue: a title and a sentence of one of two forms for every item.
    first_words = rng.permutation(TOY_FIRST_WORDS)[:num_items]
    items = []
    for i in range(num_items):
        attributes = {}
        for code, (name, values) in zip(codes[i], TOY_ATTRIBUTES.items()):
            attributes[name] = values[code]
        items.append(
            {
                "id": f"{i + 1:03d}",
                "title": f"{first_words[i]} {rng.choice(TOY_SECOND_WORDS)}",
                "text": describe(attributes, starts_with_mood=i % 2 == 1),
                "attributes": attributes,
            }
        )

    # The laws of choice: types in the grid's order, the last trait changes fastest.
    types = np.indices(trait_sizes).reshape(len(trait_sizes), -1).T  # (types, traits)
    matches = types[:, None] == codes  # (types, I, traits)
    popularity = rng.normal(0, TOY_POPULARITY, num_items)
    utility = matches @ np.array(list(TOY_WEIGHTS.values())) + popularity
    setting = codes[:, list(TOY_ATTRIBUTES).index("setting")]
    same_setting = setting[:, None] == setting
    return {
        "items": items,
        "trait_sizes": np.array(trait_sizes),
        "taste": np.exp(utility).astype(np.float32),
        "follow": np.exp(TOY_FOLLOW * same_setting).astype(np.float32),
    }


def describe(attributes, starts_with_mood):
    """One sentence that names all the attributes of an item, in one of two orders."""
    if starts_with_mood:
        form = "A {mood} {genre} of the {era}, set in a {setting} and directed by {director}."
    else:
        form = (
            "{director} directed this {genre} with a {mood} mood, set in a {setting} in the {era}."
        )
    text = form.format(**attributes)
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)


def toy_interactions(world, num_users, seed, drift=TOY_DRIFT):
    """Every user watches 16 to 40 movies, none twice -> users, items, times, each (nnz,).

    Rows are in the order of time, not of users. Before each movie but the first, each trait of a
    user is drawn again with probability `drift`, from all its values, the present one included.
    """
    rng = np.random.default_rng([seed, 1000])
    sizes = world["trait_sizes"]
    num_items = len(world["items"])

    # Where the users start. The values of a trait are equally likely, now and after every drift.
    everyone = np.arange(num_users)
    lengths = rng.integers(16, 41, size=num_users)
    traits = rng.integers(sizes, size=(num_users, len(sizes)))
    watched = np.zeros((num_users, num_items), dtype=bool)
    follow = np.ones((num_users, num_items), dtype=np.float32)

    users, items, times = [], [], []
    for step in range(lengths.max()):
        # The traits drift.
        if step > 0:
            moves = rng.random(traits.shape) < drift
            traits = np.where(moves, rng.integers(sizes, size=traits.shape), traits)

        # A choice: the largest log weight + Gumbel noise is one draw from the softmax.
        types = np.ravel_multi_index(tuple(traits.T), sizes)
        log_weight = np.log(world["taste"][types] * follow)
        log_weight[watched] = -np.inf
        choice = (log_weight + rng.gumbel(size=log_weight.shape)).argmax(axis=1)
        watched[everyone, choice] = True
        follow = world["follow"][choice]

        # Only users whose time is not over write it down.
        present = np.flatnonzero(step < lengths)
        users.append(present)
        items.append(choice[present])
        times.append(np.full(len(present), step))

    item_ids = np.array([item["id"] for item in world["items"]])
    return np.concatenate(users), item_ids[np.concatenate(items)], np.concatenate(times)


def toy_files(world_seed, num_users, seed):
    """What readers.read_files gives of raw files: users, items, times, {item id: item}."""
    world = toy_world(world_seed)
    log = toy_interactions(world, num_users, seed)
    return *log, {item["id"]: item for item in world["items"]}


def mix_traits(belief, trait_sizes, drift):
    """What one drift makes of a belief over types. (U, types) -> (U, types), the same row sums.

    Each trait keeps its value with probability 1 - drift, else all its values are equally likely:
    along each axis of the grid, (1 - drift) * belief + drift * mean over the axis.
    """
    grid = belief.view(len(belief), *trait_sizes).clone()
    for axis in range(1, grid.ndim):
        grid.lerp_(grid.mean(axis, keepdim=True), drift)
    return grid.view(belief.shape)


def toy_oracle(world, histories, drift=TOY_DRIFT):
    """The Bayes-optimal recommender: p(next item | history), exact, over all ways a user can drift.

    List of U index arrays, none empty -> (U, I), rows sum to 1, zeros at watched items. This is
    the filter of a hidden Markov model. The belief, p(type now | history so far), takes in each
    item by Bayes' rule and then drifts, also after the last item:

        belief(type) <- mix_traits(belief(type) * taste(type, item) / normaliser(type))
        p(i) = sum over types of belief(type) * taste(type, i) * follow(last, i) / normaliser(type)

    where normaliser(type) is the sum of taste * follow over the unwatched movies.
    """
    taste = torch.from_numpy(world["taste"])
    follow = torch.from_numpy(world["follow"])
    num_types, num_items = taste.shape
    taste_of_item = taste.T.contiguous()  # (I, types)

    # Histories of different lengths, side by side.
    rows = [torch.as_tensor(history) for history in histories]
    lengths = torch.tensor([len(row) for row in rows])
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).long()

    # Before the first item all types are equally likely.
    belief = torch.full((len(rows), num_types), 1 / num_types)
    unwatched = torch.ones(len(rows), num_items)
    context = torch.ones(len(rows), num_items)  # follow * unwatched

    for step in range(int(lengths.max())):
        active = torch.nonzero(step < lengths)[:, 0]
        item = padded[active, step]

        # Bayes' rule. Rows sum to 1 again at every step, so that nothing runs out of float32.
        normaliser = context[active] @ taste_of_item
        updated = belief[active] * taste_of_item[item] / normaliser
        updated /= updated.sum(1, keepdim=True)
        belief[active] = mix_traits(updated, world["trait_sizes"], drift)

        # The item is watched now, and the next one follows it.
        unwatched[active, item] = 0
        context[active] = follow[item] * unwatched[active]

    return (belief / (context @ taste_of_item)) @ taste * context


def oracle(dataset, users, split):
    """A reference of evaluate.py: the toy world's Bayes-optimal recommender knows its laws, and of
    a user no more than we. users (B,) -> scores (B, I)."""
    world = toy_world(dataset.meta["world_seed"])
    numbers = np.array([int(item["id"]) - 1 for item in dataset.items])  # the world's own, (I,)
    histories = [numbers[dataset.items_of(u, split)] for u in users]
    return toy_oracle(world, histories)[:, numbers]
