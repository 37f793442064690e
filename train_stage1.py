"""Stage 1: item-language representation learning. Teaches the Q-Former to say in text space what CF vectors know.

    python train_stage1.py                                   # toy world, CPU: about a minute
    python train_stage1.py --losses itc itm itg              # the paper's ILM-IT; itc itm itg ii is ILM-IT-II, and so on
    python train_stage1.py --data data/ml-1m --init-bert bert-base-uncased-folder --width 768 --layers 8 --num-queries 8

Every step sums five losses, each explained where it is defined (qformer.py):
    itc  item-text contrastive      itm  item-text matching      itg  item-grounded text generation      on items with training texts
    ii   item-item contrastive      ui   user-item contrastive                                            on all training interactions
Held-out items lend their CF vectors to ii and ui, and their texts to no loss. The best checkpoint has the lowest itc + itm + itg on
the validation items. DEVIATION: the paper alternates item-text and item-item batches; here both stand in every step.

What both training scripts need stands first (flags, schedule, optimizer); what surrounds every run is in assets/run.py."""

import math
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from transformers import AutoModelForMaskedLM, AutoTokenizer

from assets.bert import init_from_bert
from assets.guard import InputError, Parser, a_seed, reading, within
from assets.run import (
    RunDirectory,
    autocast,
    check_step,
    distribute,
    fingerprint,
    from_pretrained,
    own_rows,
    precision,
    progress,
    run_training,
    say,
    start_processes,
    sum_over_processes,
)
from data import load_dataset
from qformer import QFormer, QFormerConfig, item_text_losses, item_text_similarity, pair_loss

TEXT_LOSSES = ("itc", "itm", "itg")
PAIR_LOSSES = ("ii", "ui")
LOSSES = TEXT_LOSSES + PAIR_LOSSES
LOCAL_ARGS = (
    "out",
    "resume",
    "device",
    "layers",
    "width",
    "eval_every",
)  # config.json leaves them out, or has them elsewhere

# ---- Shared by both stages -------------------------------------------------------------------------------------------


def add_training_args(p, out, steps, batch_size, lr, rows=1):
    p.add_argument("--data", default="data/toy", help="prepared folder [data/toy]")
    p.add_argument(
        "--out", help=f"run directory [out/NAME/{out}, NAME that of --data: out/toy/{out}]"
    )
    p.add_argument("--steps", type=within(int, 1), default=steps, help=f"optimizer steps [{steps}]")
    p.add_argument(
        "--batch-size", type=within(int, rows), default=batch_size, help=f"[{batch_size}]"
    )
    p.add_argument(
        "--lr",
        type=within(float, 0, 100),
        default=lr,
        help=f"peak, after 5 %% of the steps; then cosine to a tenth [{lr}]",
    )
    p.add_argument(
        "--eval-every",
        type=within(int, 0),
        default=0,
        help="steps between validations [a tenth (stage 2: a sixth) of --steps]",
    )
    p.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    p.add_argument("--seed", type=a_seed, default=0, help="[0]")
    p.add_argument("--device", help="[cuda if there is one, else cpu]")


def add_qformer_args(p, num_queries=None, layers=None, width=None):
    p.add_argument(
        "--num-queries",
        type=within(int, 1, 1024),
        default=num_queries,
        help="Q, soft tokens per item [4]",
    )
    p.add_argument(
        "--layers",
        type=within(int, 1, 256),
        default=layers,
        help="layers; cross-attention in every second [2]",
    )
    p.add_argument(
        "--width", type=within(int, 1, 1 << 16), default=width, help="Q-Former width D [128]"
    )


