"""The item-language model: item encoder -> linear adapter -> soft tokens between the words of a frozen LLM. Reads, ranks, writes.

    python ilm.py --run out/toy/ilm "Describe {item:007}."              # one answer
    python ilm.py --run out/toy/ilm                                     # a conversation

Pipeline: data.py -> qformer.py (stage 1) -> this model, trained by train_stage2.py, judged by evaluate.py.

    CF vector of an item or a user --(Q-Former or MLP)--> K states --(Linear)--> K soft tokens ---.
    prompt: "History of user <u><u>: Amber Key <3><3>, Jade Road <8><8>. Next:" --(embedding)--> frozen LLM -> p(next token)

Source: ILM (arXiv 2406.02844), section on stage 2; the MLP encoder is CoLLM's. Simplified against the paper: the LLM is whatever
decoder-only checkpoint you name, and an item that occurs several times in a batch is encoded once."""
import argparse
import json
import re
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as hf_logging

from data import SOFT, InputError, item_names, load_dataset, run_script
from qformer import QFormer, QFormerConfig

hf_logging.disable_progress_bar()
SOFT_BASE = 1 << 24   # in token ids: SOFT_BASE + entity * K + k is the k-th soft token of an entity (item i is i, user u is I + u)


# ---- Device and precision --------------------------------------------------------------------------------------------

def pick_device(name=None):
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def precision(device):
    """The number type of autocast: bf16 on CUDA devices that have it, fp16 (with a GradScaler) on those that do not, fp32 on CPU."""
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def autocast(device):
    dtype = precision(device)
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


# ---- The trie that keeps ranking inside the catalogue ----------------------------------------------------------------

class Trie:
    """A prefix tree over token sequences in flat arrays: node n has children first[n] .. first[n] + count[n], reached by token[.].

    renormalize: p is divided among a node's children, so an only child is certain and a name is decided as soon as its prefix is its
    own: the tree ends there (item[n] >= 0). Otherwise every name keeps all its tokens. Names end with an end token, so that none is
    the prefix of another."""

    def __init__(self, names, renormalize=True):
        if len(set(map(tuple, names))) < len(names):
            raise InputError("two items have names of equal tokens; raise --name-tokens or use --item-names random")
        order = sorted(range(len(names)), key=lambda i: names[i])
        first, count, token, item, self.paths = [0], [0], [-1], [-1], [()] * len(names)
        queue = [(0, 0, len(order), [])]  # node, its range in the sorted names, the tokens that lead to it and the nodes that they leave
        for node, start, end, path in queue:
            depth = len(path)
            if end - start == 1 and (renormalize or depth == len(names[order[start]])):
                item[node], self.paths[order[start]] = order[start], ([t for t, _ in path], [n for _, n in path])
                continue
            first[node] = len(token)
            while start < end:
                stop = start
                while stop < end and names[order[stop]][depth] == names[order[start]][depth]:
                    stop += 1
                queue.append((len(token), start, stop, [*path, (names[order[start]][depth], node)]))
                token.append(names[order[start]][depth])
                first.append(0), count.append(0), item.append(-1)
                start = stop
            count[node] = len(token) - first[node]
        self.first, self.count, self.token, self.item = (torch.tensor(x) for x in (first, count, token, item))
        self.num_items, self.renormalize = len(names), renormalize

    def children(self, node):
        """All children of nodes (N,) -> which of the N is the parent (M,), the child (M,)."""
        count, parent = self.count[node], torch.repeat_interleave(self.count[node])
        return parent, (self.first[node] + count - count.cumsum(0))[parent] + torch.arange(len(parent), device=node.device)

    def to(self, device):
        self.first, self.count, self.token, self.item = (x.to(device) for x in (self.first, self.count, self.token, self.item))
        return self


def segment_logsumexp(x, segment, num_segments):
    """log sum exp of x (N,) within each segment (N,) -> (num_segments,)."""
    top = torch.full((num_segments,), -torch.inf, device=x.device).scatter_reduce(0, segment, x.detach(), "amax")
    return top + torch.zeros_like(top).index_add(0, segment, (x - top[segment]).exp()).log()


