"""Which CF settings? Tried on validation by MF itself, before any LLM is in sight; never on test.

MF scores an item by the dot product of its vector and the user's at the moment before the
validation item. Settings within one standard error of the best count as equal, and the smallest E
among them wins: encoders and LLM have to read every number.
"""

import time
from dataclasses import replace

import numpy as np
import torch

from assets.plumbing.cf import CFSettings, UserSolver, train_cf, training_moments, training_pairs

RECENCIES = (1.0, 0.98, 0.95, 0.9, 0.8, 0.7, 0.5, 0.35)
WIDTHS = (24, 64, 128)
RIDGES = ((1.0, 0.0), (0.003, 0.3), (0.003, 0.03), (0.003, 0.01))  # reg, a0
MAX_USERS, MAX_INTERACTIONS, ITERATIONS = 2_000, 1_000_000, 8


def ndcg_at_10(scores, targets, histories):
    """NDCG@10 of each user (B,) by scores (B, I) and targets (B,); changes the scores.

    Items of the history are taken out, the target never; ties count against it.
    """
    target_score = scores.gather(1, targets[:, None])
    lengths = torch.tensor([len(h) for h in histories], dtype=torch.long)
    columns = np.concatenate([np.zeros(0, dtype=np.int64), *histories]).astype(np.int64)
    scores[torch.repeat_interleave(lengths), torch.from_numpy(columns)] = -torch.inf
    itself = scores.gather(1, targets[:, None]) >= target_score  # False where it was taken out
    rank = 1 + (scores >= target_score).sum(1) - itself[:, 0].long()
    return torch.where(rank <= 10, 1 / torch.log2(rank + 1.0), torch.zeros(()))


def ndcg_of_mf(vectors, settings, histories, targets):
    """The same of MF: users are folded in from their histories, with item vectors (I, E)."""
    users = UserSolver(vectors, settings).of_histories(histories)
    return ndcg_at_10(users @ vectors.T, targets, histories)


def some_users(users, items, limit, seed):
    """Interactions (nnz,) of whole users drawn at random, up to `limit` of them in all."""
    if len(users) <= limit:
        return users, items
    counts = np.bincount(users)
    order = np.random.default_rng([seed, 11]).permutation(len(counts))
    kept = np.zeros(len(counts), dtype=bool)
    kept[order[counts[order].cumsum() <= limit]] = True
    return users[kept[users]], items[kept[users]]


