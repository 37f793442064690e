import json
import sys

import numpy as np
import pytest
import torch
from conftest import as_read
from safetensors.torch import load_file

import data
import ilm
import train_stage1
import train_stage2
from assets.fast.packing import of_like_length
from ilm import START_TAU, load_ilm
from train_stage2 import Examples, validation_losses

SMALL = ["--batch-size", "2", "--accumulate", "3", "--valid-users", "4"]
SHAPE = ["--width", "32", "--layers", "2", "--num-queries", "2"]


@pytest.fixture(scope="module")
def run(script):
    return lambda toy, out, *argv: script("train_stage2.py", "--data", toy, "--out", out, *SMALL, *argv)


def test_every_position_of_a_window_is_a_target(make_ilm):
    model = make_ilm("text")
    examples = Examples(model, model.dataset)
    row = examples.sequential_row(4, "{history}. Next:", np.random.default_rng(0))
    decided = sum(label in {path[0][-1] for path in model.names_trie.paths} for label in row["label"])
    assert decided == max(row["branch"]) == min(20, len(model.dataset.items_of(4, "train")) - 1)
    held_out = {model.dataset.target(4, "valid"), model.dataset.target(4, "test")}
    written = model.tokenizer.decode([i for i in row["ids"] + row["label"] if i >= 0])
    assert not any(model.names[i] in written for i in held_out)
    whole = Examples(make_ilm("text", full_vocabulary=True), model.dataset).sequential_row(4, "{history}. Next:", np.random.default_rng(0))
    assert sum(label == model.tokenizer.eos_token_id for label in whole["label"]) == decided


def test_batches_are_a_function_of_seed_and_step(make_ilm):
    examples = Examples(model := make_ilm(), model.dataset)
    for kind in ("sequential", "straightforward", "text"):
        a, b, c = (examples.batch(kind, 3, np.random.default_rng([0, step])) for step in (1, 1, 2))
        a, b, c = ({k: torch.as_tensor(v) for k, v in batch.items()} for batch in (a, b, c))
        assert all(torch.equal(a[k], b[k]) for k in a) and not all(torch.equal(a[k], c[k]) for k in a if k in c)


def test_one_batch_is_overfitted(make_ilm):
    model = make_ilm()
    examples = Examples(model, model.dataset)
    batch = examples.batch("text", 2, np.random.default_rng(1))
    optimizer, history = train_stage1.make_optimizer(model, 1e-2, 0.0), []
    for step in range(60):
        total, nll = model(batch)
        (total / len(nll)).backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(nll.mean().item())
    assert history[-1] < history[0] / 3


@pytest.mark.parametrize("task", data.RANKING_TASKS)
def test_validation_loss_is_minus_log_p_of_the_next_item(make_ilm, task):
    """Nats a user, who are asked at their moment, against the definition; the history is not divided out."""
    model = make_ilm()
    examples = Examples(model, model.dataset)
    losses = validation_losses(model, examples.validation(5, 600))
    users = model.dataset.eligible()[np.random.default_rng(0).permutation(150)[:5]]
    wanted = []
    for u in users:
        history = model.dataset.items_of(u, "valid")
        cf = as_read(model, [history])[0]
        templates = examples.templates[task, "seen"]
        template, read = templates[u % len(templates)], history[-20:] if task == "sequential" else ()
        prompt = model.prompt_ids(template, user=u, history=[int(i) for i in read], cf=cf)
        score = model.rank([prompt], model.trie())[0]
        wanted.append(-score[model.dataset.target(u, "valid")].item())
    assert losses[task] == pytest.approx(np.mean(wanted), abs=1e-3)


def test_text_loss_of_validation_is_a_mean_over_tokens(make_ilm):
    model = make_ilm("mlp")
    examples = Examples(model, model.dataset)
    batches = examples.validation(5, 600)
    nll = torch.cat([model(dict(batch))[1].detach() for batch in batches["text"]])
    assert validation_losses(model, batches)["text"] == pytest.approx(nll.mean().item(), abs=1e-5)


def test_a_micro_batch_that_is_cut_has_the_same_loss_and_less_padding(make_ilm):
    model = make_ilm()
    examples = Examples(model, model.dataset)
    rows = sum((examples.rows(kind, 3, np.random.default_rng(0)) for kind in train_stage2.KINDS), [])
    whole, parts = examples.collate(rows), [*of_like_length(rows, 500)]
    cut = [examples.collate(part) for part in parts]
    assert sorted(id(row) for part in parts for row in part) == sorted(map(id, rows))
    assert all(batch["ids"].numel() <= 500 or len(batch["ids"]) == 1 for batch in cut)
    assert sum(batch["ids"].numel() for batch in cut) < whole["ids"].numel()
    assert sum(model(batch)[0].item() for batch in cut) == pytest.approx(model(whole)[0].item(), rel=1e-5)


