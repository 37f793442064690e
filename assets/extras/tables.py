"""What evaluate.py prints of many runs: means over seeds, and who differs.

Runs named NAME-s0, NAME-s1, ... are seeds of one method: a table shows their mean and its standard
error, and p of the difference to one method (--against), by a bootstrap over users (text: items)
and seeds; of two single runs it knows their users alone.
"""

import json
import re
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np

from assets.plumbing.guard import printable, reading
from data import RANKING_TASKS
from evaluate import CONTROLS, TEXT_CONTROLS, hr, standard_error

COLUMNS = ("HR@5", "NDCG@5", "NDCG@10", "HR@10")


def bootstrap(a, b, draws=10_000, fixed=False):
    """Two-sided p of "no difference in the mean" of a (seeds, users) and b (seeds, the same users).

    Users are drawn in pairs, with replacement. Seeds are too few for that (three of them drawn so
    would show 2/3 of their variance): what they add comes from Student's t, with their pooled
    variance; where each side has one, users alone. A seed's own noise on each user is in both, and
    is taken out of the users' draws. fixed: b is a reference, whose own noise is left out."""
    rng, U, free = np.random.default_rng(0), a.shape[1], len(a) + len(b) - 2
    share = 1 / len(a) + (not fixed) / len(b)

    # Variance of a seed's mean over users, and of a seed's own noise on one user
    of_means, of_noise = 0.0, 0.0
    for x in (a, b):
        seeds, users = x.mean(1, keepdims=True), x.mean(0, keepdims=True)
        of_means += ((seeds - x.mean()) ** 2).sum() / max(1, free)
        of_noise += ((x - seeds - users + x.mean()) ** 2).sum() / max(1, free) / (U - 1)

    difference = a.mean(0) - b.mean(0)
    mean, spread = difference.mean(), max(difference.var(ddof=1), 1e-30)
    by_users = np.array([difference[rng.integers(U, size=U)].mean() for _ in range(draws)]) - mean
    by_users *= np.sqrt(max(0.0, 1 - of_noise * share / spread))
    by_seeds = rng.standard_t(max(1, free), draws) * np.sqrt(of_means * share)
    # With both signs, so that p of a and b is p of b and a
    drawn = mean + np.concatenate([by_users + by_seeds, by_users - by_seeds])
    beyond = int(min((drawn <= 0).sum(), (drawn >= 0).sum()))
    return min(1.0, 2 * (beyond + 1) / (len(drawn) + 1))


def method_of(r):
    """A method is a run's name without its -s0, -s1, ... of seeds."""
    return re.sub(r"-s\d+$", "", Path(r["run"]).name)


def by_method(results, pick, label=""):
    """{method: [pick(run) of each seed]} of the runs for which pick does not raise KeyError.

    Runs of one name with other steps, learning rate, split, beams or treatment of the history are
    no seeds of each other: each gets a line of its own."""
    keys, settings, out = ("steps", "lr", "split", "filtered", "beams"), {}, {}
    for r in results:
        settings.setdefault(method_of(r), set()).add(tuple(r.get(key) for key in keys))
    names = Counter(Path(r["run"]).name for r in results)
    for r in results:
        name = method_of(r)
        if len(settings[name]) > 1:
            name = Path(r["run"]).name
            if names[name] > 1:  # in two folders, or measured twice
                name = " ".join([str(r["run"]), *(f"{key} {r.get(key)}" for key in keys)])
        with suppress(KeyError):
            out[name + label] = out.get(name + label, []) + [pick(r)]
    return out


def comparable(found, other, values):
    """Are they two methods, measured on the same users (or items)?"""
    if not values or not other or other is found:
        return False
    return len({len(values(m)) for m in found + other}) == 1


def table(title, columns, methods, against="", values=None, references=()):
    """Print a line a method: means over its seeds, standard error of the last column over seeds (of
    one run: over users), and p of the difference to the method `against` under the same label, or
    to the reference `against` (bootstrap of values(seed), see there)."""
    if not methods or not columns:
        return

    # Whom each is compared with: the same prompts or control of `against`
    others = {}
    for name, found in methods.items():
        label = name[name.find(",") :] if "," in name and against not in references else ""
        other = methods.get(against + label)
        if comparable(found, other, values):
            others[name] = other

    head = "".join(f" {printable(column):>8}" for column in columns)
    p_of = f"  p ({against})" if others else ""
    print(f"\n{printable(title):34}{head}    s.e.  seeds{p_of}")
    for name, found in methods.items():
        line = f"  {printable(name):32}"
        for column in columns:
            line += f"{np.mean([m[column] for m in found]):9.3f}"
        if len(found) > 1:
            error = standard_error([m[columns[-1]] for m in found])
        else:
            error = found[0].get("se", {}).get(columns[-1], np.nan)
        line += f"  ± {error:.3f}" if np.isfinite(error) else " " * 9
        line += f" {len(found):4}"
        if other := others.get(name):
            a, b = (np.array([values(m) for m in group]) for group in (found, other))
            line += f"  {max(0.001, bootstrap(a, b, fixed=against in references)):.3f}"
            # Of the noise of training, two single runs tell nothing
            line += " users" if len(found) + len(other) == 2 else ""
        print(line)


