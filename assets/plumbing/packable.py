"""May an LLM of this type read several examples packed into one row? Tried when it is loaded, on
random tokens.

A packed row hides its examples from each other by a mask, and counts the positions of each anew. A
type that keeps a state from token to token (Mamba, Qwen3.5's linear attention, short convolutions)
carries it from one example into the next all the same; a type that counts columns (ALiBi, GPT-Neo's
windows) sees wrong distances. Such types are read by the definition: every example a row of its
own, padded on the right, where no token before can see it."""

import inspect
from contextlib import contextmanager

import torch
from transformers import DynamicCache

from assets.fast.attention import SDPA_IN_PIECES, cut_in_pieces, in_pieces, packed_attention
from assets.plumbing.guard import InputError

LENGTH = 11  # tokens of each of the five prompts
SHARED = (2, 4, 5, 7, 8)  # how many of them it shares with the last of the five
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


def how_to_read(llm, body, head, name):
    """Whether a decoder-only LLM reads packed rows, and ranks side by side with a cache, as it
    reads examples one by one; whether it lets attention go in pieces, which is set then; and
    whether transformers' generate goes on from embeddings as one by one does -> three bools.
    InputError where one by one is wrong.

    body, head: of an LLM (assets/plumbing/llm.py); name: what --llm says. It costs a reading of 55
    tokens, two of 46 and three of 24 together (20 ms for the toy LLM); of 180 tokens more for a
    type that does not pack."""
    trial = Trial(llm, body, head)
    packed = (
        trial.takes_positions
        and not llm._is_stateful
        and trial.agrees(trial.packed)
        and trial.agrees(trial.side_by_side)
    )
    if not packed and not trial.agrees(trial.with_other_ends):
        raise refusal(llm, name, "sees the words that it shall predict")
    forwards = inspect.signature(llm.prepare_inputs_for_generation).parameters
    generates = "inputs_embeds" in forwards and (packed or trial.agrees(trial.written))
    return packed, packed and set_in_pieces(llm, trial), generates


def set_in_pieces(llm, trial):
    """Attention from now on that knows Pieces, if the type lets it and is right with it."""
    before = llm.config._attn_implementation
    if before != "sdpa" or not llm._can_set_attn_implementation():
        return False
    llm.set_attn_implementation(SDPA_IN_PIECES)
    right = trial.agrees(trial.packed_in_pieces)
    if not right:
        llm.set_attn_implementation(before)
    return right


def continue_alone(llm, embeddings, mask, max_new_tokens, ends, streamer=None):
    """What transformers' generate does, for types where it cannot: the likeliest token after each
    prompt, one after the other, everything read anew -> token ids (B, T). ends: ids that end a
    text; streamer: transformers' TextStreamer, of one prompt."""
    kept, written = llm.read(embeddings, mask), mask.new_zeros(len(mask), 0, dtype=torch.long)
    ended = mask.new_zeros(len(mask), dtype=torch.bool)
    if streamer:
        streamer.put(written)  # the prompt, which it leaves out
    while written.shape[1] < max_new_tokens and not ended.all():
        hidden = llm.follow(kept, torch.nn.functional.pad(written, (0, 1)))[:, -1]
        tokens = llm.head(hidden).argmax(-1).masked_fill(ended, ends[0])
        written = torch.cat([written, tokens[:, None]], 1)
        ended |= torch.isin(tokens, torch.tensor(ends, device=tokens.device))
        if streamer:
            streamer.put(tokens.cpu())
    if streamer:
        streamer.end()
    return written


