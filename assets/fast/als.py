"""What makes ALS fast, and changes none of its results. What is solved for: assets/plumbing/cf.py.

Rows of like length are solved side by side, short rows by a smaller system, and the prefixes of one
history all at once. Tested against the definition in tests/test_moment.py and
tests/test_data.py.
"""

import math

import torch
import torch.nn.functional as F


def length_batches(rows, columns, num_rows, pad, budget=1 << 13, max_rows=512):
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


def solve_prefixes(Y, places, solver, tolerance=1e-6):
    """Vectors (n, E) from the items before each place (n,) of one history Y (H, E), at once.

    Conjugate gradients on n systems that share their items, so that one product serves all of them
    and no sum (n, E, E) is built: 5 times as fast as solving for each at E = 128. The gradient is
    seen in the basis of Y'Y of all items, where 4 or 5 steps reach `tolerance` of the first one.
    """
    settings, N = solver.settings, len(solver.item_cf)
    eigenvalues, basis = solver.axes

    # An item weighs recency ** age; those that weigh nothing for every place are left out
    steps = math.ceil(math.log(1e-8) / math.log(solver.recency)) if solver.recency < 1 else len(Y)
    first = max(0, min(places) - 1 - steps)
    Y = Y[first : max(places)]
    age = torch.as_tensor(places)[:, None] - 1 - torch.arange(first, max(places))
    w = torch.where(age >= 0, solver.recency ** age.clamp(min=0).float(), 0.0)  # (n, H)
    ridge = settings.ridge(w.sum(1), N)[:, None]

    def times_A(x):
        return x @ solver.gram + ridge * x + settings.alpha * (w * (x @ Y.T)) @ Y

    def scaled(residual):
        return residual @ basis / (eigenvalues + ridge) @ basis.T

    x = torch.zeros(len(w), Y.shape[1])
    residual = (1 + settings.alpha) * w @ Y
    direction = gradient = scaled(residual)
    size = first_size = (residual * gradient).sum(1, keepdim=True)  # of the error, squared
    for _ in range(Y.shape[1]):
        if (size <= tolerance**2 * first_size).all():
            break
        A_direction = times_A(direction)
        step = size / (direction * A_direction).sum(1, keepdim=True).clamp(min=1e-30)
        x = x + step * direction
        residual = residual - step * A_direction
        gradient = scaled(residual)
        last, size = size, (residual * gradient).sum(1, keepdim=True)
        direction = gradient + size / last.clamp(min=1e-30) * direction
    return x
