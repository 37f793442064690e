"""Metrics, controls and tables: what a run is worth, beside what simpler things are worth.

    python evaluate.py                                                    # all runs of out/toy, about 20 seconds
    python evaluate.py --run out/toy/ilm out/toy/mlp --controls --json results.json

Ranking: for every test user the whole catalogue is ranked by the LLM's likelihood of each item's name, with one seen and one unseen
prompt. HR@k: share of users whose test item is among the first k. NDCG@k: mean of 1 / log2(rank + 1) there, else 0. Ties count
against the target. Items of the user's own history are taken out, for every method and reference alike (--keep-history leaves them
in); the target itself is never taken out. Text: log perplexity (-log p per target token, lower is better) and, where a task asks
for one attribute, the share of generated answers that equal the truth.

References that use no text: popularity, item-kNN, MF (the dot products of the very CF vectors that the encoders read), and on the toy
world the Bayes-optimal oracle. Retention = HR@10 of the method / HR@10 of MF: how much of the CF signal survives the frozen LLM.
"""
import argparse
import json
import subprocess
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import RANKING_TASKS, InputError, load_dataset, run_script, toy_world
from ilm import autocast, load_ilm, pick_device
from train_stage1 import evaluate_texts, write_file
from train_stage2 import Examples, collate, held_out_losses, load_stage1, pack

KEYS = ("HR@5", "NDCG@5", "HR@10", "NDCG@10")


# ---- Metrics: pure functions -----------------------------------------------------------------------------------------

def target_ranks(scores, targets):
    """1 + the number of other items that score at least as much: ties, and targets at -inf, count against. (B, I), (B,) -> (B,)."""
    own = scores.gather(1, targets[:, None])
    return (~(scores < own)).sum(1)  # a score that is not a number counts against as well


def ranking_metrics(ranks):
    """Ranks (U,) from 1 -> {"HR@5", "NDCG@5", "HR@10", "NDCG@10", "users", "se"}, se = standard error of each mean over users."""
    ranks, out, se = np.asarray(ranks, dtype=float), {}, {}
    for k in (5, 10):
        hit = ranks <= k
        for name, values in ((f"HR@{k}", hit.astype(float)), (f"NDCG@{k}", np.where(hit, 1 / np.log2(ranks + 1), 0.0))):
            out[name] = float(values.mean())
            se[name] = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0
    return {**out, "users": len(ranks), "se": se}


def targets_and_taken(dataset, users, split, keep_history):
    """The items to be found (B,), and True at those that shall not be (B, I): the user's history, but never the target itself."""
    targets, taken = [dataset.target(u, split) for u in users], torch.zeros(len(users), len(dataset.items), dtype=torch.bool)
    for row, u in enumerate(users if not keep_history else []):
        taken[row, torch.as_tensor(dataset.items_of(u, split).astype(np.int64))] = True
        taken[row, targets[row]] = False
    return torch.tensor(targets), taken


# ---- References ------------------------------------------------------------------------------------------------------

def toy_oracle(world, histories):
    """The Bayes-optimal recommender: p(next item | history), exact, over all user types. List of index arrays -> (U, I).

    posterior(type) is the product over the history of taste / (normaliser over unwatched movies), and
    p(i) = sum_type posterior(type) taste(type, i) follow(last, i) / normaliser(type).
    """
    taste, follow = torch.from_numpy(world["taste"]), torch.from_numpy(world["follow"])
    out = []
    for chunk in (histories[k:k + 200] for k in range(0, len(histories), 200)):
        rows, lengths = torch.arange(len(chunk)), torch.tensor([len(h) for h in chunk])
        padded = torch.zeros(len(chunk), int(lengths.max()), dtype=torch.long)
        for row, history in enumerate(chunk):
            padded[row, :len(history)] = torch.as_tensor(history.copy())
        log_posterior = torch.zeros(len(chunk), len(taste))
        context = torch.ones(len(chunk), taste.shape[1])                                        # follow * unwatched, (U, I)
        unwatched = torch.ones_like(context)
        for step in range(padded.shape[1]):
            active = (step < lengths).float()[:, None]
            item = padded[:, step]
            log_posterior += active * (taste[:, item].T.log() - (context @ taste.T).log())
            unwatched[rows, item] *= 1 - active[:, 0]
            context = torch.where(active > 0, follow[item] * unwatched, context)
        posterior = log_posterior.softmax(1) / (context @ taste.T)
        out.append((posterior @ taste) * context)
    return torch.cat(out)


