"""The frozen LLM, of whatever type: how it is loaded, checked and asked. Two classes, for
decoder-only and for encoder-decoder LLMs, with the same three methods:

    read(embeddings, mask)     prompts -> what is kept of them
    states(kept, targets)      the last hidden states that predict each token of targets after them
    head(hidden, tokens)       those states -> logits

This is the definition, one row an example. A type that can be packed (`packs`, which check finds
out) has `body` as well, which assets/fast/packing.py and assets/fast/search.py use to do the same
with less work."""

import inspect
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationConfig,
)
from transformers.utils import logging as hf_logging

from assets.fast.attention import Pieces
from assets.plumbing.frames import end_id
from assets.plumbing.guard import InputError
from assets.plumbing.packable import (
    base_of,
    continue_alone,
    how_to_read,
    refusal,
    refused_in_one_line,
)
from assets.plumbing.run import autocast, from_pretrained, precision, say

hf_logging.disable_progress_bar()


def additive(may_attend, dtype):
    """A mask (B, 1, N, S), True = "may attend", as numbers to add to attention's logits, finite in
    every type that autocast may choose."""
    zeros = torch.zeros(may_attend.shape, dtype=dtype, device=may_attend.device)
    return zeros.masked_fill_(~may_attend, -3e4)


def computed_again(forward, *inputs, **more):
    if torch.is_grad_enabled():
        return checkpoint(forward, *inputs, use_reentrant=False, **more)
    return forward(*inputs, **more)


