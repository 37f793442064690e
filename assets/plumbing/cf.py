"""Collaborative filtering: item vectors by implicit ALS, and users at a moment. What MF is here.

A user has no vector of their own: it is one row of ALS's least squares, solved for a history when
it is asked for (UserSolver). No file and no flag is known here; what is only faster stands in
assets/fast/als.py. Source: Hu, Koren, Volinsky 2008, with the scaled ridge of Rendle et al. 2021;
the weight that falls with every step back is ours.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F

from assets.fast.als import length_batches, solve_prefixes, solve_short_rows

# ---- Implicit ALS ------------------------------------------------------------


@dataclass(frozen=True)
class CFSettings:
    """What vectors are solved with. They are chosen by choose_cf, or fixed by flags."""

    dim: int = 24  # E
    alpha: float = 2.0  # extra weight of an observed pair
    reg: float = 1.0
    a0: float = 0.0  # 0: reg is flat; else it grows with a row's weight
    recency: float = 1.0  # an item j steps back weighs recency ** j; 1: order does not matter

    def ridge(self, weight, N):
        """What stands on the diagonal for rows whose interactions weigh `weight` (R,) in all.

        N: rows on the other side. The scaled form is iALS's of Rendle et al. 2021.
        """
        if not self.a0:
            return torch.full_like(weight, self.reg)
        return self.reg * (weight + self.a0 * N)


def solve_rows(gram, S, b, weight, settings, N):
    """Vectors x (R, E) from sums over a row's weighted interactions: least squares.

        (Y'Y + alpha * S + ridge * 1) x = (1 + alpha) * b

    gram (E, E): Y'Y over all N rows of the other side, which stand for "not chosen"; S (R, E, E):
    sum of w y y'; b (R, E): sum of w y; weight (R,): sum of w. Without interactions x is zero.
    """
    A = torch.add(gram, S, alpha=settings.alpha)
    A.diagonal(dim1=1, dim2=2).add_(settings.ridge(weight, N)[:, None])
    wanted = (1 + settings.alpha) * b[..., None]
    return torch.cholesky_solve(wanted, torch.linalg.cholesky(A))[..., 0]


def als_solve(fixed, batches, num_rows, settings, solver=None):
    """Vectors (num_rows, E) of one side given the other's, fixed (N, E). Half a step of ALS.

    batches: of length_batches; column N is the padding, a vector of zeros. solver: a UserSolver,
    some of whose items are `fixed`; then columns are in time order, and one that lies j steps
    before its row's last weighs recency ** j.
    """
    pad, E = fixed.shape
    solver = solver or UserSolver(fixed, replace(settings, recency=1.0))
    N, gram, recency = len(solver.item_cf), solver.gram, solver.recency
    eigenvalues, basis = solver.axes
    padded = F.pad(fixed, (0, 0, 0, 1))
    rotated = padded @ basis
    solved = torch.zeros(num_rows, E)
    for rows, columns in batches:
        # The weight of each column, zero for padding. (R, L)
        real = columns < pad
        w = real.float()
        if recency < 1:
            steps_back = real.sum(1, keepdim=True) - 1 - torch.arange(columns.shape[1])
            w = recency ** steps_back.clamp(min=0) * real

        # Fast: a row of few interactions is a smaller system.
        if 2 * columns.shape[1] < E:
            Z = F.embedding(columns, rotated)  # (R, L, E)
            short = solve_short_rows(Z, eigenvalues, w, settings, N)
            solved[rows] = short @ basis.T
            continue

        # The definition: the sums over each row, and least squares. Padding is zeros already.
        Y = F.embedding(columns, padded)  # (R, L, E)
        weighted = Y * w[..., None] if recency < 1 else Y
        S = torch.bmm(weighted.transpose(1, 2), Y)
        solved[rows] = solve_rows(gram, S, weighted.sum(1), w.sum(1), settings, N)
    return solved


def train_cf(users, items, num_users, num_items, settings, iterations=15, seed=0):
    """Item vectors (I, E) by implicit ALS. users, items (nnz,): the training interactions alone.

    Order plays no part here; the users' side is thrown away.
    """
    users, items = torch.as_tensor(users), torch.as_tensor(items)
    by_user = length_batches(users, items, num_users, num_items)
    by_item = length_batches(items, users, num_items, num_users)

    # An item that was never seen in training lends nothing.
    generator = torch.Generator().manual_seed(seed)
    item_cf = torch.randn(num_items, settings.dim, generator=generator) * settings.dim**-0.5
    item_cf[torch.bincount(items, minlength=num_items) == 0] = 0

    for _ in range(iterations):
        user_cf = als_solve(item_cf, by_user, num_users, settings)
        item_cf = als_solve(user_cf, by_item, num_items, settings)
    return item_cf


def standardise(x, known=None):
    """Columns of x, less the mean and over the standard deviation of `known` [x itself], of its
    rows that CF has seen (not all zeros). Of fewer than two: x as it is."""
    known = x if known is None else known
    seen = known[known.abs().sum(1) > 0]
    if len(seen) < 2:
        return x
    return (x - seen.mean(0)) / seen.std(0).clamp(min=1e-6)


# ---- Users at a moment -------------------------------------------------------


class UserSolver:
    """From a history to a user's vector: one row of ALS, with the item vectors (I, E) fixed.

    The same for training, validation, test, conversation and new users. A user is asked at a
    moment, and their vector knows what came before it, the last item more than those that lie back:

        w_j = recency ** (steps that j lies back)
        (Y'Y + alpha * sum w_j y_j y_j' + ridge * 1) x = (1 + alpha) * sum w_j y_j
    """

    def __init__(self, item_cf, settings, gram=None):
        self.item_cf, self.settings, self.recency = item_cf, settings, settings.recency
        self.gram = item_cf.T @ item_cf if gram is None else gram

    @cached_property
    def axes(self):
        """Eigenvalues (E,) and eigenvectors (E, E) of Y'Y."""
        eigenvalues, basis = torch.linalg.eigh(self.gram)
        return eigenvalues.clamp(min=0), basis

    def still(self):
        """The same for users whose taste stands still: order does not matter, as in ALS itself."""
        return UserSolver(self.item_cf, replace(self.settings, recency=1.0), self.gram)

    def of_histories(self, histories):
        """Item indices in time order, a list of B arrays -> (B, E); an empty one gives zeros."""
        B = len(histories)
        lengths = torch.tensor([len(h) for h in histories], dtype=torch.long)
        items = np.concatenate([np.zeros(0, dtype=np.int64), *histories]).astype(np.int64)
        some, items = np.unique(items, return_inverse=True)  # a user needs no whole catalogue
        rows = torch.repeat_interleave(lengths)
        batches = length_batches(rows, torch.from_numpy(items), B, len(some))
        return als_solve(self.item_cf[some], batches, B, self.settings, self)

    def before(self, history, places):
        """One user's history (H,) -> their vectors (n, E) before each place (n,) of it: those of
        of_histories for n prefixes."""
        if not len(places):
            return torch.zeros(0, self.item_cf.shape[1])
        Y = self.item_cf[torch.as_tensor(np.asarray(history, dtype=np.int64))]
        return solve_prefixes(Y, [int(place) for place in places], self)

    def without(self, history, places):
        """One user's history (H,) -> (n, E): vectors from all of it but the item at each place
        (n,), however often it was chosen. Order does not matter."""
        history = torch.as_tensor(np.asarray(history, dtype=np.int64))
        left_out = history[torch.as_tensor(np.asarray(places, dtype=np.int64))]  # (n,)
        times = (left_out[:, None] == history).sum(1).float()

        # The sums over all of the history, less what the item adds to them.
        Y, y = self.item_cf[history], self.item_cf[left_out]  # (H, E), (n, E)
        S = Y.T @ Y - times[:, None, None] * y[:, :, None] * y[:, None, :]
        b = Y.sum(0) - times[:, None] * y
        return solve_rows(self.gram, S, b, len(Y) - times, self.settings, len(self.item_cf))

    def moments(self, histories, places):
        """Training histories of n users and a place in each -> (n, E): each user as that training
        target meets them, by `before` or, where order does not matter, by `without`."""
        if self.recency < 1:
            return self.of_histories([h[:place] for h, place in zip(histories, places)])
        vectors = [self.without(h, [place]) for h, place in zip(histories, places)]
        return torch.cat([torch.zeros(0, self.item_cf.shape[1]), *vectors])


# ---- Which interactions train ------------------------------------------------


def training_part(indptr):
    """True at the interactions (nnz,) to train on: all but the last two of each user (last = test,
    last but one = valid). Users with fewer than 3 have no targets and lend all they have."""
    lengths = np.diff(indptr)
    users = np.repeat(np.arange(len(lengths)), lengths)
    return (indptr[users + 1] - np.arange(len(users)) > 2) | (lengths[users] < 3)


def training_pairs(indptr, items):
    """The training part of all sequences, items (nnz,) -> users, items of equal length."""
    users = np.repeat(np.arange(len(indptr) - 1), np.diff(indptr))
    train = training_part(indptr)
    return users[train], items[train]


def training_moments(indptr, count, seed=0):
    """Up to `count` random training targets -> users (n,), places in their histories (n,).

    The first item of a user is never a target.
    """
    random = np.random.default_rng([seed, 7])
    targets = np.maximum(np.diff(indptr) - 3, 0)  # of each user: all but the first that train
    ends = targets.cumsum()
    total = ends[-1] if len(ends) else 0
    chosen = np.sort(random.permutation(total)[:count])
    users = np.searchsorted(ends, chosen, side="right")
    return users, chosen - (ends - targets)[users] + 1


def users_together(solver, indptr, sequence, user_cf=None, count=10_000):
    """What cf.npz holds of all users: user_stats (2, E), mean and standard deviation at `count`
    training moments; user_gram (E, E), X'X of their vectors X as ALS has them; user
    (U, E), where another engine has them."""
    at_moments = user_cf
    if user_cf is not None:
        gram = user_cf.T @ user_cf
    else:
        owners, items = training_pairs(indptr, sequence)
        ends = np.bincount(owners, minlength=len(indptr) - 1).cumsum()
        histories = np.split(items, ends[:-1])
        users, places = training_moments(indptr, count)
        at_moments = solver.moments([histories[u] for u in users], places)
        gram, still = torch.zeros_like(solver.gram), solver.still()
        for start in range(0, len(histories), 1 << 16):
            everyone = still.of_histories(histories[start : start + (1 << 16)])
            gram += everyone.T @ everyone
    mean, deviation = torch.zeros_like(gram[0]), torch.ones_like(gram[0])
    if len(at_moments) > 1:
        mean, deviation = at_moments.mean(0), at_moments.std(0).clamp(min=1e-6)
    kept = {"user_stats": torch.stack([mean, deviation]), "user_gram": gram}
    return kept if user_cf is None else {**kept, "user": user_cf}
