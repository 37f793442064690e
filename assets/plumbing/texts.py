"""Item texts as the Q-Former's text branch reads them, and which share of them."""

import math

import numpy as np
import torch


class Texts:
    """All item texts as token ids: [CLS] t1 t2 ... [SEP] pad.

    ids, mask (I, T); key (I,): equal for items of equal text, as far as it is read.
    """

    def __init__(self, dataset, tokenizer, max_text):
        # What the tokenizer lacks becomes a new row of the Q-Former's own table
        special, self.size = {}, len(tokenizer)
        for name in ("cls", "sep", "dec", "pad"):
            special[name] = getattr(tokenizer, f"{name}_token_id", None)
            if special[name] is None:
                special[name] = self.size
                self.size += 1
        self.dec = special["dec"]

        I, seen = len(dataset.items), {}
        self.ids = torch.full((I, max_text), special["pad"])
        self.mask = torch.zeros(I, max_text, dtype=torch.bool)
        self.key = torch.empty(I, dtype=torch.long)
        for i, item in enumerate(dataset.items):
            words = tokenizer(item["text"] or "", add_special_tokens=False)["input_ids"]
            words = words[: max_text - 2]
            row = [special["cls"], *words, special["sep"]]
            self.ids[i, : len(row)] = torch.tensor(row)
            self.mask[i, : len(row)] = True
            self.key[i] = seen.setdefault(tuple(words) or i, len(seen))

    def batch(self, items):
        """ids, mask (B, T), cut to the longest text, and keys (B,)."""
        T = int(self.mask[items].sum(1).max())
        return self.ids[items, :T], self.mask[items, :T], self.key[items]

    def ranks(self, similarity, rows, columns):
        """The place, from 1, of each row's own text: similarity (n, N) of items (n,) and texts of
        items (N,) -> (n,). An equal text is a hit as well; ties count against."""
        same = (self.key[rows][:, None] == self.key[columns]).to(similarity.device)
        own = similarity.masked_fill(~same, -2).amax(1, keepdim=True)
        return 1 + ((similarity >= own) & ~same).sum(1)


def share_of(items, fraction, seed):
    """A random share of items, sorted; a smaller share of the same seed is part of a larger one."""
    shuffled = np.random.default_rng(seed).permutation(items)
    return np.sort(shuffled[: math.ceil(fraction * len(items))])