def reference_scores(dataset, users, split):
    """Yield name, score function (list of users -> (B, I)) for each recommender that needs no LLM. Fitted on the training part alone."""
    I = len(dataset.items)
    train = {u: torch.as_tensor(dataset.items_of(u, "train").astype(np.int64)) for u in range(len(dataset.users))}
    count = torch.bincount(torch.cat(list(train.values())), minlength=I).float()
    histories = {u: torch.as_tensor(dataset.items_of(u, split).astype(np.int64)) for u in users}
    yield "popularity", lambda batch: count.expand(len(batch), I).clone()

    rows = torch.cat([torch.full_like(s, u) for u, s in train.items()])
    index = torch.unique(torch.stack([rows, torch.cat(list(train.values()))]), dim=1)      # a repeated purchase counts once
    matrix = torch.sparse_coo_tensor(index, torch.ones(index.shape[1]), (len(dataset.users), I), check_invariants=True).coalesce()

    def item_knn(batch):
        """Sum over the history of the cosine between item columns (co-occurrence / sqrt of counts)."""
        history = torch.zeros(I, len(batch))
        for k, u in enumerate(batch):
            history[histories[u], k] = 1
        norm = torch.sqrt(count.clamp(min=1))[:, None]
        scores = torch.sparse.mm(matrix.t(), torch.sparse.mm(matrix, history / norm)) / norm
        return (scores - history * count[:, None] / norm**2).T                              # an item is not its own neighbour

    yield "item-knn", item_knn
    yield "mf", lambda batch: dataset.raw_cf[0][batch] @ dataset.raw_cf[1].T
    if dataset.meta["dataset"] == "toy":
        world = toy_world(dataset.meta["world_seed"])
        columns = [int(item["id"]) - 1 for item in dataset.items]  # the world's number of each item that the data set kept
        numbers = np.array(columns)
        yield "oracle", lambda batch: toy_oracle(world, [numbers[dataset.items_of(u, split)] for u in batch])[:, columns]


def references(dataset, users, split, keep_history):
    out = {}
    for name, score in reference_scores(dataset, users, split):
        ranks = []
        for start in range(0, len(users), 256):
            batch = users[start:start + 256]
            targets, taken = targets_and_taken(dataset, batch, split, keep_history)
            ranks.append(target_ranks(score(batch).masked_fill(taken, -torch.inf), targets))
        out[name] = ranking_metrics(torch.cat(ranks))
    return out


# ---- One run ---------------------------------------------------------------------------------------------------------

@torch.no_grad()
def rank_users(model, examples, task, prompts, users, args, device):
    """Test ranks of users (U,) for a ranking task with the seen or unseen prompts."""
    dataset, trie, ranks = model.dataset, model.trie(not args.full_vocabulary), []
    beams = args.beams if args.beams is not None else 0 if len(dataset.items) <= 1000 else 20
    templates = examples.templates[task, prompts]
    for start in tqdm(range(0, len(users), args.batch_size), desc=f"{task} {prompts}", disable=None, leave=False):
        batch = users[start:start + args.batch_size]
        ids = [examples.ranking(task, u, dataset.items_of(u, args.split), templates[int(u) % len(templates)]) for u in batch]
        targets, taken = (x.to(device) for x in targets_and_taken(dataset, batch, args.split, args.keep_history))
        with autocast(device):
            ranks.append(target_ranks(model.rank(ids, trie, beams, taken), targets).cpu())
    return torch.cat(ranks)


