"""The item-language model: item encoder -> linear adapter -> soft tokens between the words of a frozen LLM. Reads, ranks, writes.

    python ilm.py --run out/toy/ilm "Describe {item:007}."              # one answer
    python ilm.py --run out/toy/ilm                                     # a conversation

    CF vector of an item or a user --(Q-Former or MLP)--> Q states --(adapter)--> Q soft tokens --.
    prompt: "So far: Amber Key <3><3>, Jade Road <8><8>. Next for user <u><u>" --(embedding)--> frozen LLM -> p(next token)

Source: ILM (arXiv 2406.02844), section on stage 2; the MLP encoder is CoLLM's. Simplified against the paper: the LLM is whatever
checkpoint you name, decoder-only or encoder-decoder."""

import datetime
import re
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
)
from transformers.utils import logging as hf_logging

from assets.cf import last_items
from assets.fast.search import Trie, additive, search, segment_logsumexp
from assets.guard import InputError, Parser, a_seed, run_script
from assets.hub import Portable
from assets.later import extend
from assets.plumbing.packable import base_of, continue_alone
from assets.run import (
    autocast,
    check_fingerprint,
    from_pretrained,
    load_weights,
    pick_device,
    precision,
    read_config,
)
from data import SOFT, item_names, load_dataset, training_moments
from qformer import Adapter, MLPEncoder, QFormer, QFormerConfig

hf_logging.disable_progress_bar()
SOFT_BASE = (
    1 << 24
)  # in token ids: SOFT_BASE + entity * Q + q is the q-th soft token of an entity (see Prompt)
START_TEMPERATURE = 0.4  # of the frozen LLM's voice among the trie's children, for all methods and data sets; it is learned
PRIORS = ("popularity", "uniform", "none")
# What a chat template gets that writes today's date: a run must not change overnight (config.json keeps it)
CHAT_DATE = "2024-07-26"

MENTION = re.compile(r"\{(user|history|item)(?::([\d,]+))?\}")
# A template that ends with a user
ASKS_ABOUT_USER = re.compile(r"(.*?)(\{user(?::\d+)?\})\W*", re.DOTALL)


class Prompt(list):
    """Token ids, and the standardised CF vectors [(E,), ...] that they mention beside the catalogue's: entity i < I is item i, entity
    I + n is cf[n]: a user at a moment, a mixture of items. So a user is nothing that the model knows: their vector travels along."""

    def __init__(self, ids=(), cf=()):
        super().__init__(ids)
        self.cf = list(cf)


# ---- Packed rows: several examples in one sequence (train_stage2.pack) ------------------------------------------------


def packed_attention(batch):
    """Who may see whom in packed rows -> (B, 1, L, L), True means "may attend". A token sees what stands before it in its own branch,
    and the part of the trunk before its branch left:

        key      A B C | . u | . u | . u
        trunk C  x x x   . .   . .   . .
        . u of 1 x . .   x x   . .   . .       branch 1 left after A
        . u of 2 x x .   . .   x x   . .       branch 2 left after B, and does not know branch 1

    (" . u " stands for the end of a prompt, as in "So far: A, B. Next for user u"; within a branch, too, no token sees the next.)"""
    branch, position, attach = batch["branch"], batch["position"], batch["attach"]
    L = branch.shape[1]
    earlier = torch.ones(L, L, dtype=torch.bool, device=branch.device).tril()
    own = (branch[:, :, None] == branch[:, None, :]) & earlier
    trunk = (branch[:, None, :] == 0) & (position[:, None, :] < attach[:, :, None])
    return (own | trunk)[:, None]


def unpacked(batch):
    """Yield every branch of packed rows as an example of its own, in order: where its prompt stands in the rows, laid end to end (P,),
    and its target ids (T,)."""
    parts = zip(*(batch[k] for k in ("ids", "position", "branch", "attach", "label")))
    for row, (ids, position, branch, attach, label) in enumerate(parts):
        for number in range(1, int(branch.max()) + 1):
            own = (branch == number).nonzero()[:, 0]
            first = int((label[own] >= 0).nonzero()[0, 0])  # stands at the prompt's last token
            trunk = ((branch == 0) & (position < attach[own[0]])).nonzero()[:, 0]
            yield row * len(ids) + torch.cat([trunk, own[: first + 1]]), label[own[first:]]


