"""A small SASRec, the reference among sequential recommenders (evaluate.py --sasrec): item ids alone, no text, no LLM."""
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from data import HISTORY


class SASRec(nn.Module):
    """A causal Transformer over item embeddings (Kang and McAuley 2018), trained here with the full softmax. (B, L) -> (B, L, I)."""

    def __init__(self, num_items, width=64, dropout=0.3):
        super().__init__()
        self.items, self.positions = nn.Embedding(num_items + 1, width, num_items), nn.Embedding(HISTORY, width)
        layer = nn.TransformerEncoderLayer(width, 2, 2 * width, dropout, "gelu", batch_first=True, norm_first=True)
        self.blocks, self.norm = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        nn.init.normal_(self.items.weight.data[:-1], std=0.02)

    def forward(self, ids):
        L, pad = ids.shape[1], self.items.padding_idx
        place = torch.arange(L) + HISTORY - (ids != pad).sum(1, keepdim=True)  # counted from the end: the last item's place is the same
        causal = nn.Transformer.generate_square_subsequent_mask(L)             # padding stands at the right, where nobody looks
        x = self.items(ids) * self.items.embedding_dim**0.5 + self.positions(place.clamp(max=HISTORY - 1))
        x = self.blocks(self.dropout(x), causal, is_causal=True)
        return self.norm(x) @ self.items.weight[:pad].T


def train_sasrec(dataset, validate, steps=2000, batch_size=128):
    """-> its score function (users, split) -> (B, I), by the checkpoint that validate(score function) likes best."""
    torch.manual_seed(0)
    I, rng, eligible, best = len(dataset.items), np.random.default_rng(0), dataset.eligible(), (-1.0, None)
    model = SASRec(I)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, betas=(0.9, 0.98))
    pad = lambda rows, length: torch.tensor([[*map(int, row)] + [I] * (length - len(row)) for row in rows])

    @torch.no_grad()
    def score(batch, split):
        histories = [dataset.items_of(u, split)[-HISTORY:] for u in batch]
        return model(pad(histories, HISTORY))[torch.arange(len(batch)), torch.tensor([len(h) - 1 for h in histories])]

    for step in range(steps + 1):
        if step % 200 == 0:
            model.eval()
            best = max(best, (validate(score), {k: v.clone() for k, v in model.state_dict().items()}), key=lambda x: x[0])
            model.train()
        rows = [dataset.items_of(u, "train") for u in rng.choice(eligible, size=batch_size)]
        ids = pad([row[start:start + HISTORY + 1] for row in rows for start in [rng.integers(max(1, len(row) - HISTORY))]], HISTORY + 1)
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten(), ignore_index=I)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.load_state_dict(best[1])
    model.eval()
    return score