class Trial:
    """Five prompts that begin alike, ids (5, LENGTH), and what the LLM predicts along each of them
    by itself, alone (5, LENGTH, 500). Four methods read the same in another way -> what it predicts
    in N places (N, 500), and what it should."""

    def __init__(self, llm, body, head):
        self.llm, self.table = llm, llm.get_input_embeddings()
        self.body, self.head = body, head
        takes = inspect.signature(base_of(llm).forward).parameters
        self.takes_positions = "position_ids" in takes
        # GPT-Neo's layers look back so many columns: its branches have to stand further off
        self.gap = getattr(llm.config, "window_size", 0) or 0
        device, random = self.table.weight.device, torch.Generator().manual_seed(0)

        def draw(*shape):
            return torch.randint(self.table.num_embeddings, shape, generator=random).to(device)

        self.ids, self.other, self.some = draw(5, LENGTH), draw(5, LENGTH), draw(500)
        for row, shared in zip(self.ids, SHARED):
            row[:shared] = self.ids[-1, :shared]
        self.alone = self.predict(self.ids)
        self.spread = (self.alone - self.alone.flatten(0, 1).mean(0)).norm(dim=-1).median()
        # A leak is as large as the spread. Half precision rounds
        self.tolerance = 1e-3 if self.table.weight.dtype == torch.float32 else 0.25

    def embed(self, ids):
        """Ids (B, L) -> embeddings. The second token of all prompts is no word, as soft tokens are
        none."""
        soft = self.ids[-1, 1]
        no_word = (self.table(soft) + self.table(self.other[0, 0])) / 2
        return torch.where((ids == soft)[..., None], no_word, self.table(ids))

    def predict(self, ids, mask=None, position=None, cache=None):
        """... -> logits (B, L, 500), less their mean."""
        return self.centred(self.head(self.body(self.embed(ids), mask, position, cache), self.some))

    @staticmethod
    def centred(logits):
        return logits.float() - logits.float().mean(-1, keepdim=True)

    def agrees(self, read):
        """Three of four predictions are as they should be: in a mixture of experts rounding may
        send some tokens to another expert."""
        try:
            found, wanted = read()
        except ERRORS:
            return False
        return bool(((found - wanted).norm(dim=-1) / self.spread).quantile(0.75) < self.tolerance)

    def packed(self, cut=lambda branch: {}):
        """A trunk, and the prompts as branches that leave it (assets/fast/packing.py)."""
        filler, parts, done = self.other[0, :1].expand(self.gap), [], 0
        for number, (row, shared) in enumerate(zip(self.ids, SHARED), 1):
            own = row[shared - 1 :]
            parts += [(0, done, row[done : shared - 1]), (-1, 0, filler), (number, shared - 1, own)]
            done = shared - 1  # branch, its first position, its tokens
        ids = torch.cat([own for *_, own in parts])
        branch = torch.cat([torch.full_like(own, number) for number, _, own in parts])
        position = torch.cat([first + torch.arange(len(own)).to(own) for _, first, own in parts])
        pieces = cut(branch[None].cpu())
        mask = in_pieces(pieces) if pieces else packed_attention(branch[None])
        found = self.predict(ids[None], mask, position[None])[0]
        wanted = [row[shared - 1 :] for row, shared in zip(self.alone, SHARED)]
        return found[branch > 0], torch.cat(wanted)

    def packed_in_pieces(self):
        return self.packed(lambda branch: {"branch": branch} | cut_in_pieces(branch, long=0))

    def side_by_side(self):
        """Two prompts, padded on the left, into a cache. Then two of their tokens, one after the
        other, each beside a stranger that goes its own way (assets/fast/search.py)."""
        ends, own = torch.tensor([[4, max(SHARED)], [2, SHARED[2]]]), torch.eye(2, dtype=torch.bool)
        ids, mask, position = self.padded([self.ids[n, :end] for n, end in ends.tolist()])
        cache, sees, found, wanted = DynamicCache(), mask.bool()[:, None], [], []
        self.predict(ids, mask, position, cache)
        for step, place in enumerate((0, 1)):
            row, column = ends[:, 0], ends[:, 1] + step
            ids = self.other[:2, :2].clone()
            ids[:, place] = self.ids[row, column]
            # In the second step own tokens and strangers change places, and so does what they see
            sees = torch.cat([sees.expand(2, 2, -1).flip(1), own.to(ids.device).expand(2, 2, 2)], 2)
            position = position[:, -1:].expand(2, 2) + 1
            states = self.predict(ids, sees[:, None], position, cache)
            found.append(states[:, place])
            wanted.append(self.alone[row, column])
        return torch.cat(found), torch.cat(wanted)

    def written(self):
        """What transformers' generate writes after prompts of five lengths, with a cache."""
        rows = [row[: LENGTH - n] for n, row in enumerate(self.ids)]
        ids, mask, _ = self.padded(rows)
        settings = dict(max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0)
        out = self.llm.generate(
            inputs_embeds=self.embed(ids),
            attention_mask=mask,
            return_dict_in_generate=True,
            output_logits=True,
            **settings,
        )
        whole = [torch.cat([row, new[:2]]) for row, new in zip(rows, out.sequences)]
        wanted = self.predict(torch.nn.utils.rnn.pad_sequence(whole, True))
        wanted = [logits[len(row) - 1 : len(row) + 2] for logits, row in zip(wanted, rows)]
        return self.centred(torch.stack(out.logits, 1)[..., self.some]), torch.stack(wanted)

    def with_other_ends(self):
        """What comes later changes nothing."""
        half = LENGTH // 2
        ids = torch.cat([self.ids[:, :half], self.other[:, half:]], 1)
        return self.predict(ids)[:, :half].flatten(0, 1), self.alone[:, :half].flatten(0, 1)

    @staticmethod
    def padded(rows):
        """Token ids [(L,), ...] -> ids (B, L) padded on the left, mask, positions."""
        ids = torch.nn.utils.rnn.pad_sequence(rows, True, 0, "left")
        mask = torch.nn.utils.rnn.pad_sequence(
            [torch.ones_like(row) for row in rows], True, 0, "left"
        )
        return ids, mask, (mask.cumsum(1) - 1).clamp(min=0)
