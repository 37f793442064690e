"""The README's fork points, followed: your own catalogue, CF vectors, later users and items, an encoder of your own, the hub's format."""
import csv
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT
from huggingface_hub import HfApi

import data
from assets.plumbing.later import extend, whole_vectors
from ilm import ILM, load_ilm

README = "".join((ROOT / n).read_text(encoding="utf-8") for n in ("README.md", "assets/docs/FORKING.md"))
SHORT = {"train_stage1.py": ["--steps", "8", "--width", "32"],
         "train_stage2.py": ["--steps", "4", "--batch-size", "2", "--valid-users", "8"]}


@pytest.fixture(scope="module")
def run(script):
    def call(folder, name, *argv):
        done = script(name, *argv, *SHORT.get(name, []), cwd=folder)
        assert done.returncode == 0, done.stderr
        return done.stdout
    return call


def write_csv(path, rows):
    with open(path, "w", newline="") as f:
        csv.writer(f).writerows(rows)


@pytest.fixture(scope="module")
def shop(run, tmp_path_factory):
    """A folder of a shop of 50 teas and coffees, 60 customers who like one of the two, after the README's four commands."""
    folder, rng = tmp_path_factory.mktemp("fork"), np.random.default_rng(0)
    (folder / "shop").mkdir()
    (folder / "assets").symlink_to(ROOT / "assets")
    table = [(f"p{i}", f"Blend No {i}", ("tea", "coffee")[i % 2]) for i in range(50)]
    write_csv(folder / "shop/items.csv", [("id", "title", "kind"), *table])
    log = [(f"ann{u}", f"p{2 * i + u % 2}", t) for u in range(60) for t, i in enumerate(rng.permutation(25)[:10])]
    write_csv(folder / "shop/interactions.csv", [("user", "item", "timestamp"), *log])
    (folder / "users.txt").write_text("ann3\nann8\n", encoding="utf-8-sig")
    commands = re.search(r"```\n(python data\.py --dataset csv --source shop\n.*?)```", README, re.S)[1]
    out = [run(folder, *line.split("#")[0].split()[1:]) for line in commands.strip().splitlines()]
    assert len(out) == 4
    return folder, out[-1]


def test_four_commands_lead_from_two_files_to_recommendations(shop):
    folder, printed = shop
    rows = [line.split("\t") for line in printed.splitlines()]
    dataset = data.load_dataset(folder / "data/shop")
    assert rows[0] == ["user", "place", "item", "title", "log_p"] and [r[0] for r in rows[1:]] == ["ann3"] * 10 + ["ann8"] * 10
    for name in ("ann3", "ann8"):
        had = {dataset.items[i]["id"] for i in dataset.items_of(dataset.users.index(name))}
        assert not had & {r[2] for r in rows if r[0] == name}
    scores = [float(r[4]) for r in rows[1:11]]
    assert scores == sorted(scores, reverse=True)


def test_so_many_items_as_are_asked_for_everybody(shop, run):
    """users.txt of the prepared folder is a file of all users."""
    folder, _ = shop
    printed = run(folder, "evaluate.py", *"--data data/shop --recommend data/shop/users.txt --top 3".split())
    rows = [line.split("\t") for line in printed.splitlines()[1:]]
    assert [r[0] for r in rows] == [name for name in data.load_dataset(folder / "data/shop").users for _ in range(3)]


