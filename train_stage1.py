"""Stage 1: item-language representation learning. Teaches the Q-Former to say in text space what CF
vectors know.

    python train_stage1.py                           # toy world, CPU: about a minute
    python train_stage1.py --losses itc itm itg      # the paper's ILM-IT; with ii it is ILM-IT-II
    python train_stage1.py --data data/ml-1m --init-bert FOLDER --width 768 --layers 8

Every step sums five losses, explained in qformer.py: itc, itm, itg on items with training texts,
ii, ui on all training interactions.

Held-out items lend their CF vectors to ii and ui, and their texts to no loss (but that items of
equal text are no negatives). The best checkpoint
has the lowest sum of those of itc, itm, itg that --losses names, on the validation items.
DEVIATION: the paper alternates item-text and item-item batches; here both stand in every step.
"""

import math
from dataclasses import asdict

import numpy as np
import torch
import torch.nn as nn
from transformers import AutoTokenizer

from assets.fast.matching import ComputesLess
from assets.plumbing.bert import read_bert, start_from
from assets.plumbing.enough import check_stage1
from assets.plumbing.run import (
    Gather,
    RunDirectory,
    autocast,
    check_step,
    describe,
    distribute,
    from_pretrained,
    introduce,
    mean_over_processes,
    own_rows,
    precision,
    progress,
    run_training,
    start_processes,
)
from assets.plumbing.texts import Texts, share_of
from assets.plumbing.training_flags import shape_of, stage1_flags
from data import load_dataset
from qformer import (
    TEMPERATURES,
    QFormer,
    QFormerConfig,
    item_text_losses,
    item_text_similarity,
    pair_loss,
)

TEXT_LOSSES = ("itc", "itm", "itg")
PAIR_LOSSES = ("ii", "ui")
LOSSES = TEXT_LOSSES + PAIR_LOSSES

# ---- Shared by both stages ----------------


