"""Packed rows have the loss of their examples one by one."""
import numpy as np
import pytest
import torch
from conftest import as_read, embedded
from test_ilm import SEQUENTIAL, prompts_of

from assets.fast.attention import cut_in_pieces, in_pieces, packed_attention
from assets.fast.packing import SOFT_BASE, collate, pack
from train_stage2 import Examples


def log_p(model, prompt, target):
    """Sum of log p(target | prompt) and its terms, straight from the LLM: no packing, no padding, no cache."""
    logits = model.llm.network(inputs_embeds=embedded(model, prompt, [target])).logits[0].float().log_softmax(-1)
    return logits[len(prompt) - 1:-1].gather(1, torch.tensor(target)[:, None])[:, 0]


@pytest.mark.parametrize("method", ["ilm-rand", "text"])
def test_packed_loss_is_the_loss_of_the_examples_one_by_one(make_ilm, method):
    model = make_ilm(method)
    examples, window = Examples(model, model.dataset), model.dataset.items_of(0)[:9]
    sequential = [(model.prompt_ids(SEQUENTIAL, user=0, history=window[:k]), model.name_ids[window[k]]) for k in range(1, 9)]
    same_prompt = [(model.prompt_ids("What would {user} like?", user=1), model.name_ids[i]) for i in (3, 8, 50)]
    single = [(model.prompt_ids("Describe {item}.", items=[3], named=False), model.target_ids("A western."))]
    template = examples.templates["sequential", "seen"][0]  # the user at its end
    prefixes = examples.prefixes(0, window, examples.read_before(0, np.arange(1, 9)), template)
    shared = [(prompt, model.name_ids[i]) for prompt, i in zip(prefixes, window[1:])]
    rows = [sequential, shared, same_prompt, single]
    with torch.no_grad():
        total, packed = model(examples.collate([examples.pack(row) for row in rows]))
        one_by_one = torch.cat([-log_p(model, prompt, target) for row in rows for prompt, target in row])
    torch.testing.assert_close(packed, one_by_one, atol=1e-4, rtol=1e-4)
    assert total.item() == pytest.approx(packed.sum().item())
    assert len(examples.pack(shared)["ids"]) < sum(len(p) + len(t) for p, t in shared) / 2


def test_packed_rows_by_hand():
    row = pack([([1, 2, 9], [5, 0]), ([1, 2, 3, 9], [6, 7, 0], [0, 4, -1])])
    assert row["cf"] == [] and row["node"] == [-1] * 5 + [0, 4, -1]
    assert row["ids"] == [1, 2, 9, 5, 3, 9, 6, 7]
    assert row["position"] == [0, 1, 2, 3, 2, 3, 4, 5]
    assert row["branch"] == [0, 0, 1, 1, 0, 2, 2, 2]
    assert row["label"] == [-100, -100, 5, 0, -100, 6, 7, 0]
    mask = packed_attention(collate([row])["branch"])[0, 0].int().tolist()
    assert mask[3] == [1, 1, 1, 1, 0, 0, 0, 0] and mask[7] == [1, 1, 0, 0, 1, 1, 1, 1]


