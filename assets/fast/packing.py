"""Packed rows: several examples that share beginnings in one sequence, and what the CPU works out
of a batch before the device has it. The loss is that of the examples one by one
(tests/test_packing.py).

First the ids of soft tokens, which the definition in ilm.py has too."""

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from assets.fast.attention import cut_in_pieces, in_pieces, packed_attention
from assets.plumbing.trie import index_targets

SOFT_BASE = 1 << 24  # more than any vocabulary has


class Prompt(list):
    """Token ids, and the vectors of those mentioned who are not in the catalogue: (E',) of a user,
    (E,) of a mixture (a weighted sum of items that somebody typed in a conversation).

    A soft token's id is above every vocabulary: SOFT_BASE + entity * Q + q is the q-th of an
    entity. Entity i < I is item i, entity I + n is vectors[n]. So a user is nothing that the model
    knows: their vector travels along. It is counted within its prompt, then its row, then its
    batch: pack, collate and index_prompts renumber it each time."""

    def __init__(self, ids=(), vectors=()):
        super().__init__(ids)
        self.vectors = list(vectors)


# ---- Several examples in one row -----------------------------------------------------------------


def shifted(ids, count, num_items, Q):
    """Ids of a prompt whose vectors come after `count` others: entity I + n becomes I + n +
    count."""
    first = SOFT_BASE + num_items * Q
    return [i + count * Q if i >= first else i for i in ids]


def item_ends(ids, num_items, Q):
    """Where the soft tokens of each item in a prompt's ids end. Soft tokens split a text, so that
    what stands before has the same tokens whatever follows: prefixes of a history can be cut from
    the longest prompt, which is tokenised once (tests/test_train_stage2.py)."""
    first_user, last = SOFT_BASE + num_items * Q, Q - 1
    soft = [(place, i - SOFT_BASE) for place, i in enumerate(ids) if SOFT_BASE <= i < first_user]
    return [place + 1 for place, slot in soft if slot % Q == last]


def pack(examples, num_items=0, Q=1):
    """Examples (prompt, target ids[, trie nodes]) that share beginnings -> one row: a trunk, which
    is the longest prompt but for its end, and a branch for each example, standing where it leaves
    the trunk.

        prompts  "So far: A. Next for u:", "So far: A, B. Next for u:", "So far: A, B, C. Next ..."
        row      A [. u: B] B [. u: C] C . [u: D]
        branch   0  1 1  1  0  2 2  2  0 0  3  3

    A token sees what stands before it in the trunk and in its own branch (packed_attention): [. u:
    C] sees A B. Twenty prefixes of a history have 2.3 times the tokens of the longest, one by one
    11 times (toy world). A branch repeats its prompt's last token, since that is the one that
    predicts the target.

    num_items, Q: of the model. Returns a dict of lists: cf (the vectors of users), ids, position
    (in the token's own prompt), branch (0 = trunk, n = the n-th example), label, node (of the trie,
    among whose children a token of a name is chosen; -1: the whole vocabulary, or no target)."""
    # The vectors of all prompts, one after the other
    cf, prompts = [], []
    for prompt, *_ in examples:
        prompts.append(shifted(prompt, len(cf), num_items, Q))
        cf += getattr(prompt, "vectors", [])

    # How many tokens of the longest prompt each begins with, its own last one aside
    longest, shared = max(prompts[::-1], key=len), []
    for prompt in prompts:
        common = next((k for k, (a, b) in enumerate(zip(prompt, longest)) if a != b), len(prompt))
        shared.append(min(common, len(prompt) - 1))

    row = {"cf": cf, "ids": [], "position": [], "branch": [], "label": [], "node": []}

    def add(branch, first, ids, label=(), node=()):
        """Tokens, from position `first` on; label and node are of the last of them."""
        row["ids"] += ids
        row["position"] += range(first, first + len(ids))
        row["branch"] += [branch] * len(ids)
        row["label"] += [-100] * (len(ids) - len(label)) + [*label]
        row["node"] += [-1] * (len(ids) - len(node)) + [*node]

    done = 0
    for k in np.argsort(shared, kind="stable"):
        n, target, *node = shared[k], *examples[k][1:]
        add(0, done, longest[done:n])
        add(int(k) + 1, n, (prompts[k][n:] + target)[:-1], target, *node)
        done = n
    return row


def tokens_read(row, packs=True):
    """How many tokens an LLM reads of a packed row: all of them once, or, one by one, each branch
    behind its part of the trunk and as long as the longest."""
    if packs:
        return len(row["ids"])
    branch = np.asarray(row["branch"])
    lengths = (np.bincount(branch)[branch] + (branch == 0).cumsum())[branch > 0]
    return int(lengths.max() * branch.max())