class LLM(nn.Module):
    """What the two classes share. network: transformers' model, of which names of types, caps and
    scales are known nowhere else; name: what errors call it; trained: no longer frozen."""

    def __init__(self, network, tokenizer, name="", trained=False):
        super().__init__()
        self.network, self.tokenizer, self.name, self.trained = network, tokenizer, name, trained
        self.width = network.get_input_embeddings().embedding_dim
        config = network.config.get_text_config()

        # Within a sliding window it slides over nothing
        limits = [
            getattr(config, name, None)
            for name in ("max_position_embeddings", "sliding_window", "attention_chunk_size")
        ]
        self.context = min([limit for limit in limits if limit], default=1 << 20)

        # Some types scale their logits (T5), some cap them (Gemma 2)
        self.cap = getattr(config, "final_logit_softcapping", None)
        self.logit_scale = 1.0

        takes = inspect.signature(base_of(network).forward).parameters
        self.cache_name = "cache" if "cache" in takes else "past_key_values"  # renamed in 5.24
        network.requires_grad_(trained)

        # Of the checkpoint's ways to generate only the ids stand: no beams, no penalties
        given = getattr(network, "generation_config", None) or GenerationConfig()
        ids = "bos_token_id eos_token_id pad_token_id decoder_start_token_id".split()
        network.generation_config = GenerationConfig(**{k: getattr(given, k) for k in ids})

    def train(self, mode=True):
        """A frozen LLM stays in eval mode, whatever its parent does: its dropout would be noise
        that nothing can learn from."""
        return super().train(mode and self.trained)

    def autocast(self):
        return autocast(self.network.device)

    def checkpoint_layers(self):
        """From now on a layer keeps nothing but its input, and is computed again when the gradient
        comes by: memory of one layer in place of all, a third more arithmetic, equal gradients."""
        for layer in self.layers():
            layer.forward = partial(computed_again, layer.forward)

    def compile_layers(self):
        """From now on what stands between a layer's matrix products is fused, for all shapes. To be
        called before checkpoint_layers, at which a compiler would stop. Rows stay whole: it would
        make a graph for each way to cut them."""
        self.in_pieces = False
        for layer in self.layers():
            layer.forward = torch.compile(layer.forward, dynamic=True)

    def layers(self):
        config = self.network.config.get_text_config()
        for layers in self.network.modules():
            if isinstance(layers, nn.ModuleList) and len(layers) == config.num_hidden_layers:
                yield from layers

    @torch.no_grad()
    def check(self, ids):
        """What is computed here must be what the LLM itself computes, on ids (1, T) and in all. And
        what this type can beside the definition: packs, generates."""
        with refused_in_one_line(self.network, self.name):
            self.check_logits(ids)
            self.loudness(ids[0])  # some types keep nothing of the kind between their layers
            if self.packs:
                network, name = self.network, self.name
                known = how_to_read(network, self.body, self.head, name)
                self.packs, self.in_pieces, self.generates = known
                if not self.packs:
                    kind = network.config.model_type
                    say(f"--llm {name}: of type {kind}, which reads one by one: slower")

    def check_logits(self, ids):
        hidden, whole = self.both_ways(ids)
        error = (whole - self.head(hidden)).norm() / whole.norm()
        if error > 0.02:
            logits = self.head(hidden)
            self.logit_scale = float((whole * logits).sum() / logits.pow(2).sum())
            error = (whole - self.head(hidden)).norm() / whole.norm()
        if error > 0.02:
            why = "makes logits that are not those of its output embeddings"
            raise refusal(self.network, self.name, why)

    def embed(self, ids):
        """Token ids (...) -> the words' embeddings (..., width)."""
        return self.network.get_input_embeddings()(ids)

    def states(self, kept, targets):
        """The last hidden states that predict each token of targets [(T,), ...] after the prompts
        that were read, one target after the other: (all T, width). One prompt for all, or as
        many."""
        targets = [torch.as_tensor(target, device=kept[0].device) for target in targets]
        kept = [x.expand(len(targets), *x.shape[1:]) for x in kept]
        hidden = self.follow(kept, nn.utils.rnn.pad_sequence(targets, True))
        return torch.cat([row[: len(target)] for row, target in zip(hidden, targets)])

    def head(self, hidden, tokens=None):
        """Logits (N, V) in fp32, or of some tokens alone."""
        out = self.network.get_output_embeddings()
        weight, bias = out.weight, out.bias
        if tokens is not None:
            weight, bias = weight[tokens], None if bias is None else bias[tokens]
        logits = nn.functional.linear(hidden, weight, bias).float() * self.logit_scale
        return self.cap * torch.tanh(logits / self.cap) if self.cap else logits

    @torch.no_grad()
    def loudness(self, ids):
        """How loud input embeddings have to be to enter the first layer as loud as the words ids
        (T,) are half way up the layers. The median: some tokens of large LLMs are very loud."""
        embeddings = self.embed(ids[None])
        states = self.reader(inputs_embeds=embeddings, output_hidden_states=True).hidden_states
        half_way = states[(len(states) - 1) // 2].float().pow(2).mean(-1).sqrt().median()

        # 1, but for types that multiply whatever is put in
        gain = (states[0] * embeddings).sum() / embeddings.pow(2).sum()
        return half_way / gain

    @torch.no_grad()
    def generate(self, embeddings, mask, max_new_tokens, **more):
        """Greedy continuation of each prompt, as text (transformers' generate, with its key/value
        cache, and its further arguments)."""
        end, pad = end_id(self.tokenizer), self.tokenizer.pad_token_id
        # A list where a chat has ends of its own
        ends = self.network.generation_config.eos_token_id
        ends = [end, *ends] if isinstance(ends, list) else [end, self.tokenizer.eos_token_id]
        if not self.generates:
            out = continue_alone(self, embeddings, mask, max_new_tokens, ends, **more)
            return self.decoded(out)
        out = self.network.generate(
            inputs_embeds=embeddings,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            **more,
            eos_token_id=ends,
            pad_token_id=end if pad is None else pad,
        )
        return self.decoded(out)

    def decoded(self, ids):
        """Token ids (B, T) -> texts. A template's end of a turn may be no special token."""
        ids = ids.masked_fill(ids == end_id(self.tokenizer), self.tokenizer.eos_token_id)
        return [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]


class DecoderOnly(LLM):
    """The prompt and what is written are one sequence."""

    side = "left"  # where prompts are padded: they end where writing goes on
    packs = generates = in_pieces = True

    @property
    def reader(self):
        """The layers that read a prompt, without the head."""
        return base_of(self.network)

    def both_ways(self, ids):
        return self.body(self.embed(ids)), self.network(input_ids=ids).logits.float()

    def body(self, embeddings, mask=None, positions=None, cache=None):
        """All but the head -> last hidden states (B, L, width); a cache grows. mask: (B, L), 1 at
        tokens, (B, 1, L, S), True means "may attend", or Pieces; positions (B, L). None: as the
        type has it."""
        pieces, dtype = None, embeddings.dtype
        if isinstance(mask, Pieces):
            pieces = mask._replace(masks=[additive(part, dtype) for part in mask.masks])
            mask = pieces.masks[0]  # not read, but a type makes none of its own then
        elif mask is not None and mask.ndim == 4:
            mask = additive(mask, dtype)
        given = {"attention_mask": mask, "position_ids": positions, "pieces": pieces}
        given[self.cache_name] = cache
        return self.reader(
            inputs_embeds=embeddings,
            use_cache=cache is not None,
            **{name: value for name, value in given.items() if value is not None},
        ).last_hidden_state

    def read(self, embeddings, mask):
        """Embeddings (B, L, width) and mask (B, L) of prompts, padded on the left, are all there
        is."""
        return embeddings, mask

    def follow(self, kept, ids):
        """States (N, T, width) that predict ids (N, T), after prompts that were read. Types that do
        not pack are padded on the right alone, where no token before it sees what is there."""
        (embeddings, mask), words = kept, self.embed(ids[:, :-1])
        if not self.packs:
            prompts = [row[own] for row, own in zip(embeddings, mask.bool())]
            rows = [torch.cat(parts) for parts in zip(prompts, words)]
            hidden = self.body(nn.utils.rnn.pad_sequence(rows, True))
            ends = [(len(row) - ids.shape[1], len(row)) for row in rows]
            return torch.stack([states[a:b] for states, (a, b) in zip(hidden, ends)])
        embeddings = torch.cat([embeddings, words], 1)
        mask = torch.cat([mask.long(), torch.ones_like(ids[:, :-1])], 1)
        return self.body(embeddings, mask, positions(mask))[:, -ids.shape[1] :]


class EncoderDecoder(LLM):
    """The encoder reads the prompt, the decoder writes. Its rows are not packed: slower, and
    right."""

    side = "right"
    packs, generates, in_pieces = False, True, False

    @property
    def reader(self):
        return self.network.get_encoder()

    def autocast(self):
        """T5's activations overflow fp16: it computes in fp32 where there is no bf16."""
        if precision(self.network.device) == torch.float16:
            return nullcontext()
        return super().autocast()

    def both_ways(self, ids):
        known = self.network.generation_config
        if known.decoder_start_token_id is None and known.bos_token_id is None:
            raise refusal(self.network, self.name, "says no token with which its decoder starts")
        kept = self.read(self.embed(ids), torch.ones_like(ids))
        whole = self.network(input_ids=ids, decoder_input_ids=ids).logits.float()
        return self.decode(kept, ids), whole

    def read(self, embeddings, mask):
        """Embeddings (B, L, width), mask (B, L) -> the encoder's states (B, L, width), mask."""
        encoded = self.reader(inputs_embeds=embeddings, attention_mask=mask.long())
        return encoded.last_hidden_state, mask

    def decode(self, kept, ids):
        """Decoder inputs (N, T) after prompts that were read -> last hidden states (N, T,
        width)."""
        states, mask = kept
        return self.network.get_decoder()(
            input_ids=ids,
            encoder_hidden_states=states,
            encoder_attention_mask=mask.long(),
            use_cache=False,
        ).last_hidden_state

    def follow(self, kept, ids):
        """States (N, T, width) that predict ids (N, T): the decoder reads a start token, then
        they."""
        known = self.network.generation_config
        start = known.decoder_start_token_id
        start = known.bos_token_id if start is None else start  # as transformers does
        return self.decode(kept, torch.cat([torch.full_like(ids[:, :1], start), ids[:, :-1]], 1))


def positions(mask):
    """Mask (B, L), 1 at tokens, wherever the padding is -> the place of each token in its row."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def load_llm(name, trained, device):
    """A folder or hub id -> its LLM. A frozen one is in bf16 where the device has it, else in fp32,
    like one that trains: a step is lost in bf16's rounding. Attention is transformers' choice."""
    seq2seq = from_pretrained(AutoConfig, name, "--llm").is_encoder_decoder
    half = not trained and precision(device) == torch.bfloat16
    network = from_pretrained(
        AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM,
        name,
        "--llm",
        dtype=torch.bfloat16 if half else torch.float32,
    )
    tokenizer = from_pretrained(AutoTokenizer, name, "--llm")
    rows = network.get_input_embeddings().num_embeddings
    # Gemma 3's tokenizer has one for images, which no row stands for, and which no text uses
    extra = len(tokenizer) == rows + 1 and rows in tokenizer.get_added_vocab().values()
    if tokenizer.eos_token_id is None or len(tokenizer) > rows + extra:
        raise InputError(
            f"--llm {name}: its tokenizer has no end token (eos_token in tokenizer_config.json) or "
            "is another LLM's"
        )
    return (EncoderDecoder if seq2seq else DecoderOnly)(network, tokenizer, name, trained)
