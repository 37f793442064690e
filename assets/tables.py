"""What evaluate.py prints and draws of many runs: means over seeds, who differs, figures (matplotlib, which nothing else needs).

Runs named NAME-s0, NAME-s1, ... are seeds of one method: a table shows their mean and its standard error, and p of the difference to
one method (--against), by a bootstrap over users (text: items) and seeds; of two single runs it knows their users alone."""

import json
import re
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from assets.guard import InputError, printable, reading
from data import RANKING_TASKS
from evaluate import CONTROLS, hr, standard_error
from qformer import attention_pattern

COLUMNS = ("HR@5", "NDCG@5", "NDCG@10", "HR@10")


def bootstrap(a, b, draws=10_000, fixed=False):
    """Two-sided p of "no difference in the mean" of a (seeds, users) and b (seeds, the same users). Users are drawn in pairs, with
    replacement. Seeds are too few for that (three of them drawn so would show 2/3 of their variance): what they add comes from Student's
    t, with their pooled variance; where each side has one, users alone. fixed: b is a reference, whose own noise is left out."""
    rng, U, free = np.random.default_rng(0), a.shape[1], len(a) + len(b) - 2
    pooled = sum(((x.mean(1) - x.mean()) ** 2).sum() for x in (a, b)) / max(1, free)
    difference = a.mean(0) - b.mean(0)
    drawn = np.array([difference[rng.integers(U, size=U)].mean() for _ in range(draws)])
    drawn += rng.standard_t(max(1, free), draws) * np.sqrt(
        pooled * (1 / len(a) + (not fixed) / len(b))
    )
    return min(1.0, 2 * (int(min((drawn <= 0).sum(), (drawn >= 0).sum())) + 1) / (draws + 1))


def method_of(r):
    """A method is a run's name without its -s0, -s1, ... of seeds."""
    return re.sub(r"-s\d+$", "", Path(r["run"]).name)


def by_method(results, pick, label=""):
    """{method: [pick(run) of each seed]} of the runs for which pick does not raise KeyError. Runs of one name with other steps, learning
    rate, split or treatment of the history are no seeds of each other: each gets a line of its own."""
    settings, out = {}, {}
    for r in results:
        settings.setdefault(method_of(r), set()).add(
            tuple(r.get(key) for key in ("steps", "lr", "split", "filtered"))
        )
    for r in results:
        name = (method_of(r) if len(settings[method_of(r)]) == 1 else Path(r["run"]).name) + label
        with suppress(KeyError):
            out[name] = out.get(name, []) + [pick(r)]
    return out


def table(title, keys, methods, against="", values=None, references=()):
    """Print a line a method: means over its seeds, standard error of the last column over seeds (of one run: over users), and p of the
    difference to the method `against` under the same label, or to the reference `against` (bootstrap of values(seed), see there)."""
    label = lambda name: name[name.find(",") :] * ("," in name and against not in references)
    other = lambda name: methods.get(
        against + label(name)
    )  # the same prompts or control of `against`
    compared = {
        name: values
        and other(name)
        and other(name) is not found
        and len({len(values(m)) for m in found + other(name)}) == 1
        for name, found in methods.items()
    }  # the same users, or items
    if methods and keys:
        head = "".join(f" {printable(k):>8}" for k in keys)
        print(
            f"\n{printable(title):34}{head}    s.e.  seeds"
            + f"  p ({against})" * any(compared.values())
        )
    for name, found in methods.items() if keys else ():
        error = (
            standard_error([m[keys[-1]] for m in found])
            if len(found) > 1
            else found[0].get("se", {}).get(keys[-1], np.nan)
        )
        error = f"  ± {error:.3f}" if np.isfinite(error) else " " * 9
        line = (
            f"  {printable(name):32}"
            + "".join(f"{np.mean([m[k] for m in found]):9.3f}" for k in keys)
            + f"{error} {len(found):4}"
        )
        if compared[name]:
            a, b = (np.array([values(m) for m in group]) for group in (found, other(name)))
            line += f"  {max(0.001, bootstrap(a, b, fixed=against in references)):.3f}"
            line += " users" * (
                len(found) + len(other(name)) == 2
            )  # of the noise of training, two single runs tell nothing
        print(line)


def print_tables(results, against="ilm"):
    """Runs of one data set, whatever was measured of them."""
    for task in RANKING_TASKS:
        references = {
            name: [m]
            for r in results
            if task in r.get("rec", {})
            for name, m in r["references"].items()
        }
        methods = dict(references)
        for prompts in ("seen", "unseen"):
            methods |= by_method(results, lambda r: r["rec"][task][prompts], f", {prompts} prompts")
        for name in CONTROLS if task == "sequential" else ():
            methods |= by_method(results, lambda r: r["controls"][name], f", {name}")
        users = next((m[0]["users"] for m in methods.values()), 0)
        table(
            f"{task} ({results[0]['split']}, {users} users)",
            COLUMNS,
            methods,
            against,
            lambda m: hr(np.array(m["ranks"]), 10),
            references,
        )
    texts = by_method(results, lambda r: r["text"])
    rows = texts | {
        k: v
        for name in CONTROLS
        for k, v in by_method(results, lambda r: r["text_controls"][name], f", {name}").items()
    }
    table(
        "text tasks, held-out items",
        ["sc", "log_ppl"],
        rows,
        against,
        lambda m: [*m["per_item"].values()],
    )
    names = [
        *dict.fromkeys(
            name for found in texts.values() for m in found for name in m["attribute_accuracy"]
        )
    ]
    table(
        "attributes, written = true",
        names,
        by_method(results, lambda r: r["text"]["attribute_accuracy"]),
    )
    table(
        "stage 1, held-out items",
        ["R@5", "itc", "itm", "itg", "R@1"],
        by_method(
            results,
            lambda r: {
                **r["stage1"]["held_out"],
                "R@5": r["stage1"]["R@5"],
                "R@1": r["stage1"]["item_to_text_R@1"],
            },
        ),
    )
    union = lambda *keys: printable(
        ", ".join(sorted({str(r[key]) for r in results for key in keys if r.get(key)}))
    )
    print(
        f"\nhistory {'taken out' if results[0]['filtered'] else 'left in'} for all; device {union('device')}, "
        f"commit {union('commit', 'trained_by')}"
    )
    encoders = {}
    for name, found in texts.items():
        for m in found:
            encoders.setdefault(printable(m["sc_encoder"]), []).append(printable(name))
    most, *others = sorted(encoders, key=lambda e: -len(encoders[e])) or [""]
    if most:
        print(
            "; of ".join(
                [
                    f"SC by {most}",
                    *(f"{', '.join(dict.fromkeys(encoders[e]))} by {e}" for e in others),
                ]
            )
        )
    for name, found in by_method(results, lambda r: r["retention"]).items():
        print(
            f"{printable(name)}: retention {np.mean(found):.2f} (sequential HR@10 over that of {union('yardstick')})"
        )


