r"""Makes the toy LLM of this folder: a small Llama that knows the toy world's movies from text and
has never seen an interaction.

    # Writes config, weights and tokenizer beside this file; about 12 minutes on two cores
    python assets/toy_llm/pretrain.py

    # Prints its read-out ceiling on data/toy (run `python data.py` before)
    python assets/toy_llm/pretrain.py --probe

    # How wide an LLM for other items has to be, and how it is made
    python assets/toy_llm/pretrain.py --probe --widths 160 768 --data data/ml-100k
    python assets/toy_llm/pretrain.py --data data/ml-100k --out out/llm/ml-100k \
        --vocab 3072 --width 768 --layers 2 --mlp-width 512

It stands in for the big pretrained LLM of the paper: it can describe a movie, compare two, name one
from its description, list and recommend movies *in words*. It then stays frozen for good.

One thing is unusual, and it matters. A frozen LLM ranks items by h . e_w with h its normalised last
state and e_w fixed rows of its head, so it can only express user tastes that these rows span, as
sharply as their size allows. In an LLM pretrained from the usual small random rows (std .02) the
rows of the title words end up nearly parallel, and a recommender's signal is lost in the very last
multiplication. Here head and embedding are untied and *start* at norms 2 and 1, without weight
decay, which keeps the rows well-conditioned. `--probe` measures what is left of the ceiling.
"""

import argparse
import json
import math
import re
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import DataLoader, IterableDataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))
import data  # noqa: E402
from assets.plumbing.cf import training_moments  # noqa: E402
from assets.plumbing.guard import run_script  # noqa: E402
from assets.plumbing.names import item_names  # noqa: E402
from assets.plumbing.run import pick_device, precision  # noqa: E402
from assets.plumbing.trie import Trie  # noqa: E402
from assets.toy_world import toy_world  # noqa: E402

END, PAD = "<|end|>", "<|pad|>"


# ---- The corpus: documents about the world, drawn without end ------------------------------------
# A movie in {history} stands by its name, a {user} by tastes in words: "user (western, tense)".


