"""Metrics, controls and tables: what a run is worth, beside what simpler things are worth.

    python evaluate.py                                                    # all runs of out/toy
    python evaluate.py --run out/toy/ilm out/toy/mlp --controls --sasrec --json results.json
    python evaluate.py --recommend users.txt                                  # the ten best items for each user id in the file
    python evaluate.py --table assets/results/main/*.json --plot assets        # means over seeds and who differs; runs nothing

Ranking: for every test user the whole catalogue is ranked by the LLM's likelihood of each item's name, with one of the ten seen prompts
(user number modulo 10) and with the unseen one. HR@k: share of users whose test item is among the first k. NDCG@k: mean of
1 / log2(rank + 1) there, else 0. Ties count against the target. Items of the user's own history are taken out, for every method and
reference alike (--keep-history leaves them in); the target itself is never taken out. Text: log perplexity (-log p per target token,
lower is better); where a task asks for one attribute, the share of generated answers that equal the truth; SC, the cosine of sentence
embeddings of written and true text.

References that use no text, and know the whole history up to the moment, as our prompts do: popularity, item-kNN, `mf` (the user folded in
from the whole history, all items alike), `mf, at the moment` (the dot product of the very vectors that the encoders read), the same with
popularity, and on the toy world the Bayes-optimal oracle. Retention = sequential HR@10 / HR@10 of the better of the last two MF rows on
validation: about 1 where the CF signal survives the frozen LLM."""

import argparse
import functools
import hashlib
import json
import math
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer

from assets.cf import UserSolver
from assets.guard import (
    InputError,
    Parser,
    a_seed,
    printable,
    reading,
    run_script,
    within,
    write_file,
)
from assets.run import check_fingerprint, commit, from_pretrained, pick_device, read_config
from assets.sasrec import Settings, sasrec_settings, train_sasrec
from assets.tables import KEYS, per_user, plot, print_tables, standard_error
from assets.toy_world import toy_oracle, toy_world
from data import RANKING_TASKS, load_dataset, training_part
from ilm import load_ilm
from qformer import QFormer, item_text_similarity
from train_stage1 import TEXT_LOSSES, evaluate_texts
from train_stage2 import Examples, load_stage1

AT_THE_MOMENT, PLUS_POPULARITY = "mf, at the moment", "mf, at the moment + popularity"

# ---- Metrics: pure functions -----------------------------------------------------------------------------------------


def target_ranks(scores, targets):
    """1 + the number of other items that score at least as much: ties, and targets at -inf, count against. (B, I), (B,) -> (B,)."""
    own = scores.gather(1, targets[:, None])
    return (~(scores < own)).sum(1)  # a score that is not a number counts against as well


def ranking_metrics(ranks):
    """Ranks (U,) from 1 -> {"HR@5", "NDCG@5", "HR@10", "NDCG@10", "users", "se", "ranks"}, se = standard error of each mean over users."""
    ranks = [int(r) for r in ranks]
    values = {key: per_user({"ranks": ranks}, key) for key in KEYS}
    return {
        **{key: float(v.mean()) for key, v in values.items()},
        "users": len(ranks),
        "se": {key: standard_error(v) for key, v in values.items()},
        "ranks": ranks,
    }


def targets_and_taken(dataset, users, split, keep_history):
    """The items to be found (B,), and True at those that shall not be (B, I): the user's history, but never the target itself."""
    targets, taken = (
        [dataset.target(u, split) for u in users],
        torch.zeros(len(users), len(dataset.items), dtype=torch.bool),
    )
    for row, u in enumerate(users if not keep_history else []):
        taken[row, torch.as_tensor(dataset.items_of(u, split).astype(np.int64))] = True
        taken[row, targets[row]] = False
    return torch.tensor(targets), taken


# ---- References ------------------------------------------------------------------------------------------------------