def best_of_each(user, score, n):
    """Which of N scored things are among the `n` best of their user, sorted by user, best first -> indices (M,), places 0 .. n-1 (M,)."""
    order = score.argsort(descending=True)
    order = order[user[order].argsort(stable=True)]
    place = torch.arange(len(order), device=user.device) - torch.searchsorted(user[order], user[order])
    return order[place < n], place[place < n]


def additive(may_attend, dtype):
    """A mask (B, 1, N, S) of True = "may attend" as numbers to add to attention's logits, which every implementation of it accepts."""
    return torch.zeros(may_attend.shape, dtype=dtype, device=may_attend.device).masked_fill_(~may_attend, torch.finfo(dtype).min)


# ---- Packed rows: several examples in one sequence (train_stage2.pack) ------------------------------------------------

def packed_attention(batch):
    """Who may see whom in packed rows -> (B, 1, L, L), True means "may attend". A token sees what stands before it in its own branch,
    and the part of the trunk before its branch left:

        key      u A B C | . : | . : | . :
        trunk C  x x x x   . .   . .   . .
        . : of 1 x x . .   x x   . .   . .       branch 1 left after A
        . : of 2 x x x .   . .   x x   . .       branch 2 left after B, and does not know branch 1"""
    branch, position, attach = batch["branch"], batch["position"], batch["attach"]
    L = branch.shape[1]
    earlier = torch.ones(L, L, dtype=torch.bool, device=branch.device).tril()
    own = (branch[:, :, None] == branch[:, None, :]) & earlier
    trunk = (branch[:, None, :] == 0) & (position[:, None, :] < attach[:, :, None])
    return (own | trunk)[:, None]


# ---- The model -------------------------------------------------------------------------------------------------------

class MLPEncoder(nn.Module):
    """CoLLM's baseline: Linear(E, 10 E), ReLU, Linear(10 E, K * hidden); no text ever shaped it. (N, E) -> (N, K, hidden)."""

    def __init__(self, cf_dim, num_soft, hidden):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(cf_dim, 10 * cf_dim), nn.ReLU(), nn.Linear(10 * cf_dim, num_soft * hidden))
        self.num_soft = num_soft

    def encode(self, cf):
        return self.net(cf).view(len(cf), self.num_soft, -1)


