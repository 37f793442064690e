"""More than one process gives what one process gives: losses, gradients, weights, validation, files."""
import json
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT
from safetensors.torch import load_file
from transformers import AutoTokenizer

import data
import train_stage1
import train_stage2
from assets.plumbing.guard import InputError
from assets.plumbing.run import start_processes
from ilm import build_ilm
from qformer import QFormerConfig


def step_of_stage1(toy, world):
    """One SGD step on the joint batch -> losses, gradients, weights."""
    dataset = data.load_dataset(toy)
    texts = train_stage1.Texts(dataset, AutoTokenizer.from_pretrained(ROOT / "assets" / "toy_llm"), 48)
    torch.manual_seed(0)
    model = train_stage1.FastQFormer(QFormerConfig(cf_dim=12, vocab_size=texts.size, num_queries=3, width=32, dropout=0.0))
    args = train_stage1.parse_args(["--batch-size", "12"])
    _, batch = train_stage1.Batches(args, dataset, texts, 2).draw(0)
    objective = train_stage1.distribute(train_stage1.Objective(model, texts.dec, args.losses), world)
    losses, accuracy = objective(batch, torch.Generator().manual_seed(0))
    means = train_stage1.mean_over_processes(losses)
    sum(losses.values()).backward()
    return finish(model, torch.tensor([*means.values(), *(v.item() for v in accuracy.values())]))


def step_of_stage2(toy, world):
    """The same of three micro-batches of unequal kinds, and the validation losses."""
    dataset = data.load_dataset(toy)
    args = train_stage2.parse_args(["--method", "ilm-rand", "--data", str(toy), "--num-queries", "3", "--width", "32"])
    torch.manual_seed(0)
    model = build_ilm(train_stage2.make_config(args, dataset)[0], dataset, torch.device("cpu"))
    examples, parallel = train_stage2.Examples(model, dataset), train_stage2.distribute(model, world)
    rng = np.random.default_rng(0)
    batches = [examples.batch(kind, 2, rng) for kind in ("sequential", "straightforward", "text")]
    count, = train_stage2.sum_over_processes(sum(int((b["label"] >= 0).sum()) for b in batches))
    loss = 0
    for k, batch in enumerate(batches):
        with train_stage2.averaging(parallel, k == 2):
            total, _ = parallel(batch)
            (total * world / count).backward()
        loss += total.item()
    loss, = train_stage2.sum_over_processes(loss / count)
    valid = train_stage2.validation_losses(model, examples.validation(7, 600))
    return finish(model, torch.tensor([loss, *valid.values()]))


def finish(model, losses):
    trained = {n: p for n, p in model.named_parameters() if p.grad is not None}
    gradients = {n: p.grad.clone() for n, p in trained.items()}
    torch.optim.SGD(trained.values(), lr=0.1).step()
    return losses, gradients, {n: p.detach().clone() for n, p in trained.items()}


STEPS = {"stage 1": step_of_stage1, "stage 2": step_of_stage2}


def worker(toy, folder):
    dist.init_process_group("gloo")
    torch.save({name: step(toy, 2) for name, step in STEPS.items()}, f"{folder}/{dist.get_rank()}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def of_two(script, toy, tmp_path_factory):
    """What each of two processes finds."""
    folder, tests = tmp_path_factory.mktemp("two"), str(ROOT / "tests")
    call = f"import sys; sys.path.insert(0, {tests!r}); import test_distributed as t; t.worker({str(toy)!r}, {str(folder)!r}); sys.exit()"
    done = script("train_stage1.py", before=call, ranks=2)
    assert done.returncode == [0, 0], done
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("name", STEPS)
def test_two_processes_make_the_step_of_one(toy, of_two, name):
    losses, gradients, weights = STEPS[name](toy, 1)
    assert not dist.is_initialized()
    for theirs in (found[name] for found in of_two):
        torch.testing.assert_close(theirs[0], losses, atol=1e-5, rtol=1e-5)
        assert theirs[1].keys() == gradients.keys() and len(gradients) > 10
        for key in gradients:
            torch.testing.assert_close(theirs[1][key], gradients[key], atol=1e-5, rtol=1e-5, msg=key)
            torch.testing.assert_close(theirs[2][key], weights[key], atol=1e-5, rtol=1e-5, msg=key)


def test_both_stages_write_one_run(toy, script, tmp_path):
    """Stage 1 as two processes without torchrun, stage 2 as the README's command."""
    small = ["--data", toy, "--batch-size", 4, "--steps", 3]
    done = script("train_stage1.py", *small, "--width", 32, "--num-queries", 2, "--out", tmp_path / "stage1", ranks=2)
    assert done.returncode == [0, 0] and done.stdout.count("wrote") == 1, done
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", ROOT / "train_stage2.py", *small,
               "--stage1", tmp_path / "stage1", "--out", tmp_path / "ilm", "--valid-users", 8, "--mix", 1, 0, 2]
    done = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("wrote") == 1, done.stdout + done.stderr
    for run in ("stage1", "ilm"):
        log = [json.loads(line) for line in (tmp_path / run / "log.jsonl").read_text().splitlines()]
        assert [row["step"] for row in log] == sorted(row["step"] for row in log) and load_file(tmp_path / run / "model.safetensors")


def test_a_batch_is_shared_by_all_processes_alike(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="--batch-size 5: not a multiple of the 2 processes"):
        start_processes(train_stage1.parse_args(["--batch-size", "5", "--device", "cpu"]))


def test_more_processes_than_gpus_is_a_mistake_that_is_named(monkeypatch):
    monkeypatch.setattr("assets.plumbing.run.pick_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    with pytest.raises(InputError, match="--nproc_per_node 1, or --device cpu"):
        start_processes(train_stage1.parse_args(["--batch-size", "8"]))


def long_run(script, toy, tmp_path, number):
    """Two processes with a long run of stage 1, of which the second gets a signal after the third line of the log. Without torchrun,
    which would stop one process when the other leaves."""
    return script("train_stage1.py", "--data", toy, "--batch-size", 8, "--steps", 5000, "--eval-every", 20, "--out", tmp_path / "run",
                  ranks=2, signal=int(number), when=[str(tmp_path / "run" / "log.jsonl"), "\n", 3])


def test_a_signal_to_one_process_stops_all_at_the_same_step(script, toy, tmp_path):
    done = long_run(script, toy, tmp_path, signal.SIGTERM)
    step = torch.load(tmp_path / "run" / "state.pt", weights_only=True)["step"]
    assert done.returncode == [143, 143], done
    assert done.stderr.count(f"interrupted: step {step} of 5000 is saved") == done.stderr.count("\n") == 2, done


def test_a_process_that_dies_ends_the_run(script, toy, tmp_path):
    done = long_run(script, toy, tmp_path, signal.SIGKILL)
    assert done.returncode == [1, -9] and "Traceback" not in done.stderr, done
    assert "process 0: lost another process of this run; the last checkpoint is kept, go on with --resume" in done.stderr
    assert (tmp_path / "run" / "state.pt").exists()