@torch.no_grad()
def evaluate_text(model, examples, args, device):
    """Log perplexity per task on held-out items, and how often a generated attribute equals the truth."""
    pool = examples.tasks[args.split]
    attributes = {name for item in model.dataset.items for name in item.get("attributes", {})}
    per_task, accuracy, every = {}, {}, []
    for task in sorted({t["task"] for t in pool}):
        instances = [t for t in pool if t["task"] == task][:args.max_texts]
        pairs = sorted((examples.text(t) + (t["target"],) for t in instances), key=lambda x: len(x[0]))
        batches = [collate([pack([p[:2]]) for p in pairs[k:k + 64]]) for k in range(0, len(pairs), 64)]
        loss, tokens = held_out_losses(model, {"text": batches}, device)["text"], sum(len(p[1]) for p in pairs)
        per_task[task] = loss
        every.append((loss * tokens, tokens))
        if task in attributes:
            model.eval()
            written = [text for k in range(0, len(pairs), 64) for text in model.generate([p[0] for p in pairs[k:k + 64]], 32)]
            accuracy[task] = float(np.mean([text == p[2] for text, p in zip(written, pairs)]))
    model.eval()
    total = np.sum(every, axis=0) if every else (np.nan, 1)
    return {"log_ppl": float(total[0] / total[1]), "per_task": per_task, "attribute_accuracy": accuracy}


def controls(model, examples, users, args, device):
    """Sequential ranking when the CF vectors belong to others, when soft tokens are zero, when there are none: is the signal used?"""
    rank = lambda: ranking_metrics(rank_users(model, examples, "sequential", "seen", users, args, device))
    I, cf, encoder, out = model.num_items, model.cf.clone(), model.encoder, {}
    generator = torch.Generator().manual_seed(0)
    order = torch.cat([torch.randperm(I, generator=generator), I + torch.randperm(len(cf) - I, generator=generator)])
    model.cf.copy_(cf[order.to(cf.device)])
    out["shuffled_cf"] = rank()
    model.cf.copy_(cf)
    model.zero_soft = True
    out["zero_soft_tokens"] = rank()
    model.zero_soft, model.encoder = False, None
    out["text_only"] = rank()
    model.encoder = encoder
    return out


def evaluate_run(run, args, device):
    """One run directory -> the dict of metrics.json (forks read it: keys are only added)."""
    began, config = time.time(), json.loads((Path(run) / "config.json").read_text())
    data = args.data or config["data"]
    out = {"run": str(run), "kind": config["kind"], "dataset": data, "seed": config["seed"], "split": args.split,
           "filtered": not args.keep_history, "commit": commit(), "device": str(device)}
    if config["kind"] == "stage1":
        dataset = load_dataset(data)
        model, texts, _ = load_stage1(run, dataset, device)
        found = evaluate_texts(model, dataset, texts, dataset.items_in(args.split), device)
        out |= {"method": "+".join(config["losses"]), "stage1": {
            "item_to_text_R@1": found["R@1"], "R@5": found["R@5"], "chance@1": found["chance@1"],
            "held_out": {k: found[k] for k in ("itc", "itm", "itg")}}}
    else:
        model = load_ilm(run, device, data)
        dataset, users = model.dataset, test_users(model.dataset, args.max_users)
        examples = Examples(model, dataset)
        out |= {"method": config["method"], "llm": config["llm"], "llm_frozen": not config["train_llm"], "rec": {}}
        for task in [t for t in RANKING_TASKS if t in args.tasks]:
            out["rec"][task] = {prompts: ranking_metrics(rank_users(model, examples, task, prompts, users, args, device))
                                for prompts in ("seen", "unseen")}
        if "text" in args.tasks:
            out["text"] = evaluate_text(model, examples, args, device)
        out["references"] = references(dataset, users, args.split, args.keep_history)
        if args.controls and model.encoder is not None:
            out["controls"] = controls(model, examples, users, args, device)
        if "sequential" in out["rec"]:
            out["retention"] = out["rec"]["sequential"]["seen"]["HR@10"] / max(1e-9, out["references"]["mf"]["HR@10"])
    out["seconds"] = round(time.time() - began, 1)
    write_file(Path(run) / "metrics.json", lambda f: f.write_text(json.dumps(out, indent=1)))
    return out


def test_users(dataset, limit):
    """All eligible users, or a fixed random sample of them."""
    users = dataset.eligible()
    return users if not limit else np.sort(users[np.random.default_rng(0).permutation(len(users))[:limit]])


def commit():
    """The git commit of this checkout, or None."""
    try:
        return subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True,
                              check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


# ---- The table -------------------------------------------------------------------------------------------------------