def test_later_users_and_items_are_ranked_without_retraining(shop, run, script):
    folder, _ = shop
    (folder / "later").mkdir()
    write_csv(folder / "later/items.csv", [("id", "title", "kind"), ("p99", "Harvest Blend", "tea")])
    log = [("bob", f"p{i}", i) for i in (0, 2, 4)] + [(f"ann{u}", "p99", 9) for u in range(0, 20, 2)] + [("eve", "p100", 0)]
    write_csv(folder / "later/interactions.csv", [("user", "item", "timestamp"), *log])
    (folder / "bob.txt").write_text("bob\n")
    printed = run(folder, "evaluate.py", "--data", "data/shop", "--recommend", "bob.txt", "--new", "later")
    rows = [line.split("\t") for line in printed.splitlines()]
    assert [r[0] for r in rows[1:]] == ["bob"] * 10 and not {"p0", "p2", "p4"} & {r[2] for r in rows}
    old, new = (load_ilm(folder / "out/shop/ilm", torch.device("cpu"), folder / "data/shop", later) for later in (None, folder / "later"))
    ann, old_ann = (m.dataset.items_of(m.dataset.users.index("ann2")).tolist() for m in (new, old))
    assert ann == [*old_ann, 50] and "eve" not in new.dataset.users  # eve and p100 meet nothing known
    assert new.num_items == old.num_items + 1 == 51 and new.names[:50] == old.names and new.names[50] == "Harvest Blend"
    torch.testing.assert_close(new.cf[:50], old.cf[:50])
    cosine = torch.nn.functional.normalize(new.dataset.raw_cf) @ torch.nn.functional.normalize(new.dataset.raw_cf[50], dim=0)
    assert all(new.dataset.items[i]["attributes"]["kind"] == "tea" for i in cosine[:50].topk(10).indices)   # its neighbours are teas
    answer = run(folder, "ilm.py", "--run", "out/shop/ilm", "--new", "later", "Recommend something like [harvest] to {user:bob}")
    assert answer.count("\n") == 10
    (folder / "nobody.txt").write_text("ann3\ncarl\n")
    done = script("evaluate.py", "--data", "data/shop", "--recommend", "nobody.txt", cwd=folder)
    assert done.returncode == 2 and "nobody.txt, line 2: no user 'carl'" in done.stderr and done.stderr.count("\n") == 1


def later_folder(folder, log):
    folder.mkdir()
    write_csv(folder / "interactions.csv", [("user", "item", "timestamp"), *log])
    return folder


@pytest.mark.parametrize("a0", [0.0, 0.1])
def test_a_new_item_is_folded_in_from_those_who_chose_it(toy, tmp_path, a0):
    """The normal equations of ALS's other side, by hand: known users by all their training items."""
    dataset = data.load_dataset(toy)
    dataset.solver.settings = replace(dataset.solver.settings, a0=a0)
    chosen_by = [3, 8, 40]
    log = [(dataset.users[u], "new", 1) for u in chosen_by]
    extended = extend(dataset, later_folder(tmp_path / "later", log))
    X = whole_vectors(dataset, range(150)).double()
    A = dataset.user_gram.double()
    b = torch.zeros(12, dtype=torch.double)
    s = dataset.solver.settings
    for u in chosen_by:
        A = A + s.alpha * torch.outer(X[u], X[u])
        b += (1 + s.alpha) * X[u]
    ridge = s.reg * (3 + a0 * 150) if a0 else s.reg
    wanted = torch.linalg.solve(A + ridge * torch.eye(12, dtype=torch.double), b)
    torch.testing.assert_close(extended.raw_cf[120].double(), wanted, atol=1e-4, rtol=1e-3)


def test_known_items_and_users_keep_their_vectors_when_others_come(toy, tmp_path):
    """A user whose history did not grow is who they were; one whose history grew has moved on."""
    dataset = data.load_dataset(toy)
    unseen = next(i for i in range(120) if i not in dataset.items_of(5))
    log = [(dataset.users[5], dataset.items[unseen]["id"], 1), (dataset.users[3], "new", 1)]
    extended = extend(dataset, later_folder(tmp_path / "later", log))
    assert torch.equal(extended.raw_cf[:120], dataset.raw_cf)
    assert torch.equal(extended.item_cf[:120], dataset.item_cf)
    torch.testing.assert_close(extended.vectors_at([8]), dataset.vectors_at([8]), atol=1e-5, rtol=1e-4)
    grown = extended.solver.of_histories([[*dataset.items_of(5), unseen]])
    torch.testing.assert_close(extended.vectors_at([5]), grown, atol=1e-5, rtol=1e-4)
    assert (extended.vectors_at([5]) - dataset.vectors_at([5])).abs().max() > 0.01


def test_a_new_user_is_a_history_like_any_other(toy, tmp_path):
    dataset = data.load_dataset(toy)
    log = [("bob", dataset.items[i]["id"], t) for t, i in enumerate((7, 3, 9))]
    extended = extend(dataset, later_folder(tmp_path / "later", log))
    assert extended.users[150] == "bob"
    wanted = dataset.solver.of_histories([[7, 3, 9]])
    torch.testing.assert_close(extended.vectors_at([150]), wanted, atol=1e-5, rtol=1e-4)


