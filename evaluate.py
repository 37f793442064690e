"""Metrics, controls and tables: what a run is worth, beside what simpler things are worth.

    python evaluate.py                                      # all runs of out/toy
    python evaluate.py --run out/toy/ilm out/toy/mlp --controls --sasrec --json results.json
    python evaluate.py --recommend users.txt                # ten items for each user id in it
    python evaluate.py --table assets/results/main/*.json   # means over seeds; runs nothing

Ranking: ILM.rank, the fast form of ILM.score (log p among the catalogue's names, with the prior),
orders the catalogue (above 1,000 items its best 20: --beams) for every test user, by one of the ten
seen prompts (user number modulo 10) and by the unseen one. Ties count against the target. Items of
the user's own history are taken out, for every method and reference alike (--keep-history leaves
them in).

Text: log perplexity (-log p per target token, lower is better); where a task asks for one
attribute, the share of generated answers that equal the truth; SC, semantic consistency.

References use no text; all but popularity know the history up to the moment (SASRec its last 50).
Retention = sequential HR@10 / HR@10 of MF at the moment, with or without popularity, whichever is
better on validation. 1 is as good as MF; it does not show that all came through the CF vector, for
the encoder reads the last 20 items, too.
"""

import copy
import math
import time
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from assets.plumbing.evaluate_flags import evaluate_flags
from assets.plumbing.guard import run_script
from assets.plumbing.run import pick_device, read_config
from assets.plumbing.runs import check_tools, find_runs, test_users, which_run, write_json
from assets.plumbing.sentences import sentence_embeddings, sentence_encoder
from data import RANKING_TASKS, load_dataset
from ilm import load_ilm
from train_stage1 import TEXT_LOSSES, evaluate_texts
from train_stage2 import KINDS, Examples, load_stage1

CONTROLS = ("shuffled_cf", "zero_soft_tokens", "text_only")
TEXT_CONTROLS = (*CONTROLS, "title")  # an upper line: the prompt says in words which item it is


def batches(rows, size):
    """A list or an array, `size` at a time."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def thinned(rows, limit):
    """At most `limit` of a list's rows, at even distances."""
    return rows[:: math.ceil(len(rows) / limit)]


# ---- Metrics: pure functions --------------


def hr(ranks, k):
    """Hit rate. Ranks (U,) from 1 -> (U,): 1 where the target is among the first k, else 0."""
    return np.where(ranks <= k, 1.0, 0.0)


def ndcg(ranks, k):
    """Ranks (U,) from 1 -> (U,): 1 / log2(rank + 1) where it is among the first k, else 0.

    There is one target, so that the ideal ranking, which NDCG divides by, is worth 1.
    """
    return np.where(ranks <= k, 1 / np.log2(ranks + 1), 0.0)


METRICS = {"HR@5": (hr, 5), "NDCG@5": (ndcg, 5), "HR@10": (hr, 10), "NDCG@10": (ndcg, 10)}


def standard_error(values):
    """Of the mean of independent values (N,); 0 where there is one alone."""
    return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0


def ranking_metrics(ranks):
    """Ranks (U,) from 1 -> {name in METRICS: mean over users, "users", "se": {name: its standard
    error}, "ranks"}. All else can be made again from the ranks."""
    ranks = np.asarray(ranks)
    means, errors = {}, {}
    for name, (metric, k) in METRICS.items():
        values = metric(ranks, k)
        means[name], errors[name] = float(values.mean()), standard_error(values)
    return {**means, "users": len(ranks), "se": errors, "ranks": ranks.tolist()}


def target_ranks(scores, targets):
    """Scores (B, I), targets (B,) -> (B,): 1 + the number of other items that score at least as
    much (the target itself is the 1). So ties count against the target, and so does a score that
    is not a number."""
    own = scores.gather(1, targets[:, None])
    return (~(scores < own)).sum(1)


def targets_and_taken(dataset, users, split, keep_history):
    """The items to be found (B,), and True at those that are taken out of the ranking (B, I): the
    user's history, but never the target, which may have been bought before."""
    targets = torch.tensor([dataset.target(u, split) for u in users])
    taken = torch.zeros(len(users), len(dataset.items), dtype=torch.bool)
    if not keep_history:
        for row, u in enumerate(users):
            taken[row, dataset.items_of(u, split)] = True
        taken[torch.arange(len(users)), targets] = False
    return targets, taken


# ---- References: recommenders that need no LLM (assets/extras/references.py) ----


def evaluate_reference(score, dataset, users, split, keep_history):
    """ranking_metrics on users (U,) of a score function: users (B,), split -> (B, I)."""
    ranks = []
    for batch in batches(users, 256):
        targets, taken = targets_and_taken(dataset, batch, split, keep_history)
        scores = score(batch, split).masked_fill(taken, -torch.inf)
        ranks.append(target_ranks(scores, targets))
    return ranking_metrics(torch.cat(ranks))


