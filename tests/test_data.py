import html
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CF, real

import data
from assets.fast.als import length_batches
from assets.fast.nearest import nearest_of_each
from assets.plumbing import cf, choose_cf
from assets.plumbing.checks import first_of_each
from assets.plumbing.guard import printable, write_atomically
from assets.plumbing.later import whole_vectors
from assets.plumbing.readers import read_items


def prepare(tmp_path, *argv):
    data.main([*map(str, argv), "--out", str(tmp_path / "out")])
    return data.load_dataset(tmp_path / "out")


def csv_source(folder, rows, items=None):
    folder.mkdir(exist_ok=True)
    (folder / "interactions.csv").write_text("user,item,timestamp\n" + "".join(f"{u},{i},{t}\n" for u, i, t in rows))
    ids = sorted({i for _, i, _ in rows})
    (folder / "items.csv").write_text("id,title,brand\n" + "".join(f"{i},{(items or {}).get(i, 'Title ' + str(i))},b\n" for i in ids))
    return folder


# -- known totals of real data


@pytest.mark.parametrize("source, argv, totals", [
    ("openp5-beauty", ["--dataset", "openp5"], (22363, 12101, 198502)),
    ("openp5-ml100k", ["--dataset", "openp5", "--items", "ml-100k/u.item"], (943, 1349, 99287)),
    ("ml-100k", ["--dataset", "movielens"], (943, 1349, 99287)),
    ("ml-100k", ["--dataset", "movielens", "--min-count", "1"], (943, 1682, 100000)),
    ("ml-latest-small", ["--dataset", "movielens", "--min-count", "1"], (610, 9724, 100836)),
])
def test_known_totals(tmp_path, source, argv, totals, capsys, monkeypatch):
    """Nothing is searched for, and few texts are made."""
    monkeypatch.setattr(data, "text_tasks", partial(data.text_tasks, limit=20))
    argv = [real("data/" + a) if a.endswith("u.item") else a for a in argv]
    dataset = prepare(tmp_path, *argv, "--source", real("data/" + source), *"--cf-dim 4 --recency 1 --reg 1".split())
    assert (dataset.meta["users"], dataset.meta["items"], dataset.meta["interactions"]) == totals
    assert f"{totals[0]:,} users, {totals[1]:,} items, {totals[2]:,} interactions" in capsys.readouterr().out
    assert len({item["title"] for item in dataset.items}) == totals[1]


# -- readers


def test_three_movielens_formats_read_alike(tmp_path):
    rows = [(u, i, 3, 100 * u + i) for u in range(1, 7) for i in range(1, 7)]
    for name in "abc":
        (tmp_path / name).mkdir()
    (tmp_path / "a/u.data").write_text("".join(f"{u}\t{i}\t{r}\t{t}\n" for u, i, r, t in rows))
    (tmp_path / "a/u.item").write_bytes("".join(f"{i}|Café {i} (1999)|01-Jan-1999||url|0|1|0|0|0|1{'|0' * 13}\n"
                                                for i in range(1, 7)).encode("latin-1"))
    (tmp_path / "b/ratings.dat").write_text("".join(f"{u}::{i}::{r}::{t}\n" for u, i, r, t in rows))
    (tmp_path / "b/movies.dat").write_bytes("".join(f"{i}::Café {i} (1999)::Action|Comedy\n" for i in range(1, 7)).encode("latin-1"))
    (tmp_path / "c/ratings.csv").write_text("userId,movieId,rating,timestamp\n" + "".join(f"{u},{i},{r}.5,{t}\n" for u, i, r, t in rows))
    (tmp_path / "c/movies.csv").write_text("movieId,title,genres\n" + "".join(f"{i},Café {i} (1999),Action|Comedy\n" for i in range(1, 7)),
                                           encoding="utf-8")
    a, b, c = (prepare(tmp_path, "--dataset", "movielens", "--source", tmp_path / x) for x in "abc")
    assert a.items == b.items == c.items
    assert a.items[0] == {"id": "1", "title": "Café 1 (1999)", "text": "Café 1 (1999). genres: Action, Comedy; decade: 1990s",
                          "attributes": {"genres": "Action, Comedy", "decade": "1990s"}}
    assert (a.sequence == b.sequence).all() and (a.sequence == c.sequence).all()


