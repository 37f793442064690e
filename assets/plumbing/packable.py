"""May an LLM of this type read several examples packed into one row? Tried when it is loaded, on random tokens.

A packed row hides its examples from each other by a mask, and counts the positions of each anew. A type that keeps a state from
token to token (Mamba, Qwen3.5's linear attention, short convolutions) carries it from one example into the next all the same;
a type that counts columns (ALiBi, GPT-Neo's windows) sees wrong distances. Such types are read by the definition: every example
a row of its own, padded on the right, where no token before can see it."""

import inspect
from contextlib import contextmanager

import torch
from transformers import DynamicCache

from assets.guard import InputError

LENGTH = 11  # tokens of each of the five prompts
SHARED = (2, 4, 5, 7, 8)  # how many of them it shares with the last of the five
UNSEEN = -3e4  # what a mask adds where a token may not look
# What code that was written for another purpose may raise
ERRORS = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def base_of(llm):
    """The LLM without its head; Llama 4 keeps it under another name than it says."""
    return llm.base_model if llm.base_model is not llm else getattr(llm, "model", llm)


@contextmanager
def refused_in_one_line(llm, name):
    """What goes wrong in here is the fault of the LLM's type -> InputError."""
    try:
        yield
    except InputError:
        raise
    except ERRORS as error:
        why = (str(error).strip() or type(error).__name__).split("\n")[0][:90]
        raise refusal(llm, name, f"cannot read embeddings ({why})") from error


def refusal(llm, name, why):
    return InputError(f"--llm {name}: its type, {llm.config.model_type}, {why}; use another")


def how_to_read(llm, body, head, packed_attention, name):
    """Whether a decoder-only LLM reads packed rows, and ranks side by side with a cache, as it reads examples one by one;
    and whether transformers' generate goes on from embeddings that are padded on the left -> two bools. InputError where
    one by one is wrong.

    body, head, packed_attention: of ilm.py; name: what --llm says. It costs a reading of 55 tokens, one of 47 and three of
    24 together, and 110 tokens more for a type that does not pack."""
    trial = Trial(llm, body, head)
    packed = (
        trial.takes_positions
        and not llm._is_stateful
        and trial.agrees(trial.packed, packed_attention)
        and trial.agrees(trial.side_by_side)
    )
    if not packed and not trial.agrees(trial.with_other_ends):
        raise refusal(llm, name, "sees the words that it shall predict")
    continues = "inputs_embeds" in inspect.signature(llm.prepare_inputs_for_generation).parameters
    return packed, continues and (packed or trial.agrees(trial.padded_on_the_left))