def evaluate_on_validation(score, dataset, keep_history):
    """The same on validation, of at most 2,000 users: what a reference's settings are chosen by."""
    users = np.random.default_rng(0).permutation(dataset.eligible())[:2_000]
    return evaluate_reference(score, dataset, np.sort(users), "valid", keep_history)


def references(dataset, users, split, keep_history, sasrec=None, device="cpu"):
    """{name: ranking_metrics} of all references. sasrec: SASRec's settings, a dict; None: none."""
    from assets.extras.references import reference_scores

    found = {}
    for name, score in reference_scores(dataset).items():
        found[name] = evaluate_reference(score, dataset, users, split, keep_history)
    if sasrec is not None and not len(dataset.eligible(4)):
        print("note: --sasrec is left out: nobody has two training items")
    elif sasrec is not None:
        from assets.extras.sasrec import sasrec_reference

        def validate(score):
            return evaluate_on_validation(score, dataset, keep_history)

        score, report = sasrec_reference(dataset, validate, sasrec, device)
        found["sasrec"] = evaluate_reference(score, dataset, users, split, keep_history)
        found["sasrec"]["report"] = report
    return found


# ---- Stage 1 ------------------------------


def evaluate_stage1(run, config, args, device):
    """Losses and retrieval on the split's items; nothing where they have no text or the run learned
    none."""
    from assets.extras.figures import alignment

    dataset = load_dataset(config["data"])
    model, texts, _ = load_stage1(run, dataset, device)
    items = dataset.items_in(args.split)
    if not items or not {*TEXT_LOSSES} & {*config["losses"]}:
        return {}
    found = evaluate_texts(model, dataset, texts, items, device)
    measured = {
        "item_to_text_R@1": found["R@1"],
        "R@5": found["R@5"],
        "chance@1": found["chance@1"],
        "held_out": {name: found[name] for name in TEXT_LOSSES},
        "alignment": alignment(model, config["seed"], dataset, texts, items, device),
    }
    return {"stage1": measured}


# ---- Stage 2: ranking ---------------------


@torch.no_grad()
def evaluate_ranking(examples, task, wording, users, args):
    """ranking_metrics on users (U,) of a ranking task, with its "seen" or "unseen" wording."""
    model = examples.model
    ranks = []
    trie = model.trie(not args.full_vocabulary)
    for batch in tqdm(
        batches(users, args.batch_size), f"{task} {wording}", leave=False, disable=None
    ):
        prompts = examples.ranking_prompts(task, batch, args.split, wording)
        targets, taken = targets_and_taken(model.dataset, batch, args.split, args.keep_history)
        with model.autocast():
            scores = model.rank(prompts, trie, args.beams, taken.to(model.cf.device))
        ranks.append(target_ranks(scores.cpu(), targets))
    return ranking_metrics(torch.cat(ranks))


# ---- Stage 2: texts of held-out items -----


def text_instances(examples, split, limit):
    """{task: at most `limit` of its instances, by length, so that a batch has little padding}."""
    pool = examples.instances[split]
    found = {}
    for task in sorted({t["task"] for t in pool}):
        instances = [t for t in pool if t["task"] == task]
        found[task] = sorted(thinned(instances, limit), key=lambda t: len(t["target"]))
    return found


@torch.no_grad()
def nats_of_texts(examples, instances):
    """Yield (instance, -log p of its target in nats, tokens of its target)."""
    for chunk in batches(instances, 64):
        batch = examples.collate([examples.pack([examples.text(t)]) for t in chunk])
        with examples.model.autocast():
            nll = examples.model(batch)[1].double().cpu()

        # A token's place among the rows (B, L), laid end to end, tells its row
        row = batch["target_at"] // batch["label"].shape[1]
        yield from zip(chunk, np.bincount(row, nll), np.bincount(row))


def log_perplexity(examples, instances):
    """Mean of -log p over target tokens, in all, per task and per item (the first that an instance
    has); "se" is over items. A uniform guess has ln V."""
    task_nats, task_tokens, nats, tokens = Counter(), Counter(), Counter(), Counter()
    for task in instances:
        for t, nll, count in nats_of_texts(examples, instances[task]):
            task_nats[task] += nll
            task_tokens[task] += count
            nats[t["items"][0]] += nll
            tokens[t["items"][0]] += count

    # A ratio of sums over items; its error is that of the mean of what each item adds to it
    items, total = sorted(nats), sum(tokens.values())
    log_ppl = sum(nats.values()) / total
    share = len(items) / total
    added = [share * (nats[i] - log_ppl * tokens[i]) for i in items]
    return {
        "log_ppl": log_ppl,
        "per_task": {task: task_nats[task] / task_tokens[task] for task in instances},
        "per_item": {i: round(nats[i] / tokens[i], 4) for i in items},
        "per_item_share": [round(share * nats[i], 5) for i in items],  # their mean is log_ppl
        "se": {"log_ppl": standard_error(added)},
    }


def write_texts(examples, instances):
    """{task: [(what the model writes, the truth)]} for at most 64 instances a task."""
    written = {}
    for task in instances:
        some = thinned(instances[task], 64)
        prompts, targets = zip(*(examples.text(t) for t in some))
        room = examples.model.context - max(map(len, prompts))
        answers = examples.model.generate(prompts, min(room, 256, max(map(len, targets))))
        written[task] = [*zip(answers, [t["target"] for t in some])]
    return written