def print_ranking(results, task, against):
    """References, then every method with seen and unseen prompts, then the controls."""
    references = {}
    for r in results:
        if task in r.get("rec", {}):
            references |= {name: [m] for name, m in r["references"].items()}
    methods = dict(references)
    for prompts in ("seen", "unseen"):
        methods |= by_method(results, lambda r: r["rec"][task][prompts], f", {prompts} prompts")
    for name in CONTROLS if task == "sequential" else ():
        methods |= by_method(results, lambda r: r["controls"][name], f", {name}")

    users = next((m[0]["users"] for m in methods.values()), 0)
    title = f"{task} ({results[0]['split']}, {users} users)"
    table(title, COLUMNS, methods, against, lambda m: hr(np.array(m["ranks"]), 10), references)


def print_texts(results, against):
    """Text tasks and their controls, then the tasks that ask for one attribute."""
    texts = by_method(results, lambda r: r["text"])
    rows = dict(texts)
    for name in TEXT_CONTROLS:
        rows |= by_method(results, lambda r: r["text_controls"][name], f", {name}")
    title, columns = "text tasks, held-out items", ["sc", "log_ppl"]
    # Older files lack the shares, in which items weigh as their tokens do
    new = all("per_item_share" in m for found in rows.values() for m in found)

    def of_items(m):
        return m["per_item_share"] if new else [*m["per_item"].values()]

    table(title, columns, rows, against, of_items)

    columns = {}
    for found in texts.values():
        for m in found:
            columns |= m["attribute_accuracy"]
    accuracy = by_method(results, lambda r: r["text"]["attribute_accuracy"])
    table("attributes, written = true", [*columns], accuracy)


def print_stage1(results):
    def losses_and_retrieval(r):
        retrieval = {"R@5": r["stage1"]["R@5"], "R@1": r["stage1"]["item_to_text_R@1"]}
        return r["stage1"]["held_out"] | retrieval

    columns = ["R@5", "itc", "itm", "itg", "R@1"]
    table("stage 1, held-out items", columns, by_method(results, losses_and_retrieval))


def print_remarks(results):
    """How it was measured, by which sentence encoder, and retention."""

    def union(*keys):
        return printable(", ".join(sorted({str(r[k]) for r in results for k in keys if r.get(k)})))

    history = "taken out" if results[0]["filtered"] else "left in"
    commits = union("commit", "trained_by")
    print(f"\nhistory {history} for all; device {union('device')}, commit {commits}")

    encoders = {}  # name -> the methods that it measured, most methods first
    for name, found in by_method(results, lambda r: r["text"]["sc_encoder"]).items():
        for encoder in found:
            encoders.setdefault(printable(encoder), []).append(printable(name))
    most, *others = sorted(encoders, key=lambda e: -len(encoders[e])) or [""]
    if most:
        rest = [f"; of {', '.join(dict.fromkeys(encoders[e]))} by {e}" for e in others]
        print(f"SC by {most}" + "".join(rest))

    for name, found in by_method(results, lambda r: r["retention"]).items():
        mean, of = np.mean(found), union("yardstick")
        print(f"{printable(name)}: retention {mean:.2f} (sequential HR@10 over that of {of})")


def print_tables(results, against="ilm"):
    """Runs of one data set, whatever was measured of them."""
    for task in RANKING_TASKS:
        print_ranking(results, task, against)
    print_texts(results, against)
    print_stage1(results)
    print_remarks(results)


def show(results, args):
    """evaluate.py [--against METHOD] [--plot FOLDER]: tables of each data set, then the figures."""
    groups = {}  # each run once: given twice, it is no second seed
    for r in results:
        same = [r.get(key) for key in ("run", "seed", "steps", "lr", "trained_by", "beams")]
        same += [sorted(r.get("rec", {})), "text" in r]
        how = r["dataset"], r["split"], r["filtered"], bool(r.get("full_vocabulary"))
        groups.setdefault(how, {})[str(same)] = r
    for (data, split, filtered, whole), found in groups.items():
        how = split + (", history left in" * (not filtered)) + (", full vocabulary" * whole)
        print(f"\n== {printable(data)} ({how})")
        print_tables([*found.values()], args.against)
    if args.plot:
        from assets.extras.figures import plot

        plot(results, args.plot)


def show_files(args):
    """evaluate.py --table FILE ...: the same of results that were written before."""
    with reading("--table", "give metrics.json or --json files of evaluate.py"):
        results = []
        for file in args.table:
            found = json.loads(Path(file).read_text())
            results += found if isinstance(found, list) else [found]
        show(results, args)