def test_equal_times_keep_file_order(tmp_path):
    rows = [("u", i, 7) for i in "cabde"] + [("v", i, t) for t, i in enumerate("edcba")]
    dataset = prepare(tmp_path, "--dataset", "csv", "--source", csv_source(tmp_path / "in", rows), "--min-count", 2)
    assert [dataset.items[i]["id"] for i in dataset.items_of(0)] == list("cabde")
    assert [dataset.items[i]["id"] for i in dataset.items_of(1, "test")] == list("edcb")
    assert [dataset.items[i]["id"] for i in dataset.items_of(1, "train")] == list("edc")
    assert dataset.items[dataset.target(1, "valid")]["id"] == "b" and dataset.items[dataset.target(1, "test")]["id"] == "a"


def test_k_core_is_iterated():
    # item 2 has one user; without it user 1 has one item, and without user 1 item 1 has one user
    users, items = np.array([0, 0, 1, 1, 2, 2, 0, 2]), np.array([0, 3, 1, 2, 0, 3, 1, 0])
    keep = data.k_core(users, items, 2)
    assert sorted(zip(users[keep], items[keep])) == [(0, 0), (0, 3), (2, 0), (2, 0), (2, 3)]


def test_who_is_left_out_for_few_interactions_is_told(tmp_path, capsys):
    rows = [(u, i, t) for u in "uvw" for t, i in enumerate("abc")] + [("few", "a", 1), ("v", "rare", 9)]
    for count, told in ((2, ["note: --min-count 2 leaves out 1 users and 1 items"]), (1, [])):
        prepare(tmp_path, "--dataset", "csv", "--source", csv_source(tmp_path / "in", rows), "--min-count", count)
        assert [line for line in capsys.readouterr().out.splitlines() if "leaves out" in line] == told


def test_equal_and_empty_titles_and_items_without_text(tmp_path):
    rows = [(f"u{k}", i, t) for k in range(3) for t, i in enumerate("abc")]
    source = csv_source(tmp_path / "in", rows)
    (source / "items.csv").write_text('id,title,text\na,Same,one\nb,Same,\nc,"",\n')
    dataset = prepare(tmp_path, "--dataset", "csv", "--source", source, "--min-count", 1)
    assert [item["title"] for item in dataset.items] == ["Same", "Same (2)", "item c"]
    assert [item["text"] for item in dataset.items] == ["one", "Same", ""]
    assert all(2 not in dataset.items_in(split) for split in ("train", "valid", "test"))


def test_users_with_fewer_than_three_interactions_train_cf_alone(tmp_path):
    rows = [("long", i, t) for t, i in enumerate("abcd")] + [("short", "a", 1), ("short", "d", 2)]
    dataset = prepare(tmp_path, "--dataset", "csv", "--source", csv_source(tmp_path / "in", rows), "--min-count", 1)
    assert dataset.meta["short_users"] == 1 and [dataset.users[u] for u in dataset.eligible()] == ["long"]
    assert dataset.raw_cf[3].abs().sum() > 0  # item d trains through `short` although it is `long`'s test item


# -- CF