def of_like_length(rows, tokens, packs=True):
    """Packed rows, the longest first, in lists of which an LLM reads at most `tokens` tokens with
    their padding (or of one row). A loss is a sum over rows: so cut, it is the same with less
    padding and memory. packs: can the LLM be packed?"""
    rows = sorted(rows, key=lambda row: -tokens_read(row, packs))
    while rows:
        count = max(1, tokens // tokens_read(rows[0], packs))
        yield rows[:count]
        rows = rows[count:]


def collate(rows, num_items=0, Q=1):
    """Pad packed rows on the right -> dict of (B, L) tensors; padding is a branch of its own (-1),
    without labels. "cf" is the list of all rows' vectors, one row after the other."""
    padding = {"ids": 0, "position": 0, "branch": -1, "label": -100, "node": -1}
    shape = len(rows), max(len(row["ids"]) for row in rows)
    arrays = {key: np.full(shape, pad) for key, pad in padding.items()}
    first, cf = SOFT_BASE + num_items * Q, []
    for r, row in enumerate(rows):
        for key in padding:
            arrays[key][r, : len(row[key])] = row[key]
        ids = arrays["ids"][r]
        ids[ids >= first] += len(cf) * Q
        cf += row["cf"]
    return {**{key: torch.from_numpy(array) for key, array in arrays.items()}, "cf": cf}


# ---- What an LLM makes of them -------------------------------------------------------------------


def unpacked(batch):
    """Yield every branch of packed rows, as they stand, as an example of its own: where its prompt
    stands in the rows, laid end to end (P,), and its target ids (T,)."""
    L = batch["ids"].shape[1]
    for row, (branch, label) in enumerate(zip(batch["branch"], batch["label"])):
        trunk = (branch == 0).nonzero()[:, 0]
        for number in branch[branch > 0].unique_consecutive():
            own = (branch == number).nonzero()[:, 0]
            first = int((label[own] >= 0).nonzero()[0, 0])  # stands at the prompt's last token
            prompt = torch.cat([trunk[trunk < own[0]], own[: first + 1]])
            yield row * L + prompt, label[own[first:]]


def target_states(llm, embeddings, batch):
    """Embeddings (B, L, hidden) of an indexed batch of packed rows -> the last hidden states (T,
    hidden) that predict its targets. An LLM that cannot be packed reads the examples one by one, by
    the definition: a prompt's soft tokens are the same wherever they stand."""
    flat = embeddings.flatten(0, 1)
    if llm.packs:
        fast = llm.in_pieces and "pieces" in batch
        mask = in_pieces(batch) if fast else packed_attention(batch["branch"])
        hidden = llm.body(embeddings, mask, batch["position"])
        return hidden.flatten(0, 1).index_select(0, batch["target_at"])
    places, targets = zip(*unpacked(batch))
    place = pad_sequence(places, True, -1, llm.side)
    kept = llm.read(flat[place.clamp(min=0)], place >= 0)
    return llm.states(kept, targets)


# ---- What a batch is to the device, worked out on the CPU, so that the device is never asked -----


def index(batch, trie, num_items, Q):
    """All that ILM.forward has to know of a collated batch: its soft tokens and its targets."""
    batch = dict(batch)
    cf, label = batch.pop("cf"), batch["label"].flatten()
    target = (label >= 0).nonzero()[:, 0]
    targets = index_targets(trie, label[target], batch["node"].flatten()[target])
    batch |= {"target_at": target} | targets | cut_in_pieces(batch["branch"])
    return batch | soft_index(batch["ids"], cf, num_items, Q)


def soft_index(ids, cf, num_items, Q):
    """Where the soft tokens of ids (B, L) stand and what they are. cf: of entities I, I + 1, ...
    (E',) for a user, (E,) for a mixture, which is filled up with zeros -> a dict of tensors, empty
    where there is no soft token."""
    flat = ids.flatten()
    place = (flat >= SOFT_BASE).nonzero()[:, 0]
    if not len(place):
        return {}

    # Each entity is encoded once, however often it occurs; users come last, since unique sorts
    slot = flat[place] - SOFT_BASE
    entity, inverse = torch.unique(slot // Q, return_inverse=True)
    users = (entity[entity >= num_items] - num_items).tolist()
    return {
        "soft_place": place,
        "soft_token": inverse * Q + slot % Q,
        "soft_item": entity[entity < num_items],
        "soft_cf": pad_sequence([cf[n] for n in users], True) if users else torch.zeros(0, 0),
    }


def index_prompts(prompts, side, num_items, Q):
    """Prompts -> their ids and mask (B, L), padded on one side, and their soft tokens."""
    rows, cf = [], []
    for prompt in prompts:
        rows.append(torch.tensor(shifted(prompt, len(cf), num_items, Q)))
        cf += getattr(prompt, "vectors", [])
    ids = pad_sequence(rows, True, 0, side)
    mask = pad_sequence([torch.ones_like(row) for row in rows], True, 0, side)
    return {"ids": ids, "mask": mask} | soft_index(ids, cf, num_items, Q)
