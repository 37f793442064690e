"""Stage 2: item-language model training. Teaches a frozen LLM to read soft tokens; also trains
every baseline of the tables.

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
    sequential        a window of a user's history: *every* position is a target, packed in one row
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

from assets.fast.packing import collate, index, item_ends, of_like_length, pack
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
from ilm import PRIORS, Prompt, build_ilm
from qformer import QFormer, QFormerConfig
from train_stage1 import clip_and_step, make_optimizer, set_learning_rate

METHODS = ("ilm", "ilm-rand", "mlp", "text")
KINDS = (*RANKING_TASKS, "text")


# ---- Examples and batches: every batch a function of (seed, step, micro-step) ----


class Examples:
    """Turns users and text-task instances into (prompt, target ids[, trie nodes]), for training,
    validation and test alike, and packs them (assets/fast/packing.py)."""

    def __init__(self, model, dataset):
        self.model, self.dataset = model, dataset
        self.templates = ranking_templates(model.config.get("prompts"), dataset.meta["name"])
        self.tasks = {
            split: [task for task in dataset.tasks if task["split"] == split]
            for split in ("train", "valid", "test")
        }
        self.users = dataset.eligible(4)
        # Whose vector a user gets where CF is shuffled; in training one who has places to ask at
        self.stranger = np.random.default_rng(0).permutation(len(dataset.users))

    # -- what stands for a user, with the last items behind it where encoders read them

    def read_at(self, users, split):
        """What encoders read (B, E') of users when the target of `split` is asked for."""
        if self.model.shuffled:
            users = self.stranger[users]
        vectors = self.dataset.standard_users(self.dataset.users_at(users, split))
        return self.model.with_history(vectors, [self.dataset.items_of(u, split) for u in users])

    def read_before(self, user, places):
        """What encoders read (n, E') of one user just before each place (n,) of their history."""
        if self.model.shuffled:  # a stranger, at some place of their own history
            user = self.users[self.stranger[user] % len(self.users)]
            places = 1 + (places - 1) % (len(self.dataset.items_of(user, "train")) - 1)
        vectors = self.dataset.standard_users(self.dataset.user_before(user, places))
        history = self.dataset.items_of(user, "train")
        return self.model.with_history(vectors, [history[:place] for place in places])

    # -- examples

    def name(self, item):
        """The target of an item's name: its tokens, and the nodes of the trie they are chosen at,
        or, with --full-vocabulary, all its tokens alone."""
        if self.model.config["full_vocabulary"]:
            return (self.model.name_ids[item],)
        return self.model.names_trie.paths[item]

    def ranking(self, task, user, history, template, cf=None):
        history = [int(i) for i in history[-PROMPT_ITEMS:]] if task == "sequential" else ()
        return self.model.prompt_ids(template, user=user, history=history, cf=cf)

    def ranking_prompts(self, task, users, split, wording):
        """What evaluation asks of users (B,): the template is the user's number modulo their
        count."""
        templates, asked = self.templates[task, wording], []
        for user, cf in zip(users, self.read_at(users, split)):
            template = templates[int(user) % len(templates)]
            history = self.dataset.items_of(user, split)
            asked.append(self.ranking(task, user, history, template, cf))
        return asked

    def text(self, instance):
        prompt = self.model.prompt_ids(instance["prompt"], items=instance["items"], named=False)
        return prompt, self.model.target_ids(instance["target"])[: self.model.context - len(prompt)]

    def prefixes(self, user, window, cf, template):
        """A window of items (n + 1,), cf (n, E') -> n prompts, of its first 1, 2 ... n items."""
        longest = self.ranking("sequential", user, window[:-1], template, cf[-1])
        ends = item_ends(longest, self.model.num_items, self.model.Q)
        if len(ends) == len(window) - 1:  # cut from the longest one, which is tokenised once
            after = longest[ends[-1] :]
            cut = [[*longest[:end], *after] for end in ends]
            return [Prompt(ids, [vector] * len(longest.cf)) for ids, vector in zip(cut, cf)]

        # The definition; no soft tokens tell where to cut, or the history had to be shortened
        return [
            self.ranking("sequential", user, window[:k], template, cf[k - 1])
            for k in range(1, len(window))
        ]

    def sequential_row(self, user, template, rng):
        """A random window of PROMPT_ITEMS + 1 training items; each but the first is the target of
        those before it."""
        items = self.dataset.items_of(user, "train")
        start = int(rng.integers(max(1, len(items) - PROMPT_ITEMS)))
        window = items[start : start + PROMPT_ITEMS + 1]
        cf = self.read_before(user, np.arange(start + 1, start + len(window)))
        prompts = self.prefixes(user, window, cf, template)
        return self.pack([(p, *self.name(item)) for p, item in zip(prompts, window[1:])])

    def straightforward_row(self, user, template, rng):
        """Up to PROMPT_ITEMS of the user's training items, each asked for at its own moment."""
        items = self.dataset.items_of(user, "train")
        places = 1 + rng.permutation(len(items) - 1)[:PROMPT_ITEMS]
        cf = self.read_before(user, places)
        prompt = self.ranking("straightforward", user, (), template, cf[0])
        prompts = [Prompt(prompt, [vector] * len(prompt.cf)) for vector in cf]
        return self.pack([(p, *self.name(items[place])) for p, place in zip(prompts, places)])

    def pack(self, examples):
        return pack(examples, self.model.num_items, self.model.Q)

    def collate(self, rows):
        """Packed rows -> the batch that ILM.forward takes."""
        num_items, Q = self.model.num_items, self.model.Q
        return index(collate(rows, num_items, Q), self.model.names_trie, num_items, Q)

    # -- batches

    def batch(self, kind, size, rng):
        return self.collate(self.rows(kind, size, rng))

    def rows(self, kind, size, rng):
        """`size` packed rows; straightforward rows are shorter, twice as many, texts' four times.
        One template for all (texts: a row), so that rows have like lengths. Every process draws the
        same users and makes its own rows of them."""
        size *= {"sequential": 1, "straightforward": 2, "text": 4}[kind]
        seeds, own = rng.integers(2**62, size=size), own_rows(size)
        if kind == "text":  # the row's seed picks the instance
            pool = self.tasks["train"]
            instances = [pool[seed % len(pool)] for seed in seeds[own]]
            return [self.pack([self.text(instance)]) for instance in instances]
        row = {"sequential": self.sequential_row, "straightforward": self.straightforward_row}[kind]
        users, templates = rng.choice(self.users, size=size), self.templates[kind, "seen"]
        template, rows = templates[rng.integers(len(templates))], []
        for user, seed in zip(users[own], seeds[own]):
            rows.append(row(user, template, np.random.default_rng(seed)))
        return rows

    def held_out(self, split, limit, tokens):
        """Batches to validate on, {kind: [batch]}: text tasks of held-out items, and the next item
        of up to `limit` users."""
        rng, rows = np.random.default_rng(0), {}
        users = self.dataset.eligible()
        users = users[rng.permutation(len(users))[:limit]]
        for task in RANKING_TASKS:
            prompts = self.ranking_prompts(task, users, split, "seen")
            targets = [self.name(self.dataset.target(u, split)) for u in users]
            rows[task] = [self.pack([(prompt, *name)]) for prompt, name in zip(prompts, targets)]
        pool = self.tasks[split]
        instances = [pool[i] for i in rng.permutation(len(pool))[: 2 * limit]]
        rows["text"] = [self.pack([self.text(instance)]) for instance in instances]

        return {
            kind: [self.collate(part) for part in of_like_length(some, tokens)]
            for kind, some in rows.items()
            if some
        }


@torch.no_grad()
def held_out_losses(model, held_out):
    """{kind: mean loss}. text: -log p a target token. Ranking: -log p(next item), nats a user; a
    uniform guess has ln I."""
    model.eval()
    losses, (rank, world) = {}, process()
    for kind, batches in held_out.items():
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
    if args.gradient_checkpointing:
        model.llm.checkpoint_layers()
    if args.compile:
        model.llm.compile_layers()
    args.batch_tokens = args.batch_tokens or (20_000 if device.type == "cuda" else 4_096)
    introduce(f"stage 2, {args.method} on {args.data} with {args.llm}", model, device)
    if not any(p.requires_grad for p in model.parameters()):
        say("nothing to train (names only, frozen LLM): the run is the LLM as it is")
        args.steps = 0
    return model.train(), RunDirectory(args, config)


def set_up_data(args, examples):
    """The share of each kind of batch (3,), and what chooses the checkpoint: batches of the kinds
    that are trained."""
    items = examples.dataset.items_in("train")
    left_out = {*items} - {*share_of(items, args.text_fraction, args.seed)}
    tasks = [t for t in examples.tasks["train"] if not left_out & {*t["items"]}]
    examples.tasks["train"] = tasks
    shares = np.array(args.mix) * [1, 1, bool(tasks)]
    found = examples.held_out("valid", args.valid_users, args.batch_tokens)
    held_out = {kind: found[kind] for kind, x in zip(KINDS, shares) if x and kind in found}
    check_stage2(args, shares, examples.users, held_out)
    return shares / shares.sum(), held_out


def draw_batches(examples, shares, args, step):
    """A step's seed for dropout, and its micro-batches, cut to what the LLM reads at once: [(kind,
    batch), ...]."""
    rng = np.random.default_rng([args.seed, step])
    seed = int(rng.integers(2**62))
    batches = []
    for kind in rng.choice(KINDS, size=args.accumulate, p=shares).tolist():
        rows = examples.rows(kind, args.batch_size, rng)
        parts = of_like_length(rows, args.batch_tokens)
        batches += [(kind, examples.collate(part)) for part in parts]
    return seed, batches


def main():
    args = parse_args()
    device, rank, world = start_processes(args)
    dataset = load_dataset(args.data)
    model, run = set_up_model(args, dataset, device)
    examples = Examples(model, dataset)
    shares, held_out = set_up_data(args, examples)
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
            valid = held_out_losses(model, held_out)
            run.save(step, sum(valid.values()) / len(valid), seen_targets)
            run.log_validation(step, valid)
        if step == args.steps:
            break
        run.stop_if_asked(step, seen_targets)

        # -- losses: the mean over all target tokens of the step's micro-batches
        seed, batches = next(drawn)
        torch.manual_seed(seed + rank)
        (targets,) = sum_over_processes(sum(len(batch["target_at"]) for _, batch in batches))
        loss, nlls = 0.0, {}
        for k, (kind, batch) in enumerate(batches, 1):
            with averaging(parallel, k == len(batches)):
                with model.autocast():  # but for T5, which overflows fp16
                    total, nll = parallel(batch)
                part = total * world / targets
                scaler.scale(part).backward()
            loss += part.detach()
            nlls.setdefault(kind, []).append(nll.detach())
        losses = {kind: torch.cat(parts).mean() for kind, parts in nlls.items()}
        seen_targets += int(targets)

        # -- step
        norm = clip_and_step(optimizer, scaler)
        check_step(losses, step, norm, scaler)

        # -- log, of all processes: the loss, and means of each kind, a token. (Of ranking,
        # validation is a user)
        if step % 20 == 0:
            means = mean_over_processes({"loss": loss, **losses})
            run.log_step(step, norm, **means, tau=model.tau.item(), targets=seen_targets)
    run.finish(f"{seen_targets:,} target tokens, ")


if __name__ == "__main__":
    run_training(main)
