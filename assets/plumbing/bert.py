"""Starting the Q-Former from BERT's weights, as BLIP-2 and the paper do (train_stage1.py
--init-bert)."""

import torch
from transformers import AutoModelForMaskedLM

from assets.plumbing.guard import reading
from assets.plumbing.run import from_pretrained, say

BERT_NAMES = (
    ("bert.", ""),
    ("embeddings.word_embeddings", "words"),
    ("embeddings.position_embeddings", "positions"),
    ("embeddings.LayerNorm", "norm"),
    ("encoder.layer", "layers"),
    ("attention.self", "self_attention"),
    ("attention.output.dense", "self_attention.out"),
    ("attention.output.LayerNorm", "self_attention.norm"),
    ("intermediate.dense", "text_ffn.up"),
    ("output.dense", "text_ffn.down"),
    ("output.LayerNorm", "text_ffn.norm"),
    ("cls.predictions.transform.dense", "lm_transform"),
    ("cls.predictions.transform.LayerNorm", "lm_norm"),
    ("cls.predictions.bias", "lm_bias"),
)


def read_bert(name):
    """A BERT by folder or hub id. fresh: what a BERT that was saved without its head lacks."""
    given = {"output_loading_info": True}
    bert, info = from_pretrained(AutoModelForMaskedLM, name, "--init-bert", **given)
    bert.fresh = {*info["missing_keys"]}
    return bert


def start_from(bert, name, model):
    """init_from_bert of a BERT that was read; what was loaded and what was not is said."""
    with reading(f"--init-bert {name}", "give a BERT and its own --width and --layers"):
        state = {key: x for key, x in bert.state_dict().items() if key not in bert.fresh}
        loaded, missing = init_from_bert(model, state)
    say(f"--init-bert {name}: loaded {len(loaded)} tensors: {', '.join(loaded)}")
    say(f"not loaded, fresh: {', '.join(missing)}")


@torch.no_grad()
def init_from_bert(model, state):
    """Copy a BERT state dict into the text branch, and its feed-forward into the queries' as well
    (BLIP-2's start).

    The word table may be longer than BERT's and the position table shorter; the rest has to fit.
    Cross-attention stays random. Returns two lists: the names of our parameters that were loaded,
    and of those that were not."""
    renamed, loaded = {}, []
    for name, tensor in state.items():
        for theirs, ours in BERT_NAMES:
            name = name.replace(theirs, ours)
        renamed[name] = tensor
    kinds = renamed.get("embeddings.token_type_embeddings.weight")
    # BERT adds "sentence A" to every token; as part of the positions it stays, and the text
    # branch *is* BERT
    if kinds is not None:
        renamed["positions.weight"] = renamed["positions.weight"] + kinds[0]
    for name, parameter in model.named_parameters():
        source = renamed.get(name.replace("query_ffn", "text_ffn"))
        if source is None:
            continue
        rows = (
            min(len(source), len(parameter))
            if name in ("words.weight", "positions.weight", "lm_bias")
            else len(parameter)
        )
        if source[:rows].shape != parameter[:rows].shape:
            raise ValueError(
                f"{name}: BERT has {tuple(source.shape)}, this Q-Former needs "
                f"{tuple(parameter.shape)}; set --width"
            )
        parameter[:rows] = source[:rows]
        loaded.append(name)
    return loaded, [name for name, _ in model.named_parameters() if name not in loaded]