class Trial:
    """Five prompts that begin alike, ids (5, LENGTH), and what the LLM predicts along each by itself, alone (5, LENGTH, 500).
    Four methods read the same in another way -> what it predicts of some states (N, 500), and what it should."""

    def __init__(self, llm, body, head):
        self.table, self.body, self.head = llm.get_input_embeddings(), body, head
        takes = inspect.signature(base_of(llm).forward).parameters
        self.takes_positions = "position_ids" in takes
        # GPT-Neo's layers look back so many columns: its branches have to stand further off
        self.gap = getattr(llm.config, "window_size", 0)
        device, random = self.table.weight.device, torch.Generator().manual_seed(0)

        def draw(*shape):
            return torch.randint(self.table.num_embeddings, shape, generator=random).to(device)

        self.ids, self.other, self.some = draw(5, LENGTH), draw(5, LENGTH), draw(500)
        for row, shared in zip(self.ids, SHARED):
            row[:shared] = self.ids[-1, :shared]
        self.alone = self.predict(self.ids)
        self.spread = (self.alone - self.alone.flatten(0, 1).mean(0)).norm(dim=-1).median()
        # A leak is as large as the spread. Half precision rounds
        self.tolerance = 1e-3 if self.table.weight.dtype == torch.float32 else 0.1

    def predict(self, ids, mask=None, position=None, cache=None):
        """Logits (B, L, 500), less their mean, after ids (B, L). The second token of all prompts is no word, as soft tokens are."""
        soft = self.ids[-1, 1]
        no_word = (self.table(soft) + self.table(self.other[0, 0])) / 2
        embeddings = torch.where((ids == soft)[..., None], no_word, self.table(ids))
        logits = self.head(self.body(embeddings, mask, position, cache), self.some).float()
        return logits - logits.mean(-1, keepdim=True)

    def agrees(self, read, *args):
        """Three of four states are as they should be: in a mixture of experts rounding may send some to another expert."""
        try:
            found, wanted = read(*args)
        except ERRORS:
            return False
        return bool(((found - wanted).norm(dim=-1) / self.spread).quantile(0.75) < self.tolerance)

    def packed(self, packed_attention):
        """A trunk, and the prompts as branches that leave it (train_stage2.pack)."""
        trunk, filler = self.ids[-1, : max(SHARED)], self.other[0, :1].expand(self.gap)
        parts = [(0, 0, trunk), (-1, 0, filler)]  # branch, its first position, its tokens
        for number, (row, shared) in enumerate(zip(self.ids, SHARED), 1):
            parts.append((number, shared - 1, row[shared - 1 :]))
        ids = torch.cat([own for *_, own in parts])[None]
        lengths = torch.tensor([len(own) for *_, own in parts])
        branch, attach = torch.tensor([p[:2] for p in parts]).repeat_interleave(lengths, 0).T
        position = torch.cat([torch.arange(len(own)) + first for _, first, own in parts])
        batch = {"branch": branch[None], "attach": attach[None], "position": position[None]}
        batch = {key: value.to(ids.device) for key, value in batch.items()}
        mask = self.added(packed_attention(batch))
        found = self.predict(ids, mask, batch["position"])[0, (branch > 0).to(ids.device)]
        return found, torch.cat([row[shared - 1 :] for row, shared in zip(self.alone, SHARED)])

    def side_by_side(self):
        """Two prompts, padded on the left, into a cache; then two tokens of each, side by side with what is none of theirs
        (assets/fast/search.py)."""
        long, short = (self.ids[n, : SHARED[n]] for n in (-1, 2))
        ids, mask, position = self.padded([long, short])
        cache = DynamicCache()
        self.predict(ids, mask, position, cache)
        found, seen = [], mask.bool()
        for step, place in enumerate((0, 1)):  # the column of the prompts' own tokens
            ids = self.other[:2, :2].clone()
            ids[:, place] = torch.stack([self.ids[-1, len(long) + step], self.ids[2, len(short) + step]])
            own = torch.eye(2, dtype=torch.bool, device=ids.device)
            # In the second step the prompts' own tokens stand in the other column, and so does what they see of the first
            before = seen[:, None].expand(2, 2, -1)
            before = before if step == 0 else torch.cat([before, own.flip(0).expand(2, 2, 2)], 2)
            sees = torch.cat([before, own.expand(2, 2, 2)], 2)
            next_position = (position[:, -1:] + 1 + step).expand(2, 2)
            found.append(self.predict(ids, self.added(sees[:, None]), next_position, cache)[:, place])
        wanted = [self.alone[n, SHARED[n] + step] for step in (0, 1) for n in (-1, 2)]
        return torch.cat(found), torch.stack(wanted)

    def padded_on_the_left(self):
        """Prompts of five lengths in one batch."""
        rows = [row[: LENGTH - n] for n, row in enumerate(self.ids)]
        ids, mask, position = self.padded(rows)
        found = self.predict(ids, mask, position if self.takes_positions else None)
        return found[mask.bool()], torch.cat([a[: len(row)] for a, row in zip(self.alone, rows)])

    def with_other_ends(self):
        """What comes later changes nothing."""
        half = LENGTH // 2
        ids = torch.cat([self.ids[:, :half], self.other[:, half:]], 1)
        return self.predict(ids)[:, :half].flatten(0, 1), self.alone[:, :half].flatten(0, 1)

    @staticmethod
    def padded(rows):
        """Token ids [(L,), ...] -> ids (B, L) padded on the left, mask, positions."""
        ids = torch.nn.utils.rnn.pad_sequence(rows, True, 0, "left")
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], True, 0, "left")
        return ids, mask, (mask.cumsum(1) - 1).clamp(min=0)

    def added(self, sees):
        """True = "may look" -> what is added to attention's logits."""
        mask = torch.zeros(sees.shape, dtype=self.table.weight.dtype, device=sees.device)
        return mask.masked_fill(~sees, UNSEEN)
