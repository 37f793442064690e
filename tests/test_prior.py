"""The prior in the trie and its temperature: what stands in for the LLM's own opinion of names."""

import json

import numpy as np
import pytest
import torch
from conftest import CF, ROOT
from safetensors.torch import load_file
from test_ilm import prompts_of, purchases

import data
import ilm
from ilm import load_ilm


def popularity(model):
    """log of each item's share of 1 + its training purchases. (I,)"""
    return torch.tensor([1.0 + n for n in purchases(model)]).log().log_softmax(0)


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.fixture()
def noisy(make_ilm):
    """noisy(...) -> an ILM whose `base` and temperature are arbitrary."""

    def make(**config):
        model = make_ilm(**config)
        with torch.no_grad():
            model.base.copy_(
                torch.randn(model.base.shape, generator=torch.Generator().manual_seed(0))
            )
            model.tau.fill_(0.7)
        return model

    return make


# ---- The numbers -----------------------------------------------------------------------------


@pytest.mark.parametrize("task", [0, 1])
def test_without_the_llm_items_are_as_likely_as_they_are_popular(noisy, task):
    """tau = 0: the p of an item is its share of 1 + purchases, down whatever branches its name."""
    model = noisy()
    with torch.no_grad():
        model.tau.zero_()
    scores = model.rank(prompts_of(model), model.trie(), task=task)
    close(scores, popularity(model).expand(3, -1))


def test_without_the_llm_a_uniform_prior_knows_nothing(noisy):
    model = noisy(prior="uniform")
    with torch.no_grad():
        model.tau.zero_()
    scores = model.rank(prompts_of(model), model.trie())
    close(scores, torch.full((3, 120), -np.log(120.0)))


def test_purchases_of_validation_and_test_items_are_not_counted(make_ilm):
    """The prior is a function of the training part: other last two items, the same numbers."""
    model = make_ilm()
    before = model.log_count.clone()
    ends = model.dataset.indptr[1:]
    for back in (1, 2):
        model.dataset.sequence[ends - back] = np.roll(model.dataset.sequence[ends - back], 7)
    model.set_prior("popularity", "learned")
    assert torch.equal(model.log_count, before)


def test_each_child_holds_the_items_below_it(make_ilm):
    model = make_ilm()
    trie, count = model.names_trie, model.log_count.exp()
    assert count[0].item() == pytest.approx(120 + sum(purchases(model)))
    inner = (trie.count > 0).nonzero()[:, 0]
    parent, child = trie.children(inner)
    total = torch.zeros(len(inner)).index_add(0, parent, count[child])
    torch.testing.assert_close(total, count[inner], atol=1e-2, rtol=1e-4)


@pytest.mark.parametrize("prior", ilm.PRIORS)
@pytest.mark.parametrize("task", [0, 1])
def test_probabilities_of_all_names_sum_to_one(noisy, prior, task):
    model = noisy(prior=prior)
    scores = model.rank(prompts_of(model), model.trie(), task=task)
    torch.testing.assert_close(scores.exp().sum(1), torch.ones(3), atol=1e-4, rtol=1e-4)


def test_each_ranking_task_has_a_base_of_its_own(noisy):
    model = noisy()
    prompts = prompts_of(model)
    one, other = (model.rank(prompts, model.trie(), task=task) for task in (0, 1))
    assert (one - other).abs().max() > 0.1
    with torch.no_grad():
        model.base[1] = model.base[0]
    close(model.rank(prompts, model.trie(), task=1), one)


def test_no_prior_is_the_llm_alone(make_ilm):
    """Equal to p renormalised over the children, as it was before there was a prior."""
    model = make_ilm(prior="none", temperature="fixed")
    assert not model.log_count.any() and not model.base.any() and model.tau == 1
    trie, prompt = model.names_trie, model.prompt_ids("Name any title:")
    scores = model.rank([prompt], model.trie())[0]
    for item in (0, 50, 119):
        tokens, nodes = trie.paths[item]
        wanted = 0.0
        for k, (token, node) in enumerate(zip(tokens, nodes)):
            ids = torch.tensor([[*prompt, *tokens[:k]]])
            with torch.no_grad():
                logits = model.llm(input_ids=ids).logits[0, -1].float()
            _, child = trie.children(torch.tensor([node]))
            wanted += (logits[token] - logits[trie.token[child]].logsumexp(0)).item()
        assert scores[item].item() == pytest.approx(wanted, abs=1e-3)