def test_vectors_of_prompts_packed_and_collated_stay_with_their_prompts(make_ilm):
    """Three rows, of which two have users: each soft token of a user is that user's, wherever it stands."""
    model = make_ilm()
    examples = Examples(model, model.dataset)
    prompts = [[model.prompt_ids("For {user} and {user:9}:", user=u) for u in (1, 2)],
               [model.prompt_ids("About {item}:", items=[5])],
               [model.prompt_ids("For {user}:", user=4)]]
    batch = collate([examples.pack([(prompt, [7, 0]) for prompt in row]) for row in prompts], model.num_items, model.Q)
    own = batch["ids"][batch["ids"] >= SOFT_BASE + model.num_items * model.Q] - SOFT_BASE
    found = [batch["cf"][e // model.Q - model.num_items] for e in own.tolist()[::model.Q]]
    wanted = as_read(model, [model.dataset.items_of(u) for u in (1, 9, 2, 9, 4)])
    torch.testing.assert_close(torch.stack(found), wanted)


def test_the_training_loss_of_a_name_is_its_ranking_score(tangled):
    """p divided among the names of the catalogue, and no token after a name is decided."""
    prompts, paths, examples = prompts_of(tangled, (0, 1)), tangled.names_trie.paths, Examples(tangled, tangled.dataset)
    with torch.no_grad():
        batch = examples.collate([examples.pack([(prompt, *paths[i]) for i in range(0, 120, 3)]) for prompt in prompts])
        nll, row = tangled(batch)[1], (batch["label"] >= 0).nonzero()
    scores = torch.zeros(2, 41).index_put((row[:, 0], batch["branch"][row[:, 0], row[:, 1]]), -nll, accumulate=True)[:, 1:]
    wanted = tangled.rank(prompts, tangled.trie())
    torch.testing.assert_close(scores, wanted[:, ::3], atol=1e-4, rtol=1e-4)
    assert len(paths[8][0]) == 3 and len(paths[7][0]) == 3 and paths[7][0][-1] == tangled.tokenizer.eos_token_id  # 7 is a prefix of others


def test_an_llm_that_cannot_be_packed_has_the_same_losses_and_gradients(make_ilm):
    """It reads the examples one by one, after prompts of unequal lengths."""
    seen = []
    for packs in (True, False):
        model = make_ilm().train()
        model.llm.packs = packs
        examples = Examples(model, model.dataset)
        rows = examples.rows("sequential", 2, np.random.default_rng(0))
        # The longest prompt, which makes the trunk, is the second: its branch stands last
        rows.append(examples.pack([([1, 10, 11, 9], [101, 0]), ([1, 20, 21, 22, 9], [102, 0]), ([1, 30, 31, 9], [103, 0])]))
        assert rows[-1]["branch"] == [0, 1, 1, 1, 1, 3, 3, 3, 3, 0, 0, 0, 2, 2]
        total, nll = model(examples.collate(rows))
        (total / len(nll)).backward()
        seen.append((nll, model.adapter.maps[0].weight.grad))
    for a, b in zip(*seen):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_checkpointed_layers_keep_less_and_give_the_same_gradients(make_ilm):
    model = make_ilm()
    examples, kept = Examples(model, model.dataset), []
    batch = examples.batch("sequential", 2, np.random.default_rng(0))

    def gradients():
        kept.append(0)

        def count(x):
            kept[-1] += x.numel() * x.element_size()
            return x
        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            loss, _ = model.train()(batch)
        model.zero_grad()
        loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]
    before = gradients()
    model.llm.checkpoint_layers()
    after = gradients()
    assert all(torch.equal(a, b) for a, b in zip(before, after)) and len(before) == len(after) > 5
    assert kept[1] < kept[0] / 2


@pytest.mark.parametrize("kind", ["sequential", "straightforward"])
def test_pieces_show_each_token_what_it_may_see_once(make_ilm, kind):
    """The pairs of packed_attention, laid out of the pieces again; and fewer pairs are looked at."""
    model = make_ilm()
    examples = Examples(model, model.dataset)
    batch = examples.batch(kind, 3, np.random.default_rng(0))
    batch |= cut_in_pieces(batch["branch"], long=0)
    wanted, looked = packed_attention(batch["branch"])[:, 0].int(), 0
    pieces, seen = in_pieces(batch), torch.zeros_like(wanted)
    for (start, stop, near, far), mask in zip(pieces.places, pieces.masks):
        looked += mask[0].numel()
        for row, at in enumerate(pieces.trunk_at.tolist()):
            keys = at[:far] + [*range(near, stop)]
            for key, allowed in zip(keys, mask[row, 0].int().T):
                seen[row, start:stop, key] += allowed
    real = batch["branch"] >= 0  # padding sees itself, and nobody sees it
    assert torch.equal(seen[real], wanted[real]) and looked < 0.7 * wanted[0].numel()


def test_attention_in_pieces_has_the_same_losses_and_gradients(make_ilm):
    seen = []
    for fast in (True, False):
        model = make_ilm().train()
        assert model.llm.in_pieces
        model.llm.in_pieces = fast
        batch = Examples(model, model.dataset).batch("sequential", 3, np.random.default_rng(0))
        total, nll = model(batch | cut_in_pieces(batch["branch"], long=0))
        total.backward()
        seen.append((nll, model.adapter.maps[0].weight.grad))
    for a, b in zip(*seen):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    assert not cut_in_pieces(batch["branch"][:, :200])  # short rows are as fast whole


def test_a_row_that_is_one_long_answer_is_cut_too(make_ilm):
    """No piece has anything of the trunk before it."""
    seen = []
    for fast in (True, False):
        model = make_ilm()
        model.llm.in_pieces = fast
        examples = Examples(model, model.dataset)
        batch = examples.collate([examples.pack([(model.prompt_ids("Describe {item}.", items=[k], named=False), [5, 7, 9] * (100 - k))])
                                  for k in (3, 40)])
        assert batch["trunk_at"].shape == (2, 0)
        seen.append(model(batch)[1])
    torch.testing.assert_close(*seen, atol=1e-4, rtol=1e-4)
