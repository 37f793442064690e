"""References of evaluate.py: recommenders that need no LLM. Each is a function (dataset, users
(B,), split) -> scores (B, I), fitted on the training part."""

from functools import lru_cache, partial

import numpy as np
import torch

from assets.plumbing.cf import training_part
from assets.toy_world import oracle

# Like `mf` they know the history up to the moment; these weigh the last items more
AT_THE_MOMENT, PLUS_POPULARITY = "mf, at the moment", "mf, at the moment + popularity"

# ---- Scores --------------------------------------------------------------------------------------


@lru_cache(1)
def purchase_matrix(dataset):
    """Who chose what in the training part, (U, I), sparse, of zeros and ones."""
    users = np.repeat(np.arange(len(dataset.users)), np.diff(dataset.indptr))
    pairs = np.stack([users, dataset.sequence])[:, training_part(dataset.indptr)]
    shape = len(dataset.users), len(dataset.items)
    ones = torch.ones(pairs.shape[1])
    # Torch 2.11 warns where nobody has said whether sparse tensors shall be checked
    torch.sparse.check_sparse_tensor_invariants.disable()
    times = torch.sparse_coo_tensor(pairs, ones, shape)
    return times.coalesce().bool().float()  # a repeated purchase counts once


def item_knn(dataset, users, split):
    """Sum over the history of the cosine between item columns (co-occurrence / sqrt of counts)."""
    history = torch.zeros(len(dataset.items), len(users))
    for column, u in enumerate(users):
        history[dataset.items_of(u, split), column] = 1

    matrix = purchase_matrix(dataset)
    count = matrix.sum(0).to_dense()[:, None]
    norm = count.clamp(min=1).sqrt()
    scores = matrix.t() @ (matrix @ (history / norm)) / norm
    return (scores - history * count / norm**2).T  # an item is not its own neighbour


def popularity(dataset, users, split):
    """How often each item was chosen."""
    return dataset.purchases.expand(len(users), -1)


def mf_at_the_moment(dataset, users, split):
    """Matrix factorisation: the dot product of the vectors that, standardised, encoders read."""
    return dataset.vectors_at(users, split) @ dataset.raw_cf.T


def mf(dataset, users, split):
    """The user folded in from the same history, but all items of it weigh the same. E and ridge are
    those that were chosen for users at a moment."""
    if dataset.raw_user_cf is not None:  # another engine's users, the same at every moment
        return mf_at_the_moment(dataset, users, split)
    histories = [dataset.items_of(u, split) for u in users]
    return dataset.solver.still().of_histories(histories) @ dataset.raw_cf.T


def mf_plus_popularity(dataset, users, split, weight):
    """MF at the moment + weight * log(1 + purchases)."""
    return mf_at_the_moment(dataset, users, split) + weight * dataset.purchases.log1p()


# ---- What there is, and what retention is measured against ---------------------------------------


@lru_cache(1)
def popularity_weight(dataset, weights=(0.0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3)):
    """How much of log(1 + purchases) helps MF at the moment: by NDCG@10 on validation."""
    from evaluate import evaluate_on_validation

    found = []
    for weight in weights:
        score = partial(mf_plus_popularity, dataset, weight=weight)
        found.append(evaluate_on_validation(score, dataset, False)["NDCG@10"])
    return weights[int(np.argmax(found))]


def reference_scores(dataset):
    """{name: score function, users (B,), split -> (B, I)} of what this data set can have."""
    found = {"popularity": popularity, "item-knn": item_knn, "mf": mf}
    if dataset.raw_user_cf is None:
        if dataset.solver.recency < 1:  # else it is mf
            found[AT_THE_MOMENT] = mf_at_the_moment
        found[PLUS_POPULARITY] = partial(mf_plus_popularity, weight=popularity_weight(dataset))
    if dataset.meta["dataset"] == "toy":
        found["oracle"] = oracle
    return {name: partial(score, dataset) for name, score in found.items()}


def yardstick(dataset):
    """What retention is measured against: the form of MF at the moment that is better on
    validation."""
    if dataset.raw_user_cf is not None:
        return "mf"
    # With recency 1 there is no row AT_THE_MOMENT
    better = popularity_weight(dataset) > 0 or dataset.solver.recency == 1
    return PLUS_POPULARITY if better else AT_THE_MOMENT
