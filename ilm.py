"""The item-language model: CF vectors become soft tokens between the words of a frozen LLM.

    python ilm.py --run out/toy/ilm "Describe {item:007}."              # one answer
    python ilm.py                                                       # a conversation

    CF vector of an item or a user --(Q-Former or MLP)--> Q states --(adapter)--> Q soft tokens --.
    prompt: "So far: Amber Key <3><3>, Jade Road <8><8>. Next for user <u><u>"                    |
                        --(embedding)--> words, and soft tokens between them <--------------------'
                        --(frozen LLM)--> p(next token)

Source: ILM (arXiv 2406.02844), section on stage 2; the MLP encoder is CoLLM's. The LLM is whatever
checkpoint you name, decoder-only or encoder-decoder (assets/plumbing/llm.py). The names' trie is in
assets/plumbing/trie.py. Packed rows and the search, which are only faster, are in assets/fast/;
what of them to read first, before `embed`, the README says."""

from pathlib import Path

import numpy as np
import torch
import torch.nn as nn

from assets.fast.packing import SOFT_BASE, Prompt, index_prompts, target_states
from assets.fast.search import search
from assets.plumbing.cf import training_moments
from assets.plumbing.frames import answer_ids, as_turns, fill, frame
from assets.plumbing.guard import InputError, run_script
from assets.plumbing.llm import load_llm
from assets.plumbing.names import SOFT, item_names
from assets.plumbing.on_hub import OnTheHub
from assets.plumbing.run import check_fingerprint, load_weights, read_config
from assets.plumbing.trie import Trie, index_targets, segment_logsumexp
from data import load_dataset
from qformer import QFormer, QFormerConfig

# How loudly the frozen LLM is heard among a trie's children at first, where it is learned (else 1).
# It multiplies logits, where ITC's temperature divides them
START_TAU = 0.4
PRIORS = ("popularity", "uniform", "none")


# ---- From a CF vector to soft tokens ------


class MLPEncoder(nn.Module):
    """CoLLM's baseline, (N, E') -> (N, Q, hidden): two layers, which have no stage 1. W is 0 by
    default: with the last items behind the vector it overfits."""

    def __init__(self, cf_dim, num_queries, llm_width, history=0):
        super().__init__()
        read, middle = cf_dim * (1 + history), 10 * cf_dim  # E', 10 E
        layers = nn.Linear(read, middle), nn.ReLU(), nn.Linear(middle, num_queries * llm_width)
        self.net = nn.Sequential(*layers)
        self.num_queries, self.width, self.history = num_queries, llm_width, history

    def encode(self, cf):
        return self.net(cf).view(len(cf), self.num_queries, -1)


