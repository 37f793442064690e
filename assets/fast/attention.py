"""Who may see whom in packed rows (assets/fast/packing.py), and attention to no more than that.

A mask lets a token see a fifth of its row, but no kernel skips what a mask like ours hides. So on a
CPU a long row is cut into pieces, and a piece attends to the trunk before it, gathered, and to what
stands near: a step of ML-100K takes .8 to .9 of the time. tests/test_packing.py shows that it is
the same. On a GPU it has not been measured: tests/bench_gpu.py --pieces does."""

from typing import NamedTuple

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

PIECES = 4  # more save little
LONG = 256  # tokens of a row from which on it pays
SDPA_IN_PIECES = "sdpa_in_pieces"  # what transformers knows `attend` by


def packed_attention(branch):
    """The mask of packed rows, branch (B, L) -> (B, 1, L, L), True means "may attend". A token sees
    what stands before it in the trunk and in its own branch:

        key       A . u B . u C . u
        A         x
        . u of 1  x x x                    branch 1 left after A
        B         x . . x
        . u of 2  x . . x x x              branch 2 left after B, and does not know branch 1
        C .       x . . x . . x x
        u of 3    x . . x . . x x x        the longest prompt's: it alone sees the trunk's "."

    (". u" is the end of a prompt, as in "So far: A, B. Next for user u"; no token sees the
    next.)"""
    earlier = branch.new_ones(branch.shape[1], branch.shape[1]).tril().bool()
    return (may_attend(branch, branch) & earlier)[:, None]


def may_attend(query, key):
    """Branches of queries (B, N) and of keys (B, S), if these stand before them -> (B, N, S)."""
    return (key == 0)[:, None] | (key[:, None] == query[:, :, None])


class Pieces(NamedTuple):
    """In place of packed_attention's mask: where the trunk's tokens stand (B, T), -1 where a row
    has fewer; the pieces [(start, stop, near, far), ...]: tokens start to stop attend to tokens
    near to stop and to the first `far` of the trunk's; and their masks [(B, 1, stop - start,
    far + stop - near), ...]."""

    trunk_at: torch.Tensor
    places: list
    masks: list


def cut_in_pieces(branch, long=LONG):
    """On the CPU, of branch (B, L): what a batch has to hold for Pieces; nothing of short rows."""
    L, trunk = branch.shape[1], branch == 0
    if L < long:
        return {}
    longest = max(int(row[row > 0].bincount().max()) for row in branch)
    size, pieces = -(-L // PIECES), []
    for start in range(0, L, size):
        near = max(0, start - longest)  # a branch may begin in the piece before
        pieces.append((start, min(start + size, L), near, int(trunk[:, :near].sum(1).max())))
    at = torch.arange(L).where(trunk, L).sort(1).values[:, : pieces[-1][-1]]
    return {"pieces": pieces, "trunk_at": at.where(at < L, -1)}


def in_pieces(batch):
    """Pieces of a batch that was cut."""
    branch, trunk_at, masks = batch["branch"], batch["trunk_at"], []
    place = torch.arange(branch.shape[1], device=branch.device)
    for start, stop, near, far in batch["pieces"]:
        own = may_attend(branch[:, start:stop], branch[:, near:stop])
        own &= place[near:stop] <= place[start:stop, None]
        at = trunk_at[:, None, :far].expand(-1, stop - start, -1)
        masks.append(torch.cat([(at >= 0) & (at < near), own], 2)[:, None])
    return Pieces(trunk_at, batch["pieces"], masks)


def attend(module, query, key, value, attention_mask, pieces=None, **more):
    """Attention of a layer, as transformers calls it: queries, keys and values (B, heads, L, d) ->
    (B, L, heads, d). Without pieces it is transformers' own."""
    if pieces is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **more)
    trunk, out = [gathered(x, pieces.trunk_at.clamp(min=0)) for x in (key, value)], []
    for (start, stop, near, far), mask in zip(pieces.places, pieces.masks):
        k, v = (
            torch.cat([t[:, :, :far], x[:, :, near:stop]], 2) for t, x in zip(trunk, (key, value))
        )
        out.append(sdpa_attention_forward(module, query[:, :, start:stop], k, v, mask, **more)[0])
    return torch.cat(out, 1), None


def gathered(x, at):
    """Keys or values (B, heads, L, d) at places (B, T) of each row -> (B, heads, T, d)."""
    B, H, L, d = x.shape
    flat = at + L * torch.arange(B, device=x.device)[:, None]
    rows = x.transpose(1, 2).reshape(B * L, H, d).index_select(0, flat.flatten())
    return rows.view(*at.shape, H, d).transpose(1, 2)


AttentionInterface.register(SDPA_IN_PIECES, attend)
AttentionMaskInterface.register(SDPA_IN_PIECES, sdpa_mask)