def test_known_users_of_another_engine_stand_beside_new_ones(toy, tmp_path):
    """In one batch or alone: who has a vector of their own keeps it, who is new is folded in."""
    dataset = data.load_dataset(toy)
    dataset.raw_user_cf = torch.randn(150, 12)
    log = [("bob", dataset.items[i]["id"], t) for t, i in enumerate((7, 3, 9))]
    extended = extend(dataset, later_folder(tmp_path / "later", log))
    found = extended.vectors_at([4, 150])
    assert torch.equal(found[0], dataset.raw_user_cf[4])
    torch.testing.assert_close(found[1], extended.solver.of_histories([[7, 3, 9]])[0])
    assert extended.vectors_before([4, 150], [1, 1]).shape == (2, 12)


def test_your_own_vectors_take_the_place_of_als(shop, run):
    folder, _ = shop
    dataset = data.load_dataset(folder / "data/shop")
    rng = np.random.default_rng(0)
    np.savez(folder / "my_vectors.npz", user=rng.normal(size=(len(dataset.users), 7)), item=rng.normal(size=(50, 7)))
    run(folder, "data.py", "--dataset", "csv", "--source", "shop", "--out", "data/mine", "--cf", "my_vectors.npz")
    mine = data.load_dataset(folder / "data/mine")
    torch.testing.assert_close(mine.raw_cf.double(), torch.from_numpy(np.load(folder / "my_vectors.npz")["item"]), atol=1e-6, rtol=1e-6)
    run(folder, "train_stage1.py", "--data", "data/mine")
    assert "target tokens" in run(folder, "train_stage2.py", "--data", "data/mine")


def test_an_encoder_of_your_own(toy, tmp_path):
    """The README's edit, made in a copy of the repository."""
    for file in ROOT.glob("*.py"):
        shutil.copy(file, tmp_path)
    shutil.copy(ROOT / "prompts.txt", tmp_path)
    shutil.copytree(ROOT / "assets", tmp_path / "assets", ignore=shutil.ignore_patterns("results"))
    encoder, line = re.search(r"### An encoder of your own.*?```python\n(.*?)```.*?```python\n(.*?)```", README, re.S).groups()
    (tmp_path / "my_encoder.py").write_text(encoder)
    code = (tmp_path / "ilm.py").read_text()
    place = '    if config["method"] == "mlp":\n'
    assert code.count(place) == 1
    (tmp_path / "ilm.py").write_text(code.replace(place, line + place))
    code = (tmp_path / "train_stage2.py").read_text()
    (tmp_path / "train_stage2.py").write_text(code.replace('METHODS = ("ilm",', 'METHODS = ("mine", "ilm",'))
    command = [sys.executable, "train_stage2.py", "--data", str(toy), "--method", "mine", *SHORT["train_stage2.py"]]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out/toy/mine/model.safetensors").exists()


def test_a_saved_model_is_a_folder_without_llm_and_gives_the_same_scores(shop, monkeypatch):
    folder, _ = shop
    monkeypatch.chdir(folder)
    model = load_ilm("out/shop/ilm", "cpu")
    model.save_pretrained("saved")
    assert {f.name for f in (folder / "saved").iterdir()} == {"config.json", "model.safetensors", "README.md"}
    assert (folder / "saved/model.safetensors").stat().st_size == (folder / "out/shop/ilm/model.safetensors").stat().st_size
    card = (folder / "saved/README.md").read_text()
    assert "data/shop" in card and "assets/toy_llm" in card and "{{" not in card and "ILM.from_pretrained" in card
    (code,) = re.findall(r"```python\n(.*?)```", card, re.S)
    compile(code, "README.md", "exec")
    again = ILM.from_pretrained("saved", device="cpu")
    prompts = [model.prompt_ids("{history}. Next for {user}", user=u, history=[1, 5]) for u in (0, 4)]
    assert torch.equal(model.rank(prompts, model.trie()), again.rank(prompts, again.trie()))


def test_push_to_hub_uploads_that_folder(shop, monkeypatch):
    folder, _ = shop
    monkeypatch.chdir(folder)
    sent = {}
    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **_: type("Url", (), {"repo_id": repo_id})())
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, *, folder_path, repo_id, **_: sent.update(
        {repo_id: sorted(f.name for f in __import__("pathlib").Path(folder_path).iterdir())}))
    model = load_ilm("out/shop/ilm", "cpu")
    model.push_to_hub("me/tea-ilm")
    assert sent == {"me/tea-ilm": ["README.md", "config.json", "model.safetensors"]}