@pytest.mark.parametrize("E", [3, 12])  # long rows and short ones
@pytest.mark.parametrize("reg, a0", [(0.5, 0.0), (0.02, 0.3)])
def test_als_solves_the_normal_equations(E, reg, a0):
    torch.manual_seed(0)
    fixed, rows, columns = torch.randn(7, E), torch.tensor([3, 0, 2, 2, 0, 2, 2]), torch.tensor([5, 1, 0, 2, 4, 3, 6])
    for budget in (1, 1 << 18):  # one row at a time, or all padded together
        settings = cf.CFSettings(E, alpha=2.0, reg=reg, a0=a0)
        x = cf.als_solve(fixed, length_batches(rows, columns, 4, 7, budget), 4, settings)
        for row in range(4):
            confidence, wanted = torch.ones(7), torch.zeros(7)
            confidence[columns[rows == row]] = 3.0
            wanted[columns[rows == row]] = 1.0
            ridge = reg * (int((rows == row).sum()) + a0 * 7) if a0 else reg
            A = (fixed.T @ (confidence[:, None] * fixed) + ridge * torch.eye(E)).double()
            found = torch.linalg.solve(A, (fixed.T @ (confidence * wanted)).double()).float()
            torch.testing.assert_close(x[row], found, atol=1e-5 if a0 == 0 else 5e-5, rtol=1e-5)


def test_cf_sees_the_training_part_alone(tmp_path):
    rng = np.random.default_rng(0)
    rows = [(f"u{u}", f"i{i:02d}", t) for u in range(30) for t, i in enumerate(rng.permutation(20)[:8])]
    ends = [(f"u{u}", "planted", 100 + t) for u in range(30) for t in range(2)]
    flags = "--min-count 1 --cf-dim 24 --reg 1 --recency 0.9".split()
    with_plant = prepare(tmp_path, "--dataset", "csv", "--source", csv_source(tmp_path / "a", rows + ends), *flags)
    other_ends = [(f"u{u}", f"i{(u + t) % 20:02d}", 100 + t) for u in range(30) for t in range(2)]
    without = prepare(tmp_path, "--dataset", "csv", "--source", csv_source(tmp_path / "b", rows + other_ends), *flags)
    assert with_plant.items[-1]["id"] == "planted" and (with_plant.raw_cf[-1] == 0).all()
    assert len(with_plant.items) == len(without.items) + 1
    scores = [d.vectors_at(range(30), "valid") @ d.raw_cf[:20].T for d in (with_plant, without)]  # vectors start from other random numbers
    torch.testing.assert_close(scores[0], scores[1], atol=0.05, rtol=0.05)


@pytest.fixture()
def four_items(tmp_path):
    """make(flags, vectors) -> a data set of 5 users who all took the same four items, with somebody else's vectors."""
    source = csv_source(tmp_path / "in", [(f"u{u}", i, t) for u in range(5) for t, i in enumerate("abcd")])

    def make(*argv, **vectors):
        np.savez(tmp_path / "cf.npz", **vectors)
        return prepare(tmp_path, "--dataset", "csv", "--source", source, "--cf", tmp_path / "cf.npz", "--min-count", 1, *argv)

    return make


def test_users_of_another_engine_stand_at_every_moment(four_items):
    users, items = np.eye(5, 3, dtype=np.float32), np.ones((4, 3))
    dataset = four_items(user=users, item=items)
    assert (dataset.raw_cf.numpy() == items).all() and dataset.raw_cf.dtype == torch.float32
    for split in ("valid", "test", None):
        assert (dataset.vectors_at([2, 0], split).numpy() == users[[2, 0]]).all()
    assert (dataset.vectors_along(2, np.array([1, 1])).numpy() == users[[2, 2]]).all()
    assert (dataset.vectors_before([2, 0], [1, 1]).numpy() == users[[2, 0]]).all()
    assert (whole_vectors(dataset, [2, 0]).numpy() == users[[2, 0]]).all()


def test_with_item_vectors_of_another_engine_alone_users_are_folded_in(four_items):
    items = np.random.default_rng(0).normal(size=(4, 3))
    dataset = four_items(item=items)
    torch.testing.assert_close(dataset.raw_cf.double(), torch.from_numpy(items), atol=1e-6, rtol=1e-6)
    assert dataset.raw_user_cf is None and "user" not in np.load(dataset.path / "cf.npz")
    wanted = dataset.solver.of_histories([dataset.items_of(3, "test")])
    assert torch.equal(dataset.vectors_at([3], "test"), wanted) and wanted.abs().sum() > 0
    chosen = dataset.meta["cf"]["settings"]
    assert chosen["dim"] == 3 and chosen["recency"] in choose_cf.RECENCIES and "valid_NDCG@10" in dataset.meta["cf"]


