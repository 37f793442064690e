"""Stage 2: item-language model training. Teaches a frozen LLM to read soft tokens; also trains
the baselines ilm-rand, mlp and text.

    python train_stage2.py                             # ILM on the toy world, CPU: two minutes
    python train_stage2.py --method mlp --lr 1e-2      # CoLLM's two-layer MLP for the Q-Former
    python train_stage2.py --method ilm-rand --lr 4e-3 # a Q-Former that skipped stage 1
    python train_stage2.py --mix 0 0 1                 # text tasks alone, as the paper's ELM-24
    python train_stage2.py --method text --train-llm   # OpenP5's way: names only, the LLM trains
    python train_stage2.py --data data/ml-1m --llm org/model

The loss is -log p(target tokens | prompt), by the LLM's own p where the target is text. DEVIATION:
where it is an item's name, p of each token is divided among the tokens that the catalogue allows
there, with the prior of ILM.set_prior, exactly as when evaluate.py ranks. Nothing is spent on
spelling, and a name ends where it is decided (--full-vocabulary: the paper's loss). A user is what
came before the target (with recency 1: all their other training items). The gradient reaches item
encoder and adapter through the frozen LLM, which stays as it is but for --train-llm.

Three kinds of batches, drawn at random per micro-step, whose rows have like lengths:
    sequential        a window of a user's history: *every* position but the first is a target, all
                      of them packed in one row
    straightforward   a user alone: up to 20 of their training items, each at its own moment
    text              an instance of tasks.jsonl: describe an item from its soft tokens, unnamed

The skeleton is train_stage1.py's; a diff of the two loops shows what is different.
"""

from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer

from assets.fast import packing
from assets.plumbing.enough import check_stage2
from assets.plumbing.frames import CHAT_DATE
from assets.plumbing.guard import InputError, reading
from assets.plumbing.run import (
    RunDirectory,
    averaging,
    check_fingerprint,
    check_step,
    describe,
    distribute,
    drawn_ahead,
    from_pretrained,
    introduce,
    load_weights,
    mean_over_processes,
    own_rows,
    precision,
    process,
    progress,
    read_config,
    run_training,
    say,
    start_processes,
    sum_over_processes,
)
from assets.plumbing.texts import Texts, share_of
from assets.plumbing.training_flags import shape_of, stage2_flags
from data import PROMPT_ITEMS, RANKING_TASKS, load_dataset, load_prompts, ranking_templates
from ilm import PRIORS, build_ilm
from qformer import QFormer, QFormerConfig
from train_stage1 import clip_and_step, make_optimizer, set_learning_rate

METHODS = ("ilm", "ilm-rand", "mlp", "text")  # text: names alone, no soft tokens
KINDS = (*RANKING_TASKS, "text")  # text: say something of an item (tasks.jsonl)


# ---- Examples and batches: every batch a function of (seed, step, micro-step) ----


