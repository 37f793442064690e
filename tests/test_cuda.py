"""The same commands on a GPU, in bf16 and in fp16; skipped where there is none. All other tests run on the CPU (conftest.py).

One process runs them all, so that torch and transformers are imported once: a busy machine takes longer for that than for all the rest."""
import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT, SHAPE, STAGES, VISIBLE

ENV = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"}
ENV |= {} if VISIBLE == "all" else {"CUDA_VISIBLE_DEVICES": VISIBLE}
# Reads a JSON object a line: argv, fp16 (as on a GPU without bf16), stop_when (a path: SIGTERM as soon as it exists);
# answers with status, out, err.
SERVER = """
import contextlib, io, json, os, runpy, signal, sys, threading, time, traceback, warnings
sys.path.insert(0, ".")
import torch
import data, evaluate, ilm, train_stage1, train_stage2
has_bf16, answers = torch.cuda.is_bf16_supported, sys.stdout
print(json.dumps(torch.cuda.is_available()), file=answers, flush=True)

def stop(path):
    while not os.path.exists(path):
        time.sleep(.01)
    os.kill(os.getpid(), signal.SIGTERM)

for line in sys.stdin:
    call = json.loads(line)
    torch.cuda.is_bf16_supported = (lambda *a, **k: False) if call["fp16"] else has_bf16
    if call["stop_when"]:
        threading.Thread(target=stop, args=(call["stop_when"],), daemon=True).start()
    out, err, status = io.StringIO(), io.StringIO(), 0
    sys.argv = call["argv"]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as end:
            status = end.code or 0
        except BaseException:
            traceback.print_exc()
            status = 1
    print(json.dumps([status, out.getvalue(), err.getvalue()]), file=answers, flush=True)
"""
STAGE1 = ["train_stage1.py", *STAGES["train_stage1.py"]]
STAGE2 = ["train_stage2.py", "--method", "ilm", *SHAPE, "2", "--eval-every", "2", "--valid-users", "8"]
TEXT = ["train_stage2.py", "--method", "text", "--train-llm", "--item-names", "random", "--batch-size", "2", "--steps", "4",
        "--eval-every", "2", "--valid-users", "8"]


@pytest.fixture(scope="module")
def run():
    """run(*argv, fp16=, status=, stop_when=) in the one process -> its stdout."""
    server = subprocess.Popen([sys.executable, "-c", SERVER], cwd=ROOT, env=ENV, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    if not json.loads(server.stdout.readline()):
        server.kill()
        pytest.skip("needs a GPU")

    def call(*argv, fp16=False, status=0, stop_when=None):
        began = time.time()
        request = {"argv": [*map(str, argv)], "fp16": fp16, "stop_when": stop_when and str(stop_when)}
        print(json.dumps(request), file=server.stdin, flush=True)
        ended, out, err = json.loads(server.stdout.readline())
        print(f"{time.time() - began:.1f} s  {argv[0]} {'fp16' if fp16 else ''}")
        assert ended == status and "Traceback" not in err and "Warning" not in err, err
        return out
    yield call
    server.stdin.close()
    server.wait(30)


@pytest.fixture(scope="module")
def on_cpu(run, toy, tmp_path_factory):
    """The run directories of the same commands on the CPU: stage 1, stage 2, and an LLM that is trained."""
    folder = tmp_path_factory.mktemp("cpu")
    run(*STAGE1, "--data", toy, "--out", folder / "stage1", "--device", "cpu")
    run(*STAGE2, "--data", toy, "--stage1", folder / "stage1", "--steps", "8", "--out", folder / "ilm", "--device", "cpu")
    run(*TEXT, "--data", toy, "--out", folder / "text", "--device", "cpu")
    return folder


def valid(run, key):
    return [row[key] for row in map(json.loads, (run / "log.jsonl").read_text().splitlines()) if key in row]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_both_stages_a_stop_and_the_scores_on_a_gpu(run, on_cpu, toy, tmp_path, precision):
    """Losses are the CPU's but for rounding, a run goes on after a signal, GPU and CPU read it with like results."""
    fp16, name = precision == "fp16", {"bf16": "torch.bfloat16", "fp16": "torch.float16"}[precision]
    stage1, ilm = tmp_path / "stage1", tmp_path / "ilm"
    assert name in run(*STAGE1, "--data", toy, "--out", stage1, fp16=fp16)
    for key in ("valid_itc", "valid_itm", "valid_itg"):  # of step 0: later ones have other dropout
        assert abs(valid(stage1, key)[0] - valid(on_cpu / "stage1", key)[0]) < 0.05
    assert valid(stage1, "valid_itg")[-1] < valid(stage1, "valid_itg")[0]
    argv = [*STAGE2, "--data", toy, "--stage1", on_cpu / "stage1", "--steps", "8", "--out", ilm]
    run(*argv, fp16=fp16, stop_when=ilm / "state.pt", status=143)
    assert name in run(*argv, "--resume", fp16=fp16)
    for key in ("valid_sequential", "valid_straightforward", "valid_text"):
        assert len(valid(ilm, key)) == 5 and valid(ilm, key) == pytest.approx(valid(on_cpu / "ilm", key), abs=0.3)
    found = []
    for device in ("cuda", "cpu"):
        run("evaluate.py", "--run", ilm, "--max-users", "40", "--max-texts", "20", "--device", device, fp16=fp16)
        found.append(json.loads((ilm / "metrics.json").read_text()))
    a, b = found
    assert a["device"].startswith("cuda") and b["device"] == "cpu"
    assert abs(a["text"]["log_ppl"] - b["text"]["log_ppl"]) < 0.02
    same = [x == y for x, y in zip(*(np.minimum(r["rec"]["sequential"]["seen"]["ranks"], 11).tolist() for r in found))]
    assert sum(same) >= 0.8 * len(same)  # rounding swaps near ones
    assert run("ilm.py", "--run", ilm, "Describe {item:007}.", fp16=fp16).strip()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_llm_itself_trained_on_a_gpu(run, on_cpu, toy, tmp_path, precision):
    run(*TEXT, "--data", toy, "--out", tmp_path / "gpu", fp16=precision == "fp16")
    for key in ("valid_sequential", "valid_straightforward", "valid_text"):
        assert valid(tmp_path / "gpu", key) == pytest.approx(valid(on_cpu / "text", key), abs=0.3)