def test_vectors_with_ids_are_found_whatever_their_order_and_company(four_items):
    items, users = np.arange(15.0).reshape(5, 3), np.arange(18.0).reshape(6, 3)
    told = {"item_id": np.array([*"dxbca"]), "user_id": np.array(["u4", "u0", "u9", "u1", "u3", "u2"])}
    dataset = four_items(item=items, user=users, **told)
    assert (dataset.raw_cf.numpy() == items[[4, 2, 3, 0]]).all()
    assert (dataset.raw_user_cf.numpy() == users[[1, 3, 5, 4, 0]]).all()


@pytest.mark.parametrize("flag, value", [("--recency", 0.9), ("--reg", 1)])
def test_settings_beside_users_of_another_engine_are_refused(four_items, tmp_path, flag, value):
    """Nothing is solved for by them; items alone leave the users to be folded in."""
    with pytest.raises(data.InputError, match="stand as they are"):
        four_items(flag, value, user=np.eye(5, 3), item=np.ones((4, 3)))
    assert not (tmp_path / "out").exists()
    settings = four_items(flag, value, item=np.eye(4, 3)).meta["cf"]["settings"]
    assert settings[flag[2:]] == value


def test_vectors_of_other_counts_are_refused(four_items):
    for wrong in ({"user": np.eye(4, 3), "item": np.ones((4, 3))}, {"item": np.ones((5, 3))}):
        with pytest.raises(data.InputError, match="expected finite"):
            four_items(**wrong)


def test_a_width_beside_vectors_of_another_engine_is_refused(tmp_path):
    with pytest.raises(data.InputError, match="--cf-dim 4: the vectors of --cf mine.npz have a width"):
        prepare(tmp_path, "--cf", "mine.npz", "--cf-dim", 4)
    assert not (tmp_path / "out").exists()


# -- repeats and entities


def test_what_a_log_says_twice_counts_once(tmp_path, capsys):
    """Else the copy of a test item would be the validation item, or stand in the training part."""
    dataset = prepare(tmp_path, "--dataset", "csv", "--source", real("cases/twice"), "--min-count", 1)
    assert "note: 30 interactions repeat another (same user, item and time); each counts once" in capsys.readouterr().out
    for user in range(6):
        assert [dataset.items[i]["id"] for i in dataset.items_of(user)] == list("vwxyz")
        assert dataset.target(user, "valid") != dataset.target(user, "test")
        assert dataset.target(user, "test") not in dataset.items_of(user, "train")
    test_items = {dataset.target(user, "test") for user in range(6)}
    assert not dataset.raw_cf[sorted(test_items)].any()  # z is nobody's training item: CF never saw it


def test_the_same_item_at_another_time_is_no_repeat():
    users, items, times = np.array([0, 0, 0, 1, 0, 1]), np.array([5, 5, 5, 5, 6, 5]), np.array([9, 8, 9, 9, 9, 9])
    assert first_of_each(users, items, times).tolist() == [True, True, False, True, True, False]


def test_entities_in_titles_and_texts_are_characters():
    """819 brands of Beauty, L&#39;Oreal before all, and a few titles."""
    path = Path(real("data/openp5-beauty")) / "items.tsv"
    table = read_items(path)
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()[1:]]
    encoded = [row for row in rows if html.unescape("".join(row)) != "".join(row)]
    assert len(encoded) > 819
    for key, title, brand, _ in encoded:
        item, title, brand = table[key], *(html.unescape(html.unescape(x)) for x in (title, brand))  # `eForCity&amp;reg;`
        assert item["title"] == printable(title) and item["attributes"].get("brand", "") == printable(brand)
        assert brand in item["text"] and "&#39;" not in item["text"] and "&amp;" not in item["text"]


