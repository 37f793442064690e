"""A figure of evaluate.py --plot: which texts an item is similar to, before and after stage 1."""

import torch

from qformer import QFormer, item_text_similarity


@torch.no_grad()
def alignment(model, seed, dataset, texts, items, device):
    """Similarity of up to 24 items (rows) with their texts (columns) -> {"before", "after"}: by the
    fresh Q-Former that training with this seed began with, and by the trained one."""
    torch.manual_seed(seed)
    fresh = QFormer(model.config).to(device)
    ids, mask, _ = (t.to(device) for t in texts.batch(torch.tensor(items[:24])))
    cf = dataset.item_cf[items[:24]].to(device)

    found = {}
    for when, qformer in (("before", fresh.eval()), ("after", model.eval())):
        queries, words = (
            qformer.query_features(qformer.encode(cf)),
            qformer.text_features(ids, mask),
        )
        similarity = item_text_similarity(queries, words)
        found[when] = similarity.cpu().numpy().round(3).tolist()
    return found
