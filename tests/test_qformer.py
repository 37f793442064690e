"""B 5, Q 3, T 7, M 2, D 24, E 11, V 31: pairwise different, so that a transposition cannot pass."""
import math

import pytest
import torch
import torch.nn.functional as F
from transformers import BertConfig, BertModel, Blip2QFormerConfig, Blip2QFormerModel

import qformer
from assets.bert import init_from_bert
from qformer import QFormer, QFormerConfig

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


def test_computing_less_gives_the_same(model, batch):
    cf, ids, mask = batch
    item, text = torch.tensor([0, 1, 4, 4, 2, 0, 3]), torch.tensor([0, 1, 2, 3, 4, 4, 0])
    slow = model.itm_head(model(cf[item], ids[text], mask[text], "joint")[0]).mean(1)
    torch.testing.assert_close(model.match_logits(cf[item], ids, mask, pair=text), slow, atol=1e-5, rtol=1e-5)
    alone = model(None, ids, mask, "separate")[1]
    torch.testing.assert_close(model(None, ids, mask, "separate", keep=1)[1], alone[:, :1], atol=1e-5, rtol=1e-5)


def test_a_step_has_the_same_bits_every_time():
    torch.manual_seed(0)
    n, length = 64, 20
    model = QFormer(QFormerConfig(cf_dim=E, vocab_size=1000, dropout=0.0))
    cf, ids, mask = torch.randn(n, E), torch.randint(1000, (n, length)), torch.ones(n, length, dtype=torch.bool)
    seen = []
    for _ in range(8):
        model.zero_grad()
        losses = qformer.item_text_losses(model, cf, ids, mask, torch.eye(n, dtype=torch.bool), 1, torch.Generator().manual_seed(0))
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
    return torch.eye(n, dtype=torch.bool)


def test_itc_by_hand():
    similarity = torch.tensor([[2.0, 0.0], [1.0, 3.0]])
    rows = [math.log(1 + math.exp(-2)), math.log(1 + math.exp(-2))]
    columns = [math.log(1 + math.exp(-1)), math.log(1 + math.exp(-3))]
    assert qformer.itc_loss(similarity, 1.0, no_duplicates(2), 0.0).item() == pytest.approx((sum(rows) + sum(columns)) / 4)
    smooth = torch.stack([F.cross_entropy(x, torch.arange(2), label_smoothing=0.1) for x in (similarity, similarity.T)]).mean()
    assert qformer.itc_loss(similarity, 1.0, no_duplicates(2), 0.1).item() == pytest.approx(smooth.item())


def test_similarity_is_the_best_query_or_the_mean_of_all():
    q = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[-1.0, 0.0], [0.6, 0.8]]])   # (2, Q 2, P 2)
    t = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    torch.testing.assert_close(qformer.item_text_similarity(q, t), torch.tensor([[1.0, 1.0], [0.8, 0.6]]))
    torch.testing.assert_close(qformer.pair_similarity(q, q), torch.tensor([[1.0, -0.1], [-0.1, 1.0]]))


def test_duplicates_are_no_negatives():
    similarity = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    same = torch.eye(4, dtype=torch.bool)
    same[0, 2] = same[2, 0] = True
    for term in (qformer.itc_loss, qformer.ii_loss, qformer.ui_loss):
        loss = lambda s, term=term: term(s, 2.0, same)
        changed = similarity.clone()
        changed[0, 2] = changed[2, 0] = 9.0
        assert loss(similarity).item() == pytest.approx(loss(changed).item())
        changed[0, 1] = 9.0
        assert loss(changed).item() > loss(similarity).item() + 1
    same[2, 0], changed = False, similarity.clone()  # II and UI: a left side can share a key with a right one, and not the other way round
    changed[0, 2] = 9.0
    assert qformer.ii_loss(changed, 2.0, same).item() == pytest.approx(qformer.ii_loss(similarity, 2.0, same).item())


def test_hard_negatives_are_never_duplicates_and_prefer_the_similar():
    similarity, same = torch.zeros(6, 6), torch.eye(6, dtype=torch.bool)
    similarity[0, 3], same[0, 1], same[1, 0] = 8.0, True, True
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([torch.stack(qformer.hard_negatives(similarity, same, generator)) for _ in range(300)])     # (300, 2, B)
    assert not (draws == torch.arange(6)).any() and not (draws[:, :, 0] == 1).any() and not (draws[:, :, 1] == 0).any()
    assert (draws[:, 0, 0] == 3).float().mean() > 0.9 and (draws[:, 1, 3] == 0).float().mean() > 0.9
    everything_equal = qformer.hard_negatives(torch.zeros(2, 2), torch.ones(2, 2, dtype=torch.bool))
    assert [x.tolist() for x in everything_equal] == [[0, 1], [0, 1]]


def test_itm_and_itg_by_hand():
    assert qformer.itm_loss(torch.zeros(3, 2), torch.tensor([1, 0, 0])).item() == pytest.approx(math.log(2))
    prior = torch.tensor([[math.log(2 / 3), math.log(1 / 3)]]).expand(3, 2)
    assert qformer.itm_loss(prior, torch.tensor([1, 0, 0])).item() == pytest.approx(0.6365, abs=1e-4)
    logits, ids = torch.zeros(1, 4, V), torch.tensor([[9, 3, 4, 9]])
    logits[0, 0, 3], logits[0, 1, 4] = 2.0, 3.0
    mask = torch.tensor([[True, True, True, False]])
    expected = -(2 - math.log(V - 1 + math.exp(2)) + 3 - math.log(V - 1 + math.exp(3))) / 2
    assert qformer.itg_loss(*qformer.next_tokens(logits, ids, mask), 0.0).item() == pytest.approx(expected, abs=1e-5)


def test_losses_start_where_theory_says(batch):
    torch.manual_seed(0)
    model = QFormer(QFormerConfig(cf_dim=E, vocab_size=1000, dropout=0.0)).eval()
    n = 64
    cf, ids, mask = torch.randn(n, E), torch.randint(1000, (n, T)), torch.ones(n, T, dtype=torch.bool)
    queries, written = model(cf, ids, mask, "causal")
    similarity = qformer.item_text_similarity(model.query_features(queries), model.text_features(ids, mask))
    assert qformer.itc_loss(similarity, model.scale(), no_duplicates(n)).item() == pytest.approx(math.log(n), rel=0.15)
    states, targets = qformer.next_tokens(written, ids, mask)
    assert qformer.itg_loss(model.lm_logits(states), targets).item() == pytest.approx(math.log(1000), rel=0.1)
    assert qformer.itm_loss(model.match_logits(cf, ids, mask), torch.arange(n) % 3 // 2).item() == pytest.approx(0.69, abs=0.15)


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
