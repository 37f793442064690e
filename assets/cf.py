"""Collaborative filtering: item vectors by implicit ALS, and users at a moment. What MF is to this project; no file, no flag.

A user has no vector of their own: it is one row of ALS's least squares, solved for a history when it is asked for (UserSolver). Source:
Hu, Koren, Volinsky 2008, with the scaled ridge of Rendle et al. 2021; the weight that falls with every step back is ours."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F


def length_batches(rows, columns, num_rows, pad, budget=1 << 15, max_rows=512):
    """Interactions (nnz,), (nnz,) -> [(row numbers (R,), their columns (R, L))]: rows of like length,
    each in its own order, filled up with `pad`, at most `budget` entries together (a single longer row
    apart), so that als_solve works in the processor's cache. Rows without interactions are left out."""
    lengths = torch.bincount(rows, minlength=num_rows)
    order = torch.argsort(lengths)  # row numbers, the shortest first
    columns = F.pad(
        columns[rows.argsort(stable=True)], (0, 1), value=pad
    ).int()  # by row, then the padding
    begin = lengths.cumsum(0) - lengths  # where each row's columns begin
    start, batches = int((lengths == 0).sum()), []
    while start < num_rows:
        longest = lengths[
            order[start : start + max_rows]
        ]  # of the first 1, 2, 3 ... rows that are left
        fits = int((longest * torch.arange(1, len(longest) + 1) <= budget).sum())
        some = order[start : start + max(1, fits)]
        offset = torch.arange(int(lengths[some[-1]]))
        place = torch.where(
            offset < lengths[some, None], begin[some, None] + offset, len(columns) - 1
        )
        batches.append((some, columns[place]))
        start += len(some)
    return batches


@dataclass(frozen=True)
class CFSettings:
    """What vectors are solved with. They are chosen by choose_cf, or fixed by flags."""

    dim: int = 24
    alpha: float = 2.0  # extra weight of an observed pair
    reg: float = 1.0
    # 0: reg is flat; else a row has reg * (its weight + a0 * N), with N rows on the other side
    a0: float = 0.0
    # d: an item that lies j steps back weighs d ** j; 1: order does not matter
    recency: float = 1.0

    def ridge(self, weight, N):
        """What stands on the diagonal for rows whose interactions weigh `weight` (R,) in all. The scaled
        form is iALS's of Rendle et al. 2021."""
        if not self.a0:
            return torch.full_like(weight, self.reg)
        return self.reg * (weight + self.a0 * N)


def solve_rows(gram, S, b, weight, settings, N):
    """Vectors (R, E) from their sums over weighted interactions: S (R, E, E) of w y y', b (R, E) of
    w y, weight (R,) of w. A row without interactions gets zeros.

        (Y'Y + alpha * S + ridge * 1) x = (1 + alpha) * b"""
    A = torch.add(gram, S, alpha=settings.alpha)
    A.diagonal(dim1=1, dim2=2).add_(settings.ridge(weight, N)[:, None])
    return torch.cholesky_solve((1 + settings.alpha) * b[..., None], torch.linalg.cholesky(A))[
        ..., 0
    ]


def solve_short_rows(Z, eigenvalues, w, settings, N):
    """The same for rows of L < E interactions, by an L x L system. Z (R, L, E): their y in the basis in
    which Y'Y is diagonal, w (R, L): their weights. By the push-through identity, with G = Y'Y + ridge
    and V = sqrt(w) y:   x = (1 + alpha) * G^-1 V' (1 + alpha V G^-1 V')^-1 sqrt(w)"""
    root = w.sqrt()
    V = Z * root[..., None]
    G = eigenvalues + settings.ridge(w.sum(1), N)[:, None]  # (R, E)
    V_over_G = V / G[:, None]
    K = torch.bmm(V, V_over_G.transpose(1, 2)).mul_(settings.alpha)  # (R, L, L)
    K.diagonal(dim1=1, dim2=2).add_(1)
    inner = torch.cholesky_solve(root[..., None], torch.linalg.cholesky(K))
    return (1 + settings.alpha) * (V_over_G * inner).sum(1)


def als_solve(fixed, batches, num_rows, settings, recency=1.0, gram=None):
    """Least-squares vectors of one side given the other's, fixed (N, E) -> (num_rows, E). batches:
    length_batches; column N is the padding, a vector of zeros. recency: columns are in time order, and
    one that lies j steps before its row's last weighs recency ** j. gram (E, E): Y'Y, if it is known."""
    N, E = fixed.shape
    gram, out = fixed.T @ fixed if gram is None else gram, torch.zeros(num_rows, E)
    eigenvalues, basis = torch.linalg.eigh(gram)
    padded = F.pad(fixed, (0, 0, 0, 1))
    rotated = padded @ basis
    for rows, columns in batches:
        L = columns.shape[1]
        real = columns < N  # (R, L)
        w = real.float()
        if recency < 1:
            age = real.sum(1, keepdim=True) - 1 - torch.arange(L)
            w = recency ** age.clamp(min=0) * real
        if 2 * L < E:
            Z = F.embedding(columns, rotated)  # (R, L, E)
            out[rows] = solve_short_rows(Z, eigenvalues.clamp(min=0), w, settings, N) @ basis.T
        else:
            Y = F.embedding(columns, padded)
            weighted = Y * w[..., None] if recency < 1 else Y
            S = torch.bmm(weighted.transpose(1, 2), Y)
            out[rows] = solve_rows(gram, S, weighted.sum(1), w.sum(1), settings, N)
    return out


