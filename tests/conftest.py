"""Shared by all tests: the repository on the path, a small prepared toy data set, a small ILM on the shipped toy LLM."""
import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait for each other sleep, or a busy machine takes ten times as long
import torch  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SHARED = ROOT.parent / "shared"  # real data and a real LLM, where they are at hand; never part of the project

# Tests run on the CPU, also where there is a GPU; tests/test_cuda.py gives back what was visible. A worker of pytest-xdist inherits both.
VISIBLE = os.environ.setdefault("CUDA_VISIBLE_BEFORE_TESTS", os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import data  # noqa: E402
from assets.fast.packing import soft_index  # noqa: E402
from assets.plumbing.trie import Trie  # noqa: E402

os.environ["OMP_NUM_THREADS"] = "1"  # in subprocesses: threads that wait for each other take longer than models as small as these
torch.set_num_threads(1)
SHAPE = "--width 32 --layers 2 --num-queries 2 --batch-size".split()
STAGES = {"train_stage1.py": [*SHAPE, 8, "--steps", 6, "--eval-every", 2],
          "train_stage2.py": ["--method", "ilm-rand", *SHAPE, 2, "--steps", 4, "--eval-every", 2, "--valid-users", 4]}
CF = "--cf-dim 12 --recency 0.9 --reg 1".split()  # flags that leave nothing to choose: no search
EVALUATE = ["--tasks", "sequential", "--max-users", 2]


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: minutes; runs only if it is asked for, by `python -m pytest -m slow`")


def pytest_collection_modifyitems(config, items):
    if not config.option.markexpr:
        items[:] = [item for item in items if not item.get_closest_marker("slow")]


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """Path of a prepared toy data set with 150 users, who are known at a moment (recency .9)."""
    out = tmp_path_factory.mktemp("data") / "toy"
    data.main(["--max-users", "150", *CF, "--out", str(out)])
    return out


@pytest.fixture(scope="session")
def make_ilm(toy):
    """make_ilm(method, **config) -> an untrained ILM on the toy data and LLM, with a data set of its own."""
    import train_stage2
    from ilm import build_ilm
    whole = data.load_dataset(toy)

    def make(method="ilm-rand", llm=str(ROOT / "assets" / "toy_llm"), **config):
        dataset = copy.deepcopy(whole)
        shape = {"mlp": ["--num-queries", "3"], "text": []}  # flags that a method does not read are refused
        shape = shape.get(method, ["--num-queries", "3", "--width", "32", "--layers", "2"])
        args = train_stage2.parse_args(["--method", method, "--data", str(toy), "--llm", llm, *shape])
        made, _ = train_stage2.make_config(args, dataset)
        torch.manual_seed(0)
        return build_ilm(made | config, dataset, torch.device("cpu")).eval()
    return make


@pytest.fixture()
def tangled(make_ilm):
    """An ILM whose 120 names share beginnings, and where one name extends another."""
    model = make_ilm()
    words = ["Amber", "Jade", "Velvet", "Iron", "Golden"]
    model.names = [f"{words[i % 5]} {words[i // 5 % 5]} {words[i // 25]}" for i in range(120)]
    model.names[7] = "Amber Jade"
    model.name_ids = [model.target_ids(name) for name in model.names]
    model.names_trie = Trie(model.name_ids)
    model.set_prior("popularity", "learned")
    with torch.no_grad():
        model.tau.fill_(0.7)
    return model


@pytest.fixture(scope="session")
def script(tmp_path_factory):
    """script(name, *argv, cwd=, ...) runs a script in a process of its own (tests/forked.py has the further arguments)."""
    folder = tmp_path_factory.mktemp("forked")
    server = subprocess.Popen([sys.executable, str(ROOT / "tests" / "forked.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                              env={**os.environ, "TOKENIZERS_PARALLELISM": "false"})
    assert server.stdout.readline() == "ready\n"

    def call(name, *argv, cwd=ROOT, **options):
        options |= {"script": name, "argv": [*map(str, argv)], "cwd": str(cwd), "out": str(folder / "out"), "err": str(folder / "err")}
        print(json.dumps(options), file=server.stdin, flush=True)
        status = json.loads(server.stdout.readline())
        return SimpleNamespace(returncode=status, stdout=(folder / "out").read_text(), stderr=(folder / "err").read_text())
    yield call
    server.stdin.close()
    server.wait()


@pytest.fixture(scope="session")
def work(script, tmp_path_factory):
    """A folder with a small data set and one finished run of each stage: what no interruption may change."""
    work = tmp_path_factory.mktemp("work")
    (work / "assets").symlink_to(ROOT / "assets")
    assert script("data.py", "--max-users", 60, *CF, cwd=work).returncode == 0
    for name, argv in STAGES.items():
        done = script(name, *argv, "--out", name[:-3], cwd=work)
        assert done.returncode == 0 and not done.stderr, done.stderr
    assert script("evaluate.py", "--run", "train_stage2", *EVALUATE, cwd=work).returncode == 0
    return work


def embedded(model, prompt, targets=((),)):
    """What the LLM reads of one prompt with each of N targets of one length behind it, (N, L, hidden)."""
    ids = torch.tensor([[*prompt, *target] for target in targets])
    return model.embed(ids, soft_index(ids, getattr(prompt, "vectors", []), model.num_items, model.Q))


def as_read(model, histories):
    """What an encoder reads of users with these histories, (B, (1 + W) * E): their standardised vector, folded in, and behind it the
    vectors of their last W items, latest first, zeros where there is none."""
    dataset, rows = model.dataset, []
    vectors = dataset.standard_users(dataset.solver.of_histories(histories))
    for vector, history in zip(vectors, histories):
        latest = [model.cf[int(i)] for i in history][::-1][:model.W]
        none = torch.zeros((model.W - len(latest)) * model.cf.shape[1])
        rows.append(torch.cat([vector, *latest, none]))
    return torch.stack(rows)


def real(path):
    """A file or folder under ../shared, or skip."""
    if not (SHARED / path).exists():
        pytest.skip(f"{path} is not at hand")
    return str(SHARED / path)