def reference_scores(dataset, split):
    """Yield name, score function (list of users -> (B, I)) for each recommender that needs no LLM. Fitted on the training part alone."""
    I = len(dataset.items)
    users = np.repeat(np.arange(len(dataset.users)), np.diff(dataset.indptr))
    pairs = torch.as_tensor(np.stack([users, dataset.sequence])[:, training_part(dataset.indptr)])
    yield "popularity", lambda batch: dataset.purchases.expand(len(batch), I).clone()

    pairs = torch.unique(pairs, dim=1)  # a repeated purchase counts once
    count = torch.bincount(pairs[1], minlength=I).float()
    with torch.sparse.check_sparse_tensor_invariants():  # else torch 2.11 warns
        matrix = torch.sparse_coo_tensor(
            pairs, torch.ones(pairs.shape[1]), (len(dataset.users), I)
        ).coalesce()
    norm = torch.sqrt(count.clamp(min=1))[:, None]

    def item_knn(batch):
        """Sum over the history of the cosine between item columns (co-occurrence / sqrt of counts)."""
        history = torch.zeros(I, len(batch))
        for k, u in enumerate(batch):
            history[dataset.items_of(u, split), k] = 1
        scores = torch.sparse.mm(matrix.t(), torch.sparse.mm(matrix, history / norm)) / norm
        return (scores - history * count[:, None] / norm**2).T  # an item is not its own neighbour

    yield "item-knn", item_knn
    moment = lambda batch: dataset.users_at(batch, split) @ dataset.raw_cf.T
    if dataset.user_cf is not None:  # another engine's users stand at every moment
        yield "mf", moment
    else:
        still = UserSolver(dataset.raw_cf, replace(dataset.solver.settings, recency=1.0))
        yield (
            "mf",
            lambda batch: (
                still.of_histories([dataset.items_of(u, split) for u in batch]) @ dataset.raw_cf.T
            ),
        )
        if dataset.solver.recency < 1:
            yield AT_THE_MOMENT, moment
        yield (
            PLUS_POPULARITY,
            lambda batch: moment(batch) + popularity_weight(dataset) * dataset.purchases.log1p(),
        )
    if dataset.meta["dataset"] == "toy":
        world = toy_world(dataset.meta["world_seed"])
        numbers = np.array(
            [int(item["id"]) - 1 for item in dataset.items]
        )  # the world's number of each item that the data set kept
        yield (
            "oracle",
            lambda batch: toy_oracle(world, [numbers[dataset.items_of(u, split)] for u in batch])[
                :, numbers
            ],
        )


@functools.lru_cache(1)
def popularity_weight(dataset, weights=(0.0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3)):
    """How much of log(1 + purchases) helps MF at the moment: by NDCG@10 of at most 2,000 validation users."""
    users = dataset.eligible()
    users = np.sort(np.random.default_rng(0).permutation(users)[:2_000])
    found = []
    for weight in weights:
        score = lambda batch: (
            dataset.users_at(batch, "valid") @ dataset.raw_cf.T + weight * dataset.purchases.log1p()
        )
        found.append(reference_ranks(dataset, "valid", False, users, score)["NDCG@10"])
    return weights[int(np.argmax(found))]


def yardstick(dataset):
    """What retention is measured against: whichever of MF's two forms at the moment is better on validation."""
    if dataset.user_cf is not None:
        return "mf"
    return (
        PLUS_POPULARITY
        if popularity_weight(dataset) > 0 or dataset.solver.recency == 1
        else AT_THE_MOMENT
    )


