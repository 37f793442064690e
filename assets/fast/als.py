"""What makes ALS fast, and changes none of its results. What is solved for: assets/cf.py.

Rows of like length are solved side by side, short rows by a smaller system, and the prefixes of one
history share their sums. Tested against the definition in tests/test_moment.py and
tests/test_data.py.
"""

import numpy as np
import torch
import torch.nn.functional as F


def length_batches(rows, columns, num_rows, pad, budget=1 << 15, max_rows=512):
    """Interactions (nnz,), (nnz,) -> [(row numbers (R,), their columns (R, L))], rows of like
    length.

    Each row keeps its own order and is filled up with `pad`. A batch has at most `budget` entries
    (a single longer row apart), so that als_solve works in the processor's cache. Rows without
    interactions are left out.
    """
    lengths = torch.bincount(rows, minlength=num_rows)
    order = torch.argsort(lengths)  # row numbers, the shortest first
    begin = lengths.cumsum(0) - lengths  # where each row's columns begin, sorted by row
    columns = F.pad(columns[rows.argsort(stable=True)], (0, 1), value=pad).int()

    batches = []
    start = int((lengths == 0).sum())
    while start < num_rows:
        # How many of the next rows fit: the k-th would make all k as long as itself.
        longest = lengths[order[start : start + max_rows]]
        fits = int((longest * torch.arange(1, len(longest) + 1) <= budget).sum())
        some = order[start : start + max(1, fits)]

        # Their columns; past a row's end stands the padding, the last of all columns.
        offset = torch.arange(int(lengths[some[-1]]))
        inside = offset < lengths[some, None]
        place = torch.where(inside, begin[some, None] + offset, len(columns) - 1)
        batches.append((some, columns[place]))
        start += len(some)
    return batches


def solve_short_rows(Z, eigenvalues, w, settings, N):
    """cf.solve_rows for rows of L < E interactions, by an L x L system -> (R, E).

    Z (R, L, E): their y in the basis in which Y'Y is diagonal; w (R, L): their weights. By the
    push-through identity, with G = Y'Y + ridge and V = sqrt(w) y:

        x = (1 + alpha) * G^-1 V' (1 + alpha V G^-1 V')^-1 sqrt(w)
    """
    root = w.sqrt()
    V = Z * root[..., None]
    G = eigenvalues + settings.ridge(w.sum(1), N)[:, None]  # (R, E)
    V_over_G = V / G[:, None]
    K = torch.bmm(V, V_over_G.transpose(1, 2)).mul_(settings.alpha)  # (R, L, L)
    K.diagonal(dim1=1, dim2=2).add_(1)
    inner = torch.cholesky_solve(root[..., None], torch.linalg.cholesky(K))
    return (1 + settings.alpha) * (V_over_G * inner).sum(1)


def prefix_sums(Y, places, recency):
    """Sums over the items before each place (n,) of one history Y (H, E), for cf.solve_rows.

    -> S (n, E, E) of w y y', b (n, E) of w y, weight (n,) of w. From one place to the next the sums
    grow: S <- recency ** steps * S + sum of w y y'.
    """
    n, E = len(places), Y.shape[1]
    S, b, weight = np.zeros((E, E), np.float32), np.zeros(E, np.float32), 0.0
    all_S = np.empty((n, E, E), np.float32)
    all_b = np.empty((n, E), np.float32)
    all_weight = np.empty(n, np.float32)
    decay = (recency ** np.arange(len(Y) + 1)).astype(np.float32)  # of 0, 1, 2 ... steps
    now = 0
    for k in np.argsort(places, kind="stable"):
        if steps := int(places[k]) - now:
            new = Y[now : now + steps]
            weighted = new * decay[:steps][::-1, None]
            S = decay[steps] * S + weighted.T @ new
            b = decay[steps] * b + weighted.sum(0)
            weight = decay[steps] * weight + decay[:steps].sum()
            now += steps
        all_S[k], all_b[k], all_weight[k] = S, b, weight
    return torch.from_numpy(all_S), torch.from_numpy(all_b), torch.from_numpy(all_weight)