def print_tables(results):
    row = lambda name, m: print(f"  {name:34}" + "".join(f"{m[k]:9.3f}" for k in KEYS) + f"   ± {m['se']['HR@10']:.3f}")
    head = lambda title: print(f"\n{title:36}" + "".join(f"{k:>9}" for k in KEYS) + "   s.e. of HR@10")
    stage2 = [r for r in results if "rec" in r]
    for task in RANKING_TASKS:
        rows = [r for r in stage2 if task in r["rec"]]
        if rows:
            head(f"{task} ({rows[0]['split']}, {rows[0]['rec'][task]['seen']['users']} users)")
            for name, m in rows[0]["references"].items():
                row(name, m)
            for r in rows:
                for prompts, m in r["rec"][task].items():
                    row(f"{Path(r['run']).name}, {prompts} prompts", m)
                if task == "sequential":
                    for name, m in r.get("controls", {}).items():
                        row(f"    control: {name}", m)
    for r in stage2:
        if "retention" in r:
            print(f"\n{Path(r['run']).name}: retention {r['retention']:.2f} (sequential HR@10 over MF's)", end="")
        if "text" in r:
            accuracy = "  ".join(f"{k} {v:.2f}" for k, v in r["text"]["attribute_accuracy"].items())
            print(f"\n{Path(r['run']).name}: text tasks on held-out items, log perplexity {r['text']['log_ppl']:.3f} (lower is better)\n"
                  f"  log perplexity  {'  '.join(f'{k} {v:.2f}' for k, v in r['text']['per_task'].items())}\n  accuracy        {accuracy}")
    for r in results:
        if "stage1" in r:
            s = r["stage1"]
            print(f"\n{Path(r['run']).name} ({r['method']}): item-to-text R@1 {s['item_to_text_R@1']:.3f} (chance {s['chance@1']:.3f}), "
                  f"R@5 {s['R@5']:.3f}; held-out " + "  ".join(f"{k} {v:.3f}" for k, v in s["held_out"].items()))
    r = results[0]
    print(f"\nhistory {'taken out' if r['filtered'] else 'left in'} for all; device {r['device']}, commit {r['commit']}")


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--run", nargs="+", help="run directories [all of out/toy]")
    p.add_argument("--data", help="prepared folder [the run's]")
    p.add_argument("--split", default="test", choices=["valid", "test"], help="[test]")
    p.add_argument("--tasks", nargs="+", default=[*RANKING_TASKS, "text"], choices=[*RANKING_TASKS, "text"], help="[all]")
    p.add_argument("--beams", type=int, help="beam width of ranking; 0 = exact [exact up to 1,000 items, else 20]")
    p.add_argument("--full-vocabulary", action=argparse.BooleanOptionalAction, default=False, help="score names without renormalising")
    p.add_argument("--keep-history", action=argparse.BooleanOptionalAction, default=False, help="leave items of the history in [no]")
    p.add_argument("--controls", action=argparse.BooleanOptionalAction, default=False, help="shuffled CF, zero soft tokens, text only")
    p.add_argument("--max-users", type=int, help="a fixed random sample of test users [all]")
    p.add_argument("--max-texts", type=int, default=500, help="instances a text task [500]")
    p.add_argument("--batch-size", type=int, default=50, help="users ranked at a time [50]")
    p.add_argument("--json", help="write the list of all results there")
    p.add_argument("--device", help="[cuda if there is one, else cpu]")
    p.add_argument("--seed", type=int, default=0, help="of nothing here: evaluation draws no random numbers but fixed ones [0]")
    args = p.parse_args()
    runs = args.run or sorted(str(f.parent) for f in Path("out/toy").glob("*/model.safetensors"))
    if not runs:
        raise InputError("no runs in out/toy; run train_stage1.py and train_stage2.py first, or name run directories with --run")
    for run in runs:
        if not (Path(run) / "config.json").is_file():
            raise InputError(f"{run}: not a run directory (no config.json); run train_stage2.py --out {run} first")
    device = pick_device(args.device)
    results = [evaluate_run(run, args, device) for run in runs]
    if args.json:
        write_file(Path(args.json), lambda f: f.write_text(json.dumps(results, indent=1)))
    print_tables(results)


if __name__ == "__main__":
    run_script(main)
