"""B 5, Q 3, T 7, M 2, D 24, E 11, V 31: pairwise different, so that a transposition cannot pass."""
import math
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from transformers import BertConfig, BertModel, Blip2QFormerConfig, Blip2QFormerModel

import qformer
from assets.plumbing.bert import init_from_bert
from qformer import QFormer, QFormerConfig
from train_stage1 import FastQFormer

B, Q, T, M, D, E, V = 5, 3, 7, 2, 24, 11, 31
CONFIG = QFormerConfig(cf_dim=E, vocab_size=V, num_queries=Q, width=D, layers=4, heads=4, cf_tokens=M, proj_dim=6, max_text=9, dropout=0.0)


@pytest.fixture()
def model():
    torch.manual_seed(0)
    return QFormer(CONFIG).eval()


@pytest.fixture()
def batch():
    generator = torch.Generator().manual_seed(1)
    mask = torch.arange(T) < torch.tensor([7, 3, 5, 1, 6])[:, None]
    return torch.randn(B, E, generator=generator), torch.randint(V, (B, T), generator=generator), mask


# -- parity with transformers, weight for weight


def hf_twin(model):
    """transformers' Q-Former with our weights; returns it and the pairs (our parameter, its parameter)."""
    c = model.config
    twin = Blip2QFormerModel(Blip2QFormerConfig(
        hidden_size=c.width, num_hidden_layers=c.layers, num_attention_heads=c.heads, intermediate_size=4 * c.width,
        cross_attention_frequency=2, encoder_hidden_size=c.width, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        use_qformer_text_input=True, attn_implementation="sdpa")).eval()
    attention = {"query": "attention.query", "key": "attention.key", "value": "attention.value", "out": "output.dense",
                 "norm": "output.LayerNorm"}
    names = {"norm": "layernorm"}
    for i, layer in enumerate(model.layers):
        for ours, theirs in attention.items():
            names[f"layers.{i}.self_attention.{ours}"] = f"encoder.layer.{i}.attention.{theirs}"
            if layer.cross_attention is not None:
                names[f"layers.{i}.cross_attention.{ours}"] = f"encoder.layer.{i}.crossattention.{theirs}"
        for ours, suffix in (("query_ffn", "_query"), ("text_ffn", "")):
            for part, theirs in (("up", "intermediate{}.dense"), ("down", "output{}.dense"), ("norm", "output{}.LayerNorm")):
                names[f"layers.{i}.{ours}.{part}"] = f"encoder.layer.{i}." + theirs.format(suffix)
    mine, its = dict(model.named_parameters()), dict(twin.named_parameters())
    pairs = [(mine[f"{a}.{kind}"], its[f"{b}.{kind}"]) for a, b in names.items() for kind in ("weight", "bias")]
    assert len(pairs) == len(its), "every parameter of transformers' Q-Former has one of ours"
    with torch.no_grad():
        for a, b in pairs:
            b.copy_(a)
    return twin, pairs


@pytest.mark.parametrize("pattern", ["separate", "joint", "causal"])
def test_parity_with_transformers(model, batch, pattern):
    cf, ids, mask = batch
    twin, pairs = hf_twin(model)
    queries, text = model(cf, ids, mask, pattern)
    embedded = torch.cat([model.queries.expand(B, -1, -1), model.words(ids) + model.positions(torch.arange(T))], 1)
    theirs = twin(query_embeds=embedded, query_length=Q, attention_mask=qformer.attention_pattern(pattern, Q, mask),
                  encoder_hidden_states=model.cf_keys(cf)).last_hidden_state
    torch.testing.assert_close(torch.cat([queries, text], 1), theirs, atol=1e-5, rtol=1e-5)
    noise = torch.randn(B, Q + T, D, generator=torch.Generator().manual_seed(2))
    (torch.cat([queries, text], 1) * noise).sum().backward()
    (theirs * noise).sum().backward()
    for ours, its in pairs:
        torch.testing.assert_close(ours.grad, its.grad, atol=1e-5, rtol=1e-5)


def fast_twin(model):
    twin = FastQFormer(model.config).eval()
    twin.load_state_dict(model.state_dict())
    return twin


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}