def show(results, args):
    """evaluate.py [--against METHOD] [--plot FOLDER]: tables of each data set, then the figures."""
    for data in dict.fromkeys(r["dataset"] for r in results):
        print(f"\n== {printable(data)}")
        print_tables([r for r in results if r["dataset"] == data], args.against)
    if args.plot:
        plot(results, args.plot)


def show_files(args):
    """evaluate.py --table FILE ...: the same of results that were written before."""
    with reading("--table", "give metrics.json or --json files of evaluate.py"):
        results = []
        for file in args.table:
            found = json.loads(Path(file).read_text())
            results += found if isinstance(found, list) else [found]
        show(results, args)


def plot(results, folder):
    """Draw every figure for which there are results."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise InputError("--plot needs matplotlib: pip install matplotlib") from None
    Path(folder).mkdir(parents=True, exist_ok=True)

    def points(expression, values):
        """{method: {x: values of its seeds}} from the runs whose name fits; values(run) -> [(x, y)]."""
        found = {}
        for r in results:
            with suppress(KeyError):
                if match := re.fullmatch(expression, method_of(r)):
                    for x, y in values(r):
                        found.setdefault(match[1], {}).setdefault(x, []).append(y)
        return found

    queries = lambda pick: {
        name: found
        for name, found in points(
            r"(ilm|mlp)(?:-k\d+)?", lambda r: [(r["num_queries"], pick(r))]
        ).items()
        if len(found) > 1
    }
    curve = lambda key, names: points(
        names, lambda r: [(row["step"], row[key]) for row in r["curve"][1:]]
    )
    figures = {
        "query_tokens": {
            "soft tokens: sequential HR@10": queries(
                lambda r: r["rec"]["sequential"]["seen"]["HR@10"]
            ),
            "soft tokens: text log perplexity": queries(lambda r: r["text"]["log_ppl"]),
        },
        "budget": {
            f"steps: valid. {kind}": curve(f"valid_{kind}", "(ilm|ilm-rand|mlp|text)")
            for kind in (*RANKING_TASKS, "text")
        },
        "stage1": {
            f"steps: valid. {loss}": curve(f"valid_{loss}", "(stage1[a-z-]*)")
            for loss in ("itc", "itg")
        },
    }
    figures["attention"] = {
        f"{name} ({loss})": attention_pattern(name, 4, torch.ones(1, 6, dtype=torch.bool))[
            0, 0
        ].float()
        for name, loss in (("separate", "ITC"), ("joint", "ITM"), ("causal", "ITG"))
    }
    aligned = max(
        (r for r in results if "stage1" in r),
        key=lambda r: (r["text_fraction"], r["run"]),
        default=None,
    )
    images = aligned["stage1"]["alignment"] if aligned else {}
    figures["alignment"] = {
        f"items x their texts, {when} stage 1": image for when, image in images.items()
    }
    for name, panels in figures.items():
        if panels := {title: found for title, found in panels.items() if len(found)}:
            fig, axes = plt.subplots(
                1, len(panels), figsize=(4.2 * len(panels), 3.2), facecolor="white", squeeze=False
            )
            for ax, (title, found) in zip(axes[0], panels.items()):
                ax.set_title(title, fontsize=9)
                if name in ("alignment", "attention"):
                    ax.imshow(
                        found,
                        **(
                            {"cmap": "Blues", "vmin": 0, "vmax": 1.3} if name == "attention" else {}
                        ),
                    )
                if name == "attention":
                    (
                        ax.set_xticks(range(10), [*"qqqqtttttt"], fontsize=8),
                        ax.set_yticks(range(10), [*"qqqqtttttt"], fontsize=8),
                    )
                    (
                        ax.set_xlabel("is seen (key)", fontsize=8),
                        ax.set_ylabel("sees (query)", fontsize=8),
                    )
                if not isinstance(found, dict):
                    continue
                for label, seeds in sorted(found.items()):
                    x = sorted(seeds)
                    ax.errorbar(
                        x,
                        [np.mean(seeds[k]) for k in x],
                        [standard_error(seeds[k]) for k in x],
                        marker=".",
                        label=label,
                    )
                ax.legend(fontsize=7)
            fig.savefig(Path(folder) / f"{name}.png", dpi=100, bbox_inches="tight")