def test_entities_of_attributes_are_characters(tmp_path):
    path = tmp_path / "items.csv"
    path.write_text("id,title,text,brand\n1,Salt &amp; Pepper,&quot;hot&quot;,A&amp;B\n2,Nail,,eFor&amp;reg;\n")
    item = read_items(path)["1"]
    assert item == {"id": "1", "title": "Salt & Pepper", "text": '"hot"', "attributes": {"brand": "A&B"}}
    item = read_items(path)["2"]  # encoded twice: the attribute and the text made of it are the same
    assert item["attributes"] == {"brand": "eFor®"} and item["text"] == "Nail. brand: eFor®"


# -- the prepared folder


def test_toy_is_a_function_of_its_seed(toy, tmp_path):
    again = prepare(tmp_path, "--max-users", 150, *CF)
    assert (again.sequence == data.load_dataset(toy).sequence).all()
    assert torch.equal(again.raw_cf, data.load_dataset(toy).raw_cf)
    other = prepare(tmp_path, "--max-users", 150, "--seed", 1, *CF)
    assert [i["title"] for i in other.items] == [i["title"] for i in again.items]  # --seed leaves the catalogue alone


def test_a_notebook_prepares_by_plain_parameters(toy, tmp_path):
    """What the flags of the fixture `toy` write, byte by byte."""
    data.prepare(tmp_path / "toy", max_users=150, cf_dim=12, recency=0.9, reg=1.0)
    assert {f.name: f.read_bytes() for f in toy.iterdir()} == {f.name: f.read_bytes() for f in (tmp_path / "toy").iterdir()}


def test_held_out_items_are_a_function_of_their_ids_and_in_no_training_task(toy):
    dataset = data.load_dataset(toy)
    held_out = {i for ids in dataset.meta["held_out"].values() for i in ids}
    assert held_out == {i for i, item in enumerate(dataset.items) if data.item_split("toy", item["id"]) != "train"}
    assert not held_out & {i for t in dataset.instances if t["split"] == "train" for i in t["items"]}
    assert not any(dataset.items[i]["title"] in t["prompt"] for t in dataset.instances for i in t["items"])
    assert len({t["task"] for t in dataset.instances}) >= 6


def test_a_failed_write_leaves_the_old_folder(tmp_path):
    write_atomically(tmp_path / "x", lambda f: (f / "file").write_text("old"))
    with pytest.raises(RuntimeError):
        write_atomically(tmp_path / "x", lambda f: (_ for _ in ()).throw(RuntimeError()))
    assert (tmp_path / "x" / "file").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_a_changed_file_is_noticed(tmp_path):
    dataset = prepare(tmp_path, "--max-users", 30, *CF)
    (dataset.path / "users.txt").write_text("u\n")
    with pytest.raises(data.InputError, match="users.txt: differs"):
        data.load_dataset(dataset.path)


