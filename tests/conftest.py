"""Shared by all tests: the repository on the path, a small prepared toy data set, a small ILM on the shipped toy LLM."""
import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SHARED = ROOT.parent / "shared"  # real data and a real LLM, where they are at hand; never part of the project

import data  # noqa: E402

os.environ["OMP_NUM_THREADS"] = "1"  # in subprocesses: threads that wait for each other take longer than models as small as these
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """Path of a prepared toy data set with 150 users."""
    out = tmp_path_factory.mktemp("data") / "toy"
    data.prepare(data.parse_args(["--max-users", "150", "--cf-dim", "12", "--out", str(out)]))
    return out


@pytest.fixture()
def make_ilm(toy):
    """make_ilm(method, **config) -> an untrained ILM on the toy data and LLM."""
    import train_stage2
    from ilm import build_ilm

    def make(method="ilm-rand", llm=str(ROOT / "assets" / "toy_llm"), **config):
        dataset = data.load_dataset(toy)
        args = train_stage2.parse_args(["--method", method, "--data", str(toy), "--llm", llm, "--num-queries", "3",
                                        "--width", "32", "--layers", "2"])
        made, _ = train_stage2.make_config(args, dataset)
        torch.manual_seed(0)
        return build_ilm(made | config, dataset, torch.device("cpu")).eval()
    return make


def real(path):
    """A file or folder under ../shared, or skip."""
    if not (SHARED / path).exists():
        pytest.skip(f"{path} is not at hand")
    return str(SHARED / path)
