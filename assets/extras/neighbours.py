"""Item-kNN, a reference of evaluate.py."""

from functools import lru_cache

import numpy as np
import torch

from assets.plumbing.cf import training_part


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
