"""What an ILM and the rest of the world exchange. In: an LLM of any family, checked before it is believed. Out: a folder or a repository
of the Hugging Face hub (huggingface_hub comes with transformers), which names LLM and data but holds neither; soft tokens as an array."""

import inspect
import json
import time
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import ModelHubMixin, snapshot_download
from safetensors.torch import save_file

from assets.cf import last_items
from assets.guard import InputError
from assets.plumbing.packable import base_of, how_to_read, refusal, refused_in_one_line
from assets.run import check_name

MODEL_CARD = """---
{{ card_data }}
---
# An Item-Language Model

Item encoder and adapter that let a frozen LLM understand the items and users of a recommender (arXiv 2406.02844), trained on the
prepared folder `{{ data }}` for the LLM `{{ llm }}` (method {{ method }}, {{ steps }} steps, seed {{ seed }}, learning rate {{ lr }}).
Neither of the two is in here. The CF vectors of the prepared folder are part of the model: with others it does not work.

```python
from ilm import ILM
model = ILM.from_pretrained("this repository or folder", data="prepared folder", llm="the LLM, where its name differs")
print(model.generate([model.prompt_ids("Describe {item}.", items=[0], named=False)]))
```
"""


class Portable(
    ModelHubMixin,
    library_name="pytorch",
    tags=["recommendation", "item-language-model", "arxiv:2406.02844"],
    model_card_template=MODEL_CARD,
):
    """check_llm and export; ILM.from_pretrained, save_pretrained, push_to_hub."""

    _hub_mixin_config = {}  # else the mixin keeps a copy of all arguments, the whole data set among them

    @torch.no_grad()
    def check_llm(self):
        """What `body`, `decode` and `head` compute must be what the LLM itself does: some types scale their logits (T5) or cap them.
        Sets `packs` and `generates`: what this type can beside the definition."""
        self.logit_scale, self.cap = (
            1.0,
            getattr(self.llm.config.get_text_config(), "final_logit_softcapping", None),
        )
        ids = torch.tensor([sum(self.name_ids[:4], [])[:16]], device=self.cf.device)
        takes = inspect.signature(base_of(self.llm).forward).parameters
        # transformers renamed it in 5.24
        self.cache_name = "cache" if "cache" in takes else "past_key_values"
        with refused_in_one_line(self.llm, self.config["llm"]):
            self.check_logits(ids, self.llm.get_input_embeddings()(ids))
            self.packs, self.generates = how_to_read(
                self.llm, self.body, self.head, self.config["llm"]
            )

    def check_logits(self, ids, embeddings):
        if self.seq2seq:
            hidden = self.decode(ids, *self.encode_prompts(embeddings, torch.ones_like(ids)))
            whole = self.llm(input_ids=ids, decoder_input_ids=ids).logits.float()
        else:
            hidden = self.body(embeddings, None, None)
            whole = self.llm(input_ids=ids).logits.float()
        differ = lambda: (whole - self.head(hidden)).norm() > 0.02 * whole.norm()
        if differ():
            self.logit_scale = float(
                (whole * self.head(hidden)).sum() / self.head(hidden).pow(2).sum()
            )
            if differ():
                why = "makes logits that are not those of its output embeddings"
                raise refusal(self.llm, self.config["llm"], why)

    @torch.no_grad()
    def export(self, path, chunk=4096):
        """Write the soft tokens of all items, then all users as they are now, to a .npy file (I + U, Q, hidden), float32; returns rows a
        second. No more than `chunk` of them are in memory at a time."""
        if self.encoder is None:
            raise InputError("a text-only run has no soft tokens to export")
        began, users = time.time(), np.arange(len(self.dataset.users))
        shape = (self.num_items + len(users), self.Q, self.hidden)
        with open(path, "wb") as f:
            np.lib.format.write_array_header_1_0(
                f, {"descr": "<f4", "fortran_order": False, "shape": shape}
            )
            for cf in self.cf.split(chunk):
                f.write(self.soft_tokens(self.with_history(cf)).float().cpu().numpy().tobytes())
            for some in (users[k : k + chunk] for k in range(0, len(users), chunk)):
                recent = [
                    last_items(x, [len(x)], self.history) for x in map(self.dataset.items_of, some)
                ]
                cf = self.with_history(
                    self.dataset.standard_users(self.dataset.users_at(some)), np.concatenate(recent)
                ).to(self.cf)
                f.write(self.soft_tokens(cf).float().cpu().numpy().tobytes())
        return shape[0] / (time.time() - began)

    def _save_pretrained(self, folder):
        """As a run directory: config.json, which names the LLM and the prepared folder, and model.safetensors; neither LLM nor data."""
        (folder / "config.json").write_text(json.dumps(self.config, indent=1))
        save_file(
            {n: p.detach().cpu().contiguous() for n, p in self.saved_parameters().items()},
            folder / "model.safetensors",
        )

    def generate_model_card(self, *args, **kwargs):
        return super().generate_model_card(
            *args,
            **{k: self.config[k] for k in ("data", "llm", "method", "steps", "seed", "lr")},
            **kwargs,
        )

    @classmethod
    def _from_pretrained(
        cls, *, model_id, data=None, llm=None, device=None, new=None, config=None, **download
    ):
        """ILM.from_pretrained(folder or hub id): `data`, `llm` replace the prepared folder and the LLM that its config.json names."""
        known = inspect.signature(snapshot_download).parameters
        check_name(model_id, "from_pretrained")
        run = (
            model_id
            if Path(model_id).is_dir()
            else snapshot_download(model_id, **{k: v for k, v in download.items() if k in known})
        )
        from ilm import load_ilm, pick_device

        return load_ilm(run, pick_device(device), data, new, llm)