def attribute_accuracy(dataset, written):
    """{task: share of answers that equal the truth} of the tasks that ask for one attribute."""
    attributes = set().union(*(item["attributes"] for item in dataset.items))
    found = {}
    for task, pairs in written.items():
        if task in attributes:
            found[task] = np.mean([answer == truth for answer, truth in pairs])
    return found


def semantic_consistency(written, encoder, tokenizer):
    """SC: the mean cosine of sentence embeddings of written and true texts."""
    sides = zip(*sum(written.values(), []))
    answers, truths = (sentence_embeddings(encoder, tokenizer, texts) for texts in sides)
    return float((answers * truths).sum(1).mean())


def evaluate_text(examples, args):
    """All that is measured of texts, of items whose texts no training loss has seen."""
    instances = text_instances(examples, args.split, args.max_texts)
    found = log_perplexity(examples, instances)
    written = write_texts(examples, instances)
    *encoder, name = sentence_encoder(args.sc_encoder, examples.model)
    return found | {
        "attribute_accuracy": attribute_accuracy(examples.dataset, written),
        "sc": semantic_consistency(written, *encoder),
        "sc_encoder": name,
        "written": {task: pairs[0] for task, pairs in written.items()},
    }


# ---- One run ------------------------------


def controls(model, names=CONTROLS):
    """Yield (name, Examples of a model whose soft tokens lack the signal): what does not fall there
    did not come from them. The model is a copy; the frozen LLM and the data are shared."""
    shared = {id(part): part for part in (model.llm, model.tokenizer, model.dataset)}
    for name in names:
        control = copy.deepcopy(model, dict(shared))
        if name == "shuffled_cf":
            control.shuffle_cf()  # the vectors of others
        elif name == "zero_soft_tokens":
            control.adapter.gain.fill_(0)
        else:
            control.Q = 0  # items by name, a user by id; in text tasks "this item", or its title
        yield name, Examples(control, control.dataset, titles=name == "title")


def evaluate_stage2(run, config, args, device):
    """Ranking, texts, references, controls and retention of a run of train_stage2.py."""
    model = load_ilm(run, device, config["data"])
    dataset, examples = model.dataset, Examples(model, model.dataset)
    users = test_users(dataset, args.max_users)
    evaluate = partial(evaluate_ranking, users=users, args=args)

    # What the run was trained on, or what was asked for
    shares = zip(KINDS, config["mix"])
    kinds = args.tasks or [kind for kind, share in shares if share]
    out = {"rec": {}}
    for task in RANKING_TASKS:
        if task in kinds and len(users):
            out["rec"][task] = {
                "seen": evaluate(examples, task, "seen"),
                "unseen": evaluate(examples, task, "unseen"),
            }
    if "text" in kinds and examples.instances[args.split]:
        out["text"] = evaluate_text(examples, args)

    # What simpler things are worth
    out["references"] = {}
    if len(users):
        out["references"] = references(
            dataset, users, args.split, args.keep_history, args.sasrec, device
        )

    # What is left where the signal is not; names alone have none
    if args.controls and model.Q:
        if "sequential" in out["rec"]:
            out["controls"] = {
                name: evaluate(control, "sequential", "seen") for name, control in controls(model)
            }
        if "text" in out:
            out["text_controls"] = {
                name: evaluate_text(control, args)
                for name, control in controls(model, TEXT_CONTROLS)
            }

    # Retention
    if "sequential" in out["rec"]:
        from assets.extras.references import yardstick

        out["yardstick"] = yardstick(dataset)
        reference = out["references"][out["yardstick"]]["HR@10"]
        out["retention"] = out["rec"]["sequential"]["seen"]["HR@10"] / max(1e-9, reference)
    return out


def evaluate_run(run, args, device):
    """One run directory -> the dict of metrics.json (forks read it: keys are only added)."""
    began = time.time()
    config = read_config(run)
    config["data"] = args.data or config["data"]
    out = which_run(run, config, args, device)
    evaluate = evaluate_stage1 if config["kind"] == "stage1" else evaluate_stage2
    out |= evaluate(run, config, args, device)
    out["seconds"] = round(time.time() - began, 1)
    write_json(Path(run) / "metrics.json", out)
    return out


def parse_args(argv=None):
    return evaluate_flags(argv, __doc__, KINDS)


def main():
    from assets.extras.recommend import recommend_file
    from assets.extras.tables import show, show_files

    args = parse_args()
    check_tools(args)
    if args.table:
        return show_files(args)
    device = pick_device(args.device)
    if args.recommend:
        return recommend_file(args, device)

    runs = find_runs(args.run, args.data, load_dataset)
    results = [evaluate_run(run, args, device) for run in runs]
    if args.json:
        write_json(args.json, results)
    show(results, args)


if __name__ == "__main__":
    run_script(main)