def candidates(num_items, dim=None, recency=None, reg=None, a0=None):
    """All widths, ridges and recencies to try; what is given has one value."""
    fitting = tuple(width for width in WIDTHS if width <= num_items // 2)  # of 120 none needs 64
    widths = (dim,) if dim else fitting or WIDTHS[:1]
    ridges = RIDGES if reg is None else ((reg, a0 or 0.0),)
    return widths, ridges, (recency,) if recency else RECENCIES


def choose_cf(indptr, items, num_items, fixed=None, seed=0, item_cf=None):
    """-> CFSettings and {"valid_NDCG@10", "se", "train_NDCG@10"}; prints the best of each E.

    indptr (U + 1,), items (nnz,): all sequences. fixed: what candidates() need not try. item_cf
    (I, E): vectors of another engine; alpha and the ridge are then those of folding in alone.
    """
    began = time.time()
    widths, ridges, recencies = candidates(num_items, **fixed or {})
    alphas = (2.0,)
    if item_cf is not None:
        widths, alphas = (item_cf.shape[1],), (0.5, 2.0, 8.0)

    # Validation: what stood before an item, and the item.
    eligible = np.flatnonzero(np.diff(indptr) >= 3)
    people = np.sort(np.random.default_rng([seed, 5]).permutation(eligible)[:MAX_USERS])
    if not len(people):
        return CFSettings(widths[0], alphas[0], *ridges[0], recencies[0]), {}
    histories = [items[indptr[u] : indptr[u + 1] - 2] for u in people]
    targets = torch.from_numpy(items[indptr[people + 1] - 2].astype(np.int64))
    pairs = training_pairs(indptr, items)
    total = len(pairs[0])
    pairs = some_users(*pairs, max(MAX_INTERACTIONS, 20 * num_items), seed)

    # NDCG@10 of all these users: with the first ridge at all recencies, with the others at the best
    # one and its neighbours.
    found, kept = {}, {}
    for width in widths:
        near = recencies
        for reg, a0 in ridges:
            trained = CFSettings(width, alphas[0], reg, a0)
            vectors = item_cf
            if vectors is None:
                vectors = train_cf(*pairs, len(indptr) - 1, num_items, trained, ITERATIONS, seed)
            kept[width, reg, a0] = vectors
            tried = [replace(trained, alpha=a, recency=r) for a in alphas for r in near]
            for settings in tried:
                found[settings] = ndcg_of_mf(vectors, settings, histories, targets)
            if (reg, a0) == ridges[0]:
                best = max(tried, key=lambda settings: found[settings].mean())
                place = recencies.index(best.recency)
                near = recencies[max(0, place - 1) : place + 2]

    # The best, and the smallest E that is not told apart from it.
    mean = {settings: value.mean().item() for settings, value in found.items()}
    best = max(mean, key=mean.get)
    error = (found[best].std() / len(people) ** 0.5).item() if len(people) > 1 else 0.0
    equal = min(s.dim for s in mean if mean[s] >= mean[best] - error)
    chosen = max((s for s in mean if s.dim == equal), key=mean.get)

    seen = at_training_moments(indptr, items, kept[chosen.dim, chosen.reg, chosen.a0], chosen)
    print(
        f"CF by NDCG@10 of MF at the moment, {len(people):,} validation users (s.e. {error:.4f}):"
    )
    if len(pairs[0]) < total:
        print(f"  (items' vectors here from {len(pairs[0]):,} of {total:,} interactions)")
    print_choice(mean, chosen, several_alphas=len(alphas) > 1)
    seconds = f"{time.time() - began:.0f} s"
    print(f"  at training moments {seen:.4f} (the item vectors know those targets); {seconds}")
    measured = {"valid_NDCG@10": mean[chosen], "se": error, "train_NDCG@10": seen}
    return chosen, {name: round(value, 5) for name, value in measured.items()}


def at_training_moments(indptr, items, vectors, settings):
    """MF's NDCG@10 at training moments, to be held beside validation's: a user's vector does not
    know the target, the item vectors do."""
    users, places = training_moments(indptr, MAX_USERS)
    if not len(users):  # nobody has two training items
        return 0.0
    targets = items[indptr[users] + places].astype(np.int64)
    pasts = []
    for u, place in zip(users, places):
        history = items[indptr[u] : indptr[u + 1] - 2]
        others = history[history != history[place]]
        pasts.append(history[:place] if settings.recency < 1 else others)
    return ndcg_of_mf(vectors, settings, pasts, torch.from_numpy(targets)).mean().item()


def print_choice(mean, chosen, several_alphas):
    """A line for each E: how it is where order does not matter, and its best. mean {settings:
    NDCG}."""
    largest = max(s.recency for s in mean)
    for width in sorted({s.dim for s in mean}):
        top = max((s for s in mean if s.dim == width), key=mean.get)
        still = [s for s in mean if s.dim == width and s.recency == largest]
        still = max(still, key=mean.get)
        alpha = f", alpha {top.alpha:g}" if several_alphas else ""
        print(
            f"  E {width:4}   recency {still.recency:4.2f}: {mean[still]:.4f}"
            f"   best: {mean[top]:.4f} with recency {top.recency:4.2f}, "
            f"reg {top.reg:g}, a0 {top.a0:g}{alpha}{'   <- chosen' if top == chosen else ''}"
        )