# ---- Which parameters learn ------------------------------------------------------------------


def test_the_temperature_is_learned_and_base_is_not(make_ilm):
    model = make_ilm()
    assert model.tau.requires_grad and model.tau.item() == pytest.approx(ilm.START_TEMPERATURE)
    assert not model.base.requires_grad and "base" in model.saved_parameters()
    assert "tau" in model.saved_parameters()


def test_a_fixed_temperature_is_one(make_ilm):
    model = make_ilm(temperature="fixed")
    assert not model.tau.requires_grad and model.tau == 1


def test_with_nothing_to_train_the_temperature_is_one(make_ilm):
    """Names only and a frozen LLM: what the prior is added to is the LLM as it is."""
    model = make_ilm("text")
    assert not model.tau.requires_grad and model.tau == 1
    assert make_ilm("text", train_llm=True).tau.requires_grad


def test_a_step_moves_the_temperature_alone_of_what_the_prior_has(make_ilm):
    from train_stage2 import Examples

    model = make_ilm().train()
    model.calibrate(count=1)
    base, count, tau = model.base.clone(), model.log_count.clone(), model.tau.item()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    batch = Examples(model, model.dataset).batch("sequential", 2, np.random.default_rng(0))
    total, nll = model(batch)
    (total / len(nll)).backward()
    optimizer.step()
    assert torch.equal(model.base, base) and torch.equal(model.log_count, count)
    assert model.tau.item() != tau


# ---- Calibration -----------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["ilm-rand", "mlp"])
@pytest.mark.parametrize("task", data.RANKING_TASKS)
def test_zero_soft_tokens_rank_as_popularity_after_the_prompt_of_the_calibration(
    make_ilm, method, task
):
    """Exactly, at any temperature: the LLM's opinion is taken out whole."""
    model = make_ilm(method)
    model.calibrate(count=1)
    template = ilm.ranking_templates(None, "toy")[task, "seen"][0]
    user = model.dataset.eligible()[0]
    history = model.dataset.items_of(user, "train")[-20:] if task == "sequential" else ()
    prompt = model.prompt_ids(template, user=user, history=history)
    model.zero_soft = True
    for tau in (0.4, 2.0):
        with torch.no_grad():
            model.tau.fill_(tau)
        scores = model.rank([prompt], model.trie(), task=data.RANKING_TASKS.index(task))
        close(scores[0], popularity(model))


def test_calibration_brings_other_prompts_and_users_nearer_to_popularity(make_ilm):
    """The mean over ten prompts is not each of them, but nearer to each than nothing taken out."""
    model = make_ilm()
    model.zero_soft = True
    templates = ilm.ranking_templates(None, "toy")["straightforward", "seen"]
    prompts = [model.prompt_ids(template, user=9) for template in templates]

    def distance():
        return (model.rank(prompts, model.trie(), task=1) - popularity(model)).abs().mean(1)

    before = distance()
    model.calibrate(count=10)
    after = distance()
    assert (after < before).all() and after.mean() < 0.8 * before.mean()


def test_base_is_the_mean_logit_of_the_prompts(make_ilm):
    """By definition: the LLM run once for each prompt and each child of the root and below."""
    model = make_ilm()
    model.calibrate(count=2)
    templates = ilm.ranking_templates(None, "toy")["straightforward", "seen"][:2]
    model.zero_soft = True
    trie = model.names_trie
    tokens, nodes = trie.paths[17]
    for k, node in enumerate(nodes):
        logits = []
        for template in templates:
            prompt = model.prompt_ids(template, user=0)
            ids = torch.tensor([[*prompt, *tokens[:k]]])
            with torch.no_grad():
                embedded = model.embed(ids, model.soft_index(ids, prompt.cf))
                logits.append(model.llm(inputs_embeds=embedded).logits[0, -1].float())
        _, child = trie.children(torch.tensor([node]))
        close(model.base[1, child], torch.stack(logits).mean(0)[trie.token[child]])