@pytest.mark.parametrize("layers", [1, 2, 4])
@pytest.mark.parametrize("name, indices", [
    ("match_logits", ([0, 1, 4, 4, 2, 0, 3], [0, 1, 2, 3, 4, 4, 0])), ("text_features", ())])
def test_computing_less_gives_the_same(batch, layers, name, indices):
    """Values and gradients of the fast twin, also where the first layer is the last."""
    torch.manual_seed(0)
    model = QFormer(replace(CONFIG, layers=layers)).eval()
    twin, argv = fast_twin(model), [*batch[name == "text_features":], *map(torch.tensor, indices)]
    slow, fast = (getattr(m, name)(*argv) for m in (model, twin))
    torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-5)
    noise = torch.randn(slow.shape, generator=torch.Generator().manual_seed(2))
    wanted, found = gradients(model, (slow * noise).sum()), gradients(twin, (fast * noise).sum())
    assert wanted.keys() == found.keys() and len(wanted) > 10
    for key in wanted:
        torch.testing.assert_close(found[key], wanted[key], atol=1e-5, rtol=1e-4, msg=key)


def test_lifted_out_of_the_repository_it_needs_torch_alone(tmp_path):
    shutil.copy(qformer.__file__, tmp_path)
    code = ("import sys, qformer; loaded = {name.split('.')[0] for name in sys.modules}; "
            "assert not loaded & {'transformers', 'data', 'assets'}, loaded")
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


def test_a_step_has_the_same_bits_every_time():
    torch.manual_seed(0)
    n, length = 64, 20
    model = FastQFormer(QFormerConfig(cf_dim=E, vocab_size=1000, dropout=0.0))
    cf, ids, mask = torch.randn(n, E), torch.randint(1000, (n, length)), torch.ones(n, length, dtype=torch.bool)
    seen = []
    for _ in range(8):
        model.zero_grad()
        losses = qformer.item_text_losses(model, cf, ids, mask, torch.arange(n), 1, torch.Generator().manual_seed(0))
        sum(losses.values()).backward()
        seen.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert all(torch.equal(seen[0], other) for other in seen[1:])


# -- the three patterns, by perturbation with random noise (a constant shift would be erased by LayerNorm)


def changed(model, batch, pattern, text_at=None):
    """Which query rows and which text positions of example 0 change when its CF vector or one of its words changes."""
    cf, ids, mask = (x.clone() for x in batch)
    before = model(cf, ids, mask, pattern)
    if text_at is None:
        cf[0] += torch.randn(E)
    else:
        ids[0, text_at] = (ids[0, text_at] + 1) % V
    after = model(cf, ids, mask, pattern)
    return [((a - b)[0].abs().amax(-1) > 1e-6).tolist() for a, b in zip(before, after)]


def test_separate_neither_side_sees_the_other(model, batch):
    assert changed(model, batch, "separate") == [[True] * Q, [False] * T]
    assert changed(model, batch, "separate", text_at=2) == [[False] * Q, [True] * T]


def test_joint_everyone_sees_everyone(model, batch):
    assert changed(model, batch, "joint") == [[True] * Q, [True] * T]
    assert changed(model, batch, "joint", text_at=2) == [[True] * Q, [True] * T]


def test_causal_text_cannot_see_the_future_and_queries_cannot_see_text(model, batch):
    assert changed(model, batch, "causal") == [[True] * Q, [True] * T]
    assert changed(model, batch, "causal", text_at=4) == [[False] * Q, [False] * 4 + [True] * 3]


@pytest.mark.parametrize("pattern", ["separate", "joint", "causal"])
def test_padding_changes_nothing(model, batch, pattern):
    cf, ids, mask = batch
    other = torch.where(mask, ids, (ids + 5) % V)
    for a, b, real in zip(model(cf, ids, mask, pattern), model(cf, other, mask, pattern), (torch.ones(B, Q, dtype=torch.bool), mask)):
        torch.testing.assert_close(a[real], b[real])


def test_one_causal_pass_serves_itc_and_itg(model, batch):
    cf, ids, mask = batch
    torch.testing.assert_close(model(cf, ids, mask, "causal")[0], model.encode(cf))


