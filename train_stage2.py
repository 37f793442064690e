"""Stage 2: item-language model training. Teaches a frozen LLM to read soft tokens; also trains every baseline of the tables.

    python train_stage2.py                                                 # ILM on the toy world, CPU: about two minutes
    python train_stage2.py --method mlp --lr 1e-2                          # CoLLM's two-layer MLP in place of the Q-Former
    python train_stage2.py --method ilm-rand --lr 4e-3                     # a Q-Former that skipped stage 1
    python train_stage2.py --mix 0 0 1                                     # text tasks alone, as the paper trains its ELM-24 table
    python train_stage2.py --method text --train-llm                       # OpenP5's way: names only, the LLM itself is trained
    python train_stage2.py --data data/ml-1m --llm org/model               # reads out/ml-1m/stage1, writes out/ml-1m/ilm

The loss is -log p(target tokens | prompt), by the LLM's own p where the target is text. DEVIATION: where it is an item's name, p of each
token is divided among the tokens that the catalogue allows there, exactly as when evaluate.py ranks: nothing is spent on spelling, and
a name ends where it is decided (--full-vocabulary: the paper's loss). A user is what came before the target. The gradient reaches item
encoder and adapter through the frozen LLM, which stays as it is but for --train-llm. Three kinds of batches, drawn at random per
micro-step, whose rows have like lengths:
    sequential        a window of a user's history: *every* position is a target, packed in one row (pack)
    straightforward   a user alone: up to 20 of their training items, each asked for at its own moment
    text              an instance of tasks.jsonl: describe an item from its soft tokens, without its name
The skeleton is train_stage1.py's; a diff of the two loops shows what is different."""

import argparse
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer

from assets.fast.packing import SOFT_BASE, collate, index, pack
from assets.guard import InputError, Parser, reading, within
from assets.run import (
    RunDirectory,
    check_fingerprint,
    check_step,
    distribute,
    fingerprint,
    from_pretrained,
    load_weights,
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
from data import HISTORY, RANKING_TASKS, load_dataset, load_prompts, ranking_templates
from ilm import CHAT_DATE, PRIORS, Prompt, build_ilm
from qformer import QFormer, QFormerConfig
from train_stage1 import (
    LOCAL_ARGS,
    Texts,
    add_qformer_args,
    add_training_args,
    clip_and_step,
    make_optimizer,
    print_parameters,
    set_learning_rate,
    share_of,
)

METHODS = ("ilm", "ilm-rand", "mlp", "text")


# ---- Examples and batches: every batch a function of (seed, step, micro-step) --------------------


class Examples:
    """Turns users and text-task instances into (prompt ids, target ids), for training, validation
    and test alike, and packs them (assets/fast/packing.py)."""

    def __init__(self, model, dataset):
        self.model, self.dataset = model, dataset
        self.templates = ranking_templates(model.config.get("prompts"), dataset.meta["name"])
        self.tasks = {
            split: [task for task in dataset.tasks if task["split"] == split]
            for split in ("train", "valid", "test")
        }
        self.users = np.array(
            [u for u in dataset.eligible() if len(dataset.items_of(u, "train")) >= 2]
        )
        # Whose vector a user gets where CF is shuffled
        self.stranger = np.random.default_rng(0).permutation(len(dataset.users))

    # -- what stands for a user, with the last items behind it where encoders read them

    def users_at(self, users, split):
        """What encoders read (B, E') of users when the target of `split` is asked for."""
        if self.model.shuffled:
            users = self.stranger[users]
        vectors = self.dataset.standard_users(self.dataset.users_at(users, split))
        return self.model.with_history(vectors, [self.dataset.items_of(u, split) for u in users])

    def training_users(self, user, places):
        """What encoders read (n, E') of a user as a training target at each place (n,) meets
        them."""
        if self.model.shuffled:
            other = self.users[self.stranger[user] % len(self.users)]
            count = len(self.dataset.items_of(other, "train"))
            places, user = 1 + (places - 1) % (count - 1), other
        vectors = self.dataset.standard_users(self.dataset.training_users(user, places))
        history = self.dataset.items_of(user, "train")
        return self.model.with_history(vectors, [history[:place] for place in places])

    # -- examples

    def name(self, item):
        """The target of an item's name: its tokens, and the nodes of the trie they are chosen at,
        or, with --full-vocabulary, all its tokens alone."""
        if self.model.config.get("full_vocabulary"):
            return (self.model.name_ids[item],)
        return self.model.names_trie.paths[item]

    def ranking(self, task, user, history, template, cf=None):
        history = [int(i) for i in history[-HISTORY:]] if task == "sequential" else ()
        return self.model.prompt_ids(template, user=user, history=history, cf=cf)

    def ranking_prompts(self, task, users, split, prompts):
        """What evaluation asks of users (B,): the template is the user's number modulo their
        count."""
        templates, asked = self.templates[task, prompts], []
        for user, cf in zip(users, self.users_at(users, split)):
            template = templates[int(user) % len(templates)]
            history = self.dataset.items_of(user, split)
            asked.append(self.ranking(task, user, history, template, cf))
        return asked

    def text(self, instance):
        prompt = self.model.prompt_ids(instance["prompt"], items=instance["items"], named=False)
        return prompt, self.model.target_ids(instance["target"])[: self.model.context - len(prompt)]

    def prefixes(self, user, window, cf, template):
        """Prompts of all prefixes of a window of items (n + 1,) but the empty one, cf (n, E'). Soft
        tokens split a text, so that what stands before an item has the same tokens whatever
        follows: all are cut from the longest one, tokenised once."""
        longest, Q = self.ranking("sequential", user, window[:-1], template, cf[-1]), self.model.Q
        first_user = SOFT_BASE + self.model.num_items * Q
        ends = [  # of the history's items
            place + 1
            for place, i in enumerate(longest)
            if SOFT_BASE <= i < first_user and (i - SOFT_BASE) % Q == Q - 1
        ]
        if len(ends) != len(window) - 1:  # no soft tokens, or a history that had to be shortened
            return [
                self.ranking("sequential", user, window[:k], template, cf[k - 1])
                for k in range(1, len(window))
            ]
        after = longest[ends[-1] :]
        return [
            Prompt([*longest[:end], *after], [vector] * len(longest.cf))
            for end, vector in zip(ends, cf)
        ]

    def sequential_row(self, user, template, rng):
        """A random window of HISTORY + 1 training items; each but the first is the target of the
        window before it."""
        items = self.dataset.items_of(user, "train")
        start = int(rng.integers(max(1, len(items) - HISTORY)))
        window = items[start : start + HISTORY + 1]
        cf = self.training_users(user, np.arange(start + 1, start + len(window)))
        prompts = self.prefixes(user, window, cf, template)
        return self.pack([(p, *self.name(item)) for p, item in zip(prompts, window[1:])])

    def straightforward_row(self, user, template, rng):
        """Up to HISTORY of the user's training items, each asked for at its own moment."""
        items = self.dataset.items_of(user, "train")
        places = 1 + rng.permutation(len(items) - 1)[:HISTORY]
        cf = self.training_users(user, places)
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
        """`size` packed rows of one kind; rows of the other two are shorter, there are twice and
        four times as many. One template a batch, so that rows have like lengths. Every process
        draws the same users and makes its own rows of them."""
        size *= {"sequential": 1, "straightforward": 2, "text": 4}[kind]
        seeds, own = rng.integers(2**62, size=size), own_rows(size)
        if kind == "text":  # a random number is as good as an index
            pool = self.tasks["train"]
            instances = [pool[seed % len(pool)] for seed in seeds[own]]
            return self.collate([self.pack([self.text(instance)]) for instance in instances])
        row = {"sequential": self.sequential_row, "straightforward": self.straightforward_row}[kind]
        users, templates = rng.choice(self.users, size=size), self.templates[kind, "seen"]
        template, rows = templates[rng.integers(len(templates))], []
        for user, seed in zip(users[own], seeds[own]):
            rows.append(row(user, template, np.random.default_rng(seed)))
        return self.collate(rows)

    def held_out(self, split, limit, size):
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

        # Rows of like lengths together
        batches = {}
        for kind, some in rows.items():
            some.sort(key=lambda row: len(row["ids"]))
            parts = [some[k : k + size] for k in range(0, len(some), size)]
            if parts:
                batches[kind] = [self.collate(part) for part in parts]
        return batches


@torch.no_grad()
def held_out_losses(model, held_out):
    """{kind: mean loss}. text: -log p a target token. Ranking: -log p(next item), nats a user; a uniform guess has ln I."""
    model.eval()
    losses, (rank, world) = {}, process()
    for kind, batches in held_out.items():
        total, count = 0.0, 0
        for batch in batches[rank::world]:  # every user is validated once, by one process
            with model.autocast():
                value, nll = model(batch)
            total, count = (
                total + value.double(),
                count + (len(nll) if kind == "text" else len(batch["ids"])),
            )
        total, count = sum_over_processes(float(total), count)
        losses[kind] = total / count
    model.train()
    return losses


# ----------------------------------------------------------------------------------------------------------------------


def load_stage1(run, dataset, device):
    """A trained Q-Former, its texts and its config from a run directory."""
    check_fingerprint(config := read_config(run, "stage1"), dataset, run)
    with reading(Path(run) / "config.json", "train stage 1 again"):
        model = QFormer(QFormerConfig(**config["qformer"]))
    load_weights(dict(model.named_parameters()), Path(run) / "model.safetensors")
    texts = Texts(
        dataset,
        from_pretrained(AutoTokenizer, str(Path(run) / "tokenizer"), "--stage1"),
        config["qformer"]["max_text"],
    )
    return model.to(device).eval(), texts, config


def parse_args(argv=None):
    p = Parser(description=__doc__.split("\n")[0])
    add_training_args(p, "ilm", steps=160, batch_size=16, lr=2e-3)
    add_qformer_args(p)  # of ilm-rand and mlp; those of ilm are its stage-1 run's
    p.add_argument(
        "--history",
        type=within(int, 0, 200),
        default=20,
        help="W, items of a user's history that the encoder reads beside their vector [20]",
    )
    p.add_argument(
        "--accumulate",
        type=within(int, 1),
        default=2,
        help="micro-batches a step, each of one kind; a mean over tokens [2]",
    )
    p.add_argument("--method", default="ilm", choices=METHODS, help="[ilm]")
    p.add_argument(
        "--stage1", help="run directory of train_stage1.py, for --method ilm [out/NAME/stage1]"
    )
    p.add_argument(
        "--llm",
        default="assets/toy_llm",
        help="folder or hub id of an LLM, decoder-only or encoder-decoder [assets/toy_llm]",
    )
    p.add_argument(
        "--train-llm",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="train the LLM as well [no: it is frozen]",
    )
    p.add_argument(
        "--item-names",
        default="title",
        metavar="title|random|FILE",
        help="names in prompts and targets; a file has lines `id name`, as OpenP5's index files [title]",
    )
    p.add_argument(
        "--name-tokens",
        type=within(int, 0),
        default=0,
        help="cut names to so many tokens, keeping them unique [0: whole]",
    )
    p.add_argument(
        "--prompt-items",
        default="names+tokens",
        choices=["names+tokens", "tokens"],
        help="histories of the soft methods",
    )
    p.add_argument(
        "--prompts",
        metavar="FILE",
        help="templates of the ranking tasks, also OpenP5's prompt file [prompts.txt]",
    )
    p.add_argument(
        "--full-vocabulary",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="names compete with all tokens [no]",
    )
    p.add_argument(
        "--prior",
        default="popularity",
        choices=PRIORS,
        help="what is added in the trie to the LLM's opinion of names [popularity]",
    )
    p.add_argument(
        "--temperature",
        default="learned",
        choices=["learned", "fixed"],
        help="how loud the LLM is there; fixed: 1 [learned]",
    )
    p.add_argument(
        "--shuffle-cf",
        action="store_true",
        help="a control: train on the CF vectors of other items and users",
    )
    p.add_argument(
        "--valid-users", type=within(int, 1), default=128, help="users of each validation [128]"
    )
    p.add_argument(
        "--text-fraction",
        type=within(float, 1e-6, 1),
        default=1.0,
        help="share of training items with text tasks [1]",
    )
    p.add_argument(
        "--mix",
        type=within(float, 0),
        nargs=3,
        default=[0.3, 0.5, 0.2],
        metavar=("SEQ", "STR", "TEXT"),
        help="share of batches of each kind (not of target tokens, over which a step's loss is the mean) [.3 .5 .2]",
    )
    args = p.parse_args(argv)
    args.out = args.out or f"out/{Path(args.data).name}/{args.method}"
    args.stage1 = args.stage1 or f"out/{Path(args.data).name}/stage1"
    if not sum(args.mix):
        raise InputError("--mix: the shares must not all be 0")
    load_prompts(args.prompts)  # a mistake in it is said before the LLM is loaded
    return args


def make_config(args, dataset):
    """What a run is, as written to config.json: enough to build the model again. Returns it and the stage-1 Q-Former, if any."""
    qformer, shape = (
        None,
        {"num_queries": args.num_queries, "layers": args.layers, "width": args.width},
    )
    if args.method == "ilm":
        qformer, _, stage1 = load_stage1(args.stage1, dataset, torch.device("cpu"))
        for name, value in shape.items():
            if value not in (None, stage1["qformer"][name]):
                raise InputError(
                    f"--{name.replace('_', '-')} {value}: the stage-1 run {args.stage1} has {stage1['qformer'][name]}; "
                    "leave it out, or train stage 1 again"
                )
        qformer_config = stage1["qformer"]
    else:
        given = {k: v for k, v in shape.items() if v is not None}
        qformer_config = asdict(
            QFormerConfig(cf_dim=dataset.item_cf.shape[1], vocab_size=1, **given)
        )
    qformer_config = qformer_config | {
        "dropout": 0.0,
        "history": args.history,
    }  # DEVIATION: BLIP-2 keeps .1; here the soft tokens underfit, noise only slows them
    given = {name: value for name, value in vars(args).items() if name not in LOCAL_ARGS}
    return {
        **given,
        "kind": "stage2",
        "stage1": args.stage1 if args.method == "ilm" else None,
        "qformer": qformer_config,
        "num_queries": qformer_config["num_queries"],
        "fingerprint": fingerprint(dataset),
        "chat_date": CHAT_DATE,
    }, qformer


def main():
    args, began = parse_args(), time.time()
    device, rank, world = start_processes(args)
    dataset = load_dataset(args.data)
    config, qformer = make_config(args, dataset)
    torch.manual_seed(args.seed)
    model = build_ilm(config, dataset, device)
    if qformer is not None:
        weights = model.encoder.state_dict()  # stage 1 has no history keys
        model.encoder.load_state_dict(
            {name: qformer.state_dict().get(name, x) for name, x in weights.items()}
        )
        model.set_up()
    trainable = [p for p in model.parameters() if p.requires_grad]
    say(
        f"stage 2, {args.method} on {args.data} with {args.llm}, {world} x {device}, {precision(device)}"
    )
    print_parameters(model)
    run = RunDirectory(args, config)
    examples = Examples(model, dataset)
    kinds, shares = ["sequential", "straightforward", "text"], np.array(args.mix)
    items = dataset.items_in("train")
    left_out = {*items} - {*share_of(items, args.text_fraction, args.seed)}
    examples.tasks["train"] = [t for t in examples.tasks["train"] if not left_out & {*t["items"]}]
    shares[2] *= bool(examples.tasks["train"])
    if not shares.sum():
        raise InputError(f"--mix 0 0 ...: {args.data} has no text task to train on")
    if shares[:2].any() and not len(examples.users):
        raise InputError(
            f"{args.data}: no user has two training items, one to read and one to predict; users need 4 interactions"
        )
    held_out = examples.held_out("valid", limit=args.valid_users, size=2 * args.batch_size)
    held_out = {
        kind: batches for kind, batches in held_out.items() if shares[kinds.index(kind)]
    }  # what is trained chooses the checkpoint
    if not held_out:
        raise InputError(
            f"{args.data}: no text task of a validation item to choose a checkpoint by; --mix needs more than texts"
        )
    if not trainable:
        say("nothing to train (names only, frozen LLM): the run is the LLM as it is")
        args.steps = 0
    parameters, optimizer = (
        model.saved_parameters(),
        make_optimizer(model, args.lr) if trainable else torch.optim.AdamW([torch.zeros(1)]),
    )
    scaler = torch.amp.GradScaler(device.type, enabled=precision(device) == torch.float16)
    run.restore(parameters, optimizer, scaler)
    eval_every = args.eval_every or max(1, args.steps // 6)
    model.train()
    parallel = distribute(model, world if trainable else 1)
    seen_targets = run.state["targets"] if run.state else 0

    def draw(step):
        """A step's kinds of micro-batches, the batches and a seed for dropout: a function of (seed, step)."""
        rng = np.random.default_rng([args.seed, step])
        seed = int(rng.integers(2**62))
        drawn = rng.choice(kinds, size=args.accumulate, p=shares / shares.sum())
        return seed, drawn, [examples.batch(kind, args.batch_size, rng) for kind in drawn]

    ahead = ThreadPoolExecutor(1)  # makes the next step's batches while the device computes
    following = ahead.submit(draw, run.start) if run.start < args.steps else None
    for step in progress(run.start, args.steps, "stage 2"):
        # -- learning rate
        rate = set_learning_rate(optimizer, step, args.steps, args.lr)
        # -- evaluate and save
        if step % eval_every == 0 or step == args.steps:
            valid = held_out_losses(model, held_out)
            run.save(
                step, parameters, optimizer, scaler, sum(valid.values()) / len(valid), seen_targets
            )
            run.log(
                step=step,
                **{f"valid_{k}": v for k, v in valid.items()},
                seconds=time.time() - began,
            )
            say(
                f"step {step:5}  "
                + "  ".join(f"valid {k} {v:.3f}" for k, v in valid.items())
                + f"  {time.time() - began:.0f} s"
            )
        if step == args.steps:
            break
        run.stop_if_asked(step, parameters, optimizer, scaler, None, seen_targets)
        # -- losses: the sum over all target tokens of the step's micro-batches, over their number
        seed, drawn, batches = following.result()
        following = ahead.submit(draw, step + 1) if step + 1 < args.steps else None
        torch.manual_seed(seed + rank)
        (targets,) = sum_over_processes(sum(len(batch["target"]) for batch in batches))
        losses = {}
        for k, (kind, batch) in enumerate(zip(drawn, batches), 1):
            with nullcontext() if world == 1 or k == len(batches) else parallel.no_sync():
                with model.autocast():
                    total, nll = parallel(batch)
                scaler.scale(total * world / targets).backward()
            losses.setdefault(str(kind), []).append(nll.detach().mean())
        losses = {kind: torch.stack(values).mean() for kind, values in losses.items()}
        seen_targets += int(targets)
        # -- step
        norm = clip_and_step(optimizer, scaler)
        check_step(losses, step, norm, scaler)
        # -- log (with several processes: the first one's rows)
        if step % 20 == 0:
            losses = {k: v.item() for k, v in losses.items()}
            run.log(
                step=step,
                **losses,
                grad_norm=norm,
                tau=model.tau.item(),
                targets=seen_targets,
                lr=rate,
                scale=scaler.get_scale(),
            )
    ahead.shutdown()
    say(
        f"wrote {run.path}: best validation loss {run.best:.4f}, {seen_targets:,} target tokens, {time.time() - began:.0f} s"
    )


if __name__ == "__main__":
    run_training(main)