def test_names_in_chunks_give_the_same_base(make_ilm):
    model = make_ilm()
    model.calibrate(count=2)
    whole = model.base.clone()
    model.calibrate(count=2, chunk=31)
    close(model.base, whole)


def test_calibration_leaves_the_model_as_it_was(make_ilm):
    model = make_ilm()
    before = {n: p.clone() for n, p in model.named_parameters() if n != "base"}
    model.calibrate(count=1)
    assert not model.zero_soft
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters() if n != "base")
    assert not model.base.requires_grad


# ---- Runs ------------------------------------------------------------------------------------

SMALL = "--steps 2 --batch-size 2 --valid-users 4 --width 32 --layers 2 --num-queries 2".split()


@pytest.fixture(scope="module")
def runs(script, tmp_path_factory):
    """runs(name, *flags) -> the folder of a short run of `ilm-rand` on 60 users."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "assets").symlink_to(ROOT / "assets")
    done = script("data.py", "--max-users", 60, *CF, cwd=folder)
    assert done.returncode == 0, done.stderr

    def run(name, *flags):
        if not (folder / name).exists():
            argv = ["--method", "ilm-rand", *SMALL, "--out", name, *flags]
            done = script("train_stage2.py", *argv, cwd=folder)
            assert done.returncode == 0, done.stderr
        return folder / name

    return run


@pytest.fixture()
def here(runs, monkeypatch):
    folder = runs("popular").parent
    monkeypatch.chdir(folder)
    return folder


def test_base_and_temperature_are_saved_with_the_run(runs, here):
    saved = load_file(runs("popular") / "model.safetensors")
    assert saved["base"].abs().max() > 1
    model = load_ilm("popular", "cpu")
    assert torch.equal(model.base, saved["base"]) and torch.equal(model.tau, saved["tau"])
    fresh = model.base.clone()
    model.calibrate()
    close(model.base, fresh)


def test_base_is_made_again_for_later_names(runs, here):
    """The trie has other nodes. What is new has no training purchases: it counts 1, and what is
    known counts what it did."""
    later = here / "later"
    later.mkdir(exist_ok=True)
    dataset = data.load_dataset(here / "data/toy")
    (later / "items.csv").write_text("id,title\nnew,Ancient Compass\n")
    log = [f"{user},new,9\n" for user in dataset.users[:5]]
    (later / "interactions.csv").write_text("user,item,timestamp\n" + "".join(log))
    old, new = load_ilm("popular", "cpu"), load_ilm("popular", "cpu", new=later)
    assert new.num_items == old.num_items + 1
    assert new.base.shape[1] == len(new.names_trie.token) > old.base.shape[1]
    assert torch.equal(new.tau, old.tau)
    parent, child = new.names_trie.children(torch.tensor([0]))
    assert (new.base[:, child].abs().max(0).values > 0).all()
    saved = new.base.clone()
    new.calibrate()
    close(new.base, saved)
    # Known items keep their share of what the new one leaves
    with torch.no_grad():
        old.tau.zero_(), new.tau.zero_()
    prompt = "Name any title:"
    before = old.rank([old.prompt_ids(prompt)], old.trie())[0]
    after = new.rank([new.prompt_ids(prompt)], new.trie())[0]
    total = sum(purchases(old)) + old.num_items
    assert after[-1].exp().item() == pytest.approx(1 / (total + 1), rel=1e-3)
    close(after[:-1], before + np.log(total / (total + 1)))


@pytest.mark.parametrize("prior", ["uniform", "none"])
def test_the_prior_of_a_run_is_kept_in_its_config(runs, here, prior):
    folder = runs(prior, "--prior", prior, "--temperature", "fixed")
    config = json.loads((folder / "config.json").read_text())
    assert config["prior"] == prior and config["temperature"] == "fixed"
    model = load_ilm(prior, "cpu")
    assert model.tau == 1 and (model.base.abs().max() > 1) == (prior == "uniform")
    below = (model.names_trie.span[:, 1] - model.names_trie.span[:, 0]).float()
    close(model.log_count, below.log() if prior == "uniform" else torch.zeros(len(below)))


def test_a_loss_over_the_full_vocabulary_knows_no_prior(runs, here):
    folder = runs("full", "--full-vocabulary")
    assert not load_file(folder / "model.safetensors")["base"].any()