def set_learning_rate(optimizer, step, steps, peak):
    """Linear warm-up over the first 5 % of the steps, then a cosine down to a tenth of the peak."""
    warmup = max(1, steps // 20)
    cosine = 0.5 * (1 + math.cos(math.pi * max(0, step - warmup) / max(1, steps - warmup)))
    rate = peak * min(1.0, (step + 1) / warmup) * (0.1 + 0.9 * cosine)
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


def make_optimizer(model, lr, weight_decay=0.05):
    """AdamW with the betas and the decay of BLIP-2's code. What has two axes decays: matrices,
    tables of words and positions, HistoryKeys.places; nothing else."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    matrices = {"params": [p for p in trainable if p.ndim == 2], "weight_decay": weight_decay}
    others = {"params": [p for p in trainable if p.ndim != 2], "weight_decay": 0.0}
    return torch.optim.AdamW([matrices, others], lr=lr, betas=(0.9, 0.999))


def clip_and_step(optimizer, scaler):
    """Gradient clipped to norm 1, one optimizer step, gradients cleared -> the norm. An fp16
    overflow makes the scaler skip the step."""
    scaler.unscale_(optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, 1.0).item()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return norm


# ---- Batches: every one a function of (seed, step), so that a resumed run sees the same ----


class Pairs:
    """II pairs: two training items of one user within 5 steps. UI pairs: a user just before one of
    their training items, and that item (recency 1, where order does not matter: the user made of
    their other training items)."""

    def __init__(self, dataset, window=5):
        self.dataset, self.window = dataset, window
        self.users = dataset.eligible(4)

    def ii(self, count, rng):
        """(B,), (B,) item indices."""
        left, right = [], []
        for u in rng.choice(self.users, size=count):
            history = self.dataset.items_of(u, "train")
            place = int(rng.integers(len(history) - 1))
            near = history[place + 1 :][: self.window]
            others = near[near != history[place]]  # what is bought again is no pair with itself
            near = others if len(others) else near
            left.append(int(history[place]))
            right.append(int(near[rng.integers(len(near))]))
        return torch.tensor(left), torch.tensor(right)

    def ui(self, count, rng):
        """(B,) user indices, each once; their standardised vectors (B, E) at the moment before an
        item; it (B,)."""
        users = rng.choice(self.users, size=count, replace=False)
        histories = [self.dataset.items_of(u, "train") for u in users]
        places = [int(rng.integers(1, len(history))) for history in histories]
        items = [int(history[place]) for history, place in zip(histories, places)]
        vectors = self.dataset.standard_users(self.dataset.vectors_before(users, places))
        return torch.tensor(users), vectors, torch.tensor(items)


class Batches:
    """What Objective reads, drawn whole by every process. A batch never holds an item (of texts) or
    a user (of UI) twice."""

    def __init__(self, args, dataset, texts, world=1):
        self.args, self.cf, self.texts, self.world = args, dataset.item_cf, texts, world
        self.pairs = Pairs(dataset)
        items = np.array(dataset.items_in("train"))
        self.items = share_of(items, args.text_fraction, args.seed)
        self.with_text = bool({*args.losses} & {*TEXT_LOSSES})

    def size(self, choices):
        return min(self.args.batch_size, len(choices)) // self.world * self.world

    def draw(self, step):
        """A seed for dropout and negatives, and {"text": cf (B, E), ids, mask (B, T), key (B,);
        "ii", "ui": CF vectors (B, E) and keys (B,) of both sides}, those that --losses needs."""
        rng, losses = np.random.default_rng([self.args.seed, step]), self.args.losses
        cf, key, batch = self.cf, self.texts.key, {}
        seed = int(rng.integers(2**62))
        if self.with_text:
            items = np.sort(rng.choice(self.items, size=self.size(self.items), replace=False))
            batch["text"] = cf[items], *self.texts.batch(items)
        if "ii" in losses:
            left, right = self.pairs.ii(self.args.batch_size, rng)
            batch["ii"] = cf[left], cf[right], key[left], key[right]
        if "ui" in losses:
            users, vectors, items = self.pairs.ui(self.size(self.pairs.users), rng)
            batch["ui"] = vectors, cf[items], -1 - users, key[items]  # keys that no item has
        return seed, batch


# ---- All losses of a step -----------------


class FastQFormer(ComputesLess, QFormer):
    """The Q-Former, with text_features and match_logits replaced by faster ones of equal results
    (assets/fast/matching.py). To step through the definition, put QFormer in its place."""


class Objective(nn.Module):
    """All losses of a step in one forward, which is what DistributedDataParallel can follow."""

    def __init__(self, model, dec, losses):
        super().__init__()
        self.model, self.dec, self.losses, self.gather = model, dec, losses, Gather()

    def forward(self, batch, generator=None):
        """A batch of Batches.draw, of which each process reads its own rows -> {name: loss}, {name:
        accuracy}."""
        losses, accuracy = {}, {}
        for name, whole in batch.items():
            rows = [x[own_rows(len(x))].to(self.model.queries.device) for x in whole]
            if name == "text":
                losses |= item_text_losses(self.model, *rows, self.dec, generator, self.gather)
            else:
                losses[name], hits = pair_loss(self.model, *rows, self.gather)
                accuracy[f"{name}_accuracy"] = hits
        return {name: losses[name] for name in losses if name in self.losses}, accuracy


@torch.no_grad()
def evaluate_texts(model, dataset, texts, items, device, chunk=256):
    """Held-out items -> {"itc", "itm", "itg", "R@1", "R@5", "chance@1"}. R@k: an item's text is
    among the k most similar of the texts of all of them."""
    model.eval()
    items, means, queries, texts_read = torch.tensor(items), {}, [], []
    # Chunks of like sizes: ITC depends on them
    for batch in items.chunk(math.ceil(len(items) / chunk)):
        cf = dataset.item_cf[batch].to(device)
        ids, mask, key = (x.to(device) for x in texts.batch(batch))
        generator = torch.Generator(device).manual_seed(0)
        losses = item_text_losses(model, cf, ids, mask, key, texts.dec, generator)
        for name, value in losses.items():
            means[name] = means.get(name, 0) + value.item() * len(batch) / len(items)
        queries.append(model.query_features(model.encode(cf)))  # features
        texts_read.append(model.text_features(ids, mask))

    # Where an item's own text stands among all
    texts_read, ranks = torch.cat(texts_read), []
    for rows, query in zip(items.split(chunk), torch.cat(queries).split(chunk)):
        similarity = item_text_similarity(query, texts_read)  # (chunk, held-out items)
        ranks.append(texts.ranks(similarity, rows, items))
    recall = {f"R@{k}": (torch.cat(ranks) <= k).double().mean().item() for k in (1, 5)}
    return {**means, **recall, "chance@1": 1 / len(items)}


# ---- The script ---------------------------


def parse_args(argv=None):
    return stage1_flags(argv, __doc__, LOSSES)


def set_up_model(args, dataset, device):
    """A fresh Q-Former, the texts as it reads them, and the run directory."""
    name = args.tokenizer or args.init_bert or "assets/toy_llm"
    tokenizer = from_pretrained(AutoTokenizer, name, "--tokenizer")
    bert = read_bert(args.init_bert) if args.init_bert else None
    torch.manual_seed(args.seed)
    config = QFormerConfig(
        cf_dim=dataset.item_cf.shape[1],
        vocab_size=len(tokenizer) + 4,  # what Texts may add: [CLS] [SEP] [DEC] pad
        heads=bert.config.num_attention_heads if bert else 0,
        **shape_of(args),
    )
    model = FastQFormer(config)
    if bert:
        start_from(bert, args.init_bert, model)
    introduce(f"stage 1 on {args.data}: {' '.join(args.losses)}", model, device)
    said = describe(args, dataset, kind="stage1", tokenizer=name, qformer=asdict(config))
    run = RunDirectory(args, said, tokenizer)
    return model.to(device), Texts(dataset, tokenizer, config.max_text), run


def main():
    args = parse_args()
    device, rank, world = start_processes(args)
    dataset = load_dataset(args.data)
    model, texts, run = set_up_model(args, dataset, device)
    batches, valid_items = Batches(args, dataset, texts, world), dataset.items_in("valid")
    check_stage1(args, batches, valid_items)
    unused = not {*TEXT_LOSSES} <= {*args.losses}  # some parameters get no gradient
    parallel = distribute(Objective(model, texts.dec, args.losses), world, unused)
    optimizer = make_optimizer(model, args.lr)
    # Precision: bf16 on a card that has it, fp16 with a scaler on one that has not; fp32 on a CPU
    scaler = torch.amp.GradScaler(device.type, enabled=precision(device) == torch.float16)
    run.restore(dict(model.named_parameters()), optimizer, scaler)

    # After the last step comes one more round, which only evaluates
    for step in progress(run.start, args.steps, "stage 1"):
        # -- learning rate
        set_learning_rate(optimizer, step, args.steps, args.lr)

        # -- evaluate and save, the lower the better; without text losses the latest is the best
        if (step % args.eval_every == 0 or step == args.steps) and rank == 0:
            valid = {}
            if batches.with_text:
                valid = evaluate_texts(model, dataset, texts, valid_items, device)
            model.train()
            chosen_by = sum(valid[name] for name in args.losses if name in valid)
            run.save(step, chosen_by if valid else -step)
            run.log_validation(step, valid)
        if step == args.steps:
            break
        run.stop_if_asked(step)

        # -- losses: a batch and its dropout are functions of (seed, step)
        seed, batch = batches.draw(step)
        torch.manual_seed(seed + rank)
        with autocast(device):
            losses, accuracy = parallel(batch, torch.Generator(device).manual_seed(seed))
            loss = sum(losses.values())
        scaler.scale(loss).backward()

        # -- step
        norm = clip_and_step(optimizer, scaler)
        model.temperature.data.clamp_(*TEMPERATURES)  # outside it would have no gradient
        check_step(losses, step, norm, scaler)

        # -- log, of all processes
        if step % 20 == 0:
            means = mean_over_processes({"loss": loss, **losses, **accuracy})
            run.log_step(step, norm, **means, temperature=model.temperature.item())
    run.finish()


if __name__ == "__main__":
    run_training(main)
