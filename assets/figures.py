"""The README's figures, from the results of evaluate.py (evaluate.py --plot DIR). Needs matplotlib, which nothing else does."""
import re
from contextlib import suppress
from pathlib import Path

import numpy as np

from data import RANKING_TASKS, InputError


def plot(results, folder):
    """Draw every figure for which there are results."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise InputError("--plot needs matplotlib: pip install matplotlib") from None
    from evaluate import method_of, standard_error
    Path(folder).mkdir(parents=True, exist_ok=True)

    def points(expression, values):
        """{method: {x: values of its seeds}} from the runs whose name fits; values(run, match) -> [(x, y)]."""
        found = {}
        for r in results:
            with suppress(KeyError):
                if match := re.fullmatch(expression, method_of(r)):
                    for x, y in values(r, match):
                        found.setdefault(match[1], {}).setdefault(x, []).append(y)
        return found

    queries = lambda pick: points(r"(ilm|mlp)-k(\d+)", lambda r, match: [(int(match[2]), pick(r))])
    curve = lambda key, names: points(names, lambda r, _: [(row["step"], row[key]) for row in r["curve"][1:]])
    figures = {
        "query_tokens": {"soft tokens: sequential HR@10": queries(lambda r: r["rec"]["sequential"]["seen"]["HR@10"]),
                         "soft tokens: text log perplexity": queries(lambda r: r["text"]["log_ppl"])},
        "budget": {f"steps: valid. {kind}": curve(f"valid_{kind}", "(ilm|ilm-rand|mlp|text)") for kind in (*RANKING_TASKS, "text")},
        "stage1": {f"steps: valid. {loss}": curve(f"valid_{loss}", "(stage1[a-z-]*)") for loss in ("itc", "itg")}}
    images = next((r["stage1"]["alignment"] for r in results if "stage1" in r), {})
    figures["alignment"] = {f"items x their texts, {when} stage 1": image for when, image in images.items()}
    for name, panels in figures.items():
        if all(panels.values()) and panels:
            fig, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.2), facecolor="white", squeeze=False)
            for ax, (title, found) in zip(axes[0], panels.items()):
                ax.set_title(title, fontsize=9)
                if name == "alignment":
                    ax.imshow(found)
                    continue
                for label, seeds in sorted(found.items()):
                    x = sorted(seeds)
                    ax.errorbar(x, [np.mean(seeds[k]) for k in x], [standard_error(seeds[k]) for k in x], marker=".", label=label)
                ax.legend(fontsize=7)
            fig.savefig(Path(folder) / f"{name}.png", dpi=100, bbox_inches="tight")
