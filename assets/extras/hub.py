"""What an ILM gives to the rest of the world: a folder or a repository of the Hugging Face hub
(huggingface_hub comes with transformers), which names LLM and data but holds neither, and soft
tokens as an array. ILM.save_pretrained, push_to_hub and from_pretrained call these functions."""

import inspect
import json
import time
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import ModelHubMixin, snapshot_download
from safetensors.torch import save_file

from assets.plumbing.guard import InputError, write_file
from assets.plumbing.run import check_name, pick_device
from ilm import load_ilm

MODEL_CARD = """---
{{ card_data }}
---
# An Item-Language Model

Item encoder and adapter that let a frozen LLM understand the items and users of a recommender
(arXiv 2406.02844), trained on the prepared folder `{{ data }}` for the LLM `{{ llm }}` (method {{
method }}, {{ steps }} steps, seed {{ seed }}, learning rate {{ lr }}). Neither of the two is in
here. The CF vectors of the prepared folder are part of the model: with others it does not work.

```python
from ilm import ILM

model = ILM.from_pretrained("this repository", data="prepared folder", llm="where its name differs")
print(model.generate([model.prompt_ids("Describe {item}.", items=[0], named=False)]))
```
"""


class Folder(
    ModelHubMixin,
    library_name="pytorch",
    tags=["recommendation", "item-language-model", "arxiv:2406.02844"],
    model_card_template=MODEL_CARD,
):
    """An ILM in the hub's format: a run directory's config.json, which names the LLM and the
    prepared folder, and model.safetensors, with a model card."""

    _hub_mixin_config = {}  # else the mixin keeps a copy of all arguments

    def __init__(self, model):
        self.model = model

    def _save_pretrained(self, folder):
        (folder / "config.json").write_text(json.dumps(self.model.config, indent=1))
        parameters = self.model.saved_parameters().items()
        weights = {name: p.detach().cpu().contiguous() for name, p in parameters}
        save_file(weights, folder / "model.safetensors")

    def generate_model_card(self, *args, **kwargs):
        told = ("data", "llm", "method", "steps", "seed", "lr")
        told = {key: self.model.config[key] for key in told}
        return super().generate_model_card(*args, **told, **kwargs)


def save(model, folder, **more):
    return Folder(model).save_pretrained(folder, **more)


def push(model, name, **more):
    return Folder(model).push_to_hub(name, **more)


def load(name, data=None, llm=None, device=None, new=None, **download):
    """A folder or hub id -> an ILM. data, llm: in place of the prepared folder and the LLM that its
    config.json names; new: as for load_ilm; download: arguments of the hub's snapshot_download."""
    check_name(name, "from_pretrained")
    if not Path(name).is_dir():
        known = inspect.signature(snapshot_download).parameters
        name = snapshot_download(name, **{k: v for k, v in download.items() if k in known})
    return load_ilm(name, pick_device(device), data, new, llm)


@torch.no_grad()
def export(model, path, chunk=4096):
    """Write the soft tokens of all items, then all users as they are now, to a .npy file (I + U, Q,
    hidden), float32; returns rows a second. No more than `chunk` of them are in memory at a
    time."""
    if not model.Q:
        raise InputError("a text-only run has no soft tokens to export")
    began, dataset, users = time.time(), model.dataset, np.arange(len(model.dataset.users))
    shape = (model.num_items + len(users), model.Q, model.llm.width)

    def vectors():
        for cf in model.cf.split(chunk):
            yield model.with_history(cf)
        for some in (users[k : k + chunk] for k in range(0, len(users), chunk)):
            cf = dataset.standard_users(dataset.vectors_at(some))
            yield model.with_history(cf, [dataset.items_of(u) for u in some]).to(model.cf)

    def write(file):
        with open(file, "wb") as f:
            header = {"descr": "<f4", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(f, header)
            for cf in vectors():
                f.write(model.soft_tokens(cf).float().cpu().numpy().tobytes())

    write_file(Path(path), write)
    return shape[0] / (time.time() - began)