class Examples:
    """Turns users and text-task instances into (prompt, target ids[, trie nodes]), for training,
    validation and test alike, and packs them (assets/fast/packing.py)."""

    def __init__(self, model, dataset, titles=False):
        self.model, self.dataset = model, dataset
        self.titles = titles  # a control: text tasks name their items
        self.templates = ranking_templates(model.config.get("prompts"), dataset.meta["name"])
        self.instances = {
            split: [x for x in dataset.instances if x["split"] == split]
            for split in ("train", "valid", "test")
        }
        self.users = dataset.eligible(4)
        # Where CF is shuffled, user u is read as user stranger[u]; in read_before modulo the number
        # of those who have two training items
        self.stranger = np.random.default_rng(0).permutation(len(dataset.users))

    # -- what stands for a user, with the last items behind it where encoders read them

    def read_at(self, users, split):
        """What encoders read (B, E') of users when the target of `split` is asked for."""
        if self.model.shuffled:
            users = self.stranger[users]
        vectors = self.dataset.standard_users(self.dataset.vectors_at(users, split))
        return self.model.with_history(vectors, [self.dataset.items_of(u, split) for u in users])

    def read_before(self, user, places):
        """What encoders read (n, E') of one user just before each place (n,) of their history."""
        if self.model.shuffled:  # a stranger, at some place of their own history
            user = self.users[self.stranger[user] % len(self.users)]
            places = 1 + (places - 1) % (len(self.dataset.items_of(user, "train")) - 1)
        vectors = self.dataset.standard_users(self.dataset.vectors_along(user, places))
        history = self.dataset.items_of(user, "train")
        return self.model.with_history(vectors, [history[:place] for place in places])

    # -- examples

    def name_target(self, item):
        """The target of an item's name: its tokens, and the nodes of the trie they are chosen at,
        or, with --full-vocabulary, all its tokens alone."""
        if self.model.config["full_vocabulary"]:
            return (self.model.name_ids[item],)
        return self.model.names_trie.paths[item]

    def ranking_prompt(self, task, user, history, template, cf=None):
        """One question of a ranking task -> a Prompt."""
        history = [int(i) for i in history[-PROMPT_ITEMS:]] if task == "sequential" else ()
        return self.model.prompt_ids(template, user=user, history=history, cf=cf)

    def ranking_prompts(self, task, users, split, wording):
        """What evaluation asks of users (B,): the template is the user's number modulo their
        count."""
        templates, asked = self.templates[task, wording], []
        for user, cf in zip(users, self.read_at(users, split)):
            template = templates[int(user) % len(templates)]
            history = self.dataset.items_of(user, split)
            asked.append(self.ranking_prompt(task, user, history, template, cf))
        return asked

    def text(self, instance):
        items = instance["items"]
        prompt = self.model.prompt_ids(instance["prompt"], items=items, named=self.titles)
        return prompt, self.model.target_ids(instance["target"])[: self.model.context - len(prompt)]

    def prefixes(self, user, window, cf, template):
        """A window of items (n + 1,), cf (n, E') -> n prompts, of its first 1, 2 ... n items."""
        longest = self.ranking_prompt("sequential", user, window[:-1], template, cf[-1])
        ends = packing.item_ends(longest, self.model.num_items, self.model.Q)

        # The definition, if no soft tokens tell where to cut, or the history had to be shortened
        if len(ends) != len(window) - 1:
            return [
                self.ranking_prompt("sequential", user, window[:k], template, cf[k - 1])
                for k in range(1, len(window))
            ]

        # The same, cut from the longest one, which is tokenised once; a vector for each {user}
        cut = [[*longest[:end], *longest[ends[-1] :]] for end in ends]
        return [
            packing.Prompt(ids, [vector] * len(longest.vectors)) for ids, vector in zip(cut, cf)
        ]

    def sequential_row(self, user, template, rng):
        """A random window of PROMPT_ITEMS + 1 training items; each but the first is the target of
        those before it."""
        items = self.dataset.items_of(user, "train")
        start = int(rng.integers(max(1, len(items) - PROMPT_ITEMS)))
        window = items[start : start + PROMPT_ITEMS + 1]
        cf = self.read_before(user, np.arange(start + 1, start + len(window)))
        prompts = self.prefixes(user, window, cf, template)
        return self.pack([(p, *self.name_target(item)) for p, item in zip(prompts, window[1:])])

    def straightforward_row(self, user, template, rng):
        """Up to PROMPT_ITEMS of the user's training items, each asked for at its own moment."""
        items = self.dataset.items_of(user, "train")
        places = 1 + rng.permutation(len(items) - 1)[:PROMPT_ITEMS]
        cf = self.read_before(user, places)
        prompt = self.ranking_prompt("straightforward", user, (), template, cf[0])
        prompts = [packing.Prompt(prompt, [vector] * len(prompt.vectors)) for vector in cf]
        return self.pack(
            [(p, *self.name_target(items[place])) for p, place in zip(prompts, places)]
        )

    def pack(self, examples):
        return packing.pack(examples, self.model.num_items, self.model.Q)

    def collate(self, rows):
        """Packed rows -> the batch that ILM.forward takes."""
        num_items, Q = self.model.num_items, self.model.Q
        batch = packing.collate(rows, num_items, Q)
        return packing.index(batch, self.model.names_trie, num_items, Q)

    def cut(self, rows, tokens):
        """Packed rows in lists of like length, of which the LLM reads at most `tokens` at once."""
        return packing.of_like_length(rows, tokens, self.model.llm.packs)

    # -- batches

    def rows(self, kind, size, rng):
        """`size` packed rows; of straightforward ones, which are shorter, twice as many, of texts
        four times. One template for all (texts: a row), so that rows have like lengths. Every
        process draws the same users and makes its own rows of them."""
        size *= {"sequential": 1, "straightforward": 2, "text": 4}[kind]
        seeds, own = rng.integers(2**62, size=size), own_rows(size)
        if kind == "text":  # the row's seed picks the instance
            pool = self.instances["train"]
            instances = [pool[seed % len(pool)] for seed in seeds[own]]
            return [self.pack([self.text(instance)]) for instance in instances]
        make = self.sequential_row if kind == "sequential" else self.straightforward_row
        users, templates = rng.choice(self.users, size=size), self.templates[kind, "seen"]
        template, rows = templates[rng.integers(len(templates))], []
        for user, seed in zip(users[own], seeds[own]):
            rows.append(make(user, template, np.random.default_rng(seed)))
        return rows

    def batch(self, kind, size, rng):
        """The rows in one piece, for tests and notebooks; training cuts them (draw_batches)."""
        return self.collate(self.rows(kind, size, rng))

    def validation(self, limit, tokens):
        """Batches to validate on, {kind: [batch]}: text tasks of held-out items, and the next item
        of up to `limit` users."""
        rng, rows = np.random.default_rng(0), {}
        users = self.dataset.eligible()
        users = users[rng.permutation(len(users))[:limit]]
        for task in RANKING_TASKS:
            prompts = self.ranking_prompts(task, users, "valid", "seen")
            targets = [self.name_target(self.dataset.target(u, "valid")) for u in users]
            rows[task] = [self.pack([(prompt, *name)]) for prompt, name in zip(prompts, targets)]
        pool = self.instances["valid"]
        instances = [pool[i] for i in rng.permutation(len(pool))[: 2 * limit]]
        rows["text"] = [self.pack([self.text(instance)]) for instance in instances]

        return {
            kind: [self.collate(part) for part in self.cut(some, tokens)]
            for kind, some in rows.items()
            if some
        }


