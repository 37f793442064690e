"""The figures of evaluate.py --plot; matplotlib, which nothing else needs, is imported to draw."""

import re
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from assets.extras.tables import method_of
from data import RANKING_TASKS
from evaluate import standard_error
from qformer import QFormer, attention_pattern, item_text_similarity


@torch.no_grad()
def alignment(model, seed, dataset, texts, items, device):
    """Similarity of up to 24 items (rows) with their texts (columns) -> {"before", "after"}: by a
    fresh Q-Former of this seed (without --init-bert the one that training began with), and by the
    trained one."""
    torch.manual_seed(seed)
    fresh = QFormer(model.config).to(device)
    ids, mask, _ = (t.to(device) for t in texts.batch(torch.tensor(items[:24])))
    cf = dataset.item_cf[items[:24]].to(device)

    found = {}
    for when, qformer in (("before", fresh.eval()), ("after", model.eval())):
        queries = qformer.query_features(qformer.encode(cf))
        words = qformer.text_features(ids, mask)
        similarity = item_text_similarity(queries, words)
        found[when] = similarity.cpu().numpy().round(3).tolist()
    return found


# ---- What is drawn: {title of a panel: {method: {x: values of its seeds}}}, or an image ----------


def points(results, expression, values):
    """{method: {x: values of its seeds}} of the runs whose method fits, and is the first group of
    the expression; values(run) -> [(x, y)], which may lack (KeyError)."""
    found = {}
    for r in results:
        match = re.fullmatch(expression, method_of(r))
        with suppress(KeyError):
            for x, y in values(r) if match else ():
                found.setdefault(match[1], {}).setdefault(x, []).append(y)
    return found


def query_tokens(results, measure):
    """measure(run) over the number of soft tokens, of methods that were trained with several."""
    expression = r"(ilm|mlp)(?:-k\d+)?"
    found = points(results, expression, lambda r: [(r["num_queries"], measure(r))])
    return {method: seeds for method, seeds in found.items() if len(seeds) > 1}


def curves(results, expression, key):
    """A validation loss over training steps, from the second validation on."""
    return points(
        results, expression, lambda r: [(row["step"], row[key]) for row in r["curve"][1:]]
    )


def attention_images():
    """The three masks of stage 1, of four queries and six tokens of text."""
    found = {}
    for pattern, loss in (("separate", "ITC"), ("joint", "ITM"), ("causal", "ITG")):
        mask = attention_pattern(pattern, 4, torch.ones(1, 6, dtype=torch.bool))
        found[f"{pattern} ({loss})"] = mask[0, 0].float()
    return found


def alignment_images(results):
    """Of the stage-1 run with most texts."""
    runs = [r for r in results if "stage1" in r]
    if not runs:
        return {}
    images = max(runs, key=lambda r: (r["text_fraction"], r["run"]))["stage1"]["alignment"]
    return {f"items x their texts, {when} stage 1": image for when, image in images.items()}


def all_figures(results):
    """{name of a file: {title: panel}}."""
    queries = {
        "soft tokens: sequential HR@10": query_tokens(
            results, lambda r: r["rec"]["sequential"]["seen"]["HR@10"]
        ),
        "soft tokens: text log perplexity": query_tokens(results, lambda r: r["text"]["log_ppl"]),
    }
    budget, stage1 = {}, {}
    for kind in (*RANKING_TASKS, "text"):
        title = f"steps: valid. {kind}"
        budget[title] = curves(results, "(ilm|ilm-rand|mlp|text)", f"valid_{kind}")
    for loss in ("itc", "itg"):
        stage1[f"steps: valid. {loss}"] = curves(results, "(stage1[a-z-]*)", f"valid_{loss}")
    return {
        "query_tokens": queries,
        "budget": budget,
        "stage1": stage1,
        "attention": attention_images(),
        "alignment": alignment_images(results),
    }


# ---- Drawing -------------------------------------------------------------------------------------


def draw_lines(ax, panel):
    """Means over seeds with their standard errors, a line a method."""
    for label, seeds in sorted(panel.items()):
        x = sorted(seeds)
        means, errors = [np.mean(seeds[k]) for k in x], [standard_error(seeds[k]) for k in x]
        ax.errorbar(x, means, errors, marker=".", label=label)
    ax.legend(fontsize=7)


def draw_mask(ax, panel):
    ax.imshow(panel, cmap="Blues", vmin=0, vmax=1.3)
    ax.set_xticks(range(10), [*"qqqqtttttt"], fontsize=8)
    ax.set_yticks(range(10), [*"qqqqtttttt"], fontsize=8)
    ax.set_xlabel("is seen (key)", fontsize=8)
    ax.set_ylabel("sees (query)", fontsize=8)


def plot(results, folder):
    """Draw every figure for which there are results: folder/NAME.png."""
    import matplotlib.pyplot as plt

    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, panels in all_figures(results).items():
        panels = {title: panel for title, panel in panels.items() if len(panel)}
        if not panels:
            continue
        size = (4.2 * len(panels), 3.2)
        fig, axes = plt.subplots(1, len(panels), figsize=size, facecolor="white", squeeze=False)
        for ax, (title, panel) in zip(axes[0], panels.items()):
            ax.set_title(title, fontsize=9)
            if name == "attention":
                draw_mask(ax, panel)
            elif name == "alignment":
                ax.imshow(panel)
            else:
                draw_lines(ax, panel)
        fig.savefig(Path(folder) / f"{name}.png", dpi=100, bbox_inches="tight")