class Corpus:
    def __init__(self, items, templates, seed):
        self.items, self.rng = items, np.random.default_rng(seed)
        self.told_of = [item for item in items if item["attributes"]]
        # Unseen prompts stay unseen
        self.ranking = [t for t in templates if t[1] == "seen" and t[0] in data.RANKING_TASKS]
        self.questions = [t for t in templates if t[0] not in data.RANKING_TASKS]
        self.names = sorted({name for item in self.told_of for name in item["attributes"]})
        # Which value an item has, -1 for none
        self.codes, by_value = np.full((len(self.told_of), len(self.names)), -1), {}
        for i, item in enumerate(self.told_of):
            for name, value in item["attributes"].items():
                by_value.setdefault((name, value), (len(by_value), []))[1].append(item)
                self.codes[i, self.names.index(name)] = by_value[name, value][0]
        self.values = [(key, movies) for key, (_, movies) in by_value.items()]

    def pick(self, sequence):
        return sequence[self.rng.integers(len(sequence))]

    def some(self, sequence, low, high):
        count = min(len(sequence), int(self.rng.integers(low, high + 1)))
        return [sequence[i] for i in self.rng.permutation(len(sequence))[:count]]

    def document(self):
        kinds = {
            self.fact: 0.06,
            self.question: 0.24,
            self.repeat: 0.04,
            self.naming: 0.06,
            self.listing: 0.06,
            self.recommendation: 0.54,
        }
        if len(self.told_of) < 10:  # without attributes there is nothing to ask or to prefer
            kinds = {self.fact: 0.4, self.repeat: 0.2, self.naming: 0.4}
        return [*kinds][self.rng.choice(len(kinds), p=[*kinds.values()])]()

    def told(self, item, low, high):
        return ", ".join(
            f"{name} {value}"
            for name, value in self.some(list(item["attributes"].items()), low, high)
        )

    def fact(self):
        """Titles with their descriptions or their bare attributes."""
        item = self.pick(self.items)
        said = [f": {item['text']}", f". {item['text']}"]
        if item["attributes"]:
            said.append(f" has {self.told(item, 2, 5)}.")
        return item["title"] + self.pick(said)

    def question(self):
        """The text tasks of its own prompts.txt, the movie given by its name."""
        while True:
            _, _, prompt, target = self.pick(self.questions)
            a, b = self.some(self.told_of, 2, 2)
            facts = data.facts_of(a, b)
            if all(facts.get(name) for name in re.findall(r"\{(\w+)\}", target)):
                prompt = (
                    prompt.replace("{item}", a["title"], 1)
                    .replace("{item}", b["title"])
                    .replace("{neighbour}", b["title"])
                )
                return f"{prompt} {target.format(**facts)}"

    def repeat(self):
        """A list of titles, said twice: the LLM learns to copy a title from its context."""
        titles = ", ".join(item["title"] for item in self.some(self.items, 3, 12))
        return f"{titles}. Again: {titles}."

    def naming(self):
        item = self.pick(self.items)
        said = self.pick([item["text"], self.told(item, 3, 5) or item["text"]])
        return f"{said} Which movie is it? {item['title']}"

    def listing(self):
        (name, value), movies = self.pick(self.values)
        return (
            f"Movies with {name} {value}: "
            f"{', '.join(m['title'] for m in self.some(movies, 3, 10))}."
        )

    def recommendation(self):
        """The ranking tasks of its own prompts.txt for an invented person: up to five tastes, told
        in words, by titles that meet them, or not at all; history and answer are drawn by how many
        of the tastes a movie meets. No user of the data is involved, nor the toy world's hidden
        trait, order or weights."""
        _, _, prompt, target = self.pick(self.ranking)
        liked = self.rng.integers(len(self.told_of))
        tastes = self.some(np.flatnonzero(self.codes[liked] >= 0), 1, 5)
        score = 2.5 * (self.codes[:, tastes] == self.codes[liked, tastes]).sum(1) + self.rng.gumbel(
            size=len(self.told_of)
        )
        count = min(int(self.rng.integers(6, 25)), len(score))
        chosen = np.argpartition(-score, count - 1)[:count]  # Gumbel-top-k, without replacement
        chosen = chosen[(-score[chosen]).argsort()]
        known, chosen = (
            [self.told_of[i] for i in self.rng.permutation(chosen)[:4]],
            [self.told_of[i] for i in chosen],
        )
        chosen = [item for item in chosen if item not in known]
        # Unseen ones must not use up the best
        history, answer = (chosen[:-1], chosen[-1]) if "{history}" in prompt else ([], chosen[0])
        words = [self.told_of[liked]["attributes"][self.names[k]] for k in tastes]
        titles = [item["title"] for item in self.some(known, 1, 4)]
        told = self.pick([words, words, titles] + ([[], self.some(words, 0, 5)] if history else []))
        user = f"user ({', '.join(told)})" if told else "user"
        return (
            f"{prompt.format(user=user, history=', '.join(m['title'] for m in history))} "
            f"{target.format(target=answer['title'])}"
        )


