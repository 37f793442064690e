"""The toy world: a catalogue of 120 movies and a law of choice that is known, so that the best possible recommender is known too.

data.py draws the interactions, pretrain.py writes the toy LLM's corpus from the catalogue, evaluate.py asks the oracle."""
import re

import numpy as np
import torch

TOY_ATTRIBUTES = {
    "genre": "comedy thriller romance western mystery fantasy".split(), "mood": "tense gentle gloomy playful".split(),
    "era": "fifties seventies nineties future".split(), "setting": "harbor desert village mountain island".split(),
    "director": ["Ada Stone", "Ben Okoro", "Carla Ruiz", "Dov Levin", "Elsa Lind", "Farid Khan", "Greta Wolf", "Hugo Sato"],
}
# One word of its own for every title: a frozen LLM can only rank names that its head can tell apart (see README, read-out ceiling).
TOY_FIRST_WORDS = """Amber Azure Bitter Blazing Borrowed Brass Broken Burning Candle Captive Cedar Cobalt Copper Coral Crimson Crooked
Crystal Dancing Distant Double Drifting Dusty Echo Electric Ember Emerald Empty Endless Fading Falcon Feather Fearless Final First Flying
Foggy Forgotten Frozen Gilded Glass Golden Granite Green Hidden Hollow Honest Humble Hungry Icy Indigo Iron Ivory Jade Jagged Kindred
Lantern Last Lavender Lead Leaping Lonely Lost Lucky Lunar Marble Midnight Mirror Misty Mossy Narrow Nimble Noble Northern Oaken Obsidian
Olive Opal Open Orange Painted Paper Patient Pearl Phantom Plain Polar Proud Purple Quiet Rapid Raven Restless Roaming Rolling Royal Ruby
Rusty Sacred Sapphire Scarlet Secret Seventh Shallow Shining Silent Silver Sleeping Solar Southern Spiral Stolen Stormy Sudden Tangled
Tender Thirsty Twisted Velvet Violet Wandering Wicked Winter""".split()
TOY_SECOND_WORDS = ("Bridge Crown Letter River Garden Window Promise Road Orchard Signal Mask Clock Voyage Shadow Song Tower Circle "
                    "Harvest Stranger Key").split()
TOY_WEIGHTS = {"genre": 3.6, "mood": 2.2, "era": 1.8, "setting": 1.8, "director": 2.6, "hidden": 3.6}  # in nats of preference
TOY_HIDDEN, TOY_FOLLOW, TOY_POPULARITY = 4, 1.5, 0.6


def toy_world(seed=0, num_items=120):
    """The catalogue and the laws of choice, a pure function of the world seed; no interaction is drawn here.

    A user is a *type*: one favourite value of every attribute, the hidden trait included, which no text mentions.
    log p(next = i) = sum of the weights of matching attributes + popularity_i + TOY_FOLLOW if i shares the last movie's setting,
    over the movies not yet watched. `taste` (types, I) holds the exponential of the first two terms.
    """
    rng = np.random.default_rng([seed, 120])
    sizes = [len(v) for v in TOY_ATTRIBUTES.values()] + [TOY_HIDDEN]
    codes = np.stack([rng.permutation(np.arange(num_items) % n) for n in sizes], 1)           # (I, A), balanced
    words, items = rng.permutation(TOY_FIRST_WORDS)[:num_items], []
    for i in range(num_items):
        a = {name: values[codes[i, k]] for k, (name, values) in enumerate(TOY_ATTRIBUTES.items())}
        text = (f"A {a['mood']} {a['genre']} of the {a['era']}, set in a {a['setting']} and directed by {a['director']}." if i % 2 else
                f"{a['director']} directed this {a['genre']} with a {a['mood']} mood, set in a {a['setting']} in the {a['era']}.")
        items.append({"id": f"{i + 1:03d}", "title": f"{words[i]} {rng.choice(TOY_SECOND_WORDS)}",
                      "text": re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text), "attributes": a})
    types = np.stack(np.meshgrid(*map(np.arange, sizes), indexing="ij"), -1).reshape(-1, len(sizes))
    matches = types[:, None] == codes                                                         # (types, I, A)
    utility = matches @ np.array(list(TOY_WEIGHTS.values())) + rng.normal(0, TOY_POPULARITY, num_items)
    setting = codes[:, list(TOY_ATTRIBUTES).index("setting"), None]
    follow = np.exp(TOY_FOLLOW * (setting == setting.T))
    return {"items": items, "taste": np.exp(utility).astype(np.float32), "follow": follow.astype(np.float32)}


def toy_interactions(world, num_users, seed):
    """Every user watches 16 to 40 movies, none twice -> users, items, times."""
    rng, taste, follow = np.random.default_rng([seed, 1000]), world["taste"], world["follow"]
    kind, length = rng.integers(len(taste), size=num_users), rng.integers(16, 41, size=num_users)
    weight, last, rows = taste[kind].copy(), None, []
    for step in range(length.max()):
        now = weight if last is None else weight * follow[last]
        last = (np.log(np.maximum(now, 1e-30)) + rng.gumbel(size=now.shape)).argmax(1)         # Gumbel-max = one softmax draw
        weight[np.arange(num_users), last] = 0
        rows += [(u, world["items"][last[u]]["id"], step) for u in np.flatnonzero(step < length)]
    return tuple(np.array(column) for column in zip(*rows))


def toy_oracle(world, histories):
    """The Bayes-optimal recommender: p(next item | history), exact, over all user types. List of index arrays -> (U, I).

    posterior(type) is the product over the history of taste / (normaliser over unwatched movies), and
    p(i) = sum_type posterior(type) taste(type, i) follow(last, i) / normaliser(type).
    """
    taste, follow = torch.from_numpy(world["taste"]), torch.from_numpy(world["follow"])
    rows, lengths = torch.arange(len(histories)), torch.tensor([len(h) for h in histories])
    padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(h) for h in histories], batch_first=True)
    log_posterior = torch.zeros(len(histories), len(taste))
    context = torch.ones(len(histories), taste.shape[1])                                        # follow * unwatched, (U, I)
    unwatched = torch.ones_like(context)
    for step, item in enumerate(padded.T):
        active = (step < lengths).float()[:, None]
        log_posterior += active * (taste[:, item].T.log() - (context @ taste.T).log())
        unwatched[rows, item] *= 1 - active[:, 0]
        context = torch.where(active > 0, follow[item] * unwatched, context)
    return (log_posterior.softmax(1) / (context @ taste.T)) @ taste * context