# ---- Prompts of all prefixes of a window -----------------------------------------------------

OPENP5 = "Considering {user} has interacted with {history} . What is next for the user ?"


@pytest.mark.parametrize("method", ["ilm-rand", "mlp", "text"])
@pytest.mark.parametrize("template", [None, OPENP5])
def test_prompts_cut_from_the_longest_are_those_of_each_prefix(make_ilm, method, template):
    """Ids and vectors, and the tensors of the batch that is made of them; also where the user, who
    is another at each place, stands before the history."""
    model = make_ilm(method)
    examples = Examples(model, model.dataset)
    for template in [template] if template else examples.templates["sequential", "seen"]:
        window = model.dataset.items_of(4, "train")[:9]
        cf = examples.read_before(4, np.arange(1, len(window)))
        cut = examples.prefixes(4, window, cf, template)
        each = []
        for k in range(1, len(window)):
            history = [int(i) for i in window[:k]]
            each.append(model.prompt_ids(template, user=4, history=history, cf=cf[k - 1]))
        assert [*map(list, cut)] == [*map(list, each)]
        assert all(torch.equal(a, b) for x, y in zip(cut, each) for a, b in zip(x.vectors, y.vectors))
        batches = []
        for prompts in (cut, each):
            named = [(prompt, *examples.name_target(i)) for prompt, i in zip(prompts, window[1:])]
            batches.append(examples.collate([examples.pack(named)]))
        assert batches[0].keys() == batches[1].keys()
        assert all(torch.equal(*(torch.as_tensor(batch[key]) for batch in batches)) for key in batches[0])


def test_prompts_that_do_not_fit_the_context_are_those_of_each_prefix_too(make_ilm):
    model = make_ilm()
    examples = Examples(model, model.dataset)
    window = model.dataset.items_of(4, "train")[:9]
    cf = examples.read_before(4, np.arange(1, len(window)))
    template = examples.templates["sequential", "seen"][0]
    model.context = len(examples.prefixes(4, window, cf, template)[-1]) - 4 + model.reserve
    cut = examples.prefixes(4, window, cf, template)
    for k, prompt in enumerate(cut, 1):
        assert prompt == examples.ranking_prompt("sequential", 4, window[:k], template, cf[k - 1])
    assert len(cut[-1]) < len(cut[-2]) + 5  # its oldest item went


def test_a_row_asks_each_user_at_the_moment_of_its_target(make_ilm):
    model = make_ilm()
    examples = Examples(model, model.dataset)
    row = examples.sequential_row(4, "{history} for {user}", np.random.default_rng(0))
    start = int(np.random.default_rng(0).integers(max(1, len(model.dataset.items_of(4, "train")) - 20)))
    history = model.dataset.items_of(4, "train")
    pasts = [history[:start + k] for k in range(1, len(row["cf"]) + 1)]
    torch.testing.assert_close(torch.stack(row["cf"]), as_read(model, pasts), atol=1e-4, rtol=1e-4)


def test_a_straightforward_row_asks_each_target_at_its_own_moment(make_ilm):
    model = make_ilm()
    examples = Examples(model, model.dataset)
    row = examples.straightforward_row(4, "for {user}", np.random.default_rng(0))
    history = model.dataset.items_of(4, "train")
    places = 1 + np.random.default_rng(0).permutation(len(history) - 1)[:20]
    wanted = as_read(model, [history[:p] for p in places])
    torch.testing.assert_close(torch.stack(row["cf"]), wanted, atol=1e-4, rtol=1e-4)


# ---- Whole runs ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stage1(toy, script, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "stage1"
    assert script("train_stage1.py", "--data", toy, "--out", out, "--steps", 2, "--batch-size", 8, *SHAPE).returncode == 0
    return out


def test_ilm_starts_from_its_stage_1_run_and_refuses_another_shape(run, toy, stage1, tmp_path):
    done = run(toy, tmp_path / "a", "--stage1", stage1, "--steps", 1, "--lr", 0)
    assert done.returncode == 0, done.stderr
    model, (qformer, _, _) = load_ilm(tmp_path / "a", torch.device("cpu")), train_stage2.load_stage1(stage1, load_ilm(
        tmp_path / "a", torch.device("cpu")).dataset, "cpu")
    mine, learned = dict(model.encoder.named_parameters()), dict(qformer.named_parameters())
    assert {*learned} <= {*mine} and all(torch.equal(mine[name], learned[name]) for name in learned)
    assert all("history" in name for name in {*mine} - {*learned})  # stage 1 reads no history
    done = run(toy, tmp_path / "b", "--stage1", stage1, "--steps", 1, "--num-queries", 7)
    assert done.returncode == 2 and "has 2; leave it out" in done.stderr and done.stderr.count("\n") == 1
    done = run(toy, tmp_path / "c", "--stage1", tmp_path / "none", "--steps", 1)
    assert done.returncode == 2 and "run train_stage1.py" in done.stderr
    done = run(toy, tmp_path / "d", "--method", "mlp", "--llm", tmp_path / "none", "--steps", 1)
    assert done.returncode == 2 and "no such folder" in done.stderr


