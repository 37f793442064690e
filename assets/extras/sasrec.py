"""A strong SASRec, the reference among sequential recommenders (evaluate.py --sasrec): ids alone.

Kang and McAuley 2018. DEVIATION: cross-entropy over the whole catalogue (theirs: one negative an
item), cosine logits unless temperature is 0, positions counted from the end. Expect a test HR@10
of .45 on the toy world after 22 epochs.
"""

import argparse
import copy
import json
import math
from dataclasses import asdict, dataclass, fields

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass(frozen=True)
class Settings:
    """What sasrec_settings may change."""

    history: int = 50  # items looked back on
    temperature: float = 0.1  # of the cosine of state and item; 0: dot product, as in the paper
    dropout: float = 0.3
    width: int = 64
    learning_rate: float = 3e-3
    weight_decay: float = 0.0
    batch_targets: int = 1500  # items predicted in one step, about


def sasrec_settings(text):
    """A type for argparse: a JSON object of some of Settings' fields -> a dict."""
    given, known = json.loads(text), {field.name: field.type for field in fields(Settings)}
    if not isinstance(given, dict):
        raise argparse.ArgumentTypeError(f"{text} is no JSON object")
    for name, value in given.items():
        kinds = {int: (int,), float: (int, float)}.get(known.get(name), ())
        if type(value) not in kinds or not (1 if kinds == (int,) else 0) <= value < math.inf:
            raise argparse.ArgumentTypeError(
                f"{name} {value!r}: give numbers for {', '.join(known)}"
            )
    return given


class Block(nn.Module):
    """Causal attention of two heads, then an MLP, each added to its input. (B, L, D) -> same."""

    def __init__(self, width, dropout):
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.query_key_value, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        B, L, D = x.shape
        projected = self.query_key_value(self.norms[0](x)).view(B, L, 3, 2, D // 2)
        query, key, value = projected.permute(2, 0, 3, 1, 4)  # (B, 2, L, D / 2) each
        found = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.dropout(self.out(found.transpose(1, 2).reshape(B, L, D)))
        return x + self.dropout(self.narrow(F.gelu(self.wide(self.norms[1](x)))))


class SASRec(nn.Module):
    """Item ids (B, L), padded with num_items at the right, where nobody looks -> (B, L, D)."""

    def __init__(self, num_items, settings):
        super().__init__()
        self.num_items, self.settings, width = num_items, settings, settings.width
        self.items = nn.Embedding(num_items + 1, width)
        self.positions = nn.Embedding(settings.history, width)
        self.blocks = nn.Sequential(*[Block(width, settings.dropout) for _ in range(2)])
        self.norm, self.dropout = nn.LayerNorm(width), nn.Dropout(settings.dropout)
        nn.init.normal_(self.items.weight, std=0.02)
        nn.init.normal_(self.positions.weight, std=0.02)

    def forward(self, ids):
        # Counted from the end: the last item has the same place in every row.
        lengths = (ids != self.num_items).sum(1, keepdim=True)
        place = torch.arange(ids.shape[1], device=ids.device) + self.settings.history - lengths
        positions = self.positions(place.clamp(max=self.settings.history - 1))

        # Cosine logits leave the length of an embedding free, so it is fixed here.
        x = self.items(ids)
        if self.settings.temperature:
            x = F.normalize(x, dim=-1) / 2
        x = x * self.settings.width**0.5 + positions
        return self.norm(self.blocks(self.dropout(x)))

    def logits(self, states):
        """States (N, D) -> a score for each item (N, I), by the input embeddings."""
        items = self.items.weight[: self.num_items]
        if not self.settings.temperature:
            return states @ items.T
        return (
            F.normalize(states, dim=-1) @ F.normalize(items, dim=-1).T / self.settings.temperature
        )


def laid_out(rows):
    """Arrays -> one after another (nnz,), where each begins (B,) and ends (B,)."""
    lengths = np.array([len(row) for row in rows])
    return np.concatenate(rows), lengths.cumsum() - lengths, lengths.cumsum()


def windows(sequence, begin, end, length, pad):
    """The last `length` of each sequence[begin:end], padded. (nnz,), (B,), (B,) -> (B, L) int64."""
    begin = np.maximum(begin, end - length)
    place = begin[:, None] + np.arange((end - begin).max())
    row = sequence[np.minimum(place, len(sequence) - 1)]
    return torch.as_tensor(np.where(place < end[:, None], row, pad), dtype=torch.int64)


def epoch_windows(begin, end, history, rng):
    """Where windows begin (W,) and end (W,): as many as a user's targets fill, at random places."""
    targets = np.maximum(end - begin - 1, 0)  # all but the first item
    user = np.repeat(np.arange(len(targets)), -(-targets // history))
    spare = np.maximum(targets[user] - history, 0)
    return begin[user], end[user] - rng.integers(0, spare + 1)


def train_sasrec(
    dataset, validate, settings=Settings(), epochs=40, patience=5, device="cpu", seed=0
):
    """-> score function, (users, split) -> (B, I), of the best epoch; its report.

    validate(score function) gives a number or a tuple, larger is better."""
    torch.manual_seed(seed)
    rng, pad, best = np.random.default_rng(seed), len(dataset.items), {}
    sequence, begin, end = laid_out([dataset.items_of(u, "train") for u in dataset.eligible()])
    model = SASRec(pad, settings).to(device).train()
    average = copy.deepcopy(model).eval()  # of the weights over the last epoch or so: scores better
    rates = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay}
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), **rates)
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=100)

    @torch.no_grad()
    def score(users, split):
        rows = laid_out([dataset.items_of(user, split) for user in users])
        ids = windows(*rows, settings.history, pad)
        last = (ids != pad).sum(1) - 1
        states = average(ids.to(device))[torch.arange(len(ids)), last]
        return average.logits(states).cpu()

    for epoch in range(1, epochs + 1):
        # All windows once, in random order
        starts, stops = epoch_windows(begin, end, settings.history, rng)
        targets = np.minimum(stops - starts - 1, settings.history).sum()
        steps = -(-targets // settings.batch_targets)
        for rows in np.array_split(rng.permutation(len(starts)), steps):
            ids = windows(sequence, starts[rows], stops[rows], settings.history + 1, pad)
            asked = ids[:, 1:] != pad
            # The last item, which has nothing to predict, is padding: so the last that has stands
            # where at test the last one does
            known = ids[:, :-1].where(asked, pad)
            logits = model.logits(model(known.to(device))[asked])
            loss = F.cross_entropy(logits, ids[:, 1:][asked].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            warm_up.step()
            for slow, weight in zip(average.parameters(), model.parameters()):
                slow.data.lerp_(weight.data, 1 / int(steps))

        # Keep the best epoch
        value = validate(score)
        if not best or value > best["validation"]:
            best = {**asdict(settings), "epoch": epoch, "validation": value}
            weights = {name: weight.clone() for name, weight in average.state_dict().items()}
        elif epoch - best["epoch"] >= patience:
            break
    average.load_state_dict(weights)
    return score, best


def sasrec_reference(dataset, validate, settings, device):
    """train_sasrec by HR@10 + NDCG@10 of validate(score function), a dict of metrics. settings:
    those that differ from the defaults, a dict."""

    def value(score):
        metrics = validate(score)
        return metrics["HR@10"] + metrics["NDCG@10"]

    return train_sasrec(dataset, value, Settings(**settings), device=device)