@torch.no_grad()
def validation_losses(model, validation):
    """{kind: mean loss}. text: -log p a target token. Ranking: -log p(next item), nats a user; a
    uniform guess has ln I."""
    model.eval()
    losses, (rank, world) = {}, process()
    for kind, batches in validation.items():
        total, count = 0.0, 0
        for batch in batches[rank::world]:  # every user is validated once, by one process
            with model.autocast():
                value, nll = model(batch)
            total += value.double()
            count += len(nll) if kind == "text" else len(batch["ids"])
        total, count = sum_over_processes(float(total), count)
        losses[kind] = total / count
    model.train()
    return losses


# ---- The script ---------------------------


def parse_args(argv=None):
    args = stage2_flags(argv, __doc__, METHODS, PRIORS)
    load_prompts(args.prompts)  # a mistake in it is said before the LLM is loaded
    return args


def load_stage1(run, dataset, device):
    """A trained Q-Former, its texts and its config from a run directory."""
    config = read_config(run, "stage1")
    check_fingerprint(config, dataset, run)
    with reading(Path(run) / "config.json", "train stage 1 again"):
        model = QFormer(QFormerConfig(**config["qformer"]))
    load_weights(dict(model.named_parameters()), Path(run) / "model.safetensors")
    tokenizer = from_pretrained(AutoTokenizer, str(Path(run) / "tokenizer"), "--stage1")
    texts = Texts(dataset, tokenizer, config["qformer"]["max_text"])
    return model.to(device).eval(), texts, config


def make_config(args, dataset):
    """What a run is, as written to config.json: enough to build the model again. Returns it and the
    stage-1 Q-Former, if any."""
    given = shape_of(args)
    if args.method == "ilm":
        qformer, _, stage1 = load_stage1(args.stage1, dataset, torch.device("cpu"))
        known = stage1["qformer"]
        for name, value in given.items():
            if value != known[name]:
                raise InputError(
                    f"--{name.replace('_', '-')} {value}: the stage-1 run {args.stage1} has "
                    f"{known[name]}; leave it out, or train stage 1 again"
                )
    else:
        cf_dim, qformer = dataset.item_cf.shape[1], None
        # The text branch is never read
        known = asdict(QFormerConfig(cf_dim=cf_dim, vocab_size=1, **given))
    # DEVIATION: BLIP-2 keeps dropout .1; here the soft tokens underfit, noise only slows them
    known |= {"dropout": 0.0, "history": args.history}
    more = {"kind": "stage2", "qformer": known, "num_queries": known["num_queries"]}
    return describe(args, dataset, chat_date=CHAT_DATE, **more), qformer


