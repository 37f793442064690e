"""The prior in the trie and its temperature: what is heard of the LLM's opinion of names, and what
stands in for the rest of it."""

import math

import numpy as np
import pytest
import torch
from test_ilm import prompts_of, purchases

import data
import ilm
from ilm import load_ilm
from train_stage2 import Examples, make_config, parse_args


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def models(make_ilm):
    """An ILM for each prior, of which tests change nothing but the temperature."""
    return {prior: make_ilm(prior=prior) for prior in ilm.PRIORS}


def ranked(model, tau, prompts=None):
    """log p of all names, (B, I), at a temperature."""
    with torch.no_grad():
        model.tau.fill_(tau)
    return model.rank(prompts or prompts_of(model), model.trie())


def batch_of(model, kind):
    return Examples(model, model.dataset).batch(kind, 2, np.random.default_rng(0))


# ---- The numbers -----------------------------------------------------------------------------


@pytest.mark.parametrize("zero_soft", [False, True])
def test_without_the_llm_items_are_as_likely_as_they_are_popular(models, monkeypatch, zero_soft):
    """tau = 0: p of an item is its share of 1 + purchases, down whatever branches its name and after
    any prompt, so that the ranking is popularity's list."""
    model = models["popularity"]
    if zero_soft:
        monkeypatch.setattr(model.adapter.gain, "data", torch.zeros(()))
    templates = Examples(model, model.dataset).templates
    asked = [model.prompt_ids(templates["straightforward", seen][0], user=9) for seen in ("seen", "unseen")]
    prompts = [*prompts_of(model), *asked, model.prompt_ids("Name any title:")]
    scores = ranked(model, 0.0, prompts)
    count = torch.tensor(purchases(model)).float()
    close(scores, (1 + count).log().log_softmax(0).expand(6, -1))
    listed = count[scores.argsort(1, descending=True)]
    assert (listed[:, :-1] >= listed[:, 1:]).all() and len(count.unique()) > 20
    assert (ranked(model, 0.4, prompts) - scores).abs().max() > 0.1  # and the LLM has a say


def test_without_the_llm_a_uniform_prior_knows_nothing(models):
    close(ranked(models["uniform"], 0.0), torch.full((3, 120), -math.log(120)))


@pytest.mark.parametrize("prior", ilm.PRIORS)
def test_probabilities_of_all_names_sum_to_one(models, prior):
    for tau in (0.0, 0.7, 3.0):
        close(ranked(models[prior], tau).exp().sum(1), torch.ones(3))


def test_no_prior_is_the_llm_alone(models):
    """p renormalised over the children, as it was before there was a prior."""
    model = models["none"]
    trie, prompt = model.names_trie, model.prompt_ids("Name any title:")
    scores = ranked(model, 1.0, [prompt])[0]
    assert not model.log_count.any()
    for item in (0, 50, 119):
        tokens, nodes = trie.paths[item]
        with torch.no_grad():
            logits = model.llm.network(input_ids=torch.tensor([[*prompt, *tokens]])).logits[0].float()
        wanted = 0.0
        for row, token, node in zip(logits[len(prompt) - 1:], tokens, nodes):
            _, child = trie.children(torch.tensor([node]))
            wanted += (row[token] - row[trie.token[child]].logsumexp(0)).item()
        assert scores[item].item() == pytest.approx(wanted, abs=1e-3)


def test_each_child_holds_the_items_below_it(models):
    """And "uniform" counts each of them once."""
    for prior, total in (("popularity", 120 + sum(purchases(models["none"]))), ("uniform", 120)):
        model = models[prior]
        trie, count = model.names_trie, model.log_count.exp()
        assert count[0].item() == pytest.approx(total)
        inner = (trie.count > 0).nonzero()[:, 0]
        parent, child = trie.children(inner)
        below = torch.zeros(len(inner)).index_add(0, parent, count[child])
        torch.testing.assert_close(below, count[inner], atol=1e-2, rtol=1e-4)


# ---- What is counted -------------------------------------------------------------------------


def test_purchases_of_validation_and_test_items_are_not_counted(toy, models):
    dataset = data.load_dataset(toy)
    assert dataset.purchases.tolist() == purchases(models["none"])
    assert dataset.purchases.sum() == len(dataset.sequence) - 2 * len(dataset.users)