def as_turns(template, tokenizer):
    """A template -> the turns of a conversation. A chat LLM that is asked about a user reads the user's soft tokens
    in the answer that it has begun, "For {user}", so that nothing of its template stands between them and
    the item's name; the question is what stands before."""
    if not isinstance(template, str):
        return template
    asked = ASKS_ABOUT_USER.fullmatch(template)
    return (
        [asked[1].strip(), f"For {asked[2]}"] if asked and tokenizer.chat_template else [template]
    )


def frame(turns, tokenizer, date=CHAT_DATE):
    """The turns of a conversation, user and model in turn -> one text, and whether the tokenizer puts its own
    special tokens around it. By the LLM's chat template, if it has one: the model's next turn is opened, and
    begun by the last of an even number of turns. date: what a template is told that asks for today's."""
    if not tokenizer.chat_template:
        said = [
            (" ", "\n")[k % 2] + turn for k, turn in enumerate(turns[1:])
        ]  # answers after a space
        return turns[0] + "".join(said), True
    asked, begun = (turns, "") if len(turns) % 2 else (turns[:-1], turns[-1])
    roles = [
        {"role": ("user", "assistant")[k % 2], "content": turn} for k, turn in enumerate(asked)
    ]
    written = lambda call: repr(datetime.date.fromisoformat(date).strftime(call[2]))
    dated = re.sub(r"strftime_now\((['\"])(.*?)\1\)", written, tokenizer.chat_template)
    framed = tokenizer.apply_chat_template(
        roles, chat_template=dated, tokenize=False, add_generation_prompt=True
    )
    return framed + begun, False


def shifted(ids, count, num_items, Q):
    """ids of a Prompt, whose vectors come after `count` others: entity I + n becomes I + n + count."""
    own = SOFT_BASE + num_items * Q
    return [i + count * Q if i >= own else i for i in ids]


# ---- The model -------------------------------------------------------------------------------------------------------


