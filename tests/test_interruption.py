"""Nothing is lost: signals, kill -9, a full disk, a folder that cannot be written; same seed, same bits.

The slow test (40 kills at random moments, minutes) runs only with -m slow."""
import hashlib
import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CF, EVALUATE, ROOT, STAGES
from safetensors.torch import load_file
from transformers import AutoTokenizer

import data
import train_stage1
from assets.plumbing.run import read_config


def outcome(run):
    """All that a run is: config, best weights, state, log (without the time)."""
    state = torch.load(run / "state.pt", weights_only=True)
    log = [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in (run / "log.jsonl").read_text().splitlines()]
    tensors = {**state["weights"], **{f"{n}.{k}": v for n, s in state["optimizer"]["state"].items() for k, v in s.items()}}
    return {"config": json.loads((run / "config.json").read_text()), "model": (run / "model.safetensors").read_bytes(), "log": log,
            "step": state["step"], "best": state["best"], "tensors": {k: v.numpy().tobytes() for k, v in tensors.items()}}


def tree(folder):
    """{path: sha256} of all that stands in a folder, leftovers of a killed process apart."""
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.rglob("*"))
            if f.is_file() and "tmp-" not in str(f.relative_to(folder))}


def one_line(done, status, *words):
    assert done.returncode == status and done.stderr.count("\n") == 1 and all(w in done.stderr for w in words), done
    return done.stderr


def at_step(name, step, action):
    """Code for tests/forked.py: do something when the loop reaches a step."""
    module = name[:-3]
    return (f"import os, {module} as t\nrate = t.set_learning_rate\ndef hooked(optimizer, step, *rest):\n    if step == {step}: {action}\n"
            f"    return rate(optimizer, step, *rest)\nt.set_learning_rate = hooked")


# -- signals


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("number, step", [(signal.SIGINT, 3), (signal.SIGTERM, 2)])  # between two validations, and at one
def test_a_signal_saves_and_says_how_to_go_on(script, work, tmp_path, name, number, step):
    argv = [*STAGES[name], "--out", tmp_path / "run"]
    done = script(name, *argv, cwd=work, before=at_step(name, step, f"os.kill(os.getpid(), {int(number)})"))
    line = one_line(done, 128 + number, f"interrupted: step {step} of", f"{name} --method" if "2" in name else name, "--resume")
    assert torch.load(tmp_path / "run" / "state.pt", weights_only=True)["step"] == step
    again = line.split(f"python {name} ")[1].split()  # the command, as it stands there
    assert script(name, *again, cwd=work).returncode == 0
    assert outcome(tmp_path / "run") == outcome(work / name[:-3])


@pytest.mark.parametrize("name, argv, moment", [
    ("data.py", ["--max-users", 60, *CF], "import data\ndata.text_tasks = {}"),
    ("train_stage1.py", [], "import train_stage1 as t\nt.load_dataset = {}"),
    ("evaluate.py", ["--run", "train_stage2"], "import evaluate\nevaluate.load_ilm = {}")])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_anything_is_saved_changes_nothing(script, work, name, argv, moment, number):
    before = tree(work)
    moment = moment.format(f"lambda *_: __import__('os').kill(__import__('os').getpid(), {int(number)})")
    one_line(script(name, *argv, cwd=work, before=moment), 128 + number, "interrupted: what stood there before is kept")
    assert tree(work) == before


def test_a_second_signal_does_not_wait(script, work, tmp_path):
    twice = at_step("train_stage1.py", 3, "[os.kill(os.getpid(), 15) for _ in range(2)]")
    done = script("train_stage1.py", *STAGES["train_stage1.py"], "--out", tmp_path / "run", cwd=work, before=twice)
    one_line(done, 143, "a training run with --resume")
    assert torch.load(tmp_path / "run" / "state.pt", weights_only=True)["step"] == 2


# -- a finished run, made longer