def reference_ranks(dataset, split, keep_history, users, score):
    ranks = []
    for batch in np.array_split(users, -(-len(users) // 256)):
        targets, taken = targets_and_taken(dataset, batch, split, keep_history)
        ranks.append(target_ranks(score(batch).masked_fill(taken, -torch.inf), targets))
    return ranking_metrics(torch.cat(ranks))


def references(dataset, users, split, keep_history, sasrec=None, device="cpu"):
    """{name: metrics} of all references on the users given. sasrec: SASRec's settings, a dict, or None for none."""
    scores = dict(reference_scores(dataset, split))
    if sasrec is not None:
        some = dataset.eligible()
        some = np.sort(np.random.default_rng(0).permutation(some)[:2_000])

        def validate(score):
            found = reference_ranks(
                dataset, "valid", keep_history, some, lambda batch: score(batch, "valid")
            )
            return found["HR@10"] + found["NDCG@10"]

        score, report = train_sasrec(dataset, validate, Settings(**sasrec), device=device)
        scores["sasrec"] = lambda batch: score(batch, split)
    found = {
        name: reference_ranks(dataset, split, keep_history, users, score)
        for name, score in scores.items()
    }
    if sasrec is not None:
        found["sasrec"]["report"] = report
    return found


# ---- One run ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def rank_users(model, examples, task, prompts, users, args, device):
    """Test ranks of users (U,) for a ranking task with the seen or unseen prompts."""
    dataset, trie, ranks = model.dataset, model.trie(not args.full_vocabulary), []
    for start in tqdm(
        range(0, len(users), args.batch_size), desc=f"{task} {prompts}", disable=None, leave=False
    ):
        batch = users[start : start + args.batch_size]
        ids = examples.ranking_prompts(task, batch, args.split, prompts)
        targets, taken = (
            x.to(device) for x in targets_and_taken(dataset, batch, args.split, args.keep_history)
        )
        with model.autocast():
            ranks.append(target_ranks(model.rank(ids, trie, args.beams, taken), targets).cpu())
    return torch.cat(ranks)


@torch.no_grad()
def sentence_embeddings(encoder, tokenizer, texts):
    """Texts -> unit vectors (N, width): the mean of an encoder's last states over the tokens."""
    limit = getattr(encoder.config.get_text_config(), "max_position_embeddings", None)
    ids, out = [tokenizer(text)["input_ids"][:limit] or [0] for text in texts], []
    for chunk in (ids[k : k + 64] for k in range(0, len(ids), 64)):
        mask = torch.tensor(
            [[1] * len(row) + [0] * (max(map(len, chunk)) - len(row)) for row in chunk],
            device=encoder.device,
        )
        padded = torch.tensor(
            [row + [0] * (mask.shape[1] - len(row)) for row in chunk], device=encoder.device
        )
        states = encoder(input_ids=padded, attention_mask=mask).last_hidden_state.float()
        out.append(
            F.normalize((states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True), dim=-1)
        )
    return torch.cat(out)


@torch.no_grad()
def evaluate_text(model, examples, args, device):
    """On held-out items: log perplexity, in all, per task and per item; and of what the model writes (64 instances a task at most) SC, the
    cosine of sentence embeddings of written and true text, and how often an asked-for attribute is the truth."""
    attributes = {name for item in model.dataset.items for name in item.get("attributes", {})}
    pool, losses, written = examples.tasks[args.split], {}, {}
    for task in sorted({t["task"] for t in pool}):
        instances = [t for t in pool if t["task"] == task]
        instances = sorted(
            instances[:: math.ceil(len(instances) / args.max_texts)], key=lambda t: len(t["target"])
        )
        for chunk in (instances[k : k + 64] for k in range(0, len(instances), 64)):
            batch = examples.collate([examples.pack([examples.text(t)]) for t in chunk])
            with model.autocast():
                nll = model(batch)[1].double().cpu()
            row = batch["target"] // batch["label"].shape[1]
            for t, total, count in zip(
                chunk, torch.zeros(len(chunk)).double().index_add(0, row, nll), row.bincount()
            ):
                losses.setdefault(task, []).append((t["items"][0], total.item(), count.item()))
        few = instances[:: math.ceil(len(instances) / 64)]
        written[task] = list(
            zip(model.generate([examples.text(t)[0] for t in few], 32), (t["target"] for t in few))
        )
    mean = lambda rows: sum(r[1] for r in rows) / max(1, sum(r[2] for r in rows))
    every, pairs = sum(losses.values(), []), sum(written.values(), [])
    per_item = {
        i: round(mean([r for r in every if r[0] == i]), 4) for i in sorted({r[0] for r in every})
    }
    out = {
        "log_ppl": mean(every),
        "per_task": {task: mean(rows) for task, rows in losses.items()},
        "per_item": per_item,
        "se": {"log_ppl": standard_error(list(per_item.values()))},
        "attribute_accuracy": {
            task: float(np.mean([a == b for a, b in written[task]]))
            for task in written
            if task in attributes
        },
    }
    name = f"the {'trained' if model.config.get('train_llm') else 'frozen'} LLM's own states"
    encoder = model.llm.reader, model.tokenizer
    if args.sc_encoder:
        name = Path(args.sc_encoder).name
        encoder = [
            from_pretrained(auto_class, args.sc_encoder, "--sc-encoder")
            for auto_class in (AutoModel, AutoTokenizer)
        ]
    a, b = (sentence_embeddings(*encoder, texts) for texts in zip(*pairs))
    return out | {
        "sc": float((a * b).sum(1).mean()),
        "sc_encoder": name,
        "written": {task: rows[0] for task, rows in written.items()},
    }


@torch.no_grad()
def controls(model, measure):
    """{name: measure()} when the CF vectors belong to others, when soft tokens are zero, when there are none: is the signal used?"""
    cf, shuffled, Q, out = model.cf.clone(), model.shuffled, model.Q, {}
    loudness = model.adapter.loudness.clone()
    model.shuffle_cf()
    out["shuffled_cf"] = measure()
    model.cf.copy_(cf)
    model.shuffled = shuffled
    model.adapter.loudness.fill_(0)
    out["zero_soft_tokens"] = measure()
    model.adapter.loudness.copy_(loudness)
    model.Q = 0
    out["text_only"] = measure()
    model.Q = Q
    return out


@torch.no_grad()
def alignment(model, config, dataset, texts, items, device):
    """Similarity of up to 24 held-out items (rows) with their texts (columns), by a fresh Q-Former and by the trained one."""
    torch.manual_seed(config["seed"])
    ids, mask, _ = (t.to(device) for t in texts.batch(torch.tensor(items[:24])))
    cf = dataset.item_cf[items[:24]].to(device)
    similar = lambda m: (
        item_text_similarity(m.query_features(m.encode(cf)), m.text_features(ids, mask))
        .cpu()
        .numpy()
        .round(3)
        .tolist()
    )
    return {
        "before": similar(QFormer(model.config).to(device).eval()),
        "after": similar(model.eval()),
    }


def evaluate_stage1(run, config, dataset, args, device):
    """Losses and retrieval on the items of the split that have a text; nothing where there are none or the run learned none."""
    model, texts, _ = load_stage1(run, dataset, device)
    if not (items := dataset.items_in(args.split)) or not {*TEXT_LOSSES} & {*config["losses"]}:
        return {}
    found = evaluate_texts(model, dataset, texts, items, device)
    return {
        "stage1": {
            "item_to_text_R@1": found["R@1"],
            "R@5": found["R@5"],
            "chance@1": found["chance@1"],
            "held_out": {k: found[k] for k in TEXT_LOSSES},
            "alignment": alignment(model, config, dataset, texts, items, device),
        }
    }


def evaluate_run(run, args, device):
    """One run directory -> the dict of metrics.json (forks read it: keys are only added)."""
    began, config = time.time(), read_config(run)
    data, log = args.data or config["data"], Path(run) / "log.jsonl"
    curve = [
        row
        for row in map(json.loads, log.read_text().split("\n")[:-1] if log.exists() else [])
        if any("valid" in k for k in row)
    ]
    out = {
        "run": str(run),
        "kind": config["kind"],
        "dataset": data,
        "seed": config["seed"],
        "split": args.split,
        "filtered": not args.keep_history,
        "commit": commit(),
        "trained_by": config.get("commit"),
        "device": str(device),
        "steps": config["steps"],
        "lr": config["lr"],
        "num_queries": config["qformer"]["num_queries"],
        "curve": curve,
    }
    if config["kind"] == "stage1":
        out |= {"method": "+".join(config["losses"]), "text_fraction": config["text_fraction"]}
        out |= evaluate_stage1(run, config, load_dataset(data), args, device)
    else:
        model = load_ilm(run, device, data)
        dataset, users = model.dataset, test_users(model.dataset, args.max_users)
        examples = Examples(model, dataset)
        out |= {
            "method": config["method"],
            "llm": config["llm"],
            "llm_frozen": not config["train_llm"],
            "rec": {},
        }
        rank = lambda task, prompts: ranking_metrics(
            rank_users(model, examples, task, prompts, users, args, device)
        )
        write = lambda: evaluate_text(model, examples, args, device)
        tasks = args.tasks or [
            task
            for task, share in zip((*RANKING_TASKS, "text"), config.get("mix", (1, 1, 1)))
            if share
        ]
        for task in [t for t in RANKING_TASKS if t in tasks and len(users)]:
            out["rec"][task] = {prompts: rank(task, prompts) for prompts in ("seen", "unseen")}
        if "text" in tasks and examples.tasks[args.split]:
            out["text"] = write()
        out["references"] = {}
        if len(users):  # else nobody has a target
            out["references"] = references(
                dataset, users, args.split, args.keep_history, args.sasrec, device
            )
        if args.controls and model.Q:
            if "sequential" in out["rec"]:
                out["controls"] = controls(model, lambda: rank("sequential", "seen"))
            if "text" in out:
                out["text_controls"] = controls(model, write)
        if "sequential" in out["rec"]:
            out["yardstick"] = yardstick(dataset)
            out["retention"] = out["rec"]["sequential"]["seen"]["HR@10"] / max(
                1e-9, out["references"][out["yardstick"]]["HR@10"]
            )
    out["seconds"] = round(time.time() - began, 1)
    write_file(Path(run) / "metrics.json", lambda f: f.write_text(json.dumps(out)))
    return out


def test_users(dataset, limit):
    """All eligible users, or a sample of them, fixed by a hash of their ids."""
    by_hash = sorted(
        dataset.eligible(), key=lambda u: hashlib.sha256(dataset.users[u].encode()).digest()
    )
    return np.sort(np.array(by_hash[: limit or None], dtype=int))


# ---- Recommendations for many users ------------------------------------------------------------------------------------


def recommend(run, args, device):
    """Print the ten best items of every user in a file of ids, a line each: user, place, item, title, log p, between tabs."""
    model = load_ilm(run, device, args.data, args.new)
    dataset, examples = model.dataset, Examples(model, model.dataset)
    number, users = {name: u for u, name in enumerate(dataset.users)}, []
    with reading(f"--recommend {args.recommend}", "give a file of UTF-8 text, a user id a line"):
        names = Path(args.recommend).read_text(encoding="utf-8-sig").split("\n")
    for line, name in enumerate(names, 1):
        if name.strip() and name.strip() not in number:
            raise InputError(
                f"{args.recommend}, line {line}: no user {name.strip()!r} in {dataset.path}: left out by --min-count, "
                "or one who came later and needs --new, and a known item there"
            )
        users += [number[name.strip()]] if name.strip() else []
    print("user\tplace\titem\ttitle\tlog_p")
    for chunk in (users[k : k + args.batch_size] for k in range(0, len(users), args.batch_size)):
        had = [dataset.items_of(u) for u in chunk]  # all of it: nothing is being tested here
        template, cf = examples.templates["sequential", "seen"][0], examples.users_at(chunk, None)
        prompts = [
            examples.ranking("sequential", u, items, template, v)
            for u, items, v in zip(chunk, had, cf)
        ]
        for u, found in zip(chunk, model.recommend(prompts, had)):
            if not found:
                print(f"note: {dataset.users[u]} has every item already", file=sys.stderr)
            for place, (i, log_p) in enumerate(found, 1):
                print(
                    dataset.users[u],
                    place,
                    dataset.items[i]["id"],
                    dataset.items[i]["title"],
                    f"{log_p:.3f}",
                    sep="\t",
                )


# ----------------------------------------------------------------------------------------------------------------------


def show(results, args):
    for data in dict.fromkeys(r["dataset"] for r in results):
        print(f"\n== {printable(data)}")
        print_tables([r for r in results if r["dataset"] == data], args.against)
    if args.plot:
        plot(results, args.plot)


def parse_args(argv=None):
    p = Parser(description=__doc__.split("\n")[0])
    p.add_argument(
        "--run",
        nargs="+",
        help="run directories [all of out/toy; with --data data/NAME, of out/NAME]",
    )
    p.add_argument("--data", help="prepared folder [the run's]")
    p.add_argument(
        "--recommend",
        metavar="FILE",
        help="evaluate nothing: print the ten best items for each user id in FILE, one a line",
    )
    p.add_argument(
        "--new",
        metavar="FOLDER",
        help="with --recommend: interactions.csv (and items.csv) of users and items that came later",
    )
    p.add_argument("--split", default="test", choices=["valid", "test"], help="[test]")
    p.add_argument(
        "--tasks",
        nargs="+",
        choices=[*RANKING_TASKS, "text"],
        help="[those that the run was trained on]",
    )
    p.add_argument(
        "--beams",
        type=within(int, 0),
        help="beam width of ranking; 0 = exact [exact up to 1,000 items, else 20]",
    )
    p.add_argument(
        "--full-vocabulary",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="score names without renormalising",
    )
    p.add_argument(
        "--keep-history",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="leave items of the history in [no]",
    )
    p.add_argument(
        "--controls",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="shuffled CF, zero soft tokens, text only",
    )
    p.add_argument(
        "--sasrec",
        nargs="?",
        const={},
        type=sasrec_settings,
        metavar="JSON",
        help="train SASRec as one more reference, with these settings [its defaults]",
    )
    p.add_argument(
        "--sc-encoder",
        metavar="PATH",
        help="folder or hub id of a sentence encoder for SC [the LLM's own mean states]",
    )
    p.add_argument(
        "--table",
        nargs="+",
        metavar="FILE",
        help="run nothing: tables of these metrics.json or --json files",
    )
    p.add_argument(
        "--against", default="ilm", help="the method or reference that p compares with [ilm]"
    )
    p.add_argument("--plot", metavar="DIR", help="draw figures there (needs matplotlib)")
    p.add_argument(
        "--max-users", type=within(int, 1), help="a fixed random sample of test users [all]"
    )
    p.add_argument(
        "--max-texts",
        type=within(int, 1),
        default=500,
        help="instances a text task, at even distances [500]",
    )
    p.add_argument(
        "--batch-size", type=within(int, 1), default=50, help="users ranked at a time [50]"
    )
    p.add_argument("--json", help="write the list of all results there")
    p.add_argument("--device", help="[cuda if there is one, else cpu]")
    p.add_argument(
        "--seed",
        type=a_seed,
        default=0,
        help="of nothing here: evaluation draws no random numbers but fixed ones [0]",
    )
    args = p.parse_args(argv)
    if args.new and not args.recommend:
        raise InputError(
            "--new goes with --recommend: users and items that came later have no test items"
        )
    return args


def is_current(run, data=None):
    """Does a run found in out/NAME belong to the data as they are now? If not, a line says so."""
    config = read_config(run)
    try:
        check_fingerprint(config, load_dataset(data or config["data"]), run)
    except InputError as error:
        print(printable(f"note: left out: {error}"), file=sys.stderr)
        return False
    return True


def main():
    args = parse_args()
    if args.table:
        with reading("--table", "give metrics.json or --json files of evaluate.py"):
            results = [json.loads(Path(f).read_text()) for f in args.table]
            return show(
                [r for found in results for r in (found if isinstance(found, list) else [found])],
                args,
            )
    folder = Path("out", Path(args.data or "toy").name)
    runs = args.run or sorted(str(f.parent) for f in folder.glob("*/model.safetensors"))
    if not runs:
        raise InputError(
            f"no runs in {folder}; run train_stage1.py and train_stage2.py first, or name run directories with --run"
        )
    device = pick_device(args.device)
    if args.recommend:
        return recommend((args.run or [str(folder / "ilm")])[0], args, device)
    for run in runs:  # a mistake is said before the first evaluation, not after it
        read_config(run)
    if not args.run:
        runs = [run for run in runs if is_current(run, args.data)]
        if not runs:
            raise InputError(f"no runs in {folder} belong to its data; train again")
    results = [evaluate_run(run, args, device) for run in runs]
    if args.json:
        write_file(Path(args.json), lambda f: f.write_text(json.dumps(results)))
    show(results, args)


if __name__ == "__main__":
    run_script(main)
