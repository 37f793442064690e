import json

import numpy as np
import pytest
import torch

import train_stage1
import train_stage2
from ilm import load_ilm
from train_stage2 import Examples, held_out_losses

SMALL = ["--batch-size", "2", "--accumulate", "3"]
SHAPE = ["--width", "32", "--layers", "2", "--num-queries", "2"]


@pytest.fixture(scope="module")
def run(script):
    return lambda toy, out, *argv: script("train_stage2.py", "--data", toy, "--out", out, *SMALL, *argv)


def test_every_position_of_a_window_is_a_target(make_ilm):
    model = make_ilm("text")
    examples = Examples(model, model.dataset)
    row = examples.sequential_row(4, "{history}. Next:", np.random.default_rng(0))
    decided = sum(label in {path[0][-1] for path in model.names_trie.paths} for label in row["label"])
    assert decided == max(row["branch"]) == min(20, len(examples.sequences[4]) - 1)
    held_out = {model.dataset.target(4, "valid"), model.dataset.target(4, "test")}
    written = model.tokenizer.decode([i for i in row["ids"] + row["label"] if i >= 0])
    assert not any(model.names[i] in written for i in held_out)
    whole = Examples(make_ilm("text", full_vocabulary=True), model.dataset).sequential_row(4, "{history}. Next:", np.random.default_rng(0))
    assert sum(label == model.tokenizer.eos_token_id for label in whole["label"]) == decided


def test_batches_are_a_function_of_seed_and_step(make_ilm):
    examples = Examples(model := make_ilm(), model.dataset)
    for kind in ("sequential", "straightforward", "text"):
        a, b, c = (examples.batch(kind, 3, np.random.default_rng([0, step])) for step in (1, 1, 2))
        assert all(torch.equal(a[k], b[k]) for k in a) and not all(a[k].shape == c[k].shape and torch.equal(a[k], c[k]) for k in a)


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


def test_validation_loss_takes_the_history_out(make_ilm):
    """-log [p(target) / (1 - p(history))], against the definition."""
    model = make_ilm()
    examples = Examples(model, model.dataset)
    losses = held_out_losses(model, examples.held_out("valid", 3, 2), torch.device("cpu"))
    users = model.dataset.eligible()[np.random.default_rng(0).permutation(150)[:3]]
    for task in ("sequential", "straightforward"):
        wanted = []
        for k, u in enumerate(users):
            history, target = model.dataset.items_of(u, "valid"), model.dataset.target(u, "valid")
            prompt = examples.ranking(task, u, history, examples.templates[task, "seen"][k])
            with torch.no_grad():
                p = model.rank([prompt], model.trie())[0, torch.tensor([target, *history])].double().exp().tolist()
            wanted.append(-np.log(p[0] / (1 - sum(p[1:]))))
        assert losses[task] == pytest.approx(np.mean(wanted), abs=1e-3)


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
    assert all(torch.equal(a, b) for a, b in zip(model.encoder.parameters(), qformer.parameters()))
    done = run(toy, tmp_path / "b", "--stage1", stage1, "--steps", 1, "--num-queries", 7)
    assert done.returncode == 2 and "has 2; leave it out" in done.stderr and done.stderr.count("\n") == 1
    done = run(toy, tmp_path / "c", "--stage1", tmp_path / "none", "--steps", 1)
    assert done.returncode == 2 and "run train_stage1.py" in done.stderr
    done = run(toy, tmp_path / "d", "--method", "mlp", "--llm", tmp_path / "none", "--steps", 1)
    assert done.returncode == 2 and "no such folder" in done.stderr


@pytest.mark.parametrize("method", [["ilm-rand", *SHAPE], ["mlp", "--num-queries", "2"], ["text"], ["text", "--train-llm"]])
def test_a_run_loads_to_the_same_scores(run, toy, tmp_path, method):
    done = run(toy, tmp_path, "--steps", 2, "--method", *method)
    assert done.returncode == 0, done.stderr
    assert ("(frozen)" in done.stdout) == ("--train-llm" not in method)
    a, b = (load_ilm(tmp_path, torch.device("cpu")) for _ in range(2))
    prompt = a.prompt_ids("What would {user} like?", user=3)
    assert torch.equal(a.rank([prompt], a.trie()), b.rank([prompt], b.trie()))
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