@pytest.mark.parametrize("name", STAGES)
def test_more_steps_go_on_along_the_longer_cosine(script, work, tmp_path, name):
    """As if the run had been one of 10 steps from step 6 on; its config says so, its log has a line more, none twice or lost."""
    run, argv = tmp_path / "run", [*STAGES[name], "--out", tmp_path / "run"]
    shutil.copytree(work / name[:-3], run)
    rates = at_step(name, -1, "pass").replace("return rate(optimizer, step, *rest)", "print('rate', step, rate(optimizer, step, *rest))")
    done = script(name, *argv, "--resume", "--steps", 10, cwd=work, before=rates)
    assert done.returncode == 0 and not done.stderr, done
    said = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("rate")]
    reached = int(STAGES[name][STAGES[name].index("--steps") + 1])
    optimizer = torch.optim.SGD([torch.zeros(1)], 1.0)
    peak = json.loads((run / "config.json").read_text())["lr"]
    assert said == [[str(s), str(train_stage1.set_learning_rate(optimizer, s, 10, peak))] for s in range(reached, 11)]
    before, after = outcome(work / name[:-3]), outcome(run)
    assert after["step"] == 10 and after["config"]["steps"] == 10 and before["config"] == {**after["config"], "steps": reached}
    assert after["log"][:len(before["log"])] == before["log"]
    validated = [row["step"] for row in after["log"] if any("valid" in key for key in row)]
    assert validated == sorted({*range(0, 11, 2)}) and after["tensors"] != before["tensors"]


@pytest.mark.parametrize("name", STAGES)
def test_fewer_steps_than_a_run_has_made_are_one_line(script, work, name):
    before = tree(work)
    done = script(name, *STAGES[name], "--out", name[:-3], "--resume", "--steps", 2, cwd=work)
    one_line(done, 2, "has reached step", "--steps 2 is less", "or more")
    assert tree(work) == before


def test_a_longer_run_that_is_interrupted_goes_on_to_the_same_bits(script, work, tmp_path):
    """Its first steps had the shorter cosine: interrupted or not, a resumed run is the same."""
    name = "train_stage1.py"
    for run, stop in (("whole", None), ("stopped", 8)):
        shutil.copytree(work / name[:-3], tmp_path / run)
        argv = [*STAGES[name], "--out", tmp_path / run, "--resume", "--steps", 10]
        if stop:
            one_line(script(name, *argv, cwd=work, before=at_step(name, stop, "os.kill(os.getpid(), 15)")), 143, "step 8 of 10")
        assert script(name, *argv, cwd=work).returncode == 0
    assert outcome(tmp_path / "whole") == outcome(tmp_path / "stopped")


# -- kill -9


def test_data_killed_at_every_change_of_a_file(script, work, tmp_path):
    """The folder is the old one or the new one, as its next reader finds it."""
    argv = ["--max-users", 60, *CF, "--seed", 1, "--out"]
    assert script("data.py", *argv, tmp_path / "new" / "toy", cwd=work).returncode == 0
    old, new, seen = tree(work / "data" / "toy"), tree(tmp_path / "new" / "toy"), set()
    for count in range(1, 60):
        shutil.copytree(work / "data" / "toy", folder := tmp_path / str(count) / "toy")
        (folder / "notes.txt").write_text("mine")  # what is not ours stays
        done = script("data.py", *argv, folder, cwd=work, kill_at=count)
        assert done.returncode in (0, -9), done
        data.load_dataset(folder)
        assert (folder / "notes.txt").read_text() == "mine"
        found = {k: v for k, v in tree(folder).items() if k != "notes.txt"}
        assert found in (old, new), count
        seen.add(found == new)
        if done.returncode == 0:
            break
    assert count > 10 and seen == {True, False}
    assert not any("tmp-" in f.name for f in folder.iterdir())


def load(name, run):
    """The run as its readers find it -> its seed."""
    config = read_config(run, "stage1" if "1" in name else "stage2")
    assert {f.name for f in run.iterdir()} >= {"config.json", "model.safetensors", "state.pt", "log.jsonl"}
    if "1" in name:
        assert (run / "tokenizer" / "tokenizer.json").is_file()
    torch.load(run / "state.pt", weights_only=True)
    load_file(run / "model.safetensors")
    return config["seed"]


@pytest.mark.parametrize("name, stride", [("train_stage1.py", 13), ("train_stage2.py", 17),
                                          *(pytest.param(name, 1, marks=pytest.mark.slow) for name in STAGES)])