def set_up_model(args, dataset, device):
    """An ILM, whose Q-Former begins as stage 1 left it, and the run directory."""
    config, qformer = make_config(args, dataset)
    torch.manual_seed(args.seed)
    model = build_ilm(config, dataset, device)
    if qformer is not None:  # stage 1 has no history keys
        model.encoder.load_state_dict(model.encoder.state_dict() | qformer.state_dict())
        model.set_up()
    if args.compile:
        model.llm.compile_layers()
    if args.gradient_checkpointing:
        model.llm.checkpoint_layers()
    args.batch_tokens = args.batch_tokens or (20_000 if device.type == "cuda" else 4_096)
    introduce(f"stage 2, {args.method} on {args.data} with {args.llm}", model, device)
    if not any(p.requires_grad for p in model.parameters()):
        say("nothing to train (names only, frozen LLM): the run is the LLM as it is")
        args.steps = config["steps"] = 0
    return model.train(), RunDirectory(args, config)


def set_up_data(args, examples):
    """The share of each kind of batch (3,), and what chooses the checkpoint: batches of the kinds
    that are trained."""
    items = examples.dataset.items_in("train")
    left_out = {*items} - {*share_of(items, args.text_fraction, args.seed)}
    told = [x for x in examples.instances["train"] if not left_out & {*x["items"]}]
    examples.instances["train"] = told
    shares = np.array(args.mix) * [1, 1, bool(told)]
    found = examples.validation(args.valid_users, args.batch_tokens)
    validation = {kind: found[kind] for kind, x in zip(KINDS, shares) if x and kind in found}
    check_stage2(args, shares, examples.users, validation)
    return shares / shares.sum(), validation


def draw_batches(examples, shares, args, step):
    """A step's seed for dropout, and its micro-batches (--accumulate), each cut to what the LLM
    reads at once: [(kind, batch), ...]."""
    rng = np.random.default_rng([args.seed, step])
    seed = int(rng.integers(2**62))
    batches = []
    for kind in rng.choice(KINDS, size=args.accumulate, p=shares).tolist():
        rows = examples.rows(kind, args.batch_size, rng)
        parts = examples.cut(rows, args.batch_tokens)
        batches += [(kind, examples.collate(part)) for part in parts]
    return seed, batches


def main():
    args = parse_args()
    device, rank, world = start_processes(args)
    dataset = load_dataset(args.data)
    model, run = set_up_model(args, dataset, device)
    examples = Examples(model, dataset)
    shares, validation = set_up_data(args, examples)
    parallel = distribute(model, world if args.steps else 1)
    optimizer = make_optimizer(model, args.lr)
    # Precision: bf16 on a card that has it, fp16 with a scaler on one that has not; fp32 on a CPU
    scaler = torch.amp.GradScaler(device.type, enabled=precision(device) == torch.float16)
    run.restore(model.saved_parameters(), optimizer, scaler)
    drawn = drawn_ahead(partial(draw_batches, examples, shares, args), run.start, args.steps)
    seen_targets = run.targets

    for step in progress(run.start, args.steps, "stage 2"):
        # -- learning rate
        set_learning_rate(optimizer, step, args.steps, args.lr)

        # -- evaluate and save
        if step % args.eval_every == 0 or step == args.steps:
            valid = validation_losses(model, validation)
            # What chooses the checkpoint is a mean of nats a user and nats a token of texts
            run.save(step, sum(valid.values()) / len(valid), seen_targets)
            run.log_validation(step, valid)
        if step == args.steps:
            break
        run.stop_if_asked(step, seen_targets)

        # -- losses: the mean over all target tokens of the step's micro-batches
        seed, batches = next(drawn)
        torch.manual_seed(seed + rank)
        (num_targets,) = sum_over_processes(sum(len(batch["target_at"]) for _, batch in batches))
        loss, nlls = 0.0, {}
        for k, (kind, batch) in enumerate(batches, 1):
            with averaging(parallel, k == len(batches)):
                with model.autocast():  # but for T5, which overflows fp16
                    total, nll = parallel(batch)
                part = total * world / num_targets
                scaler.scale(part).backward()
            loss += part.detach()
            nlls.setdefault(kind, []).append(nll.detach())
        losses = {kind: torch.cat(parts).mean() for kind, parts in nlls.items()}
        seen_targets += int(num_targets)

        # -- step
        norm = clip_and_step(optimizer, scaler)
        check_step(losses, step, norm, scaler)

        # -- log, of all processes: the loss, and means of each kind. They are per token, ranking's
        # validation is per user (a name's sum): not to be compared
        if step % 20 == 0:
            means = mean_over_processes({"loss": loss, **losses})
            run.log_step(step, norm, **means, tau=model.tau.item(), targets=seen_targets)
    run.finish(f"{seen_targets:,} target tokens, ")


if __name__ == "__main__":
    run_training(main)