UNUSED = [("mlp", ["--layers", "2"]), ("mlp", ["--width", "64"]), ("mlp", ["--stage1", "x"]), ("ilm-rand", ["--stage1", "x"]),
          ("text", ["--num-queries", "2"]), ("text", ["--history", "0"]), ("text", ["--shuffle-cf"]), ("text", ["--layers", "2"])]


@pytest.mark.parametrize("method, argv", UNUSED)
def test_a_flag_that_a_method_does_not_read_is_a_mistake(method, argv):
    with pytest.raises(data.InputError, match=f"{argv[0]} does nothing with --method {method}; leave it out"):
        train_stage2.parse_args(["--method", method, *argv])


def test_the_history_has_its_default_with_every_method():
    assert [train_stage2.parse_args(["--method", method]).history for method in train_stage2.METHODS] == [20, 20, 0, 20]


def test_the_logged_loss_is_the_one_that_is_optimised(toy, tmp_path, monkeypatch):
    """-log p, a mean over all target tokens of the step's micro-batches, which are of unequal kinds."""
    seen, forward = [], ilm.ILM.forward

    def counted(self, batch):
        total, nll = forward(self, batch)
        if self.training:
            seen.append((float(total.detach()), len(batch["target_at"])))
        return total, nll
    monkeypatch.setattr(ilm.ILM, "forward", counted)
    argv = ["--data", str(toy), "--out", str(tmp_path), "--method", "ilm-rand", *SHAPE, *SMALL, "--steps", "1", "--seed", "2"]
    monkeypatch.setattr(sys, "argv", ["x", *argv])
    train_stage2.main()
    row = next(row for row in map(json.loads, open(tmp_path / "log.jsonl")) if "loss" in row)
    assert len(seen) == 3 and len({kind for kind in train_stage2.KINDS if kind in row}) > 1
    assert row["loss"] == pytest.approx(sum(total for total, _ in seen) / sum(count for _, count in seen), abs=2e-5)
    assert row["targets"] == sum(count for _, count in seen)


@pytest.mark.parametrize("method", [["ilm-rand", *SHAPE], ["mlp", "--num-queries", "2"], ["text"], ["text", "--train-llm"]])
def test_a_run_loads_to_the_same_scores(run, toy, tmp_path, method):
    done = run(toy, tmp_path, "--steps", 2, "--method", *method)
    assert done.returncode == 0, done.stderr
    assert ("(frozen)" in done.stdout) == ("--train-llm" not in method)
    a, b = (load_ilm(tmp_path, torch.device("cpu")) for _ in range(2))
    prompt = a.prompt_ids("What would {user} like?", user=3)
    assert torch.equal(a.rank([prompt], a.trie()), b.rank([prompt], b.trie()))
    best, last = load_file(tmp_path / "model.safetensors"), torch.load(tmp_path / "state.pt", weights_only=True)["weights"]
    frozen = "nothing to train" in done.stdout
    assert torch.equal(a.tau, best["tau"]) and (last["tau"] == 1) == frozen and abs(last["tau"] - START_TAU) > 1e-4
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["method"] == method[0] and config["train_llm"] == ("--train-llm" in method)


def test_a_step_has_the_same_bits_every_time(make_ilm):
    """Large enough that kernels use both threads: index_put and index with repeated indices would differ in the last bit."""
    torch.set_num_threads(2)
    model = make_ilm().train()
    batch = Examples(model, model.dataset).batch("sequential", 8, np.random.default_rng(0))
    seen = []
    for _ in range(3):
        model.zero_grad()
        total, _ = model(batch)
        total.backward()
        seen.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.set_num_threads(1)
    assert all(torch.equal(seen[0], other) for other in seen[1:])


@pytest.mark.parametrize("task", ["sequential", "straightforward"])
def test_a_prompt_may_mention_its_user_twice(make_ilm, task):
    """Every branch has a user of its own, at both places: the loss is that of the branches one by one."""
    model = make_ilm()
    examples = Examples(model, model.dataset)
    template = "{user} asks after {history}: what for {user}"
    if task == "sequential":
        row = examples.sequential_row(0, template, np.random.default_rng(0))
    else:
        row = examples.straightforward_row(0, template.replace("{history}", "all"), np.random.default_rng(0))
    count = max(row["branch"])
    assert len(row["cf"]) == 2 * count
    assert all(torch.equal(row["cf"][2 * k], row["cf"][2 * k + 1]) for k in range(count))
    total, nll = model(examples.collate([row]))
    assert torch.isfinite(total) and len(nll) >= count