def test_training_killed_at_a_change_of_a_file(script, work, tmp_path, name, stride):
    """A new run over an old one: killed anywhere, the folder holds the old run as it was, or the new one whole and the old one, until
    the new one has finished, in `previous`. Gone on with, it ends as if nothing had happened. stride=1: at every change of a file."""
    argv = [*STAGES[name], "--seed", 1, "--out"]
    assert script(name, *argv, tmp_path / "new", cwd=work).returncode == 0
    old, new = outcome(work / name[:-3]), outcome(tmp_path / "new")
    for count in range(1, 99, stride):
        run = tmp_path / str(count)
        shutil.copytree(work / name[:-3], run)
        done = script(name, *argv, run, cwd=work, kill_at=count)
        assert done.returncode in (0, -9), done
        seed = load(name, run)
        kept = run / "previous" if seed else run
        if done.returncode:
            if kept.exists() or outcome(run)["step"] < max(row["step"] for row in new["log"]):
                assert outcome(kept) == old and (kept / "metrics.json").exists() == (work / name[:-3] / "metrics.json").exists()
            assert script(name, *argv, run, *["--resume"] * seed, cwd=work).returncode == 0
        assert outcome(run) == new and not any(".tmp-" in f.name or f.name in ("previous", "metrics.json") for f in run.iterdir())
        if done.returncode == 0:
            break
    assert count > 20


def test_evaluate_killed_at_every_change_of_a_file(script, work, tmp_path):
    old = json.loads((work / "train_stage2" / "metrics.json").read_text())
    for count in (1, 2, 3):
        done = script("evaluate.py", "--run", "train_stage2", *EVALUATE, "--split", "valid", cwd=work, kill_at=count)
        assert done.returncode in (0, -9)
        found = json.loads((work / "train_stage2" / "metrics.json").read_text())
        assert found == old or found["split"] == "valid"
        for left in (work / "train_stage2").glob("*.tmp-*"):
            left.unlink()


def kill_at_random(script, work, folder, kills, rng):
    """Kill every script at random moments and go on, until `kills` kills have hit -> how many hit each script."""
    hits, seconds = {}, {"data.py": 0.6, "train_stage1.py": 1.2, "train_stage2.py": 2.5}
    while sum(hits.values()) < kills:
        (folder := folder.with_name(f"{folder.name}x")).mkdir()
        for name, argv in (("data.py", ["--max-users", 60, *CF, "--out", folder / "toy"]), *STAGES.items()):
            run = folder / name[:-3]
            command = [name, *argv, *([] if name == "data.py" else ["--out", run])]
            while True:
                again = ["--resume"] if (run / "state.pt").exists() or (run / "tmp-ready").exists() else []
                patience = float(rng.uniform(0.05, seconds[name])) if sum(hits.values()) < kills else 100
                done = script(*command, *again, cwd=work, signal=9, after=patience)
                if done.returncode == 0:
                    break
                assert done.returncode == -9, done
                hits[name] = hits.get(name, 0) + 1
                if (run / "state.pt").exists():
                    load(name, run)
            if name == "data.py":
                assert tree(folder / "toy") == tree(work / "data" / "toy")
            else:
                assert outcome(run) == outcome(work / name[:-3])
    return hits


def test_killed_at_a_few_random_moments(script, work, tmp_path):
    kill_at_random(script, work, tmp_path / "k", 3, np.random.default_rng(0))


@pytest.mark.slow
def test_killed_at_40_random_moments(script, work, tmp_path):
    print(kill_at_random(script, work, tmp_path / "k", 40, np.random.default_rng(1)))


# -- a full disk, a folder that cannot be written


@pytest.mark.parametrize("name, argv, limit", [
    ("data.py", ["--max-users", 60, *CF, "--seed", 1], 50_000),
    ("train_stage1.py", [*STAGES["train_stage1.py"], "--seed", 1, "--out", "train_stage1"], 100_000),
    ("train_stage2.py", [*STAGES["train_stage2.py"], "--seed", 1, "--out", "train_stage2"], 10_000),
    ("evaluate.py", ["--run", "train_stage2", *EVALUATE, "--split", "valid"], 500)])
def test_a_full_disk_is_one_line_and_keeps_what_was_there(script, work, name, argv, limit):
    before = tree(work)
    one_line(script(name, *argv, cwd=work, largest_file=limit), 2, "error: ", "cannot be written", "free some space")
    assert tree(work) == before and not [f for f in work.rglob("*tmp-*")]


def test_a_disk_that_fills_up_at_the_second_checkpoint(script, work, tmp_path):
    """The optimizer's moments make state.pt grow: the first checkpoint of the new run stays, the old run as well."""
    name, run = "train_stage1.py", tmp_path / "run"
    shutil.copytree(work / "train_stage1", run)
    argv = [*STAGES[name], "--seed", 1, "--out", run]
    one_line(script(name, *argv, cwd=work, largest_file=500_000), 2, "state.pt cannot be written")
    assert load(name, run) == 1 and outcome(run / "previous") == outcome(work / "train_stage1")
    assert script(name, *argv, "--resume", cwd=work).returncode == 0 and not (run / "previous").exists()