def train_cf(users, items, num_users, num_items, settings, iterations=15, seed=0):
    """Item vectors (I, E) by implicit ALS. users, items (nnz,): the training interactions alone. Order
    plays no part here; the users' side is thrown away."""
    users, items = torch.as_tensor(users), torch.as_tensor(items)
    by_user = length_batches(users, items, num_users, num_items)
    by_item = length_batches(items, users, num_items, num_users)
    generator = torch.Generator().manual_seed(seed)
    item_cf = torch.randn(num_items, settings.dim, generator=generator) * settings.dim**-0.5
    item_cf[torch.bincount(items, minlength=num_items) == 0] = (
        0  # never seen in training: lends nothing
    )
    for _ in range(iterations):
        user_cf = als_solve(item_cf, by_user, num_users, settings)
        item_cf = als_solve(user_cf, by_item, num_items, settings)
    return item_cf


# ---- Users at a moment -----------------------------------------------------------------------------------------------


class UserSolver:
    """From a history to a user's vector: one row of ALS, with the item vectors (I, E) fixed.

    The same for training, validation, test, conversation and new users. A user is asked at a moment, and
    their vector knows what came before it, the last item more than those that lie back:

        w_j = recency ** (steps that j lies back)
        (Y'Y + alpha * sum w_j y_j y_j' + ridge * 1) x = (1 + alpha) * sum w_j y_j"""

    def __init__(self, item_cf, settings, gram=None):
        self.item_cf, self.settings, self.recency = item_cf, settings, settings.recency
        self.gram = item_cf.T @ item_cf if gram is None else gram

    def of_histories(self, histories):
        """Item indices in time order, a list of B arrays -> (B, E); an empty one gives zeros."""
        lengths = torch.tensor([len(h) for h in histories], dtype=torch.long)
        rows = torch.repeat_interleave(lengths)
        columns = torch.from_numpy(
            np.concatenate([np.zeros(0, dtype=np.int64), *histories]).astype(np.int64)
        )
        batches = length_batches(rows, columns, len(histories), len(self.item_cf))
        return als_solve(
            self.item_cf, batches, len(histories), self.settings, self.recency, self.gram
        )

    def before(self, history, places):
        """One user's history (H,) -> their vectors (n, E) before each place (n,) of it. The n prefixes
        share their sums: from one place to the next, S <- d ** steps * S + sum of w y y'."""
        Y = self.item_cf.numpy()[np.asarray(history, dtype=np.int64)]
        n, E, now = len(places), Y.shape[1], 0
        S, b, weight = np.zeros((E, E), np.float32), np.zeros(E, np.float32), 0.0
        sums = (
            np.empty((n, E, E), np.float32),
            np.empty((n, E), np.float32),
            np.empty(n, np.float32),
        )
        decay = (self.recency ** np.arange(len(Y) + 1)).astype(np.float32)  # of 0, 1, 2 ... steps
        for k in np.argsort(places, kind="stable"):
            steps = int(places[k]) - now
            if steps:
                weighted = Y[now : now + steps] * decay[:steps][::-1, None]
                S = decay[steps] * S + weighted.T @ Y[now : now + steps]
                b = decay[steps] * b + weighted.sum(0)
                weight = decay[steps] * weight + decay[:steps].sum()
                now += steps
            for array, value in zip(sums, (S, b, weight)):
                array[k] = value
        return solve_rows(self.gram, *map(torch.from_numpy, sums), self.settings, len(self.item_cf))

    def without(self, history, places):
        """One user's history (H,) -> (n, E): vectors from all of it but the item at each place (n,), however
        often it was chosen."""
        Y = self.item_cf[torch.as_tensor(np.asarray(history, dtype=np.int64))]
        own = Y[torch.as_tensor(np.asarray(places, dtype=np.int64))]
        history = np.asarray(history)
        times = (history[np.asarray(places, dtype=np.int64)][:, None] == history).sum(1)
        times = torch.as_tensor(times, dtype=torch.float32)
        S = Y.T @ Y - times[:, None, None] * own[:, :, None] * own[:, None, :]
        weight = len(Y) - times
        return solve_rows(
            self.gram, S, Y.sum(0) - times[:, None] * own, weight, self.settings, len(self.item_cf)
        )

    def moments(self, histories, places):
        """Training histories of n users and a place in each -> (n, E): each user as that training target
        meets them, by `before` or, where order does not matter, by `without`."""
        if self.recency < 1:
            return self.of_histories([h[:place] for h, place in zip(histories, places)])
        rows = [self.without(h, [place]) for h, place in zip(histories, places)]
        return torch.cat(rows) if rows else torch.zeros(0, self.item_cf.shape[1])


def last_items(history, places, count):
    """The `count` items before each place (n,) of a history (H,), latest first (n, count); -1 where there is none."""
    at = np.asarray(places)[:, None] - 1 - np.arange(count)
    padded = np.append(np.asarray(history, dtype=np.int64), -1)
    return padded[np.maximum(at, -1)]