# -- losses: hand-worked numbers and values at the start


def no_duplicates(n):
    return torch.zeros(n, n, dtype=torch.bool)


def test_contrast_by_hand():
    similarity = torch.tensor([[2.0, 0.0], [1.0, 3.0]])
    rows = [math.log(1 + math.exp(-2)), math.log(1 + math.exp(-2))]
    columns = [math.log(1 + math.exp(-1)), math.log(1 + math.exp(-3))]
    assert qformer.contrastive_loss(similarity, 1.0, no_duplicates(2)).item() == pytest.approx((sum(rows) + sum(columns)) / 4)
    halved = qformer.contrastive_loss(similarity / 2, 0.5, no_duplicates(2))
    assert halved.item() == pytest.approx((sum(rows) + sum(columns)) / 4)
    smooth = torch.stack([F.cross_entropy(x, torch.arange(2), label_smoothing=0.1) for x in (similarity, similarity.T)]).mean()
    assert qformer.contrastive_loss(similarity, 1.0, no_duplicates(2), 0.1).item() == pytest.approx(smooth.item())


def test_similarity_is_the_best_query_or_the_mean_of_all():
    q = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[-1.0, 0.0], [0.6, 0.8]]])   # (2, Q 2, P 2)
    t = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    torch.testing.assert_close(qformer.item_text_similarity(q, t), torch.tensor([[1.0, 1.0], [0.8, 0.6]]))
    torch.testing.assert_close(qformer.pair_similarity(q, q), torch.tensor([[1.0, -0.1], [-0.1, 1.0]]))


def test_duplicates_are_no_negatives():
    similarity = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    duplicates = no_duplicates(4)
    duplicates[0, 2] = True  # a left side can share a key with a right one, and not the other way round
    loss = qformer.contrastive_loss(similarity, 0.5, duplicates)
    changed = similarity.clone()
    changed[0, 2] = 9.0
    assert qformer.contrastive_loss(changed, 0.5, duplicates).item() == pytest.approx(loss.item())
    changed[2, 0] = 9.0
    assert qformer.contrastive_loss(changed, 0.5, duplicates).item() > loss.item() + 1


def test_duplicates_share_a_key_and_are_never_the_pair_itself():
    """Left: user 1 twice, users 2, 3; right: items 7, 8, 7, 9. Then items on both sides: 7 is left of one pair, right of another."""
    found = qformer.find_duplicates(torch.tensor([-1, -1, -2, -3]), torch.tensor([7, 8, 7, 9]))
    assert found.nonzero().tolist() == [[0, 1], [0, 2], [1, 0], [2, 0]]
    found = qformer.find_duplicates(torch.tensor([7, 8, 9]), torch.tensor([8, 9, 9]))
    assert found.nonzero().tolist() == [[1, 0], [1, 2], [2, 1]]


def test_hard_negatives_are_never_duplicates_and_prefer_the_similar():
    similarity, duplicates = torch.zeros(6, 6), no_duplicates(6)
    similarity[0, 3], duplicates[0, 1], duplicates[1, 0] = 8.0, True, True
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([qformer.hard_negatives(similarity, duplicates, generator) for _ in range(300)])  # (300, B)
    assert not (draws == torch.arange(6)).any() and not (draws[:, 0] == 1).any() and not (draws[:, 1] == 0).any()
    assert (draws[:, 0] == 3).float().mean() > 0.9
    everything_equal = ~torch.eye(2, dtype=torch.bool)
    assert qformer.hard_negatives(torch.zeros(2, 2), everything_equal).tolist() == [0, 1]


def test_matching_takes_an_equal_text_for_right(model, batch):
    """Items 0 and 1 have equal texts, so that 1 is no wrong text for 0; where all texts are equal, all pairs are real."""
    seen = []
    model.match_logits = lambda cf, ids, mask, item, text: seen.append((item, text)) or torch.zeros(len(item), 2)
    itm = qformer.item_text_losses(model, *batch, torch.tensor([5, 5, 2, 3, 4]), 1, torch.Generator().manual_seed(0))["itm"]
    item, text = seen.pop()
    assert len(item) == 3 * B and torch.equal(item[:B], text[:B]) and itm.item() == pytest.approx(math.log(2))
    assert not ((item != text) & (item < 2) & (text < 2)).any()
    qformer.item_text_losses(model, *batch, torch.zeros(B, dtype=torch.long), 1)
    item, text = seen.pop()
    assert torch.equal(item, text)