class ILM(nn.Module, Portable):
    """encoder (None for the text-only baseline), adapter, frozen LLM. `cf` (I, E): the standardised vectors of the items."""

    def __init__(self, llm, tokenizer, encoder, dataset, config):
        super().__init__()
        self.llm, self.tokenizer, self.encoder, self.config = llm, tokenizer, encoder, config
        self.seq2seq = llm.config.is_encoder_decoder
        self.train_llm = config["train_llm"]
        self.Q, self.num_items, self.dataset = config["num_queries"], len(dataset.items), dataset
        self.names = item_names(dataset, tokenizer, config["item_names"], config["name_tokens"])
        limits = [
            getattr(llm.config.get_text_config(), name, None)
            for name in ("max_position_embeddings", "sliding_window", "attention_chunk_size")
        ]
        self.context = min(
            [n for n in limits if n], default=1 << 20
        )  # within a sliding window it slides over nothing
        self.register_buffer("cf", dataset.item_cf.clone(), persistent=False)
        self.history = getattr(encoder, "history", 0)  # W
        self.history_cf = nn.functional.pad(
            dataset.item_cf, (0, 0, 0, 1)
        )  # on the CPU: users' vectors travel with the batch
        self.shuffled = False
        if config.get("shuffle_cf"):
            self.shuffle_cf()
        self.name_ids = [self.target_ids(name) for name in self.names]
        self.names_trie, self.device_trie = Trie(self.name_ids), None
        self.reserve = max(64, *map(len, self.name_ids))  # tokens kept free for an answer
        tokenizer.add_tokens([SOFT], special_tokens=True)
        self.soft_id, self.zero_soft = (
            tokenizer.convert_tokens_to_ids(SOFT),
            False,
        )  # zero_soft: a control of evaluate.py
        self.hidden, self.adapter = llm.get_input_embeddings().embedding_dim, None
        self.check_llm()
        if config.get("full_vocabulary"):
            self.set_prior("none", "fixed")  # its loss knows no trie
        else:
            self.set_prior(config.get("prior", "none"), config.get("temperature", "fixed"))
        if encoder is not None:
            self.adapter = (
                nn.Identity()
                if isinstance(encoder, MLPEncoder)
                else Adapter(self.Q, encoder.width, self.hidden)
            )
            self.soft_scale = nn.Parameter(torch.ones(()), requires_grad=False)
            self.match_scale()
        llm.requires_grad_(self.train_llm)

    def set_prior(self, prior, temperature):
        """The prior in the trie: p is divided among a node's children not by the LLM's logits alone, but by

            logit' = log_count[child] + tau * logit

        log_count is the log of 1 + the training purchases of each item below the child, summed ("uniform": of the number of items there);
        tau says how loudly the frozen LLM is heard, and is learned. So an ILM starts near popularity, and not at a frozen LLM's opinion of
        titles, which would have to be unlearned first: 7.3 nats in place of 9.8 on ML-100K, where popularity has 7.0. DEVIATION: the
        paper has no such thing (--prior none --temperature fixed)."""
        purchases = self.dataset.purchases if prior == "popularity" else torch.zeros(self.num_items)
        below = self.names_trie.sums(1 + purchases).log().float()
        self.register_buffer(
            "log_count", torch.zeros_like(below) if prior == "none" else below, persistent=False
        )
        learned = temperature == "learned" and (self.encoder is not None or self.train_llm)
        self.tau = nn.Parameter(
            torch.tensor(START_TEMPERATURE if learned else 1.0), requires_grad=learned
        )

    def among_children(self, logit, child):
        """The LLM's logits of children's tokens (M,) -> those by which p is divided among them (M,)."""
        return self.log_count[child] + self.tau * logit

    def train(self, mode=True):
        """A frozen LLM stays in eval mode, whatever its parent does: its dropout would be noise that nothing can learn from."""
        super().train(mode)
        if not self.train_llm:
            self.llm.eval()
        return self

    def autocast(self):
        """As for the scripts; T5's activations overflow fp16, so that it computes in fp32 where there is no bf16."""
        return (
            nullcontext()
            if self.seq2seq and precision(self.cf.device) == torch.float16
            else autocast(self.cf.device)
        )

    @torch.no_grad()
    def match_scale(self):
        """A Q-Former's adapter reads whitened states. Soft tokens start as loud as the LLM's own states half way up its layers
        (the median: some tokens of large LLMs are very loud), so that the layers pass them on instead of drowning them, and a prompt that
        ends with them can be answered from them (assets/docs/FINDINGS.md). DEVIATION: the paper names no scale. Both stay as set."""
        ids = torch.tensor(
            [sum(self.name_ids[:64], [])[: min(256, self.context)]], device=self.cf.device
        )
        reader = self.llm.get_encoder() if self.seq2seq else base_of(self.llm)
        embeddings = self.llm.get_input_embeddings()(ids)
        states = reader(inputs_embeds=embeddings, output_hidden_states=True).hidden_states
        # 1, but for types that multiply whatever is put in
        gain = (states[0] * embeddings).sum() / embeddings.pow(2).sum()
        words = states[(len(states) - 1) // 2].float().pow(2).mean(-1).sqrt().median() / gain
        probe = torch.randn(256, self.cf.shape[1], generator=torch.Generator().manual_seed(0))
        probe = self.with_history(probe.to(self.cf.device))
        if not isinstance(self.encoder, MLPEncoder):  # some thousands of items and users will do
            moments = training_moments(self.dataset.indptr, 2_000)
            recent = [
                last_items(self.dataset.items_of(u), [place], self.history)
                for u, place in zip(*moments)
            ]
            users = self.dataset.standard_users(self.dataset.moments(*moments))
            users = self.with_history(
                users, np.concatenate([np.zeros((0, self.history), int), *recent])
            ).to(self.cf)
            some = self.cf[:: self.num_items // 5_000 + 1]
            some = torch.cat([self.with_history(some), users])
            self.adapter.whiten_(self.encoder.eval().encode(some).flatten(0, 1))
        self.soft_scale.fill_(
            words / self.adapter(self.encoder.eval().encode(probe)).pow(2).mean().sqrt()
        )

    def with_history(self, vectors, recent=None):
        """Vectors (N, E) and the items before them (N, W), latest first, -1 for none (last_items) -> what encoders read (N, (1 + W) * E):
        the items' vectors behind their own. Items have no history. W is --history."""
        if not self.history:
            return vectors
        if recent is None:
            return nn.functional.pad(vectors, (0, self.history * self.cf.shape[1]))
        items = self.history_cf[torch.from_numpy(recent)]  # the last row is zeros: -1
        return torch.cat([vectors, items.flatten(1)], 1)

    def shuffle_cf(self):
        """A control: the CF vectors of all items are dealt out anew at random, and every user gets a
        stranger's (Examples.stranger); the same for every seed."""
        random = np.random.default_rng(0)
        order = torch.from_numpy(random.permutation(self.num_items)).to(self.cf.device)
        self.cf.copy_(self.cf[order])
        self.shuffled = True

    # -- prompts

    def prompt_ids(self, template, user=None, history=(), items=(), named=True, cf=None, guests=()):
        """Fill a template, tokenise it, fit it into the context -> a Prompt, in which soft tokens are
        SOFT_BASE + entity * Q + q.

        user: an index; cf (E,): what stands for them [their vector now]. {item:7}, {user:7} and {history:7,8}
        say themselves whom they mean, by index; {item:I+n} is guests[n], a vector (E,) that has no name.
        `named=False` leaves the names of {item} out (text tasks). A list of templates is a conversation, user
        and model in turn. What is too long loses its oldest history items, whole, then its oldest turns."""
        turns, history = as_turns(template, self.tokenizer), list(history)
        while True:
            prompt = self.tokenise(*self.filled(turns, user, history, items, named, cf, guests))
            if len(prompt) + self.reserve <= self.context or not history and len(turns) < 3:
                break
            history, turns = history[1:], turns if history else turns[2:]
        if not 0 < len(prompt) <= self.context - self.reserve:
            raise InputError(
                f"a prompt of {len(prompt)} tokens and {self.reserve} for the answer do not fit the LLM's context of "
                f"{self.context}; shorten it, or the names by --name-tokens: {turns[0][:60]!r}"
            )
        return prompt

    def filled(self, turns, user, history, items, named, cf, guests):
        """Templates with names and reserved tokens in place of {user}, {history} and {item} -> the texts, which
        entities the reserved tokens stand for, in order, and the vectors of those that are no items."""
        entities, vectors, queue = [], list(guests), list(items)
        with_names = self.config["prompt_items"] != "tokens" or self.encoder is None

        def soft(entity):
            entities.append(entity)
            return SOFT * self.Q if self.encoder is not None else ""

        def mention(match):
            given = [int(i) for i in match[2].split(",")] if match[2] else None
            if match[1] == "history":
                known = given or history
                return ", ".join(
                    (self.names[i] if with_names else "") + soft(int(i)) for i in known
                )
            if match[1] == "item":
                item = given[0] if given else queue.pop(0)
                name = self.names[item] if named and with_names and item < self.num_items else ""
                return (name + soft(item)) or "this item"
            person = given[0] if given else user
            if self.encoder is None:
                return f"user {self.dataset.users[person] if person is not None else ''}"
            vectors.append(self.user_now(person) if cf is None or given else cf)
            return f"user {soft(self.num_items + len(vectors) - 1)}"

        texts = [MENTION.sub(mention, turn.replace(SOFT, "")) for turn in turns]
        return texts, entities, vectors

    def user_now(self, user):
        """What encoders read (E',) of a user of the data set after all that they chose."""
        vector = self.dataset.standard_users(self.dataset.users_at([user]))
        items = self.dataset.items_of(user)
        return self.with_history(vector, last_items(items, [len(items)], self.history))[0]

    def tokenise(self, texts, entities, vectors):
        """The turns of a conversation, framed as the LLM is used to, as one text -> a Prompt. Soft tokens
        replace the reserved token one by one, counted."""
        framed, special = frame(texts, self.tokenizer, self.config.get("chat_date", CHAT_DATE))
        ids = self.tokenizer(framed, add_special_tokens=special)["input_ids"]
        if self.encoder is not None:
            slots = iter([SOFT_BASE + e * self.Q + q for e in entities for q in range(self.Q)])
            assert ids.count(self.soft_id) == self.Q * len(entities), (
                "the tokenizer lost a soft token"
            )
            ids = [next(slots) if i == self.soft_id else i for i in ids]
        return Prompt(ids, vectors)

    def target_ids(self, text):
        """What follows a prompt: after a space, unless it is the reply in a chat, or the tokenizer puts one before every text."""
        ids = lambda text: self.tokenizer(text, add_special_tokens=False)["input_ids"]
        space = "" if self.tokenizer.chat_template or ids("a a") == 2 * ids("a") else " "
        return ids(space + text) + [self.tokenizer.eos_token_id]

    # -- forward

    def soft_tokens(self, cf):
        """Standardised CF vectors (N, E) of items or users -> their soft tokens (N, Q, hidden)."""
        tokens = self.adapter(self.encoder.encode(cf)) * self.soft_scale
        return tokens * 0 if self.zero_soft else tokens

    def soft_index(self, ids, cf):
        """Where the soft tokens of ids (B, L) stand and what they are, worked out on the CPU, so that the device is never asked.
        cf [(E,), ...]: the vectors of entities I, I + 1, ... -> a dict of tensors, empty where there is no soft token."""
        flat = ids.flatten()
        place = (flat >= SOFT_BASE).nonzero()[:, 0]
        if not len(place):
            return {}
        slot = flat[place] - SOFT_BASE
        # Each is encoded once, however often it occurs; users come last, since unique sorts
        entity, inverse = torch.unique(slot // self.Q, return_inverse=True)
        guests = (entity[entity >= self.num_items] - self.num_items).tolist()
        vectors = torch.zeros(0, self.cf.shape[1])
        if guests:
            vectors = nn.utils.rnn.pad_sequence([cf[n] for n in guests], True)
        return {
            "soft_place": place,
            "soft_token": inverse * self.Q + slot % self.Q,
            "soft_item": entity[entity < self.num_items],
            "soft_cf": vectors,
        }

    def embed(self, ids, soft=None):
        """Token ids (B, L) -> input embeddings (B, L, hidden): words from the LLM's table, soft tokens from the item encoder.
        soft: soft_index of the ids, by now on the device; without it there are words alone."""
        if not soft or "soft_place" not in soft:
            return self.llm.get_input_embeddings()(ids)
        words = self.llm.get_input_embeddings()(ids.masked_fill(ids >= SOFT_BASE, 0))
        items, users = self.with_history(self.cf[soft["soft_item"]]), soft["soft_cf"].to(self.cf)
        if users.shape[1] < items.shape[1]:  # a mixture of items
            users = self.with_history(users)
        tokens = self.soft_tokens(torch.cat([items, users])).flatten(0, 1)
        tokens = tokens.index_select(0, soft["soft_token"]).to(words.dtype)
        return words.flatten(0, 1).index_copy(0, soft["soft_place"], tokens).view(words.shape)

    def body(self, embeddings, attention_mask, position_ids, cache=None):
        """The LLM without its head -> last hidden states (B, L, hidden); a cache grows. None: as the LLM itself has it."""
        given = {
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            self.cache_name: cache,
        }
        return base_of(self.llm)(
            inputs_embeds=embeddings,
            use_cache=cache is not None,
            **{name: value for name, value in given.items() if value is not None},
        ).last_hidden_state

    def read_alone(self, rows, counts):
        """The definition of reading, for LLMs whose type does not pack (assets/plumbing/packable.py). Embeddings of examples
        [(L, hidden), ...], each a row of its own, padded on the right -> the hidden states of the last counts[n] tokens of
        each, one after the other."""
        hidden = self.body(nn.utils.rnn.pad_sequence(rows, True), None, None)
        kept = zip(hidden, rows, counts)
        return torch.cat([states[len(row) - n : len(row)] for states, row, n in kept])

    def encode_prompts(self, embeddings, mask):
        """An encoder-decoder LLM reads its prompts -> states (B, L, hidden), mask (B, L)."""
        return self.llm.get_encoder()(
            inputs_embeds=embeddings, attention_mask=mask.long()
        ).last_hidden_state, mask

    def decode(self, ids, states, mask):
        """... and continues ids (B, T), the start token first -> last hidden states (B, T, hidden)."""
        return self.llm.get_decoder()(
            input_ids=ids,
            encoder_hidden_states=states,
            encoder_attention_mask=mask.long(),
            use_cache=False,
        ).last_hidden_state

    def decode_branches(self, batch):
        """The simple path of LLMs that cannot read packed rows, encoder-decoders among them: every branch a row of its own ->
        hidden (N, hidden) of the targets, in row order."""
        prompts, targets = zip(*unpacked(batch))
        embeddings = self.embed(batch["ids"], batch)  # soft tokens are the same wherever they stand
        if not self.seq2seq:
            words = embeddings.flatten(0, 1)
            rows = [torch.cat([words[p], self.embed(t[:-1])]) for p, t in zip(prompts, targets)]
            return self.read_alone(rows, map(len, targets))
        width = max(len(place) for place in prompts)
        place = torch.stack([nn.functional.pad(p, (0, width - len(p)), value=-1) for p in prompts])
        states = self.encode_prompts(embeddings.flatten(0, 1)[place.clamp(min=0)], place >= 0)
        start = torch.tensor(
            [self.llm.generation_config.decoder_start_token_id], device=place.device
        )
        label = nn.utils.rnn.pad_sequence(targets, True, -100)
        hidden = self.decode(
            nn.utils.rnn.pad_sequence([torch.cat([start, t[:-1]]) for t in targets], True), *states
        )
        return hidden[label >= 0]

    def head(self, hidden, tokens=None):
        """Logits (N, V), or of some tokens alone."""
        out, rows = self.llm.get_output_embeddings(), slice(None) if tokens is None else tokens
        logits = (
            nn.functional.linear(
                hidden, out.weight[rows], None if out.bias is None else out.bias[rows]
            ).float()
            * self.logit_scale
        )
        return self.cap * torch.tanh(logits / self.cap) if self.cap else logits

    def index(self, batch):
        """What forward needs to know of a batch (train_stage2.collate) before the device has it: its soft tokens and its targets."""
        batch = batch | self.soft_index(batch["ids"], batch.pop("cf"))
        target = (batch["label"].flatten() >= 0).nonzero()[:, 0]
        token, node = batch["label"].flatten()[target], batch["node"].flatten()[target]
        return batch | {"target": target} | self.index_targets(token, node)

    def index_targets(self, token, node):
        """What log_p needs to know of target tokens (T,), worked out on the CPU: which of them are words of a text (node -1), and of
        those that are part of a name all children of their nodes (T,), among which p is divided, and which child is meant."""
        words, named = (node < 0).nonzero()[:, 0], (node >= 0).nonzero()[:, 0]
        parent, child = self.names_trie.children(node[named])
        hit = (self.names_trie.token[child] == token[named][parent]).nonzero()[:, 0]
        found = {"words": words, "word": token[words], "named": named}
        return found | {"parent": parent, "child": child, "hit": hit}

    def log_p(self, hidden, targets):
        """The last hidden states (T, hidden) that predict the targets (index_targets, on the device) -> log p of each, (T,)."""
        log_p = hidden.new_zeros(len(hidden), dtype=torch.float32)
        if len(targets["words"]):
            logits = self.head(hidden.index_select(0, targets["words"]))
            own = logits.gather(1, targets["word"][:, None])[:, 0]
            log_p = log_p.index_copy(0, targets["words"], own - logits.logsumexp(1))
        if len(targets["named"]):
            parent, child, trie = targets["parent"], targets["child"], self.trie()
            logits = self.head(hidden.index_select(0, targets["named"]), trie.vocabulary)
            logit = self.among_children(logits[parent, trie.column[child]], child)
            total = segment_logsumexp(logit, parent, len(targets["named"]))
            own = logit.index_select(0, targets["hit"])
            log_p = log_p.index_copy(0, targets["named"], own - total)
        return log_p

    def forward(self, batch):
        """An indexed batch of packed rows -> the sum of -log p over target tokens, and -log p of each of them (T,), in row order. p is
        divided among all tokens, or, where a target is part of a name, among those that the catalogue allows there."""
        batch = {key: value.to(self.cf.device, non_blocking=True) for key, value in batch.items()}
        if not self.packs:
            hidden = self.decode_branches(batch)
        else:
            embeddings = self.embed(batch["ids"], batch)
            mask = additive(packed_attention(batch), embeddings.dtype)
            hidden = self.body(embeddings, mask, batch["position"])
            hidden = hidden.flatten(0, 1).index_select(0, batch["target"])
        nll = -self.log_p(hidden, batch)
        return (
            nll.sum() + 0 * self.tau,
            nll,
        )  # of several processes none may leave tau without a gradient

    # -- inference

    def trie(self, renormalize=True):
        """The names' trie on the model's device."""
        if not renormalize:
            return Trie(self.name_ids, False).to(self.cf.device)
        if self.device_trie is None or self.device_trie.token.device != self.cf.device:
            self.device_trie = self.names_trie.to(self.cf.device)
        return self.device_trie

    def pad(self, prompts):
        """Prompts -> embeddings (B, L, hidden), mask (B, L), positions: padded on the left, to end where generation goes on; for an
        encoder on the right."""
        side = "right" if self.seq2seq else "left"
        cf, rows = [], []
        for prompt in prompts:
            rows.append(torch.tensor(shifted(prompt, len(cf), self.num_items, self.Q)))
            cf += getattr(prompt, "cf", [])
        pad = lambda rows: nn.utils.rnn.pad_sequence(rows, True, 0, side)
        mask, ids = (
            pad([torch.ones(len(row), dtype=torch.long) for row in rows]).to(self.cf.device),
            pad(rows),
        )
        soft = {key: value.to(self.cf.device) for key, value in self.soft_index(ids, cf).items()}
        return self.embed(ids.to(self.cf.device), soft), mask, (mask.cumsum(1) - 1).clamp(min=0)

    @torch.no_grad()
    def score(self, prompts, items, chunk=64):
        """log p of items' names after each prompt, prompts (B,), items (N,) -> (B, N). This is what ranking *is*: the sum over a name's
        tokens of log p, p divided among the trie's children at each of them, until the name is decided. rank finds the best of it
        faster."""
        scores = torch.zeros(len(prompts), len(items))
        for row, prompt in enumerate(prompts):
            for start in range(0, len(items), chunk):
                tokens, nodes = zip(
                    *(self.names_trie.paths[i] for i in items[start : start + chunk])
                )
                hidden = self.states([prompt] * len(tokens), tokens)
                named = self.index_targets(
                    torch.tensor(sum(tokens, [])), torch.tensor(sum(nodes, []))
                )
                log_p = self.log_p(hidden, {k: v.to(hidden.device) for k, v in named.items()}).cpu()
                lengths = [len(name) for name in tokens]
                scores[row, start : start + chunk] = torch.stack(
                    [part.sum() for part in log_p.split(lengths)]
                )
        return scores

    def states(self, prompts, targets):
        """The last hidden states that predict each token of targets [(T,), ...] after prompts [(P,), ...], one after the other."""
        before = [
            Prompt([*prompt, *target[:-1]], getattr(prompt, "cf", []))
            for prompt, target in zip(prompts, targets)
        ]
        if self.seq2seq:
            start = self.llm.generation_config.decoder_start_token_id
            embeddings, mask, _ = self.pad(prompts)
            decoded = [
                torch.tensor([start, *target[:-1]], device=self.cf.device) for target in targets
            ]
            ids = nn.utils.rnn.pad_sequence(decoded, True)
            hidden = self.decode(ids, *self.encode_prompts(embeddings, mask))
            return torch.cat([row[: len(target)] for row, target in zip(hidden, targets)])
        embeddings, mask, position = self.pad(before)
        if not self.packs:
            rows = [row[own.bool()] for row, own in zip(embeddings, mask)]
            return self.read_alone(rows, map(len, targets))
        hidden = self.body(embeddings, mask, position)
        return torch.cat([row[len(row) - len(target) :] for row, target in zip(hidden, targets)])

    def rank(self, prompts, trie, beams=None, taken=None):
        """score of the `beams` best items of each prompt, (B, I), the others -inf (assets/fast/search.py)."""
        return search(self, prompts, trie, beams, taken)

    def recommend(self, prompts, taken, k=10):
        """The k best items after each prompt, best first: [[(item, log p), ...], ...]. taken: for each prompt the items to leave out."""
        mask = torch.zeros(len(prompts), self.num_items, dtype=torch.bool)
        for row, items in zip(mask, taken):
            row[list(items)] = True
        with self.autocast():
            scores = self.rank(
                prompts,
                self.trie(),
                None if k <= 20 or self.num_items <= 1000 else k,
                mask.to(self.cf.device),
            )
        return [
            [
                (int(i), row[i].item())
                for i in row.argsort(descending=True, stable=True)[:k]
                if row[i] > -torch.inf
            ]
            for row in scores
        ]

    @torch.no_grad()
    def generate(self, prompts, max_new_tokens=48, **more):
        """Greedy continuation of each prompt, as text (transformers' generate, with its key/value cache, and its further arguments)."""
        end, pad = self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        # A list where a chat model ends its turns in another way
        ends = self.llm.generation_config.eos_token_id
        ends = [end, *ends] if isinstance(ends, list) else [end]
        if not self.generates:
            out = continue_alone(self, prompts, max_new_tokens, ends, **more)
            texts = self.tokenizer.batch_decode(out, skip_special_tokens=True)
            return [text.strip() for text in texts]
        embeddings, mask, _ = self.pad(prompts)
        out = self.llm.generate(
            inputs_embeds=embeddings,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            **more,
            eos_token_id=ends,
            pad_token_id=end if pad is None else pad,
        )
        return [text.strip() for text in self.tokenizer.batch_decode(out, skip_special_tokens=True)]

    def saved_parameters(self):
        """What a run directory holds: encoder and adapter, and the LLM only where it was trained."""
        return {
            n: p for n, p in self.named_parameters() if self.train_llm or not n.startswith("llm.")
        }


# ---- Building and loading --------------------------------------------------------------------------------------------


def make_encoder(config, cf_dim, hidden):
    """The item encoder of a method. Of your own: any module with a number `width` and encode(cf (N, E)) -> (N, Q, width), a line here,
    and its name in METHODS of train_stage2.py."""
    if config["method"] == "text":
        return None
    if config["method"] == "mlp":
        return MLPEncoder(
            cf_dim, config["num_queries"], hidden, config["qformer"].get("history", 0)
        )
    encoder = QFormer(QFormerConfig(**config["qformer"]))
    encoder.freeze_all_but_encode()
    return encoder


def build_ilm(config, dataset, device):
    """A fresh ILM for a run's config (see train_stage2.py); weights are loaded by the caller. A frozen LLM is in bf16 where the device has
    it, else in fp32, like one that trains (a step is lost in bf16's rounding). Attention: transformers' choice, sdpa where the type can."""
    seq2seq = from_pretrained(AutoConfig, config["llm"], "--llm").is_encoder_decoder
    llm = from_pretrained(
        AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM,
        config["llm"],
        "--llm",
        dtype=torch.float32
        if config["train_llm"] or precision(device) != torch.bfloat16
        else torch.bfloat16,
    )
    tokenizer = from_pretrained(AutoTokenizer, config["llm"], "--llm")
    if tokenizer.eos_token_id is None or len(tokenizer) > llm.get_input_embeddings().num_embeddings:
        raise InputError(
            f"--llm {config['llm']}: its tokenizer has no end token (eos_token in tokenizer_config.json) or is another LLM's"
        )
    encoder = make_encoder(
        config, dataset.item_cf.shape[1], llm.get_input_embeddings().embedding_dim
    )
    return ILM(llm, tokenizer, encoder, dataset, config).to(device)


def load_ilm(run, device, data=None, new=None, llm=None):
    """A trained ILM in eval mode from a run directory of train_stage2.py. new: a folder of interactions.csv (and items.csv) with users and
    items that came later; they get vectors by fold-in (assets/later.py) and can be ranked and asked about like all others."""
    config = read_config(run, "stage2")
    config["llm"], dataset = (
        llm or config["llm"],
        check_fingerprint(config, load_dataset(data or config["data"]), run),
    )
    model = build_ilm(config, extend(dataset, new) if new else dataset, torch.device(device))
    load_weights(model.saved_parameters(), Path(run) / "model.safetensors")
    return model.eval()


# ---- Talking to it ---------------------------------------------------------------------------------------------------


def main():
    p = Parser(description=__doc__.split("\n")[0])
    p.add_argument("prompt", nargs="?", help="answer this and stop; without it, a conversation")
    p.add_argument(
        "--run", default="out/toy/ilm", help="run directory of train_stage2.py [out/toy/ilm]"
    )
    p.add_argument("--data", help="prepared folder [the run's]")
    p.add_argument(
        "--new",
        metavar="FOLDER",
        help="interactions.csv (and items.csv) of users and items that came after training",
    )
    p.add_argument("--device", help="[cuda if there is one, else cpu]")
    p.add_argument(
        "--export",
        metavar="FILE.npy",
        help="write the soft tokens of all items and users, for use elsewhere",
    )
    p.add_argument("--seed", type=a_seed, default=0, help="unused: answers are greedy [0]")
    args = p.parse_args()
    model = load_ilm(args.run, pick_device(args.device), args.data, args.new)
    if args.export:
        return print(
            f"wrote {args.export}: {model.export(args.export):,.0f} items and users a second"
        )
    from assets.chat import Chat

    Chat(model).answer(args.prompt) if args.prompt else Chat(model).converse()


if __name__ == "__main__":
    run_script(main)