def make_tokenizer(corpus, templates, vocab_size):
    """Byte-level BPE on the corpus; every title of the toy world must begin with one token of its
    own (read-out ceiling)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    lines = [corpus.document() for _ in range(20000)] + [" ".join(t[2:]) for t in templates] * 50
    tokenizer.train_from_iterator(
        lines,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END, PAD],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    first = [
        len(tokenizer.encode(" " + item["title"].split()[0]).ids) == 1 for item in corpus.items
    ]
    print(f"{np.mean(first):.2f} of the titles' first words are one token")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PAD)


class Batches(IterableDataset):
    """Endless (B, length) rows; each starts with a document and holds as many as fit."""

    def __init__(self, corpus, tokenizer, batch_size, length):
        self.corpus, self.tokenizer = corpus, tokenizer
        self.batch_size, self.length = batch_size, length

    def documents(self):
        """The corpus in tokens, many documents to a call of the tokenizer."""
        while True:
            yield from self.tokenizer([self.corpus.document() for _ in range(256)])["input_ids"]

    def __iter__(self):
        documents = self.documents()
        while True:
            rows = []
            for _ in range(self.batch_size):
                row = []
                while len(row) < self.length:
                    row += next(documents) + [self.tokenizer.eos_token_id]
                rows.append(row[: self.length])
            yield torch.tensor(rows)


def train(args):
    torch.manual_seed(args.seed)
    device = pick_device(args.device)
    bf16 = precision(device) == torch.bfloat16  # only on a GPU that has it; the weights stay fp32
    templates = data.load_prompts(HERE / "prompts.txt")
    corpus = Corpus(
        data.load_dataset(args.data).items if args.data else toy_world(0)["items"],
        templates,
        args.seed,
    )
    tokenizer = make_tokenizer(corpus, templates, args.vocab)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=args.width,
            intermediate_size=args.mlp_width or 3 * args.width,
            num_hidden_layers=args.layers,
            num_attention_heads=args.width // 32,
            max_position_embeddings=1024,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    torch.nn.init.normal_(model.lm_head.weight, std=2 / math.sqrt(args.width))
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=1 / math.sqrt(args.width))
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens, "
        f"loss at step 0 about ln V = {math.log(len(tokenizer)):.2f} and more "
        "(the head's rows are long)"
    )
    model.to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0
    )

    # A GPU is faster than the corpus: there a process of its own makes the batches ahead
    rows = Batches(corpus, tokenizer, args.batch_size, 256)
    ahead = {"num_workers": 1, "prefetch_factor": 32} if device.type == "cuda" else {}
    start = time.time()
    for step, ids in zip(range(args.steps), DataLoader(rows, batch_size=None, **ahead)):
        warm = min(1.0, (step + 1) / 200) * (
            0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / args.steps))
        )
        for group in optimizer.param_groups:
            group["lr"] = args.lr * warm
        ids = ids.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0 or step == args.steps - 1:
            print(
                json.dumps(
                    {
                        "step": step,
                        "loss": round(loss.item(), 4),
                        "seconds": round(time.time() - start),
                    }
                ),
                flush=True,
            )
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


# ---- The read-out ceiling ------------------------------------------------------------------------
# A user at a moment -> linear -> final norm -> head, no LLM layers in between and the same state at
# every node of the trie of names, against the same into a free head.


def tree_scores(trie, logits):
    """Logits (B, W) of the tokens that names consist of -> log p of each item (B, I)."""
    level, parent = (
        torch.zeros(len(trie.token), dtype=torch.long),
        torch.zeros(len(trie.token)).long(),
    )
    inner = (trie.count > 0).nonzero()[:, 0]
    which, child = trie.children(inner)
    parent[child] = inner[which]
    for node in range(1, len(level)):  # breadth first: a parent's level is known
        level[node] = level[parent[node]] + 1
    logit = trie.log_count + trie.tau * logits[:, trie.column]
    spread = torch.full_like(logit, -torch.inf)
    top = spread.scatter_reduce(1, parent.expand_as(logit)[:, 1:], logit[:, 1:].detach(), "amax")
    apart = (logit - top[:, parent]).exp()[:, 1:]
    total = top + torch.zeros_like(logit).index_add(1, parent[1:], apart).clamp(min=1e-30).log()
    step = logit - total[:, parent]
    score = torch.zeros_like(logit)
    for depth in range(1, int(level.max()) + 1):
        at = (level == depth).nonzero()[:, 0]
        score = score.index_copy(1, at, score[:, parent[at]] + step[:, at])
    leaves = (trie.item >= 0).nonzero()[:, 0]
    return score[:, leaves[trie.item[leaves].argsort()]]


def read_out(dataset, trie, rows, train_rows, steps=600, batch=128):
    """Best validation HR@10 of a linear map from users at a moment into rows (W, D) of a head,
    trained on training moments."""
    torch.manual_seed(0)
    D, E = rows.shape[1], dataset.raw_cf.shape[1]
    rows, linear = torch.nn.Parameter(rows.clone(), requires_grad=train_rows), torch.nn.Linear(E, D)
    trie.tau = torch.nn.Parameter(torch.tensor(0.4))
    trie.log_count = trie.sums(1 + dataset.purchases).log().float()
    trained = [x for x in (*linear.parameters(), rows, trie.tau) if x.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=3e-3)

    # Training moments and validation users
    users, places = training_moments(dataset.indptr, steps * batch)
    seen = dataset.standard_users(dataset.vectors_before(users, places))
    targets = torch.tensor([int(dataset.items_of(u)[place]) for u, place in zip(users, places)])
    people = dataset.eligible()
    people = np.sort(np.random.default_rng(0).permutation(people)[:2000])
    asked = dataset.standard_users(dataset.vectors_at(people, "valid"))
    wanted = torch.tensor([dataset.target(u, "valid") for u in people])

    best, order = 0.0, torch.randperm(len(targets))
    for step in range(steps):
        some = order[torch.arange(step * batch, (step + 1) * batch) % len(order)]
        scores = tree_scores(trie, F.rms_norm(linear(seen[some]), (D,)) @ rows.T)
        loss = -scores.gather(1, targets[some][:, None]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 99:
            hits = 0
            for part in torch.arange(len(people)).split(200):
                with torch.no_grad():
                    scores = tree_scores(trie, F.rms_norm(linear(asked[part]), (D,)) @ rows.T)
                own = scores.gather(1, wanted[part][:, None])
                for row, user in enumerate(people[part]):
                    scores[
                        row, torch.as_tensor(dataset.items_of(user, "valid").astype(np.int64))
                    ] = -torch.inf
                hits += int(((scores >= own).sum(1) <= 10).sum())  # the target itself is the 1
            best = max(best, hits / len(people))
    return best


def probe(args):
    dataset = data.load_dataset(args.data or "data/toy")
    tokenizer = AutoTokenizer.from_pretrained(args.out)
    names = item_names(dataset, tokenizer, "title", args.name_tokens)
    ids = [tokenizer(" " + name, add_special_tokens=False)["input_ids"] for name in names]
    trie = Trie([[*name, tokenizer.eos_token_id] for name in ids])
    W = len(trie.vocabulary)

    def random_rows(width):
        return (
            torch.randn(W, width, generator=torch.Generator().manual_seed(1)) * 2 / math.sqrt(width)
        )

    for width in args.widths:  # how wide has a head to be? Rows drawn at random
        free = (
            f", of free ones {read_out(dataset, trie, random_rows(width), True):.3f}"
            if width == args.widths[0]
            else ""
        )
        said = read_out(dataset, trie, random_rows(width), False)
        print(
            f"width {width}: read-out ceiling of random rows, valid HR@10 {said:.3f}{free}",
            flush=True,
        )
    if args.widths:
        return
    model = AutoModelForCausalLM.from_pretrained(args.out)
    # The norm's gain folded in
    rows = (
        (model.get_output_embeddings().weight * model.model.norm.weight)[trie.vocabulary]
        .detach()
        .float()
    )
    singular = torch.linalg.svdvals(rows)
    ours, free = (
        read_out(dataset, trie, rows, False),
        read_out(dataset, trie, random_rows(rows.shape[1]), True),
    )
    print(
        f"read-out ceiling at the moment, valid HR@10: frozen head {ours:.3f}, "
        f"free head {free:.3f}, ratio {ours / free:.3f}; "
        f"singular values of the {W} rows of names {singular[0]:.2f} to {singular[-1]:.2f}"
    )


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("--name-tokens", type=int, default=0, help="with --probe: as in train_stage2.py")
    p.add_argument(
        "--probe", action="store_true", help="measure the read-out ceiling of what is in --out"
    )
    p.add_argument(
        "--widths",
        type=int,
        nargs="+",
        default=[],
        help="with --probe: measure random rows of these widths instead",
    )
    p.add_argument(
        "--data", help="prepared folder whose items the LLM shall know [the toy world's]"
    )
    p.add_argument(
        "--out", default=str(HERE), help="folder to write; --probe: to measure [this one]"
    )
    p.add_argument(
        "--width",
        type=int,
        default=160,
        help="at least the number of items, or the head cannot tell them apart",
    )
    p.add_argument("--mlp-width", type=int, help="width inside the feed-forward [3 x --width]")
    p.add_argument("--layers", type=int, default=3)
    p.add_argument("--vocab", type=int, default=1024)
    p.add_argument("--steps", type=int, default=3000)
    p.add_argument("--batch-size", type=int, default=16, help="rows of 256 tokens")
    p.add_argument("--lr", type=float, default=3e-3)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", help="for pretraining [cuda if there is one, else cpu]")
    arguments = p.parse_args()
    if arguments.data and not arguments.probe and Path(arguments.out).resolve() == HERE:
        p.error("--data needs an --out of its own: this folder is the toy LLM's")
    if arguments.width % 32:
        p.error(f"--width {arguments.width}: a multiple of 32, the width of a head")
    run_script(partial((probe if arguments.probe else train), arguments))