@pytest.mark.parametrize("files, argv, message", [
    ({}, ["--dataset", "movielens", "--source", "."], "grouplens.org"),
    ({"u.data": "1\t2\t3\t4\n1\tx\t3\t4\n", "u.item": "2|A|b\n"}, ["--dataset", "movielens", "--source", "."], "u.data, line 2"),
    ({"interactions.csv": "user,item\na,b\n"}, ["--dataset", "csv", "--source", "."], "no column timestamp"),
    ({"interactions.csv": "user,item,timestamp\na,b,noon\n"}, ["--dataset", "csv", "--source", "."], "line 2: timestamp 'noon'"),
    ({"user_sequence.txt": "u 1 2 3\nv\n"}, ["--dataset", "openp5", "--source", "."], "user_sequence.txt, line 2"),
    ({}, ["--dataset", "csv"], "needs --source"),
    ({"interactions.csv": "user,item,timestamp\na,b,1\n"}, ["--dataset", "csv", "--source", ".", "--out", "."], "name another by --out"),
])
def test_bad_input_is_one_line_and_status_2(tmp_path, script, files, argv, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    done = script("data.py", *argv, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "data").exists()


def test_openp5_prompt_lines_are_accepted(tmp_path):
    (tmp_path / "p.txt").write_text("sequential; seen; user_{user_id} took {history}; {target}\n")
    assert data.load_prompts(tmp_path / "p.txt") == [("sequential", "seen", "{user} took {history}", "{target}")]
    (tmp_path / "p.txt").write_text("sequential; seen; no target\n")
    with pytest.raises(data.InputError, match="line 1"):
        data.load_prompts(tmp_path / "p.txt")


def test_meta_counts(toy):
    meta = json.loads((toy / "meta.json").read_text())
    assert meta["users"] == 150 and meta["items"] == 120
    assert meta["cf"]["settings"] == {"dim": 12, "alpha": 2.0, "reg": 1.0, "a0": 0.0, "recency": 0.9}


@pytest.mark.parametrize("number", [1, None, 99])
def test_a_folder_of_another_format_is_one_line(toy, tmp_path, number):
    """Format 1 had a table of users' vectors, and no number."""
    meta = json.loads((toy / "meta.json").read_text())
    (tmp_path / "meta.json").write_text(json.dumps({k: v for k, v in (meta | {"format": number}).items() if v is not None}))
    with pytest.raises(data.InputError, match=r"another version of data.py \(format \d+, now 2\); prepare it again"):
        data.load_dataset(tmp_path)


def test_the_nearest_items_of_a_pool_are_those_of_each():
    """Where vectors are equal or zero too: the fast twin asks the definition then."""
    vectors = torch.randn(700, 5, generator=torch.Generator().manual_seed(0))
    vectors[300:350], vectors[600:630] = vectors[100:150], 0
    unit, pool = torch.nn.functional.normalize(vectors).numpy(), np.arange(0, 700, dtype=int)[::-1][:650].copy()
    assert nearest_of_each(unit, pool, data.nearest) == {i: data.nearest(unit, pool, i) for i in pool.tolist()}
    assert data.nearest(unit, pool, 605) and nearest_of_each(unit, pool[:1], data.nearest) == {int(pool[0]): []}
    apart = np.eye(4, dtype=np.float32)[[0, 1, 2, 2]] + np.float32(0.1) * np.eye(4, dtype=np.float32)
    assert nearest_of_each(apart, np.arange(4), data.nearest)[3] == [2]


def test_the_24_tasks_follow_from_the_truth(toy):
    """Every ELM-style task is there on the toy world, in every split, and its target is made of what is true of its items."""
    dataset = data.load_dataset(toy)
    by_task = {}
    for t in dataset.instances:
        by_task.setdefault(t["task"], []).append(t)
    elm = [t[0] for t in data.load_prompts() if t[0] not in (*data.RANKING_TASKS, *dataset.items[0]["attributes"])]
    elm = [t for t in dict.fromkeys(elm) if t not in ("genres", "decade", "brand", "categories")]
    assert len(elm) == 24 and all({t["split"] for t in by_task[task]} == {"train", "valid", "test"} for task in elm)
    near = torch.nn.functional.normalize(dataset.raw_cf)
    for t in by_task["neighbour difference"][:30]:
        a, b = t["items"]
        pool = [i for i in dataset.items_in(t["split"]) if i != a]
        assert b == max(pool, key=lambda i: float(near[i] @ near[a]))
        mine, other = (dataset.items[i]["attributes"] for i in (a, b))
        assert t["target"] == (", ".join(f"{k} {other[k]}" for k in mine if mine[k] != other[k]) or "nothing")
    a, b = ({"text": "", "attributes": {"genre": g, "mood": "tense"}} for g in ("comedy", "western"))
    assert data.facts_of(a, b) | {"text": 0} == {"text": 0, "facts": "comedy, tense", "genre": "comedy", "mood": "tense", "kind": "comedy",
                                                 "common": "mood tense", "differ": "genre western", "between": "comedy or western, tense"}