class ILM(nn.Module):
    """encoder (None for the text-only baseline), adapter, frozen LLM. `cf` (I + U, E): the vectors of items, then of users."""

    def __init__(self, llm, tokenizer, encoder, num_soft, dataset, config):
        super().__init__()
        self.llm, self.tokenizer, self.encoder, self.config = llm, tokenizer, encoder, config
        self.train_llm = config["train_llm"]
        self.K, self.num_items, self.dataset = num_soft, len(dataset.items), dataset
        self.names = item_names(dataset, tokenizer, config["item_names"], config["name_tokens"])
        self.context = min(getattr(llm.config, "max_position_embeddings", None) or 1 << 20, 1 << 20)
        self.register_buffer("cf", torch.cat([dataset.item_cf, dataset.user_cf]), persistent=False)
        if config.get("shuffle_cf"):
            self.shuffle_cf()
        self.name_ids = [self.target_ids(name) for name in self.names]
        self.names_trie = Trie(self.name_ids)
        tokenizer.add_tokens([SOFT], special_tokens=True)
        self.soft_id, self.zero_soft = tokenizer.convert_tokens_to_ids(SOFT), False  # zero_soft: a control of evaluate.py
        self.hidden, self.adapter = llm.get_input_embeddings().embedding_dim, None
        if encoder is not None:
            self.adapter = nn.Linear(encoder.config.width, self.hidden) if isinstance(encoder, QFormer) else nn.Identity()
            self.soft_scale = nn.Parameter(torch.ones(()), requires_grad=False)
            self.match_scale()
        llm.requires_grad_(self.train_llm)

    def train(self, mode=True):
        """A frozen LLM stays in eval mode, whatever its parent does: its dropout would be noise that nothing can learn from."""
        super().train(mode)
        if not self.train_llm:
            self.llm.eval()
        return self

    @torch.no_grad()
    def match_scale(self):
        """Soft tokens start as loud as the LLM's own states half way up its layers (17 times the embeddings in the toy LLM): so the layers
        pass on what they say instead of drowning it, and a prompt that ends with them can be answered from them. Validation loss of the
        next item, toy world, width 64, one seed: 4.15 at 4 times these, 3.96 at 10, 3.88 at 30, 3.89 at 100; texts .40 .30 .25 .36.
        A fixed factor, not larger weights: Adam's steps do not grow with the weights. Median: some tokens of large LLMs are very loud."""
        ids = torch.tensor([sum(self.name_ids[:64], [])[:256]], device=self.cf.device)
        states = self.llm.base_model(ids, output_hidden_states=True).hidden_states
        words = states[(len(states) - 1) // 2].float().pow(2).mean(-1).sqrt().median()
        probe = torch.randn(256, self.cf.shape[1], generator=torch.Generator().manual_seed(0)).to(self.cf.device)
        self.soft_scale.fill_(words / self.adapter(self.encoder.eval().encode(probe)).pow(2).mean().sqrt())

    def shuffle_cf(self):
        """A control: every item gets the CF vector of another item, every user that of another user; the same for every seed."""
        random = np.random.default_rng(0)
        order = np.concatenate([random.permutation(self.num_items), self.num_items + random.permutation(len(self.cf) - self.num_items)])
        self.cf.copy_(self.cf[torch.from_numpy(order).to(self.cf.device)])

    # -- prompts

    def prompt_ids(self, template, user=None, history=(), items=(), named=True):
        """Fill {user}, {history} and {item} -> token ids in which soft tokens are SOFT_BASE + entity * K + k.

        The text is tokenised once, as a whole; soft tokens replace the reserved token one by one, counted. What is too long for the
        context loses its oldest history items, whole. `named=False` leaves the names of {item} out (text tasks)."""
        tokens_only, history = self.config["prompt_items"] == "tokens" and self.encoder is not None, list(history)
        while True:
            entities, queue = [], list(items)

            def soft(entity):
                entities.append(entity)
                return SOFT * self.K if self.encoder is not None else ""

            def mention(item, named=True):
                return (self.names[item] if named and not tokens_only else "") + soft(item)

            def fill(match):
                if match[1] == "user":
                    return f"user {soft(self.num_items + user) or self.dataset.users[user]}"
                return (mention(queue.pop(0), named) or "this item") if match[1] == "item" else ", ".join(mention(int(i)) for i in history)

            text = re.sub(r"\{(user|history|item)\}", fill, template.replace(SOFT, ""))
            ids = self.tokenizer(text)["input_ids"]
            if self.encoder is not None:
                slots = iter([SOFT_BASE + e * self.K + k for e in entities for k in range(self.K)])
                assert ids.count(self.soft_id) == self.K * len(entities), "the tokenizer lost a soft token"
                ids = [next(slots) if i == self.soft_id else i for i in ids]
            if len(ids) + 64 <= self.context or not history:
                break
            history = history[1:]
        if len(ids) >= self.context:
            raise InputError(f"a prompt of {len(ids)} tokens does not fit the LLM's context of {self.context}: {text[:60]!r}")
        return ids

    def target_ids(self, text):
        return self.tokenizer(" " + text, add_special_tokens=False)["input_ids"] + [self.tokenizer.eos_token_id]

    # -- forward

    def soft_tokens(self, entities):
        """Indices of items and users (N,) -> their soft tokens (N, K, hidden)."""
        tokens = self.adapter(self.encoder.encode(self.cf[entities])) * self.soft_scale
        return tokens * 0 if self.zero_soft else tokens

    def embed(self, ids):
        """Token ids (B, L) -> input embeddings (B, L, hidden): words from the LLM's table, soft tokens from the item encoder.
        Each item or user is encoded once, however often it occurs in the batch."""
        is_soft = ids >= SOFT_BASE
        embeddings = self.llm.get_input_embeddings()(ids.masked_fill(is_soft, 0))
        if is_soft.any():
            slots = ids[is_soft] - SOFT_BASE
            entities, inverse = torch.unique(slots // self.K, return_inverse=True)
            tokens = self.soft_tokens(entities).flatten(0, 1).index_select(0, inverse * self.K + slots % self.K)
            embeddings = embeddings.index_put((is_soft,), tokens.to(embeddings.dtype))
        return embeddings

    def body(self, embeddings, attention_mask, position_ids, cache=None, use_cache=False):
        """The LLM without its head -> last hidden states (B, L, hidden), cache."""
        out = self.llm.base_model(inputs_embeds=embeddings, attention_mask=attention_mask, position_ids=position_ids,
                                  past_key_values=cache, use_cache=use_cache)
        return out.last_hidden_state, out.past_key_values

    def head(self, hidden, tokens=None):
        """Logits (N, V), or of some tokens alone."""
        out = self.llm.get_output_embeddings()
        if tokens is None:
            return out(hidden).float()
        return nn.functional.linear(hidden, out.weight[tokens], None if out.bias is None else out.bias[tokens]).float()

    def forward(self, batch):
        """Packed rows (train_stage2.collate) -> the sum of -log p over target tokens, and -log p of each of them, in row order. p is
        divided among all tokens, or, where a target is part of a name, among those that the catalogue allows there ("node")."""
        batch = {key: value.to(self.cf.device) for key, value in batch.items()}
        embeddings = self.embed(batch["ids"])
        hidden, _ = self.body(embeddings, additive(packed_attention(batch), embeddings.dtype), batch["position"])
        wanted = batch["label"] >= 0
        logits, label, node = self.head(hidden[wanted]), batch["label"][wanted], batch["node"][wanted]
        total, named = logits.logsumexp(1), (node >= 0).nonzero()[:, 0]
        if len(named):
            parent, child = self.names_trie.children(node[named])
            total = total.index_copy(0, named, segment_logsumexp(logits[named[parent], self.names_trie.token[child]], parent, len(named)))
        nll = total - logits.gather(1, label[:, None])[:, 0]
        return nll.sum(), nll

    # -- inference

    def trie(self, renormalize=True):
        return self.names_trie if renormalize else Trie(self.name_ids, False).to(self.cf.device)

    def left_pad(self, prompts):
        """Prompts of unequal length -> ids, mask (B, L), positions: real tokens end at the right, where generation goes on."""
        L = max(map(len, prompts))
        pad = lambda rows: torch.tensor([[0] * (L - len(row)) + row for row in rows], device=self.cf.device)
        mask = pad([[1] * len(p) for p in prompts])
        return pad(prompts), mask, (mask.cumsum(1) - 1).clamp(min=0)

    @torch.no_grad()
    def rank(self, prompts, trie, beams=0, taken=None):
        """log p of items' names after each prompt, (B, I): of the `beams` best of each user, the others -inf. beams=0: of all, exact.

        score(name) = sum over its tokens and an end token of log p, p renormalised over the trie's children (trie.renormalize).
        taken (B, I): items that shall not be found. All prefixes of a user are read side by side in that user's row, a token a step; a
        mask shows each of them the prompt and its own beginning. So the prompt's keys and values exist once, and nothing is moved."""
        ids, sees, position = self.left_pad(prompts)
        B, device, beams = len(ids), ids.device, beams or trie.num_items
        hidden, cache = self.body(self.embed(ids), sees, position, use_cache=True)
        hidden, position, sees = hidden[:, -1], position[:, -1:], sees.bool()                  # of N living prefixes, first N = B
        user, node, score = torch.arange(B, device=device), torch.zeros(B, dtype=torch.long, device=device), torch.zeros(B, device=device)
        found = user[:0], node[:0], score[:0]                                                  # finished names: user, item, score
        while len(node):
            # All continuations of all prefixes
            parent, child = trie.children(node)
            allowed, column = trie.token[child].unique(return_inverse=True)
            logit = self.head(hidden, allowed)[parent, column]
            total = segment_logsumexp(logit, parent, len(node)) if trie.renormalize else self.head(hidden).logsumexp(1)
            user, score, item = user[parent], score[parent] + logit - total[parent], trie.item[child]
            # The `beams` best finished names; a prefix that is not above the last of them can only lose, and is dead
            done = (item >= 0) if taken is None else (item >= 0) & ~taken[user, item]
            found = [torch.cat([old, new[done]]) for old, new in zip(found, (user, item, score))]
            kept, place = best_of_each(found[0], found[2], beams)
            found, bar = [x[kept] for x in found], torch.full((B,), -torch.inf, device=device)
            bar[found[0][place == beams - 1]] = found[2][place == beams - 1]
            alive = ((item < 0) & (score > bar[user])).nonzero()[:, 0]
            kept, place = best_of_each(user[alive], score[alive], beams)
            alive = alive[kept]
            if not len(alive):
                break
            # One more token of each, side by side: row = user, column = place
            user, node, score, parent = user[alive], child[alive], score[alive], parent[alive]
            W, position = int(place.max()) + 1, position[:, :1] + 1
            sees = torch.cat([sees[parent], place[:, None] == torch.arange(W, device=device)], 1)   # (N, columns of the cache)
            mask = torch.zeros(B, W, sees.shape[1], dtype=torch.bool, device=device)
            mask[user, place], token = sees, torch.zeros(B, W, dtype=torch.long, device=device)
            token[user, place] = trie.token[node]
            embedded = self.embed(token)
            hidden, cache = self.body(embedded, additive(mask[:, None], embedded.dtype), position.expand(B, W), cache, True)
            hidden = hidden[user, place]
        scores = torch.full((B, trie.num_items), -torch.inf, device=device)
        scores[found[0], found[1]] = found[2]
        return scores

    @torch.no_grad()
    def generate(self, prompts, max_new_tokens=48):
        """Greedy continuation of each prompt, as text (transformers' generate, with its key/value cache)."""
        ids, mask, _ = self.left_pad(prompts)
        end = self.tokenizer.eos_token_id
        out = self.llm.generate(inputs_embeds=self.embed(ids), attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False,
                                eos_token_id=end, pad_token_id=end if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id)
        return [text.strip() for text in self.tokenizer.batch_decode(out, skip_special_tokens=True)]

    @torch.no_grad()
    def export(self, path, chunk=4096):
        """Write the soft tokens of all items, then all users, to a .npy file (I + U, K, hidden), float32; returns rows a second. No more
        than `chunk` of them are in memory at a time."""
        began, shape = time.time(), (len(self.cf), self.K, self.hidden)
        with open(path, "wb") as f:
            np.lib.format.write_array_header_1_0(f, {"descr": "<f4", "fortran_order": False, "shape": shape})
            for rows in torch.arange(len(self.cf), device=self.cf.device).split(chunk):
                f.write(self.soft_tokens(rows).float().cpu().numpy().tobytes())
        return len(self.cf) / (time.time() - began)

    def saved_parameters(self):
        """What a run directory holds: encoder and adapter, and the LLM only where it was trained."""
        return {n: p for n, p in self.named_parameters() if self.train_llm or not n.startswith("llm.")}


# ---- Building and loading --------------------------------------------------------------------------------------------

def from_pretrained(auto_class, name, flag, **kwargs):
    """auto_class.from_pretrained of a folder or a hub id; what goes wrong is said in one line."""
    if not Path(name).exists() and (name.startswith((".", "/")) or name.count("/") != 1):
        raise InputError(f"{flag} {name}: no such folder (give a folder with config.json, or a hub id like org/model)")
    try:
        return auto_class.from_pretrained(name, **kwargs)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{flag} {name}: {str(error).splitlines()[0]}") from None


def build_ilm(config, dataset, device):
    """A fresh ILM for a run's config (see train_stage2.py); weights are loaded by the caller."""
    dtype = torch.bfloat16 if precision(device) == torch.bfloat16 else torch.float32
    llm = from_pretrained(AutoModelForCausalLM, config["llm"], "--llm", dtype=dtype)
    tokenizer = from_pretrained(AutoTokenizer, config["llm"], "--llm")
    if config["method"] == "text":
        encoder = None
    elif config["method"] == "mlp":
        encoder = MLPEncoder(dataset.item_cf.shape[1], config["num_queries"], llm.get_input_embeddings().embedding_dim)
    else:
        encoder = QFormer(QFormerConfig(**config["qformer"]))
        encoder.freeze_text()
    model = ILM(llm, tokenizer, encoder, config["num_queries"], dataset, config).to(device)
    model.names_trie.to(device)
    return model


def load_weights(parameters, path):
    """Copy a safetensors file into named parameters, strictly: same names, same shapes."""
    tensors = load_file(path)
    wrong = sorted(set(tensors) ^ set(parameters)) or [n for n in tensors if tensors[n].shape != parameters[n].shape]
    if wrong:
        raise InputError(f"{path}: does not fit this configuration ({len(wrong)} tensors differ, the first is {wrong[0]})")
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)


def read_config(run, kind):
    """config.json of a run directory of the given kind, stage1 or stage2."""
    path = Path(run) / "config.json"
    if not path.is_file() or not (Path(run) / "model.safetensors").is_file():
        raise InputError(f"{run}: not a finished {kind} run (no config.json and model.safetensors); run train_{kind}.py --out {run} first")
    config = json.loads(path.read_text())
    if config.get("kind") != kind:
        raise InputError(f"{run}: is a {config.get('kind')} run, expected {kind}")
    return config


def load_ilm(run, device, data=None):
    """A trained ILM in eval mode from a run directory of train_stage2.py."""
    config = read_config(run, "stage2")
    model = build_ilm(config, load_dataset(data or config["data"]), device)
    load_weights(model.saved_parameters(), Path(run) / "model.safetensors")
    return model.eval()


# ---- Talking to it ---------------------------------------------------------------------------------------------------

def answer(model, text):
    """Answer one prompt with {item:ID}, {user:ID}, {history:ID,ID} in it (original ids)."""
    ids = {"item": [item["id"] for item in model.dataset.items], "user": model.dataset.users}
    known = {kind: {name: k for k, name in enumerate(names)} for kind, names in ids.items()}
    found = {"item": [], "user": [], "history": []}

    def resolve(match):
        kind = "user" if match[1] == "user" else "item"
        for name in match[2].split(","):
            if name not in known[kind]:
                raise InputError(f"no {kind} with the id {name!r} in {model.dataset.path}")
            found[match[1]].append(known[kind][name])
        return "{" + match[1] + "}"

    template = re.sub(r"\{(item|user|history):([^{}]+)\}", resolve, text)
    if len(found["user"]) > 1 or re.search(r"\{(item|user|history)\}", text):
        raise InputError("mention {item:ID}, {history:ID,ID} and at most one {user:ID}")
    named = model.encoder is None  # as in training
    return model.generate([model.prompt_ids(template, *found["user"] or [None], found["history"], found["item"], named)])[0]


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("prompt", nargs="?", help="answer this and stop; without it, a conversation")
    p.add_argument("--run", default="out/toy/ilm", help="run directory of train_stage2.py [out/toy/ilm]")
    p.add_argument("--data", help="prepared folder [the run's]")
    p.add_argument("--device", help="[cuda if there is one, else cpu]")
    p.add_argument("--export", metavar="FILE.npy", help="write the soft tokens of all items and users, for use elsewhere")
    p.add_argument("--seed", type=int, default=0, help="unused: answers are greedy [0]")
    args = p.parse_args()
    model = load_ilm(args.run, pick_device(args.device), args.data)
    if args.export:
        if model.encoder is None:
            raise InputError(f"--export: {args.run} is a text-only run, without soft tokens")
        return print(f"wrote {args.export}: {model.export(args.export):,.0f} items and users a second")
    if args.prompt:
        return print(answer(model, args.prompt))
    print("Mention {item:ID}, {user:ID} or {history:ID,ID}; an empty line or Ctrl-D leaves.")
    while line := (input("> ") if sys.stdin.isatty() else sys.stdin.readline()).strip():
        try:
            print(answer(model, line))
        except InputError as error:
            print(error)


if __name__ == "__main__":
    run_script(main)
