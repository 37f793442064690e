"""Which CF settings? Tried on validation by MF itself, before any LLM is in sight; never on test.

MF scores an item by the dot product of its vector and the user's at the moment before the validation item. Settings within one standard
error of the best count as equal, and the smallest E among them wins: encoders and LLM have to read every number."""

import time
from dataclasses import replace

import numpy as np
import torch

from assets.cf import CFSettings, UserSolver, train_cf
from data import training_moments, training_part

RECENCIES = (1.0, 0.98, 0.95, 0.9, 0.8, 0.7, 0.5, 0.35)
WIDTHS = (24, 64, 128)
RIDGES = ((1.0, 0.0), (0.003, 0.3), (0.003, 0.03), (0.003, 0.01))  # reg, a0
MAX_USERS, MAX_INTERACTIONS, ITERATIONS = 2_000, 1_000_000, 8


def ndcg_at_10(scores, targets, histories):
    """NDCG@10 of each user (B,). Items of the history are taken out, the target never; ties count against it."""
    own = scores.gather(1, targets[:, None])
    rows = torch.repeat_interleave(torch.tensor([len(h) for h in histories], dtype=torch.long))
    columns = torch.from_numpy(
        np.concatenate([np.zeros(0, dtype=np.int64), *histories]).astype(np.int64)
    )
    scores[rows, columns] = -torch.inf
    rank = 1 + (scores >= own).sum(1) - (scores.gather(1, targets[:, None]) >= own)[:, 0].long()
    return torch.where(rank <= 10, 1 / torch.log2(rank + 1.0), torch.zeros(()))


def some_users(users, items, limit, seed):
    """Interactions (nnz,) of whole users drawn at random, up to `limit` of them in all."""
    if len(users) <= limit:
        return users, items
    counts = np.bincount(users)
    order = np.random.default_rng([seed, 11]).permutation(len(counts))
    kept = np.zeros(len(counts), dtype=bool)
    kept[order[counts[order].cumsum() <= limit]] = True
    return users[kept[users]], items[kept[users]]


def candidates(args, num_items):
    """All settings to try; what a flag fixes has one value."""
    fitting = (
        tuple(width for width in WIDTHS if width <= num_items // 2) or WIDTHS[:1]
    )  # of 120 items none needs 64
    widths = (args.cf_dim,) if args.cf_dim else fitting
    ridges = ((args.reg, args.a0 or 0.0),) if args.reg is not None else RIDGES
    recencies = (args.recency,) if args.recency else RECENCIES
    return widths, ridges, recencies


def choose_cf(users, items, indptr, num_items, args, item_cf=None):
    """-> CFSettings and {"valid_NDCG@10", "se", "train_NDCG@10"}; prints the best of each E. users, items (nnz,): all interactions, by
    user and time. item_cf (I, E): vectors of another engine; then alpha and the ridge are those of folding in alone."""
    began, train = time.time(), training_part(indptr)
    widths, ridges, recencies = candidates(args, num_items)
    if item_cf is not None:
        widths = (item_cf.shape[1],)
    alphas = (2.0,) if item_cf is None else (0.5, 2.0, 8.0)
    eligible = np.flatnonzero(np.diff(indptr) >= 3)
    people = np.sort(np.random.default_rng([args.seed, 5]).permutation(eligible)[:MAX_USERS])
    first = CFSettings(widths[0], alphas[0], *ridges[0], recencies[0])
    if not len(people):
        return first, {}
    histories = [items[indptr[u] : indptr[u + 1] - 2] for u in people]
    targets = torch.from_numpy(items[indptr[people + 1] - 2].astype(np.int64))
    some = some_users(users[train], items[train], MAX_INTERACTIONS, args.seed)

    # NDCG@10 of every user: all recencies with the first ridge, with the others the best one and its neighbours
    found, kept = {}, {}
    for width in widths:
        best_place = None
        for reg, a0 in ridges:
            trained = CFSettings(width, alphas[0], reg, a0)
            vectors = (
                item_cf
                if item_cf is not None
                else train_cf(*some, len(indptr) - 1, num_items, trained, ITERATIONS, args.seed)
            )
            kept[width, reg, a0] = vectors
            near = (
                recencies
                if best_place is None
                else recencies[max(0, best_place - 1) : best_place + 2]
            )
            tried = [
                replace(trained, alpha=alpha, recency=recency)
                for alpha in alphas
                for recency in near
            ]
            for settings in tried:
                at = UserSolver(vectors, settings).of_histories(histories)
                found[settings] = ndcg_at_10(at @ vectors.T, targets, histories)
            if best_place is None:
                best_place = recencies.index(
                    max(tried, key=lambda settings: found[settings].mean()).recency
                )

    # The best, and the smallest E that is not told apart from it
    mean = {settings: value.mean().item() for settings, value in found.items()}
    best = max(mean, key=mean.get)
    error = (found[best].std() / len(people) ** 0.5).item() if len(people) > 1 else 0.0
    equal = min(s.dim for s in mean if mean[s] >= mean[best] - error)
    chosen = max((s for s in mean if s.dim == equal), key=mean.get)

    # How far training moments are from validation's: their vectors do not know the target, the item vectors do
    moments = training_moments(indptr, MAX_USERS)
    pasts = []
    for u, place in zip(*moments):
        whole = items[indptr[u] : indptr[u + 1] - 2]
        others = whole[whole != whole[place]]
        pasts.append(whole[:place] if chosen.recency < 1 else others)
    at_train = torch.from_numpy(items[indptr[moments[0]] + moments[1]].astype(np.int64))
    vectors = kept[chosen.dim, chosen.reg, chosen.a0]
    seen = (
        ndcg_at_10(UserSolver(vectors, chosen).of_histories(pasts) @ vectors.T, at_train, pasts)
        .mean()
        .item()
    )

    print(
        f"CF by NDCG@10 of MF at the moment, {len(people):,} validation users (s.e. {error:.4f}):"
    )
    for width in widths:
        top = max((s for s in mean if s.dim == width), key=mean.get)
        still = max(
            (s for s in mean if s.dim == width and s.recency == max(recencies)), key=mean.get
        )
        said = "   <- chosen" if top == chosen else ""
        print(
            f"  E {width:4}   recency {still.recency:4.2f}: {mean[still]:.4f}   best: {mean[top]:.4f} with recency {top.recency:4.2f}, "
            f"reg {top.reg:g}, a0 {top.a0:g}"
            + (f", alpha {top.alpha:g}" if len(alphas) > 1 else "")
            + said
        )
    print(
        f"  at training moments {seen:.4f} (the item vectors know those targets); {time.time() - began:.0f} s"
    )
    return chosen, {
        "valid_NDCG@10": round(mean[chosen], 5),
        "se": round(error, 5),
        "train_NDCG@10": round(seen, 5),
    }