def test_itm_and_itg_by_hand():
    assert qformer.itm_loss(torch.zeros(3, 2), torch.tensor([1, 0, 0])).item() == pytest.approx(math.log(2))
    prior = torch.tensor([[math.log(2 / 3), math.log(1 / 3)]]).expand(3, 2)
    assert qformer.itm_loss(prior, torch.tensor([1, 0, 0])).item() == pytest.approx(0.6365, abs=1e-4)
    logits, ids = torch.zeros(1, 4, V), torch.tensor([[9, 3, 4, 9]])
    logits[0, 0, 3], logits[0, 1, 4] = 2.0, 3.0
    mask = torch.tensor([[True, True, True, False]])
    expected = -(2 - math.log(V - 1 + math.exp(2)) + 3 - math.log(V - 1 + math.exp(3))) / 2
    total, count = qformer.itg_loss(*qformer.next_tokens(logits, ids, mask), 0.0)
    assert count.tolist() == [2] and (total / 2).item() == pytest.approx(expected, abs=1e-5)


def test_losses_start_where_theory_says(batch):
    torch.manual_seed(0)
    model = QFormer(QFormerConfig(cf_dim=E, vocab_size=1000, dropout=0.0)).eval()
    n = 64
    cf, ids, mask = torch.randn(n, E), torch.randint(1000, (n, T)), torch.ones(n, T, dtype=torch.bool)
    own, (queries, written) = torch.arange(n), model(cf, ids, mask, "causal")
    similarity = qformer.item_text_similarity(model.query_features(queries), model.text_features(ids, mask))
    loss = qformer.contrastive_loss(similarity, model.bounded_temperature(), no_duplicates(n), 0.1)
    assert loss.item() == pytest.approx(math.log(n), rel=0.15)
    states, targets = qformer.next_tokens(written, ids, mask)
    total, count = qformer.itg_loss(model.lm_logits(states), targets)
    assert (total / count).item() == pytest.approx(math.log(1000), rel=0.1)
    assert qformer.itm_loss(model.match_logits(cf, ids, mask, own, own), own % 3 // 2).item() == pytest.approx(0.69, abs=0.15)


# -- starting from BERT


def test_init_from_bert_makes_the_text_branch_bert(batch):
    _, ids, mask = batch
    torch.manual_seed(0)
    bert = BertModel(BertConfig(vocab_size=V - 4, hidden_size=D, num_hidden_layers=4, num_attention_heads=4, intermediate_size=4 * D,
                                max_position_embeddings=20)).eval()
    model, ids = QFormer(CONFIG).eval(), ids % (V - 4)
    loaded, missing = init_from_bert(model, {"bert." + k: v for k, v in bert.state_dict().items()})
    ours, theirs = model(None, ids, mask)[1], bert(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(ours[mask], theirs[mask], atol=1e-5, rtol=1e-5)
    assert torch.equal(model.layers[1].query_ffn.up.weight, model.layers[1].text_ffn.up.weight)
    assert "layers.0.cross_attention.query.weight" in missing and "queries" in missing and "layers.3.query_ffn.down.bias" in loaded
    assert sorted(loaded + missing) == sorted(n for n, _ in model.named_parameters())
    with pytest.raises(ValueError, match="set --width"):
        init_from_bert(QFormer(QFormerConfig(cf_dim=E, vocab_size=V, width=32)), bert.state_dict())


def test_stage_2_freezes_what_encode_does_not_touch(model, batch):
    model.freeze_all_but_encode()
    model.encode(batch[0]).pow(3).sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_the_length_of_a_cf_vector_shows(model, batch):
    """Popular items have long ones: a LayerNorm on the CF keys would hide it."""
    one, two = model.encode(batch[0]), model.encode(2 * batch[0])
    assert (one - two).abs().max() > 0.1