def test_half_a_line_of_a_log_is_no_line(script, work, tmp_path):
    """A disk that fills up in the middle of a log line: --resume and evaluate.py read what is whole."""
    name, run = "train_stage2.py", tmp_path / "run"
    argv = [*STAGES[name], "--out", run]
    script(name, *argv, cwd=work, before=at_step(name, 3, "os.kill(os.getpid(), 9)"))
    with open(run / "log.jsonl", "a") as f:
        f.write('{"step": 2, "va')
    assert script("evaluate.py", "--run", run, *EVALUATE, cwd=work).returncode == 0
    assert script(name, *argv, "--resume", cwd=work).returncode == 0
    assert outcome(run) == outcome(work / "train_stage2")


@pytest.mark.parametrize("name", ["data.py", *STAGES, "evaluate.py"])
def test_a_place_that_cannot_be_written_is_one_line(script, work, tmp_path, name):
    """Root may write everywhere, so the places are ones where nobody can: below a file, in place of a file, in /proc."""
    before = tree(work)
    (tmp_path / "file").write_text("mine")
    argv = {"data.py": ["--max-users", 60, *CF], "evaluate.py": ["--run", "train_stage2", *EVALUATE], **STAGES}[name]
    places = [tmp_path / "file" / "below", "/proc/nowhere/out", tmp_path / "file"]
    for place in places[:2] if name == "evaluate.py" else places:  # --json may well replace a file
        done = script(name, *argv, "--json" if name == "evaluate.py" else "--out", place, cwd=work)
        one_line(done, 2, "error: ", str(place))
    assert (tmp_path / "file").read_text() == "mine"
    unchanged = lambda files: {k: v for k, v in files.items() if name != "evaluate.py" or "metrics" not in k}
    assert unchanged(tree(work)) == unchanged(before)


# -- same seed, same bits


def test_same_seed_same_bits_for_every_script(script, work, tmp_path):
    assert script("data.py", "--max-users", 60, *CF, "--out", tmp_path / "toy", cwd=work).returncode == 0
    assert tree(tmp_path / "toy") == tree(work / "data" / "toy")
    for name, argv in STAGES.items():
        assert script(name, *argv, "--out", tmp_path / name, cwd=work).returncode == 0
        assert outcome(tmp_path / name) == outcome(work / name[:-3])
        other = script(name, *argv, "--seed", 5, "--out", tmp_path / f"{name} other", cwd=work)
        assert other.returncode == 0 and outcome(tmp_path / f"{name} other")["model"] != outcome(tmp_path / name)["model"]
    said = [script("ilm.py", "--run", "train_stage2", "Describe {item:007}.", cwd=work) for _ in range(2)]
    assert said[0].stdout == said[1].stdout and said[0].returncode == 0
    metrics = []
    for run in (work / "train_stage2", tmp_path / "train_stage2.py"):
        assert script("evaluate.py", "--run", run, *EVALUATE, cwd=work).returncode == 0
        metrics.append({k: v for k, v in json.loads((run / "metrics.json").read_text()).items() if k not in ("run", "seconds")})
    for row in metrics[0]["curve"] + metrics[1]["curve"]:
        row.pop("seconds")
    assert metrics[0] == metrics[1]


def test_the_number_of_threads_moves_the_weights_by_rounding_alone(script, work, tmp_path):
    """What can differ: sums in another order. AdamW turns a rounded gradient near zero into a step of size lr (1e-3), hence the bound."""
    assert script("train_stage1.py", *STAGES["train_stage1.py"], "--out", tmp_path / "run", cwd=work,
                  before="import torch; torch.set_num_threads(2)").returncode == 0
    a, b = (load_file(Path(run) / "model.safetensors") for run in (tmp_path / "run", work / "train_stage1"))
    assert max(float((a[k] - b[k]).abs().max()) for k in a) <= 6 * 2e-3


def test_batches_of_stage_1_are_a_function_of_seed_and_step(work):
    dataset = data.load_dataset(work / "data" / "toy")
    texts = train_stage1.Texts(dataset, AutoTokenizer.from_pretrained(ROOT / "assets" / "toy_llm"), 48)

    def draw(seed, step):
        args = train_stage1.parse_args(["--batch-size", "8", "--seed", str(seed)])
        number, batch = train_stage1.Batches(args, dataset, texts).draw(step)
        return number, [x.tolist() for part in ("text", "ii", "ui") for x in batch[part]]
    assert draw(0, 3) == draw(0, 3) != draw(0, 4) and draw(1, 3) != draw(0, 3)