class Loudness(nn.Module):
    """Soft tokens (N, Q, hidden), all of them louder or quieter by one number, which stays as
    set."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()), requires_grad=False)

    def forward(self, states):
        return states * self.gain

    @torch.no_grad()
    def fit(self, states, probe, loudness):
        """Now states like probe (N, Q, width) come out with a root mean square of loudness. states:
        what an Adapter whitens by."""
        self.gain.fill_(1)
        self.gain.fill_(loudness / self(probe).pow(2).mean().sqrt())


class Adapter(Loudness):
    """States of a Q-Former's queries (N, Q, D) -> soft tokens (N, Q, hidden): a whitening, fixed,
    a linear map, then the gain. DEVIATION: BLIP-2's map is the same for all queries; here each has
    its own, as each soft token of the MLP has: one map would give all the same D dimensions."""

    def __init__(self, num_queries, width, hidden):
        super().__init__()
        self.whitening = nn.Linear(width, width).requires_grad_(False)
        self.maps = nn.ModuleList(nn.Linear(width, hidden) for _ in range(num_queries))

    def forward(self, states):
        states = self.whitening(states).unbind(1)  # Q times (N, D)
        return super().forward(torch.stack([f(x) for f, x in zip(self.maps, states)], 1))

    @torch.no_grad()
    def fit(self, states, probe, loudness):
        """The whitening, from states (N, Q, D) of items and users, then the loudness."""
        self.whiten_(states.flatten(0, 1))
        super().fit(states, probe, loudness)

    @torch.no_grad()
    def whiten_(self, states):
        """From now on states (N, D) come out of `whitening` with mean 0 and, where they vary at
        all, with like variance (ZCA).

        DEVIATION: half or more of what varies in a Q-Former's states is which query it is, and the
        rest lies in few directions (effective dimension 6 or 7 of 128; an MLP's hidden layer has
        28). Without this the large directions are learnt first and the item last. A variance v
        becomes v / (v + 1 % of the largest), so that noise stays small."""
        mean = states.mean(0)
        variance, directions = torch.linalg.eigh((states - mean).T @ (states - mean) / len(states))
        stretch = (variance + 0.01 * variance.max()).clamp(min=1e-6).rsqrt()
        self.whitening.weight.copy_((directions * stretch) @ directions.T)
        self.whitening.bias.copy_(-self.whitening.weight @ mean)


def make_encoder(config, cf_dim, hidden):
    """The item encoder of a method; None for text, which has no soft tokens. Of your own: an
    nn.Module with `width` and encode(cf (N, E)) -> (N, Q, width), three lines here, and its name in
    METHODS of train_stage2.py."""
    if config["method"] == "text":
        return None
    if config["method"] == "mlp":
        # Of "qformer", which every run has, it takes W alone
        return MLPEncoder(cf_dim, config["num_queries"], hidden, config["qformer"]["history"])
    encoder = QFormer(QFormerConfig(**config["qformer"]))
    encoder.freeze_all_but_encode()
    return encoder


# ---- The model ----------------------------


class ILM(OnTheHub, nn.Module):
    """Item encoder, adapter, frozen LLM. `cf` (I, E): the standardised vectors of the items. Q is
    the number of soft tokens of an item or a user: 0 is the text-only baseline."""

    def __init__(self, llm, encoder, dataset, config):
        super().__init__()
        self.llm, self.encoder, self.adapter = llm, encoder, None
        self.tokenizer, self.context = llm.tokenizer, llm.context
        self.config, self.dataset, self.num_items = config, dataset, len(dataset.items)
        tokenizer = self.tokenizer
        self.Q = 0 if encoder is None else config["num_queries"]

        # Names of items, what follows a prompt, and the trie of all of them
        self.names = item_names(dataset, tokenizer, config["item_names"], config["name_tokens"])
        self.name_ids = [self.target_ids(name) for name in self.names]
        self.names_trie = Trie(self.name_ids)
        self.reserve = max(64, *map(len, self.name_ids))  # tokens kept free for an answer
        tokenizer.add_tokens([SOFT], special_tokens=True)
        self.soft_id = tokenizer.convert_tokens_to_ids(SOFT)

        # Vectors; those of histories stay on the CPU, since users' vectors travel with the batch
        self.register_buffer("cf", dataset.item_cf.clone(), persistent=False)
        self.W = getattr(encoder, "history", 0)
        self.history_cf = nn.functional.pad(dataset.item_cf, (0, 0, 0, 1))  # item I: none
        self.shuffled = False
        if config["shuffle_cf"]:
            self.shuffle_cf()

        # Is what we compute what the LLM computes? Can its rows be packed?
        llm.check(torch.tensor([sum(self.name_ids[:4], [])[:16]]))
        if config["full_vocabulary"]:
            self.set_prior("none", "fixed")  # its loss knows no trie
        else:
            self.set_prior(config["prior"], config["temperature"])
        if self.Q:
            mlp = isinstance(encoder, MLPEncoder)
            self.adapter = Loudness() if mlp else Adapter(self.Q, encoder.width, llm.width)
            self.set_up()  # load_ilm overwrites it with what the run had

    @torch.no_grad()
    def set_up(self):
        """Whitening and loudness of the adapter. Soft tokens start as loud as the LLM's own states
        half way up its layers, so that the layers pass them on instead of drowning them, and a
        prompt that ends with them can be answered from them (assets/docs/FINDINGS.md). DEVIATION:
        the paper names no scale. Both stay as set."""
        ids = torch.tensor(sum(self.name_ids[:64], [])[: min(256, self.context)])
        loudness = self.llm.loudness(ids.to(self.cf.device))
        probe = torch.randn(256, self.cf.shape[1], generator=torch.Generator().manual_seed(0))
        probe = self.with_history(probe.to(self.cf.device))

        # States to whiten: some thousands of items and users will do. The loudness is set on noise,
        # so that it is the same for all methods
        who, places = training_moments(self.dataset.indptr, 2_000)
        vectors = self.dataset.standard_users(self.dataset.vectors_before(who, places))
        histories = [self.dataset.items_of(u, "train")[:place] for u, place in zip(who, places)]
        users = self.with_history(vectors, histories).to(self.cf)
        items = self.with_history(self.cf[:: self.num_items // 5_000 + 1])
        encode = self.encoder.eval().encode
        self.adapter.fit(encode(torch.cat([items, users])), encode(probe), loudness)

    def set_prior(self, prior, temperature):
        """The prior in the trie: p is divided among a node's children not by the LLM's logits
        alone, but by

            logit' = log_count[child] + tau * logit

        log_count is the log of a sum over the items below the child, each 1 + its training
        purchases ("uniform": each 1, so that all names are alike; "none": log_count is 0). With tau
        0, p of a name would be its item's share of all of these. tau says
        how loudly the LLM is heard; it is learned where soft tokens are or the LLM trains. So an
        ILM starts near popularity, not at a frozen LLM's opinion of titles, which would have to be
        unlearned first: 7.3 nats in place of 9.8 on ML-100K, where popularity has 6.9. DEVIATION:
        the paper has none (--prior none --temperature fixed)."""
        purchases = self.dataset.purchases if prior == "popularity" else torch.zeros(self.num_items)
        log_count = self.names_trie.sums(1 + purchases).log().float()
        if prior == "none":
            log_count = torch.zeros_like(log_count)
        self.register_buffer("log_count", log_count, persistent=False)
        learned = temperature == "learned" and (self.Q > 0 or self.llm.trained)
        tau = torch.tensor(START_TAU if learned else 1.0)
        self.tau = nn.Parameter(tau, requires_grad=learned)

    def among_children(self, logit, child):
        """The LLM's logits of children (N,) -> those by which p is divided among them (N,)."""
        return self.log_count[child] + self.tau * logit

    def trie(self, renormalize=True):
        """The names' trie on the model's device."""
        trie = self.names_trie if renormalize else Trie(self.name_ids, False)
        return trie.to(self.cf.device)

    def autocast(self):
        return self.llm.autocast()

    # -- what encoders read

    def with_history(self, vectors, histories=None):
        """Vectors (N, E) of users, and all that they chose before, N sequences of items, oldest
        first -> what encoders read (N, E'): behind a vector those of the last W items, latest
        first, zeros where there is none. Items have no history. W is --history."""
        if histories is None:
            return nn.functional.pad(vectors, (0, self.W * self.cf.shape[1]))
        recent = np.full((len(vectors), self.W), self.num_items)
        for row, history in zip(recent, histories):
            row[: len(history)] = history[::-1][: self.W]
        return torch.cat([vectors, self.history_cf[torch.from_numpy(recent)].flatten(1)], 1)

    def user_now(self, user):
        """What encoders read (E',) of a user of the data set after all that they chose."""
        vector = self.dataset.standard_users(self.dataset.vectors_at([user]))
        return self.with_history(vector, [self.dataset.items_of(user)])[0]

    def shuffle_cf(self):
        """A control, the same for every seed. Items: the rows of self.cf are dealt out anew. Users:
        Examples (train_stage2.py) reads a stranger's vector and last items in their place, from
        history_cf, whose rows stay. (A conversation's users stay their own.)"""
        order = torch.from_numpy(np.random.default_rng(0).permutation(self.num_items))
        self.cf.copy_(self.cf[order.to(self.cf.device)])
        self.shuffled = True

    # -- prompts: fill a template, tokenise it, fit it into the context

    def prompt_ids(self, template, user=None, history=(), items=(), named=True, cf=None, guests=()):
        """A template -> a Prompt.

        user: an index; cf (E',): what stands for them, by default their vector now. {item:7},
        {user:7} and {history:7,8} say themselves whom they mean, by index (a conversation turns ids
        into them); {item:I+n} is guests[n], a mixture (E,), which has no name. `named=False` leaves
        the names of {item} out (text tasks). A list of templates is a conversation, user and model
        in turn. What is too long loses the oldest items of `history`, whole, then its oldest
        turns."""
        # A text, or a chat's turns; of each, fill makes [("words", text), ("item", 7), ...]
        turns, history = as_turns(template, self.tokenizer), list(history)
        room = self.context - self.reserve
        while True:
            filled = fill([turn.replace(SOFT, "") for turn in turns], history, items)
            prompt = self.tokenise(filled, user, named, cf, guests)
            if len(prompt) <= room or (not history and len(turns) < 3):
                break
            if history:
                history = history[1:]
            else:
                turns = turns[2:]
        if not 0 < len(prompt) <= room:
            raise InputError(
                f"a prompt of {len(prompt)} tokens and {self.reserve} for the answer do not fit "
                f"the LLM's context of {self.context}; shorten it, or the names by --name-tokens: "
                f"{turns[0][:60]!r}"
            )
        return prompt

    def tokenise(self, filled, user, named, cf, guests):
        """The parts of a conversation's turns (of fill) -> a Prompt. They are framed as the LLM is
        used to, as one text, in which SOFT stands at each soft token's place; their ids take those
        places in order. guests are the first vectors: guest n is entity I + n."""
        texts, entities, vectors = [], [], list(guests)
        for parts in filled:
            text = ""
            for what, value in parts:
                if what == "words":
                    text += value
                elif what == "user":
                    person, vector = value, None  # {user:7}
                    if value is None:  # {user}
                        person, vector = user, cf
                    text += self.user_words(person) + SOFT * self.Q
                    if self.Q:
                        vectors.append(self.user_now(person) if vector is None else vector)
                        entities.append(self.num_items + len(vectors) - 1)
                else:
                    text += self.item_words(what, value, named) + SOFT * self.Q
                    entities.append(value)
            texts.append(text)
        framed, special = frame(texts, self.tokenizer, self.config["chat_date"])
        ids = self.tokenizer(framed, add_special_tokens=special)["input_ids"]
        soft = [SOFT_BASE + entity * self.Q + q for entity in entities for q in range(self.Q)]
        assert ids.count(self.soft_id) == len(soft), "the tokenizer lost a soft token"
        places = [place for place, i in enumerate(ids) if i == self.soft_id]
        for place, i in zip(places, soft):
            ids[place] = i
        return Prompt(ids, vectors)

    def user_words(self, user):
        """What is said of a user: "user", and their id where there is no soft token."""
        return "user " + ("" if self.Q or user is None else str(self.dataset.users[user]))

    def item_words(self, kind, item, named):
        """What is said of an {item} or of an item of a {history}: its name, nothing, or "this item"
        in text tasks without soft tokens."""
        if kind == "item" and not named:  # text tasks
            return "" if self.Q else "this item"
        if item >= self.num_items:  # a mixture has no name
            return ""
        return "" if self.Q and self.config["prompt_items"] == "tokens" else self.names[item]

    def target_ids(self, text):
        """The tokens of what follows a prompt, and the end token."""
        return answer_ids(text, self.tokenizer)

    # -- forward

    def soft_tokens(self, cf):
        """What encoders read (N, E') of items or users -> their soft tokens (N, Q, hidden)."""
        return self.adapter(self.encoder.encode(cf))

    def embed(self, ids, batch=()):
        """Token ids (B, L) -> input embeddings (B, L, hidden): words from the LLM's table, soft
        tokens from the item encoder. batch, of soft_index: items soft_item (n,), users and mixtures
        soft_cf (m, E'), each once, who become (n + m) * Q soft tokens; of the S places in ids that
        hold one, soft_place (S,), its index in ids.flatten(), and soft_token (S,), its row among
        those. Nothing where there is none."""
        if "soft_place" not in batch:
            return self.llm.embed(ids)
        words = self.llm.embed(ids.masked_fill(ids >= SOFT_BASE, 0))
        items, others = self.with_history(self.cf[batch["soft_item"]]), batch["soft_cf"].to(self.cf)
        # A mixture has no history behind it; there may be no user
        others = nn.functional.pad(others, (0, items.shape[1] - others.shape[1]))
        # Through here the gradient leaves the LLM for adapter and encoder
        tokens = self.soft_tokens(torch.cat([items, others])).flatten(0, 1)
        tokens = tokens.index_select(0, batch["soft_token"]).to(words.dtype)
        return words.flatten(0, 1).index_copy(0, batch["soft_place"], tokens).view(words.shape)

    def log_p(self, hidden, targets):
        """The last hidden states (T, hidden) that predict the targets (index_targets) -> log p of
        each, (T,). p is divided among all tokens, or, where a target is part of a name, among those
        that the catalogue allows there."""
        log_p = hidden.new_zeros(len(hidden), dtype=torch.float32)
        if len(targets["word_at"]):
            logits = self.llm.head(hidden.index_select(0, targets["word_at"]))  # (words, V)
            own = logits.gather(1, targets["word_id"][:, None])[:, 0]
            log_p = log_p.index_copy(0, targets["word_at"], own - logits.logsumexp(1))
        if len(targets["name_at"]):
            parent, child, trie = targets["parent"], targets["child"], self.trie()  # (M,): children
            hidden = hidden.index_select(0, targets["name_at"])
            logits = self.llm.head(hidden, trie.vocabulary)  # (named, tokens of names)
            logit = self.among_children(logits[parent, trie.column[child]], child)  # (M,)
            total = segment_logsumexp(logit, parent, len(hidden))
            own = logit.index_select(0, targets["own_child"])
            log_p = log_p.index_copy(0, targets["name_at"], own - total)
        return log_p

    def forward(self, batch):
        """An indexed batch of packed rows (assets/fast/packing.py) -> the sum of -log p over target
        tokens, and -log p of each of them (T,), in row order."""
        batch = self.here(batch)
        embeddings = self.embed(batch["ids"], batch)  # (B, L, hidden)
        hidden = target_states(self.llm, embeddings, batch)  # (T, hidden)
        nll = -self.log_p(hidden, batch)
        # Of several processes none may leave tau without a gradient
        return nll.sum() + 0 * self.tau, nll

    # -- inference

    def here(self, batch):
        """Tensors of a batch on the model's device."""
        moved = {key: x for key, x in batch.items() if torch.is_tensor(x)}
        return batch | {k: x.to(self.cf.device, non_blocking=True) for k, x in moved.items()}

    def embed_prompts(self, prompts):
        """Prompts -> embeddings (B, L, hidden), mask (B, L), 1 at tokens, padded on one side."""
        batch = self.here(index_prompts(prompts, self.llm.side, self.num_items, self.Q))
        return self.embed(batch["ids"], batch), batch["mask"]

    @torch.no_grad()
    def score(self, prompts, items):
        """log p of items' names after each prompt, prompts (B,), items (N,) -> (B, N). This is what
        ranking *is*: the sum over a name's tokens of log p, p divided among the trie's children at
        each of them, until the name is decided. Tests alone call it: rank is its fast twin."""
        scores = torch.zeros(len(prompts), len(items))
        for row, prompt in enumerate(prompts):
            kept = self.llm.read(*self.embed_prompts([prompt]))
            for column, item in enumerate(items):
                tokens, nodes = map(torch.tensor, self.names_trie.paths[item])  # (T,), (T,)
                targets = self.here(index_targets(self.names_trie, tokens, nodes))
                hidden = self.llm.states(kept, [tokens])  # (T, hidden)
                scores[row, column] = self.log_p(hidden, targets).sum()
        return scores

    def rank(self, prompts, trie, beams=None, taken=None):
        """score of the `beams` best items of each prompt (B, I); the others have -inf."""
        return search(self, prompts, trie, beams, taken)

    def generate(self, prompts, max_new_tokens=48, **more):
        """Greedy continuation of each prompt, as text. more: arguments of transformers' own."""
        return self.llm.generate(*self.embed_prompts(prompts), max_new_tokens, **more)

    # -- what is kept

    def saved_parameters(self):
        """{name: parameter}: of encoder and adapter, tau, and the LLM's where it was trained."""
        named = self.named_parameters()
        return {n: p for n, p in named if self.llm.trained or not n.startswith("llm.")}