def test_later_names_count_one_and_later_purchases_of_known_ones_nothing(make_ilm, toy, tmp_path):
    """The trie has other nodes; known items keep their share of what the new one leaves."""
    model = make_ilm()
    with torch.no_grad():
        model.tau.fill_(0.6)
    model.save_pretrained(tmp_path / "run")
    (later := tmp_path / "later").mkdir()
    (later / "items.csv").write_text("id,title\nnew,Ancient Compass\n")
    known = [item["id"] for item in model.dataset.items[:2]]
    log = [f"{user},{item},9\n" for user in model.dataset.users[:5] for item in ("new", *known)]
    (later / "interactions.csv").write_text("user,item,timestamp\n" + "".join(log))
    extended = load_ilm(tmp_path / "run", "cpu", new=later)
    assert extended.dataset.purchases.tolist() == [*model.dataset.purchases.tolist(), 0]
    assert extended.tau.item() == pytest.approx(0.6)
    before, after = (ranked(m, 0.0, [m.prompt_ids("Name any title:")])[0] for m in (model, extended))
    total = sum(purchases(model)) + 120
    assert after[-1].exp().item() == pytest.approx(1 / (total + 1), rel=1e-3)
    close(after[:-1], before + math.log(total / (total + 1)))


# ---- The temperature -------------------------------------------------------------------------


@pytest.mark.parametrize("method, config, learned", [
    ("ilm-rand", {}, True),
    ("ilm-rand", {"temperature": "fixed"}, False),
    ("text", {}, False),  # nothing to train: what the prior is added to is the LLM as it is
    ("text", {"train_llm": True}, True),
])
def test_the_temperature_is_learned_or_one(make_ilm, method, config, learned):
    model = make_ilm(method, **config)
    assert model.tau.requires_grad == learned and "tau" in model.saved_parameters()
    assert model.tau.item() == pytest.approx(ilm.START_TAU if learned else 1.0)


@pytest.mark.parametrize("kind", ["sequential", "straightforward", "text"])
def test_a_step_moves_the_temperature_where_names_are_asked_for(make_ilm, kind):
    """And nothing else of the prior. A batch of words alone gives it a gradient of zero, not none:
    several processes wait for one of every parameter."""
    model = make_ilm().train()
    count = model.log_count.clone()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    batch = batch_of(model, kind)
    total, nll = model(batch)
    (total / len(nll)).backward()
    assert total.item() == pytest.approx(nll.sum().item())
    assert (model.tau.grad != 0) == (len(batch["name_at"]) > 0) == (kind != "text")
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    optimizer.step()
    assert (model.tau.item() != pytest.approx(ilm.START_TAU)) == (kind != "text")
    assert torch.equal(model.log_count, count) and "log_count" not in model.state_dict()


@pytest.mark.parametrize("prior, temperature", [("popularity", "fixed"), ("uniform", "learned")])
def test_prior_and_temperature_are_kept_with_a_run(make_ilm, toy, tmp_path, prior, temperature):
    """The flags in its config, and tau among its weights (tests/test_train_stage2.py: as trained)."""
    flags = ["--method", "ilm-rand", "--data", str(toy), "--prior", prior, "--temperature", temperature]
    config, _ = make_config(parse_args(flags), data.load_dataset(toy))
    assert (config["prior"], config["temperature"]) == (prior, temperature)
    model = make_ilm(prior=prior, temperature=temperature)
    with torch.no_grad():
        model.tau.fill_(1.3)
    model.save_pretrained(tmp_path)
    loaded = load_ilm(tmp_path, "cpu")
    assert loaded.tau.item() == pytest.approx(1.3) and torch.equal(loaded.log_count, model.log_count)
    assert loaded.tau.requires_grad == (temperature == "learned")


def test_a_loss_over_the_full_vocabulary_knows_no_prior(make_ilm):
    """Nor does the ranking by it: whatever tau and counts are, the same bits."""
    model = make_ilm(full_vocabulary=True)
    batch, trie, prompts = batch_of(model, "sequential"), model.trie(False), prompts_of(model)
    seen = []
    for tau in (0.4, 5.0):
        with torch.no_grad():
            model.tau.fill_(tau), model.log_count.mul_(tau)
            seen.append((model(batch)[1], model.rank(prompts, trie)))
    assert torch.equal(seen[0][0], seen[1][0]) and torch.equal(seen[0][1], seen[1][1])