def set_learning_rate(optimizer, step, steps, peak):
    """Linear warm-up over the first 5 % of the steps, then a cosine down to a tenth of the peak."""
    warmup = max(1, steps // 20)
    cosine = 0.5 * (1 + math.cos(math.pi * max(0, step - warmup) / max(1, steps - warmup)))
    rate = peak * min(1.0, (step + 1) / warmup) * (0.1 + 0.9 * cosine)
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


def clip_and_step(optimizer, scaler):
    """Gradient clipped to norm 1, one optimizer step, gradients cleared. An fp16 overflow makes the scaler skip it. Returns the norm."""
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(
        [p for group in optimizer.param_groups for p in group["params"]], 1.0
    ).item()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return norm


def make_optimizer(model, lr, weight_decay=0.05):
    """AdamW with BLIP-2's betas and decay. Matrices decay, word tables too; norms, biases, temperature and learned queries do not."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(
        [
            {"params": [p for p in trainable if p.ndim == 2], "weight_decay": weight_decay},
            {"params": [p for p in trainable if p.ndim != 2], "weight_decay": 0.0},
        ],
        lr=lr,
        betas=(0.9, 0.999),
    )


def print_parameters(model):
    """One line a child module: what trains, what is frozen."""
    for name, child in model.named_children():
        total = sum(p.numel() for p in child.parameters())
        train = sum(p.numel() for p in child.parameters() if p.requires_grad)
        say(
            f"  {name:12} {total:>12,} parameters, {train:>12,} trainable"
            + ("  (frozen)" if total and not train else "")
        )


# ---- Batches: every one a function of (seed, step), so that a resumed run sees what an uninterrupted one would -------


class Texts:
    """All item texts as token ids: [CLS] t1 t2 ... [SEP] pad. ids, mask (I, T); `group` (I,): equal for items of equal text."""

    def __init__(self, dataset, tokenizer, max_text):
        special, self.size = {}, len(tokenizer)
        for name in (
            "cls",
            "sep",
            "dec",
            "pad",
        ):  # what the tokenizer lacks becomes a new row of the Q-Former's own table
            known = getattr(tokenizer, f"{name}_token_id", None)
            special[name] = self.size if known is None else known
            self.size += known is None
        self.dec = special["dec"]
        self.ids = torch.full((len(dataset.items), max_text), special["pad"])
        self.mask = torch.zeros(len(dataset.items), max_text, dtype=torch.bool)
        groups, self.group = {}, torch.empty(len(dataset.items), dtype=torch.long)
        for i, item in enumerate(dataset.items):
            ids = (
                tokenizer(item["text"], add_special_tokens=False)["input_ids"][: max_text - 2]
                if item["text"]
                else []
            )
            row = [special["cls"], *ids, special["sep"]]
            self.ids[i, : len(row)], self.mask[i, : len(row)] = torch.tensor(row), True
            self.group[i] = groups.setdefault(
                tuple(ids) or i, len(groups)
            )  # of equal texts, as far as they are read

    def batch(self, items):
        """ids, mask cut to the longest text, and which pairs have the same text."""
        T = int(self.mask[items].sum(1).max())
        return (
            self.ids[items, :T],
            self.mask[items, :T],
            self.group[items][:, None] == self.group[items][None],
        )


class Pairs:
    """II pairs: two training items of one user within 5 steps. UI pairs: one of their training items and the user
    at the moment it was chosen."""

    def __init__(self, dataset, window=5):
        self.dataset, self.window = dataset, window
        self.users = np.array(
            [u for u in dataset.eligible() if len(dataset.items_of(u, "train")) >= 2]
        )

    def ii(self, count, rng):
        """(B,), (B,) item indices."""
        pairs = []
        for u in rng.choice(self.users, size=count):
            s = self.dataset.items_of(u, "train")
            at = int(rng.integers(len(s) - 1))
            pairs.append(
                (s[at], s[int(rng.integers(at + 1, min(at + self.window, len(s) - 1) + 1))])
            )
        return torch.tensor(np.array(pairs, dtype=np.int64)).unbind(1)

    def ui(self, count, rng):
        """(B,) user indices, each once; their standardised vectors (B, E) at the moment before an item; it (B,)."""
        users = rng.choice(self.users, size=count, replace=False)
        places = [int(rng.integers(1, len(self.dataset.items_of(u, "train")))) for u in users]
        items = [int(self.dataset.items_of(u, "train")[place]) for u, place in zip(users, places)]
        vectors = self.dataset.standard_users(self.dataset.moments(users, places))
        return torch.tensor(users), vectors, torch.tensor(items)


# ---- All losses of a step --------------------------------------------------------------------------------------------


class Objective(nn.Module):
    """All losses of a step in one forward, which is what DistributedDataParallel can follow."""

    def __init__(self, model, dataset, texts, losses):
        super().__init__()
        self.model, self.dataset, self.texts, self.losses = model, dataset, texts, losses

    def forward(self, batch, generator=None):
        """batch: {"text": items (B,), "ii": (items, items), "ui": (users, their vectors, items)}, any of them -> dict of losses, dict of
        accuracies."""
        dataset, texts, device = self.dataset, self.texts, self.model.queries.device
        losses, accuracy = {}, {}
        if "text" in batch:
            items = batch["text"]
            ids, mask, same = (t.to(device) for t in texts.batch(items))
            losses = item_text_losses(
                self.model,
                dataset.item_cf[items].to(device),
                ids,
                mask,
                same,
                texts.dec,
                generator,
                own_rows(len(items)),
            )
        for name in PAIR_LOSSES:
            if name in batch:
                *left, right = batch[name]
                if name == "ii":
                    left_cf, left_key = dataset.item_cf[left[0]].to(device), texts.group[left[0]]
                else:
                    left_cf, left_key = left[1].to(device), -1 - left[0]  # keys that no item has
                right_cf, right_key = dataset.item_cf[right].to(device), texts.group[right]
                losses[name], accuracy[f"{name}_accuracy"] = pair_loss(
                    self.model, left_cf, right_cf, left_key, right_key, own_rows(len(left_cf))
                )
        return {k: v for k, v in losses.items() if k in self.losses}, accuracy


@torch.no_grad()
def evaluate_texts(model, dataset, texts, items, device, chunk=256):
    """Held-out items -> {"itc", "itm", "itg", "R@1", "R@5", "chance@1"}. Retrieval: an item's text among the texts of all of them."""
    model.eval()
    sums, queries, words = {}, [], []
    for batch in torch.tensor(items).chunk(
        math.ceil(len(items) / chunk)
    ):  # of like sizes: ITC depends on them
        ids, mask, same = (t.to(device) for t in texts.batch(batch))
        cf = dataset.item_cf[batch].to(device)
        losses = item_text_losses(
            model, cf, ids, mask, same, texts.dec, torch.Generator(device).manual_seed(0)
        )
        for name, value in losses.items():
            sums[name] = sums.get(name, 0) + value.item() * len(batch) / len(items)
        queries.append(model.query_features(model.encode(cf)))
        words.append(model.text_features(ids, mask))
    words, hits = torch.cat(words), {1: 0, 5: 0}
    group = texts.group[torch.tensor(items)].to(device)
    for q, own_group in zip(queries, group.split([*map(len, queries)])):
        similarity = item_text_similarity(q, words)  # (chunk, held-out items)
        same = own_group[:, None] == group[None]
        own = similarity.masked_fill(~same, -2).amax(
            1, keepdim=True
        )  # an equal text is a hit as well
        rank = 1 + ((similarity >= own) & ~same).sum(1)  # ties count against
        for k in hits:
            hits[k] += int((rank <= k).sum())
    model.train()
    return {
        **sums,
        **{f"R@{k}": v / len(items) for k, v in hits.items()},
        "chance@1": 1 / len(items),
    }


# ----------------------------------------------------------------------------------------------------------------------


def parse_args(argv=None):
    p = Parser(description=__doc__.split("\n")[0])
    add_training_args(
        p, "stage1", steps=200, batch_size=64, lr=1e-3, rows=2
    )  # a loss that contrasts needs two
    add_qformer_args(p, num_queries=4, layers=2, width=128)
    p.add_argument(
        "--losses",
        nargs="+",
        default=list(LOSSES),
        choices=LOSSES,
        help="terms of the objective [all five]",
    )
    p.add_argument(
        "--text-fraction",
        type=within(float, 1e-6, 1),
        default=1.0,
        help="share of training items whose texts may be used [1]",
    )
    p.add_argument("--init-bert", help="HF folder of a BERT whose weights start the text branch")
    p.add_argument("--tokenizer", help="HF folder or id [--init-bert's, else assets/toy_llm]")
    args = p.parse_args(argv)
    args.out = args.out or f"out/{Path(args.data).name}/stage1"
    return args


def share_of(items, fraction, seed):
    """A random share of items, sorted; a smaller share of the same seed is part of a larger one."""
    return np.sort(
        np.random.default_rng(seed).permutation(items)[: math.ceil(fraction * len(items))]
    )


def draw_batch(train_items, pairs, args, world, rng):
    """What Objective.forward takes. A batch never holds an item (of texts) or a user (of UI) twice; every process draws the same."""
    batch = {}
    whole = lambda count: min(args.batch_size, count) // world * world
    if train_items is not None:
        batch["text"] = torch.tensor(
            np.sort(rng.choice(train_items, size=whole(len(train_items)), replace=False))
        )
    for name, draw, count in (
        ("ii", pairs.ii, args.batch_size),
        ("ui", pairs.ui, whole(len(pairs.users))),
    ):
        if name in args.losses:
            batch[name] = draw(count, rng)
    return batch


def main():
    args, began = parse_args(), time.time()
    device, rank, world = start_processes(args)
    dataset = load_dataset(args.data)
    tokenizer_name = args.tokenizer or args.init_bert or "assets/toy_llm"
    tokenizer = from_pretrained(AutoTokenizer, tokenizer_name, "--tokenizer")
    bert = (
        from_pretrained(AutoModelForMaskedLM, args.init_bert, "--init-bert")
        if args.init_bert
        else None
    )
    config = QFormerConfig(
        cf_dim=dataset.item_cf.shape[1],
        vocab_size=len(tokenizer) + 4,
        num_queries=args.num_queries,
        width=args.width,
        layers=args.layers,
        heads=bert.config.num_attention_heads if bert else 0,
    )
    texts, pairs = Texts(dataset, tokenizer, config.max_text), Pairs(dataset)
    train_items, valid_items = np.array(dataset.items_in("train")), dataset.items_in("valid")
    train_items = share_of(train_items, args.text_fraction, args.seed)
    with_text = bool({*TEXT_LOSSES} & {*args.losses})
    if {*PAIR_LOSSES} & {*args.losses} and not len(pairs.users):
        raise InputError(
            f"{args.data}: no user has two training items (4 interactions), as ii and ui need; use --losses itc itm itg"
        )
    if with_text and (len(train_items) < 2 or not valid_items):
        raise InputError(
            f"{args.data}: {len(train_items)} training and {len(valid_items)} validation items with a text; "
            "item-text losses need 2 and 1; use --losses ii ui"
        )

    torch.manual_seed(args.seed)
    model = QFormer(config)
    if bert:
        with reading(
            f"--init-bert {args.init_bert}", "give a BERT and its own --width and --layers"
        ):
            loaded, missing = init_from_bert(model, bert.state_dict())
        say(
            f"--init-bert {args.init_bert}: loaded {len(loaded)} tensors: {', '.join(loaded)}\nnot loaded, fresh: {', '.join(missing)}"
        )
    model.to(device)
    given = {name: value for name, value in vars(args).items() if name not in LOCAL_ARGS}
    run = RunDirectory(
        args,
        {
            **given,
            "kind": "stage1",
            "tokenizer": tokenizer_name,
            "qformer": asdict(config),
            "fingerprint": fingerprint(dataset),
        },
        tokenizer,
    )
    parameters, optimizer = dict(model.named_parameters()), make_optimizer(model, args.lr)
    scaler = torch.amp.GradScaler(device.type, enabled=precision(device) == torch.float16)
    run.restore(parameters, optimizer, scaler)
    unused = not {*TEXT_LOSSES} <= {*args.losses}  # some parameters get no gradient
    objective = distribute(
        Objective(model, dataset, texts, args.losses), world, find_unused_parameters=unused
    )
    say(
        f"stage 1 on {args.data}: {len(train_items)} items with training texts, {len(valid_items)} to validate, losses "
        f"{' '.join(args.losses)}, {sum(p.numel() for p in model.parameters()):,} parameters, {world} x {device}, {precision(device)}"
    )
    eval_every = args.eval_every or max(1, args.steps // 10)

    for step in progress(run.start, args.steps, "stage 1"):
        # -- learning rate
        rate = set_learning_rate(optimizer, step, args.steps, args.lr)
        # -- evaluate and save
        if (step % eval_every == 0 or step == args.steps) and rank == 0:
            held_out = (
                evaluate_texts(model, dataset, texts, valid_items, device) if with_text else {}
            )
            total = (
                sum(held_out[k] for k in TEXT_LOSSES if k in args.losses) if with_text else -step
            )  # without: the latest
            run.save(step, parameters, optimizer, scaler, total)
            run.log(
                step=step,
                **{f"valid_{k}": v for k, v in held_out.items()},
                seconds=time.time() - began,
            )
            say(f"step {step:5}  " + "  ".join(f"valid {k} {v:.3f}" for k, v in held_out.items()))
        if step == args.steps:
            break
        run.stop_if_asked(step, parameters, optimizer, scaler)
        # -- losses
        rng = np.random.default_rng([args.seed, step])
        seed = int(
            rng.integers(2**62)
        )  # dropout and hard negatives too are functions of (seed, step)
        torch.manual_seed(seed + rank)
        batch = draw_batch(train_items if with_text else None, pairs, args, world, rng)
        with autocast(device):
            losses, accuracy = objective(batch, torch.Generator(device).manual_seed(seed))
        # -- step
        scaler.scale(sum(losses.values())).backward()
        norm = clip_and_step(optimizer, scaler)
        check_step(losses, step, norm, scaler)
        # -- log
        if step % 20 == 0:
            losses = dict(
                zip(losses, sum_over_processes(*(v.item() / world for v in losses.values())))
            )
            run.log(
                step=step,
                **losses,
                **{k: v.item() for k, v in accuracy.items()},
                grad_norm=norm,
                temperature=model.temperature.item(),
                lr=rate,
                scale=scaler.get_scale(),
            )
    say(
        f"wrote {run.path}: "
        + f"best validation loss {run.best:.3f}, " * with_text
        + f"{time.time() - began:.0f} s"
    )


if __name__ == "__main__":
    run_training(main)