# ---- Building and loading -----------------


def build_ilm(config, dataset, device):
    """A fresh ILM for a run's config (see train_stage2.py); weights are loaded by the caller."""
    llm = load_llm(config["llm"], config["train_llm"], device)
    encoder = make_encoder(config, dataset.item_cf.shape[1], llm.width)
    model = ILM(llm, encoder, dataset, config).to(device)
    model.llm.in_pieces &= device.type == "cpu"  # assets/fast/attention.py
    return model


def load_ilm(run, device, data=None, new=None, llm=None):
    """A trained ILM in eval mode from a run directory of train_stage2.py. new: a folder of
    interactions.csv (and items.csv) with users and items that came later; they get vectors by
    fold-in (assets/plumbing/later.py) and can be ranked and asked about like all others."""
    config = read_config(run, "stage2")
    config["llm"] = llm or config["llm"]
    dataset = check_fingerprint(config, load_dataset(data or config["data"]), run)
    if new:
        from assets.plumbing.later import extend

        dataset = extend(dataset, new)
    model = build_ilm(config, dataset, torch.device(device))
    load_weights(model.saved_parameters(), Path(run) / "model.safetensors")
    return model.eval()


def main():
    from assets.extras import chat

    chat.main()


if __name__ == "__main__":
    run_script(main)
