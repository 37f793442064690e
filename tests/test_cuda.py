"""The same commands on a GPU, in bf16 and in fp16; skipped where there is none. All other tests run on the CPU (conftest.py)."""
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT, SHAPE, STAGES, VISIBLE

ENV = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"}
ENV |= {} if VISIBLE == "all" else {"CUDA_VISIBLE_DEVICES": VISIBLE}
# runs a script; with an argument "fp16" in front on what it takes for a GPU without bf16
RUN = """import runpy, sys, torch
fp16 = sys.argv[1:2] == ["fp16"]
sys.argv = sys.argv[1 + fp16:]
if fp16: torch.cuda.is_bf16_supported = lambda *args, **kwargs: False
sys.path.insert(0, "."); runpy.run_path(sys.argv[0], run_name="__main__")"""
STAGE1 = ["train_stage1.py", *STAGES["train_stage1.py"]]
STAGE2 = ["train_stage2.py", "--method", "ilm", *SHAPE, "2", "--eval-every", "2", "--valid-users", "8"]


@pytest.fixture(scope="module", params=["bf16", "fp16"])
def gpu(request, toy):
    """run(*argv) on the GPU -> its stdout; run(..., stop_when=path): a SIGTERM as soon as the file exists."""
    if subprocess.run([sys.executable, "-c", "import torch; assert torch.cuda.is_available()"], env=ENV, capture_output=True).returncode:
        pytest.skip("needs a GPU")

    def run(*argv, status=0, stop_when=None):
        flags = ["fp16"] * (request.param == "fp16")
        process = subprocess.Popen([sys.executable, "-c", RUN, *flags, *map(str, argv)], cwd=ROOT, env=ENV, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        while stop_when and not stop_when.exists() and process.poll() is None:
            time.sleep(0.01)
        if stop_when:
            process.send_signal(signal.SIGTERM)
        try:
            out, err = process.communicate(timeout=300)
        finally:
            process.kill()
        assert process.returncode == status and "Traceback" not in err and "Warning" not in err, err
        return out
    run.dtype = {"bf16": "torch.bfloat16", "fp16": "torch.float16"}[request.param]
    return run


def valid(run, key):
    return [row[key] for row in map(json.loads, (run / "log.jsonl").read_text().splitlines()) if key in row]


def test_both_stages_a_stop_and_the_scores_on_a_gpu(gpu, toy, tmp_path):
    """Losses are the CPU's but for rounding, a run goes on after a signal, GPU and CPU read it with like results."""
    stage1, ilm, cpu = tmp_path / "stage1", tmp_path / "ilm", tmp_path / "cpu"
    assert gpu.dtype in gpu(*STAGE1, "--data", toy, "--out", stage1)
    gpu(*STAGE1, "--data", toy, "--out", cpu, "--device", "cpu")
    for key in ("valid_itc", "valid_itm", "valid_itg"):  # of step 0: later ones have other dropout
        assert abs(valid(stage1, key)[0] - valid(cpu, key)[0]) < 0.05
    assert valid(stage1, "valid_itg")[-1] < valid(stage1, "valid_itg")[0]
    argv = [*STAGE2, "--data", toy, "--stage1", stage1, "--steps", "8"]
    gpu(*argv, "--out", ilm, stop_when=ilm / "state.pt", status=143)
    assert gpu.dtype in gpu(*argv, "--out", ilm, "--resume")
    gpu(*argv, "--out", cpu, "--device", "cpu")
    for key in ("valid_sequential", "valid_straightforward", "valid_text"):
        assert len(valid(ilm, key)) == 5 and valid(ilm, key) == pytest.approx(valid(cpu, key), abs=0.3)
    found = []
    for device in ("cuda", "cpu"):
        gpu("evaluate.py", "--run", ilm, "--max-users", "40", "--max-texts", "20", "--device", device)
        found.append(json.loads((ilm / "metrics.json").read_text()))
    a, b = found
    assert a["device"].startswith("cuda") and b["device"] == "cpu"
    assert abs(a["text"]["log_ppl"] - b["text"]["log_ppl"]) < 0.02
    same = [x == y for x, y in zip(*(np.minimum(r["rec"]["sequential"]["seen"]["ranks"], 11).tolist() for r in found))]
    assert sum(same) >= 0.8 * len(same)  # rounding swaps near ones
    assert gpu("ilm.py", "--run", ilm, "Describe {item:007}.").strip()


def test_the_llm_itself_trained_on_a_gpu(gpu, toy, tmp_path):
    argv = ["train_stage2.py", "--method", "text", "--train-llm", "--item-names", "random", "--data", toy, "--batch-size", "2",
            "--steps", "4", "--eval-every", "2", "--valid-users", "8"]
    gpu(*argv, "--out", tmp_path / "gpu")
    gpu(*argv, "--out", tmp_path / "cpu", "--device", "cpu")
    for key in ("valid_sequential", "valid_straightforward", "valid_text"):
        assert valid(tmp_path / "gpu", key) == pytest.approx(valid(tmp_path / "cpu", key), abs=0.3)
