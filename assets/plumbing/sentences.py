"""Sentence embeddings, by any encoder of the Hugging Face hub."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel, AutoTokenizer

from assets.plumbing.run import from_pretrained


def sentence_encoder(name, model):
    """-> encoder, tokenizer, what to call them. name: a folder or hub id; None: the layers of the
    ILM's own LLM, which need no network, but were not made to tell texts apart."""
    if name:
        parts = [from_pretrained(part, name, "--sc-encoder") for part in (AutoModel, AutoTokenizer)]
        return *parts, Path(name).name
    trained = "trained" if model.llm.trained else "frozen"
    return model.llm.reader, model.tokenizer, f"the {trained} LLM's own states"


@torch.no_grad()
def sentence_embeddings(encoder, tokenizer, texts):
    """Texts -> unit vectors (N, width): the mean of an encoder's last states over the tokens."""
    limit = getattr(encoder.config.get_text_config(), "max_position_embeddings", None)
    rows = [torch.tensor(tokenizer(text)["input_ids"][:limit] or [0]) for text in texts]
    out = []
    for start in range(0, len(rows), 64):
        chunk = rows[start : start + 64]
        ids = pad_sequence(chunk, True).to(encoder.device)
        mask = pad_sequence([torch.ones_like(row) for row in chunk], True).to(encoder.device)
        states = encoder(input_ids=ids, attention_mask=mask).last_hidden_state.float()
        mean = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        out.append(F.normalize(mean, dim=-1))
    return torch.cat(out)
