"""Nothing is let in: bad input ends in one line and changes nothing, odd input works, files of strangers run no code, test items leak
nowhere."""
import json
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import EVALUATE, ROOT, STAGES
from test_interruption import one_line, outcome, tree

import data
import train_stage1
import train_stage2
from assets.plumbing import guard, readers, run
from ilm import build_ilm

# ---- Bad input: status 2, one line that names file, line and remedy, nothing changed ---------------------------------

LOG = "".join(f"{u}\t{i}\t3\t{100 * u + i}\n" for u in range(1, 7) for i in range(1, 7))
ITEMS = "".join(f"{i}|Film {i} (1999)|x||url|0|1{'|0' * 17}\n" for i in range(1, 7))
CSV = "user,item,timestamp\n" + "".join(f"u{u},i{i},{i}\n" for u in range(6) for i in range(6))
TABLE = "id,title\n" + "".join(f"i{i},Film {i}\n" for i in range(6))
SEQUENCES = "".join(f"u{u} " + " ".join(f"i{i}" for i in range(6)) + "\n" for u in range(6))


def npz(**arrays):
    def write(path):
        np.savez(path, **arrays)
    return write


class Trap:
    """Unpickled, it would leave a file behind."""

    def __reduce__(self):
        return Path.write_text, (Path("TRAPPED"), "executed")


def movielens(**files):
    return {"u.data": LOG, "u.item": ITEMS} | {k.replace("_", "."): v for k, v in files.items()}


def csv(**files):
    return {"interactions.csv": CSV, "items.csv": TABLE} | {k.replace("_", "."): v for k, v in files.items()}


def openp5(**files):
    return {"user_sequence.txt": SEQUENCES, "items.tsv": TABLE.replace(",", "\t")} | files


DATASETS = {  # name: (files, further flags, words of the message)
    "movielens": [
        (movielens(u_data=""), [], ["u.data", "no interactions"]),
        (movielens(u_data=LOG + "7\t1\t"), [], ["u.data, line 37", "expected"]),                        # truncated
        (movielens(u_data=LOG.replace("\t", ",")), [], ["u.data, line 1"]),                             # another delimiter
        (movielens(u_data=LOG + "7\t1\t3\n"), [], ["u.data, line 37"]),                                 # no timestamp
        (movielens(u_data=LOG + "7\t1\t3\t-5\n"), [], ["u.data, line 37"]),                             # a negative one
        (movielens(u_data=LOG + "7\t1\t3\tnan\n"), [], ["u.data, line 37"]),
        (movielens(u_data=LOG + "7.5\t1\t3\t5\n"), [], ["u.data, line 37"]),
        (movielens(u_data=LOG + "1e300\t1\t3\t5\n"), [], ["u.data, line 37"]),
        (movielens(u_data=LOG + "Ada\t1\t3\t5\n"), [], ["u.data, line 37"]),
        (movielens(u_data=LOG.encode("utf-16")), [], ["u.data, line 1"]),
        (movielens(u_data=bytes(range(256))), [], ["u.data, line 1"]),
        (movielens(u_data=None), [], ["no u.data or ratings.dat or ratings.csv", "grouplens.org"]),     # a folder in its place
        (movielens(u_item=ITEMS.replace("|", ";")), [], ["u.item, line 1", "'|'"]),
        (movielens(u_item=ITEMS + "1|Again|x\n"), [], ["u.item, line 7", "1 stands there for the second time"]),
        (movielens(u_item="77|Another catalogue|x\n"), [], ["u.item", "knows none of the items", "--items"]),
        (movielens(u_item=""), [], ["u.item", "knows none"]),
        (movielens(), ["--items", "nowhere.csv"], ["nowhere.csv: no such file"]),
        (movielens(), ["--items", "."], [".: no such file"]),
        ({"ratings.dat": LOG.replace("\t", ":"), "movies.dat": "1::A::B\n"}, [], ["ratings.dat, line 1", "'::'"]),
        ({"ratings.csv": LOG.replace("\t", ","), "movies.csv": "movieId,title,genres\n1,A,B\n"}, [], ["ratings.csv, line 1", "userId"]),
        ({"ratings.csv": "userId,movieId,rating,timestamp\n1;2;3;4\n", "movies.csv": "movieId,title\n1,A\n"}, [], ["ratings.csv, line 2"]),
        ({"ratings.csv": "", "movies.csv": "movieId,title\n1,A\n"}, [], ["ratings.csv"])],
    "openp5": [
        (openp5() | {"user_sequence.txt": ""}, [], ["no interactions"]),
        (openp5() | {"user_sequence.txt": SEQUENCES + "\nu9 i1 i2\n"}, [], ["user_sequence.txt, line 7", "remove the line"]),
        (openp5() | {"user_sequence.txt": SEQUENCES + "u7\n"}, [], ["user_sequence.txt, line 7"]),
        (openp5() | {"user_sequence.txt": SEQUENCES + "u1 i1 i2\n"}, [], ["user_sequence.txt, line 7", "line 2 already"]),
        (openp5() | {"user_sequence.txt": SEQUENCES + "u9 i\x1b[31m1\n"}, [], ["user_sequence.txt, line 7", "control characters"]),
        (openp5() | {"user_sequence.txt": SEQUENCES + "u9 " + "i" * 2000 + "\n"}, [], ["user_sequence.txt, line 7", "too long"]),
        (openp5() | {"user_sequence.txt": "Jos\xe9 i1\n".encode("latin-1")}, [], ["one item alone, i1"]),
        (openp5() | {"items.tsv": "id\ttitle\ni1\tA\tB\n"}, [], ["items.tsv, line 2", "columns"]),
        (openp5() | {"items.tsv": ""}, [], ["items.tsv", "line 1"]),
        (openp5() | {"items.tsv": "id\ttitle\ni1\tA\ni1\tB\n"}, [], ["items.tsv, line 3", "second time"]),
        (openp5() | {"items.tsv": "id\ttitle\n\tA\n"}, [], ["items.tsv, line 2", "empty"])],
    "csv": [
        (csv(interactions_csv=""), [], ["interactions.csv, line 1", "no column user, item, timestamp"]),
        (csv(interactions_csv="user,item,timestamp\n"), [], ["no interactions"]),
        (csv(interactions_csv=CSV.replace("timestamp", "when")), [], ["interactions.csv, line 1", "no column timestamp"]),
        (csv(interactions_csv=CSV.replace(",", ":")), [], ["interactions.csv, line 1", "no column"]),
        (csv(interactions_csv=CSV + "u1,i1,noon\n"), [], ["interactions.csv, line 38", "'noon'", "any growing count"]),
        (csv(interactions_csv=CSV + "u1,i1,-1\n"), [], ["interactions.csv, line 38"]),
        (csv(interactions_csv=CSV + "u1,i1,\n"), [], ["interactions.csv, line 38"]),
        (csv(interactions_csv=CSV + "u1,i1,inf\n"), [], ["interactions.csv, line 38"]),
        (csv(interactions_csv=CSV + "u1,i1\n"), [], ["interactions.csv, line 38", "3 columns"]),
        (csv(interactions_csv=CSV + ",i1,3\n"), [], ["interactions.csv, line 38", "empty"]),
        (csv(interactions_csv=CSV + '"u\n1",i1,3\n'), [], ["interactions.csv, line 39", "control characters"]),
        (csv(interactions_csv=CSV + '"u1,i1,3\n'), [], ["interactions.csv, line 38 or after it", "quote"]),
        (csv(interactions_csv=CSV.encode("utf-16")), [], ["interactions.csv", "UTF-8"]),
        (csv(interactions_csv=CSV + "Jos\0,i1,3\n"), [], ["interactions.csv, line 38"]),
        (csv(items_csv=TABLE + "i1,Again\n"), [], ["items.csv, line 8", "second time"]),
        (csv(items_csv="id,title\nFilm,Film\n"), [], ["items.csv", "knows none"]),
        (csv(items_csv="id,heading\ni0,A\n"), [], ["line 1", "no column title"]),
        (csv(items_csv=TABLE + "i9,caf\xe9,x\n"), [], ["items.csv, line 8", "2 columns"]),
        (csv(items_csv="id,title,brand,title\ni0,A,b,C\n"), [], ["items.csv, line 1", "two columns are called 'title'"]),
        ({"interactions.csv": CSV, "items.tsv": 'id\ttitle\ni0\t"two\nlines"\n'}, [], ["items.tsv, line 3", "quote it and the header"]),
        ({"a.train.inter": CSV, "a.test.inter": CSV, "a.item": TABLE}, [], ["which of a.test.inter, a.train.inter?"]),
        (csv(cf_npz=npz(item=np.random.default_rng(0).normal(size=(6, 64)).astype(np.float32) * 1e6)), ["--cf", "cf.npz", "--recency", 1],
         ["least squares", "scale the vectors of --cf cf.npz"]),
        ({"interactions.csv": CSV, "items.jsonl": '{"id": "i1"'}, [], ["items.jsonl, line 1"]),
        ({"interactions.csv": CSV, "items.jsonl": '{"id": "i1"}\n[1]\n'}, [], ["items.jsonl, line 2", "no object"]),
        ({"interactions.csv": CSV, "items.jsonl": '{"id": "i1", "attributes": [1]}\n'}, [], ["items.jsonl, line 1", "attributes"]),
        ({"interactions.csv": CSV, "items.jsonl": '{"id": {}}\n' + "[" * 100000}, [], ["items.jsonl, line 2"]),
        (csv(cf_npz="text"), ["--cf", "cf.npz"], ["--cf", "cf.npz"]),
        (csv(cf_npz=npz(user=np.ones((6, 2)))), ["--cf", "cf.npz"], ["cf.npz", "`item`, and perhaps `user`"]),
        (csv(cf_npz=npz(user=np.ones((5, 2)), item=np.ones((6, 2)))), ["--cf", "cf.npz"], ["cf.npz", "user (5, 2)", "(6, 2)"]),
        (csv(cf_npz=npz(user=np.ones((6, 2)), item=np.ones((6, 3)))), ["--cf", "cf.npz"], ["cf.npz", "(6, 3)"]),
        (csv(cf_npz=npz(user=np.ones(6), item=np.ones(6))), ["--cf", "cf.npz"], ["cf.npz", "(6,)"]),
        (csv(cf_npz=npz(user=np.ones((6, 2)), item=np.full((6, 2), np.nan))), ["--cf", "cf.npz"], ["cf.npz", "finite"]),
        (csv(cf_npz=npz(user=np.ones((6, 2)), item=np.array([["x", "y"]] * 6))), ["--cf", "cf.npz"], ["cf.npz"]),
        (csv(cf_npz=npz(user=np.ones((6, 0)), item=np.ones((6, 0)))), ["--cf", "cf.npz"], ["cf.npz", "(6, 0)"]),
        (csv(cf_npz=npz(item=np.ones((5, 2)), item_id=["i1", "i2", "i3", "i4", "i5"])), ["--cf", "cf.npz"], ["cf.npz", "['i0']", "zeros"]),
        (csv(cf_npz=npz(item=np.ones((7, 2)), item_id=["i0", "i0", "i1", "i2", "i3", "i4", "i5"])), ["--cf", "cf.npz"], ["6 of 7 rows"]),
        (csv(cf_npz=npz(item=np.ones((6, 2)), item_id=np.array([*"abcdef"], dtype=object))), ["--cf", "cf.npz"], ["cf.npz", "no objects"]),
        (csv(), ["--cf", "nowhere.npz"], ["nowhere.npz", "No such file"]),
        (csv(), ["--cf", "."], ["--cf .", "directory"])]}


def put(folder, files):
    for name, content in files.items():
        path = folder / name
        if content is None:
            path.mkdir()
        elif callable(content):
            content(path)
        else:
            path.write_bytes(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)


@pytest.mark.parametrize("dataset", DATASETS)
def test_bad_sources(script, tmp_path, dataset):
    wrong = []
    for number, (files, argv, words) in enumerate(DATASETS[dataset]):
        (here := tmp_path / str(number)).mkdir()
        put(here, files)
        before = tree(here)
        done = script("data.py", "--dataset", dataset, "--source", ".", *argv, "--out", "out/x", "--min-count", 1, cwd=here)
        if done.returncode != 2 or done.stderr.count("\n") != 1 or not all(w in done.stderr for w in words) or tree(here) != before:
            wrong.append((number, words, done.returncode, done.stderr[-300:]))
    assert not wrong, "\n".join(map(str, wrong))


LONG = "{history} " + "word " * 1100 + "{user}; {target}\n"
PROMPTS = "sequential; {}; {{history}} next; {{target}}\nstraightforward; {}; for {{user}}; {{target}}\n"
FLAGS = [  # script, flags, files, words
    *(("data.py", argv, {}, words) for argv, words in [
        (["--dataset", "netflix"], ["--dataset", "netflix", "movielens"]), (["--dataset", "csv"], ["needs --source"]),
        (["--source", "shop"], ["--source", "need --dataset csv"]), (["--items", "items.csv"], ["need --dataset csv"]),
        (["--columns", "user=A"], ["need --dataset csv"]), (["--cf-dim", 0], ["--cf-dim", "at least 1"]),
        (["--cf-dim", "many"], ["--cf-dim", "many"]), (["--min-count", -1], ["--min-count"]),
        (["--recency", 0], ["--recency", "at least 0.01"]), (["--recency", 1.1], ["--recency", "at most 1"]),
        (["--recency", "nan"], ["--recency"]),
        (["--reg", 0], ["--reg", "at least 1e-06"]), (["--reg", "inf"], ["--reg"]), (["--a0", -1], ["--a0", "at least 0"]),
        (["--min-count", 10**9], ["nothing is left", "lower it"]), (["--max-users", 0], ["--max-users", "at least 1"]),
        (["--seed", -1], ["--seed", "at least 0"]), (["--seed", 2**64], ["--seed", "at most"]), (["--wordl-seed", 1], ["--wordl-seed"]),
        (["--dataset", "csv", "--source", "nowhere"], ["nowhere", "interactions.csv"])]),
    *(("train_stage1.py", argv, files, words) for argv, files, words in [
        (["--data", "nowhere"], {}, ["nowhere", "not a prepared folder", "data.py"]),
        (["--data", "f"], {"f": ""}, ["f: not a prepared folder"]),
        (["--steps", 0], {}, ["--steps", "at least 1"]), (["--steps", "x"], {}, ["--steps"]), (["--steps", "1e3"], {}, ["--steps"]),
        (["--batch-size", 1], {}, ["--batch-size", "at least 2"]), (["--lr", "nan"], {}, ["--lr"]), (["--lr", "inf"], {}, ["--lr"]),
        (["--lr", -1], {}, ["--lr"]), (["--text-fraction", 0], {}, ["--text-fraction"]), (["--text-fraction", 2], {}, ["--text-fraction"]),
        (["--losses", "itx"], {}, ["--losses", "itx"]), (["--losses"], {}, ["--losses"]), (["--width", 0], {}, ["--width"]),
        (["--num-queries", 0], {}, ["--num-queries"]), (["--layers", 0], {}, ["--layers"]), (["--eval-every", -1], {}, ["--eval-every"]),
        (["--seed", -5], {}, ["--seed"]),
        (["--device", "abacus"], {}, ["--device abacus"]), (["--tokenizer", "./nowhere"], {}, ["--tokenizer ./nowhere", "no such folder"]),
        (["--tokenizer", "."], {}, ["--tokenizer ."]), (["--tokenizer", "."], {"tokenizer.json": "{"}, ["--tokenizer ."]),
        (["--init-bert", "./nowhere"], {}, ["./nowhere"]), (["--init-bert", "assets/toy_llm"], {}, ["--init-bert assets/toy_llm"]),
        (["--resume", "--out", "nowhere"], {}, ["no state.pt", "without --resume"])]),
    *(("train_stage2.py", argv, files, words) for argv, files, words in [
        (["--stage1", "nowhere"], {}, ["nowhere", "train_stage1.py"]),
        (["--stage1", "f"], {"f": ""}, ["f: not a finished stage1 run"]), (["--stage1", "WORK/train_stage2"], {}, ["stage2 run"]),
        (["--method", "magic"], {}, ["--method", "ilm-rand"]), (["--mix", 0, 0, 0], {}, ["--mix"]), (["--mix", 1, 1], {}, ["--mix"]),
        (["--mix", "nan", 1, 1], {}, ["--mix"]), (["--mix", -1, 1, 1], {}, ["--mix"]), (["--valid-users", 0], {}, ["--valid-users"]),
        (["--prior", "mine"], {}, ["--prior", "uniform"]), (["--temperature", 1], {}, ["--temperature", "fixed"]),
        (["--accumulate", 0], {}, ["--accumulate"]), (["--name-tokens", -1], {}, ["--name-tokens"]),
        (["--llm", "./nowhere"], {}, ["--llm ./nowhere", "no such folder"]), (["--llm", "."], {}, ["--llm ."]),
        (["--llm", "."], {"config.json": "{}"}, ["--llm ."]), (["--llm", "."], {"config.json": '{"model_type": "llama"}'}, ["--llm ."]),
        (["--item-names", "nowhere"], {}, ["--item-names nowhere"]), (["--item-names", "names"], {"names": "001 7\n"}, ["no line for"]),
        (["--item-names", "names"], {"names": b"001 \xff\n"}, ["--item-names names", "lines `id name`"]),
        (["--prompts", "nowhere"], {}, ["nowhere"]), (["--prompts", "."], {}, ["error: ."]), (["--prompts", "p"], {"p": b"\xff"}, ["p: "]),
        (["--prompts", "p"], {"p": PROMPTS.format("seen", "seen")}, ["--prompts p", "unseen"]),
        (["--prompts", "p"], {"p": "sequential; never; {history}; {target}\n"}, ["p, line 1", "seen or unseen"]),
        (["--prompts", "p"], {"p": PROMPTS.format("seen", "unseen") + "mood; unseen; {item}?; {mood}\n"}, ["p, line 3", "to write"]),
        (["--prompts", "p"], {"p": "# one\nsequential; seen; {histroy}; {target}\n"}, ["p, line 2", "{histroy}", "history"]),
        (["--prompts", "p"], {"p": "sequential; seen; {item}; {target}\n"}, ["p, line 1", "{item}"]),
        (["--prompts", "p"], {"p": "sequential; seen; {history}; it\n"}, ["p, line 1", "{target}"]),
        (["--prompts", "p"], {"p": "sequential; seen; {history}\n"}, ["p, line 1"]),
        (["--prompts", "p"], {"p": "".join(f"{t}; {s}; {LONG}" for t in data.RANKING_TASKS for s in ("seen", "unseen"))},
         ["fit the LLM's context"]),
        (["--resume"], {}, ["no state.pt"]), (["--resume", "--out", "WORK/train_stage2", "--seed", 3], {}, ["another", "seed"])]),
    *(("evaluate.py", argv, files, words) for argv, files, words in [
        (["--run", "nowhere"], {}, ["nowhere", "not a finished"]), (["--run", "."], {"config.json": "{"}, ["model.safetensors"]),
        (["--table", "nowhere"], {}, ["nowhere"]),
        (["--table", "t"], {"t": "{"}, ["--table"]), (["--table", "t"], {"t": "[1]"}, ["--table"]),
        (["--beams", -1], {}, ["--beams"]), (["--batch-size", 0], {}, ["--batch-size"]), (["--max-users", 0], {}, ["--max-users"]),
        (["--sasrec", '{"x": 1}'], {}, ["--sasrec", "width"]), (["--sasrec", '{"width": "x"}'], {}, ["--sasrec", "width"]),
        (["--sasrec", "[1]"], {}, ["--sasrec"]),
        (["--split", "train"], {}, ["--split", "test"]), (["--max-texts", "x"], {}, ["--max-texts"]), (["--seed", -1], {}, ["--seed"]),
        (["--run", "WORK/train_stage2", "--data", "nowhere"], {}, ["nowhere", "data.py"]),
        (["--run", "WORK/train_stage2", "--data", "WORK/data/toy", "--sc-encoder", "./nowhere", "--max-texts", 1, *EVALUATE, "--tasks",
          "text"], {},
         ["--sc-encoder ./nowhere"])]),
    *(("ilm.py", argv, {}, words) for argv, words in [
        (["--run", "nowhere"], ["nowhere", "train_stage2.py"]), (["--run", "WORK/train_stage1"], ["stage1 run"]),
        (["--run", "WORK/train_stage2", "--data", "WORK/data/toy", "About {item:999}"], ["no item", "999"]),
        (["--run", "WORK/train_stage2", "--data", "WORK/data/toy", "About {item}"], ["{item:ID}"]),
        (["--run", "WORK/train_stage2", "--data", "WORK/data/toy", "--new", "nowhere"], ["nowhere"])])]


@pytest.mark.parametrize("name", ["data.py", *STAGES, "evaluate.py", "ilm.py"])
def test_bad_flags(script, work, tmp_path, name):
    wrong, before = [], tree(work)
    for number, (_, argv, files, words) in enumerate(row for row in FLAGS if row[0] == name):
        (here := tmp_path / str(number)).mkdir()
        put(here, files)
        (here / "assets").symlink_to(ROOT / "assets")
        there = tree(here)
        argv = [*(a.replace("WORK", str(work)) if isinstance(a, str) else a for a in argv)]
        standard = ["--data", work / "data" / "toy"] if name in STAGES and "--data" not in argv else []
        standard += [] if "--method" in argv or "--stage1" in argv or name not in STAGES else STAGES[name][:2] if "2" in name else []
        done = script(name, *standard, *argv, cwd=here)
        if done.returncode != 2 or done.stderr.count("\n") != 1 or not all(w in done.stderr for w in words) or tree(here) != there:
            wrong.append((number, argv, words, done.returncode, done.stderr[-400:]))
    assert not wrong, "\n".join(map(str, wrong))
    assert tree(work) == before


def test_at_least_sixty_bad_inputs():
    assert sum(map(len, DATASETS.values())) + len(FLAGS) >= 120


# ---- Broken or foreign files of ours: runs, prepared folders, LLM folders --------------------------------------------

def half(path):
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def garbage(path):
    path.write_bytes(np.random.default_rng(0).bytes(5000))


def trap(path):
    """A pickle that runs code, in the shape in which the file is read: torch's zip, numpy's zip, or bare."""
    if path.suffix in (".pt", ".bin"):
        torch.save({"weights": Trap()}, path)
    elif path.suffix == ".npz":
        np.savez(path, **{name: np.array([Trap()], dtype=object) for name in ("user", "item", "indptr", "items")})
    else:
        path.write_bytes(pickle.dumps(Trap(), protocol=2))


def bare(path):
    path.write_bytes(pickle.dumps(Trap(), protocol=2))


def edit(**changes):
    def change(path):
        config = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return change


def text(content):
    return lambda path: path.write_text(content)


def other_weights(path):
    from safetensors.torch import save_file
    save_file({"nothing": torch.ones(2)}, path)


def more_tokens(path):
    """The tokenizer of another LLM: more tokens than this one has embeddings."""
    tokenizer = json.loads(path.read_text())
    tokenizer["added_tokens"] += [dict(tokenizer["added_tokens"][0], id=1024 + k, content=f"<{k}>") for k in range(5)]
    path.write_text(json.dumps(tokenizer))


BROKEN = [  # script, flags, file, what is done to it, words
    *(("train_stage2.py", ["--stage1", "train_stage1"], f"train_stage1/{file}", change, words) for file, change, words in [
        ("model.safetensors", half, ["model.safetensors", "train again"]), ("model.safetensors", garbage, ["model.safetensors"]),
        ("model.safetensors", trap, ["model.safetensors"]), ("model.safetensors", text(""), ["model.safetensors"]),
        ("model.safetensors", other_weights, ["does not fit this configuration"]), ("config.json", half, ["config.json"]),
        ("config.json", text("[]"), ["config.json"]), ("config.json", text("{}"), ["config.json", "kind"]),
        ("config.json", edit(qformer=None), ["config.json", "qformer"]),
        ("config.json", edit(qformer={"cf_dim": 8, "x": 1}), ["config.json"]),
        ("config.json", edit(qformer={"cf_dim": 8, "vocab_size": 9}), ["does not fit"]),
        ("config.json", edit(fingerprint=[1]), ["other CF"]), ("config.json", edit(fingerprint=5), ["fingerprint"]),
        ("tokenizer/tokenizer.json", half, ["tokenizer"])]),
    *(("train_stage1.py", ["--resume", "--out", "train_stage1", *STAGES["train_stage1.py"]], f"train_stage1/{file}", change, words)
      for file, change, words in [
        ("state.pt", half, ["--resume: train_stage1", "without --resume"]), ("state.pt", garbage, ["without --resume"]),
        ("state.pt", trap, ["without --resume"]), ("state.pt", bare, ["without --resume"]), ("config.json", half, ["without --resume"]),
        ("config.json", edit(lr=7), ["another lr"]), ("log.jsonl", text("no\n"), ["without --resume"])]),
    *(("train_stage1.py", ["--steps", 1], f"data/toy/{file}", change, words) for file, change, words in [
        ("cf.npz", half, ["cf.npz: differs", "prepare the folder again"]), ("users.txt", text(""), ["users.txt: differs"]),
        ("meta.json", half, ["data/toy", "prepare the folder again"]), ("meta.json", text("{}"), ["data/toy", "format 1, now 2"]),
        ("meta.json", edit(sha256=None), ["data/toy", "sha256"]), ("meta.json", edit(format=3), ["data/toy", "prepare it again"]),
        ("meta.json", edit(cf={"settings": {"d": 1}}), ["data/toy", "prepare the folder again"]),
        ("meta.json", edit(cf=None), ["data/toy"]),
        ("meta.json", edit(sha256={}, held_out={}), ["data/toy"])]),
    ("train_stage2.py", ["--method", "text", "--train-llm", "--llm", "llm"], "llm/model.safetensors", half, ["--llm llm"]),
    ("train_stage2.py", ["--method", "text", "--train-llm", "--llm", "llm"], "llm/tokenizer.json", half, ["--llm llm"]),
    ("evaluate.py", ["--run", "train_stage2"], "train_stage2/config.json", edit(llm=None), ["config.json", "llm"]),
    ("evaluate.py", ["--run", "train_stage2"], "train_stage2/config.json", edit(prior=None), ["has no prior", "train again"]),
    ("evaluate.py", ["--run", "train_stage2"], "train_stage2/config.json", edit(fingerprint=[1]), ["data/toy has other CF vectors"]),
    ("train_stage2.py", ["--method", "text", "--train-llm", "--llm", "llm"], "llm/tokenizer.json", more_tokens, ["another LLM's"]),
    ("evaluate.py", ["--run", "train_stage2"], "train_stage2/model.safetensors", half, ["model.safetensors"]),
]


def fresh_copy(work, here):
    for name in ("data", "train_stage1", "train_stage2"):
        shutil.copytree(work / name, here / name)
    shutil.copytree(ROOT / "assets" / "toy_llm", here / "llm")
    (here / "assets").symlink_to(ROOT / "assets")


def test_broken_files(script, work, tmp_path):
    wrong = []
    fresh_copy(work, tmp_path)
    for name, argv, file, change, words in BROKEN:
        whole = (tmp_path / file).read_bytes()
        change(tmp_path / file)
        before = tree(tmp_path)
        done = script(name, *argv, cwd=tmp_path)
        if done.returncode != 2 or done.stderr.count("\n") != 1 or not all(w in done.stderr for w in words) or tree(tmp_path) != before:
            wrong.append((name, argv, file, change, words, done.returncode, done.stderr[-400:]))
        (tmp_path / file).write_bytes(whole)
    assert not wrong, "\n".join(map(str, wrong))


# ---- Trust -----------------------------------------------------------------------------------------------------------

def test_files_of_strangers_run_no_code(script, work, tmp_path):
    """A malicious pickle under each name that we load, where a sum (meta.json) protects it with the right sum."""
    import hashlib
    fresh_copy(work, tmp_path)
    trap(tmp_path / "cf.npz"), put(tmp_path, csv())
    done = script("data.py", *"--dataset csv --source . --min-count 1 --out out --cf cf.npz".split(), cwd=tmp_path)
    one_line(done, 2, "--cf cf.npz")
    bare(tmp_path / "cf.npz")
    one_line(script("data.py", *"--dataset csv --source . --min-count 1 --out out --cf cf.npz".split(), cwd=tmp_path), 2, "--cf cf.npz")
    for file in ("cf.npz", "sequences.npz"):
        for plant in (trap, bare):
            path, meta = tmp_path / "data/toy" / file, tmp_path / "data/toy/meta.json"
            whole, sums = path.read_bytes(), json.loads(meta.read_text())["sha256"]
            plant(path)
            edit(sha256=sums | {file: hashlib.sha256(path.read_bytes()).hexdigest()})(meta)
            one_line(script("train_stage1.py", "--steps", 1, cwd=tmp_path), 2, "data/toy", "prepare the folder again")
            path.write_bytes(whole), edit(sha256=sums)(meta)
    (tmp_path / "llm/model.safetensors").unlink()
    for plant in (trap, bare):
        plant(tmp_path / "llm/pytorch_model.bin")
        one_line(script("train_stage2.py", "--method", "text", "--train-llm", "--llm", "llm", cwd=tmp_path), 2, "--llm llm")
        (tmp_path / "bert").mkdir(exist_ok=True)
        plant(tmp_path / "bert/pytorch_model.bin")
        (tmp_path / "bert/config.json").write_text('{"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 99}')
        one_line(script("train_stage1.py", *"--steps 1 --init-bert bert".split(), cwd=tmp_path), 2, "--init-bert bert")
    assert not list(tmp_path.rglob("TRAPPED")) and not (ROOT / "TRAPPED").exists()


def test_code_that_comes_with_a_model_is_not_run(script, work, tmp_path):
    fresh_copy(work, tmp_path)
    (tmp_path / "llm/evil.py").write_text("open('TRAPPED', 'w')\nclass Evil: pass\n")
    edit(model_type="evil", auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"})(tmp_path / "llm/config.json")
    done = script("train_stage2.py", "--method", "text", "--train-llm", "--llm", "llm", cwd=tmp_path)
    one_line(done, 2, "--llm llm")
    assert not list(tmp_path.rglob("TRAPPED"))


EVIL = "\x1b[2J\x1b]0;owned\x07\x9b31m\r\u202eEvil\x00"


def test_control_characters_reach_neither_files_nor_the_terminal(script, tmp_path):
    put(tmp_path, {"interactions.csv": CSV, "items.jsonl": "".join(json.dumps(
        {"id": f"i{i}", "title": f"{EVIL} {i}", "text": f"{EVIL} text {i}", "attributes": {f"{EVIL}": EVIL}}) + "\n" for i in range(6))})
    done = script("data.py", *"--dataset csv --source . --min-count 1 --out out".split(), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    dataset = data.load_dataset(tmp_path / "out")
    told = json.dumps([dataset.items, dataset.instances], ensure_ascii=False) + done.stdout
    assert not guard.CONTROL.search(told.replace("\n", "")) and "Evil 1" in dataset.items[1]["title"]
    (tmp_path / f"a{EVIL[:4]}").mkdir()
    done = script("data.py", "--dataset", "csv", "--source", f"a{EVIL[:4]}", cwd=tmp_path)
    assert "\x1b" not in one_line(done, 2, "no interactions.csv")
    put(tmp_path, {"user_sequence.txt": f"u {EVIL[:3]}\n"})
    assert "\x1b" not in one_line(script("data.py", "--dataset", "openp5", "--source", ".", cwd=tmp_path), 2, "line 1")


def test_ids_and_titles_never_become_paths(script, tmp_path):
    ids = ["../../up", "/etc/passwd", "..", "a/b", "C:\\x", "~"]
    (here := tmp_path / "deep" / "er").mkdir(parents=True)
    rows = "".join(f"{u},{i},{t}\n" for u in ids for t, i in enumerate(ids))
    put(here, {"interactions.csv": "user,item,timestamp\n" + rows, "items.csv": "id,title\n" + "".join(f"{i},{i}\n" for i in ids)})
    argv = ["--dataset", "csv", "--source", ".", "--min-count", 1, "--out", "out"]
    assert script("data.py", *argv, cwd=here).returncode == 0
    assert sorted(tree(tmp_path)) == sorted(f"deep/er/{x}" for x in ("interactions.csv", "items.csv", *(
        f"out/{f}" for f in ("items.jsonl", "users.txt", "sequences.npz", "cf.npz", "tasks.jsonl", "meta.json"))))
    assert data.load_dataset(here / "out").users == sorted(ids)


# ---- Odd input that works --------------------------------------------------------------------------------------------

ODD = {
    "interactions.csv": "\ufeffuser,item,timestamp,note\r\n" + "".join(
        f"u{u},i{i},{t},x\r\n" for u in range(8) for t, i in enumerate(np.random.default_rng(u).permutation(9)[:7])) +
        "short,i1,5,x\r\nshort,i8,6,x\r\nRené 東京,i2,1,x\r\n \"spaced id\" ,i3,1,x\r\nu1,unknown to the table,99,x\r\n".replace('"', ""),
    "items.csv": '\ufeffid,title,text,brand\r\ni0,Amélie,"a, quoted ""text""",B\r\ni1,,no title,B\r\ni2,Same,,\r\ni3,Same,,\r\n'
                 'i4,"two\nlines",x,B\r\ni5,日本語 映画 🎬,text,B\r\ni6,,,\r\ni7,"' + "long " * 400 + '",x,B\r\n'
                 'i8,&<br>;{item};{history}<|soft|><|end|>,x,B\r\n'}


def test_odd_input_goes_through_every_script(script, tmp_path):
    """BOM, CRLF, unicode, equal, empty and endless titles, line breaks and placeholders in them, items without text, items that the
    table does not know, users with one interaction, repeated purchases."""
    put(tmp_path, ODD)
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    for command in ("data.py --dataset csv --source . --min-count 1 --cf-dim 4 --out out/x", "train_stage1.py --data out/x --out s1 "
                    "--steps 2 --batch-size 4 --width 36 --losses ii ui", "train_stage2.py --data out/x --out s2 --stage1 s1 --steps 2 "
                    "--batch-size 2 --valid-users 4 --name-tokens 8", "evaluate.py --run s1 s2 --controls"):
        done = script(*command.split(), cwd=tmp_path)
        assert done.returncode == 0 and not done.stderr, (command, done)
    dataset = data.load_dataset(tmp_path / "out" / "x")
    titles = {item["id"]: item["title"] for item in dataset.items}
    assert titles["i0"] == "Amélie" and titles["i1"] == "item i1" and titles["i3"] == "Same (2)" and titles["i4"] == "two lines"
    assert titles["i5"] == "日本語 映画 🎬" and titles["i6"] == "item i6" and titles["unknown to the table"] == "item unknown to the table"
    assert {"René 東京", "spaced id"} <= {*dataset.users} and len(dataset.eligible()) == 8


def test_columns_as_people_name_them(tmp_path):
    """Capitals, a space before a quoted field, a column of words called attributes."""
    put(tmp_path, {"items.csv": 'ID,Title,Genre,attributes\ni0, "One, two",Drama,"red, large"\ni1, "Three",War,\n'})
    found = readers.read_items(tmp_path / "items.csv", say=lambda table: None)
    assert found["i0"]["title"] == "One, two" and found["i0"]["attributes"] == {"genre": "Drama", "attributes": "red, large"}
    assert data.facts_of(found["i0"])["kind"] == "Drama" and found["i1"]["attributes"] == {"genre": "War"}
    item = {"title": "A", "text": "what is said of it", "attributes": {"text": "a column that is called so"}}
    assert data.facts_of(item)["text"] == "what is said of it"


def test_a_small_llm_reads_items_without_attributes(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "assets" / "toy_llm")
    from pretrain import Corpus
    items = [{"title": f"Film {i}", "text": f"What is said of {i}", "attributes": {"genre": "War"} if i == 3 else {}} for i in range(30)]
    corpus = Corpus(items, data.load_prompts(ROOT / "assets" / "toy_llm" / "prompts.txt"), 0)
    said = " ".join(corpus.document() for _ in range(1000))
    assert all(item["title"] in said and item["text"] in said for item in items)


def test_what_is_not_ours_is_not_written_over(script, work, tmp_path):
    """Inputs of the same command, and files of a stranger that are called like ours."""
    put(tmp_path, csv(cf_npz=npz(item=np.ones((6, 2)))))
    for copied, name in ((work / "train_stage1", "stage1"), (work / "data/toy", "toy"), (ROOT / "assets/toy_llm", "llm")):
        shutil.copytree(copied, tmp_path / name)
    for name, file in (("vectors", "cf.npz"), ("table", "items.csv"), ("mine", "config.json"), ("notes", "previous")):
        (tmp_path / name).mkdir()
        if file in ("cf.npz", "items.csv"):
            shutil.copy(tmp_path / file, tmp_path / name / file)
        else:
            put(tmp_path / name, {file: None if file == "previous" else '{"model_type": "llama"}'})
    before = tree(tmp_path)
    prepare = "data.py --dataset csv --source . --min-count 1".split()
    stage1, stage2 = ["train_stage1.py", "--data", "toy", "--tokenizer", "llm"], ["train_stage2.py", "--data", "toy", "--llm", "llm"]
    for argv, words in ((prepare + ["--cf", "vectors/cf.npz", "--out", "vectors"], "the folder of --cf"),
                        (prepare + ["--items", "table/items.csv", "--out", "table/../table"], "the folder of --items"),
                        (prepare + ["--out", "vectors"], "has cf.npz in it, not of ours"),
                        (stage1 + ["--out", "mine"], "has config.json in it"), (stage1 + ["--out", "notes"], "has previous in it"),
                        (stage2 + ["--stage1", "stage1", "--out", "./stage1"], "take the place of --stage1"),
                        (stage2 + ["--method", "mlp", "--out", "llm"], "the place of --llm"),
                        (stage2 + ["--method", "mlp", "--out", "toy"], "the place of --data")):
        one_line(script(*argv, cwd=tmp_path), 2, words)
    assert tree(tmp_path) == before


def test_histories_too_short_to_train_on(script, tmp_path):
    """Three interactions leave one training item: nothing to pair, nothing to predict from."""
    rows = "".join(f"u{u},i{(u + t) % 9},{t}\n" for u in range(9) for t in range(3))
    put(tmp_path, {"interactions.csv": "user,item,timestamp\n" + rows,
                   "items.csv": "id,title,text\n" + "".join(f"i{i},Thing {i},a thing\n" for i in range(9))})
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    assert script("data.py", *"--dataset csv --source . --min-count 1 --cf-dim 4 --out x".split(), cwd=tmp_path).returncode == 0
    one_line(script("train_stage1.py", *"--data x --out s1 --steps 1".split(), cwd=tmp_path), 2, "no user has two training items")
    one_line(script("train_stage2.py", *"--data x --out s2 --steps 1 --method mlp".split(), cwd=tmp_path), 2, "4 interactions")
    one_line(script("train_stage2.py", *"--data x --out s2 --steps 1 --mix 0 0 1 --method mlp".split(), cwd=tmp_path), 2, "validation item")


@pytest.mark.parametrize("files, argv", [
    ({"u.data": "\ufeff" + LOG.replace("\n", "\r\n"), "u.item": ("\ufeff" + ITEMS.replace("Film 1", "Caf\xe9")).encode()}, []),
    ({"u.data": LOG.rstrip("\n") + "\n\n", "u.item": ITEMS.replace("Film 1", "Caf\xe9").encode("latin-1")}, []),
    ({"ratings.dat": "\ufeff" + LOG.replace("\t", "::"),
      "movies.dat": "".join(f"{i}::Caf\xe9::Drama\r\n" for i in range(1, 7)).encode("latin-1")}, []),
    ({"ratings.csv": "\ufeffuserId,movieId,rating,timestamp\r\n" + LOG.replace("\t", ",").replace("\n", "\r\n"),
      "movies.csv": "\ufeffmovieId,title,genres\r\n" + "".join(f'{i},"Caf\xe9, the",A|B\r\n' for i in range(1, 7))}, [])])
def test_odd_movielens_files(script, tmp_path, files, argv):
    put(tmp_path, files)
    done = script("data.py", *"--dataset movielens --source . --min-count 1 --cf-dim 2 --out out".split(), *argv, cwd=tmp_path)
    assert done.returncode == 0 and not done.stderr, done
    dataset = data.load_dataset(tmp_path / "out")
    assert dataset.users == list("123456") and "Caf\xe9" in dataset.items[0]["title"] and len(dataset.sequence) == 36


def test_titles_and_texts_longer_than_the_context(script, tmp_path):
    """An LLM with learnt positions, 200 of them: names have to be cut, and one line says so; targets are cut, histories lose old items."""
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel
    put(tmp_path, ODD)
    AutoTokenizer.from_pretrained(ROOT / "assets" / "toy_llm").save_pretrained(tmp_path / "llm")
    GPT2LMHeadModel(GPT2Config(vocab_size=1024, n_positions=200, n_embd=32, n_layer=1, n_head=2, bos_token_id=0,
                               eos_token_id=0)).save_pretrained(tmp_path / "llm")
    assert script("data.py", *"--dataset csv --source . --min-count 1 --cf-dim 4 --out out/x".split(), cwd=tmp_path).returncode == 0
    argv = "--data out/x --out s2 --llm llm --method ilm-rand --width 32 --steps 2 --batch-size 2 --valid-users 4".split()
    one_line(script("train_stage2.py", *argv, cwd=tmp_path), 2, "fit the LLM's context of 200", "--name-tokens")
    done = script("train_stage2.py", *argv, "--name-tokens", 8, cwd=tmp_path)
    assert done.returncode == 0 and not done.stderr, done
    done = script("evaluate.py", "--run", "s2", "--max-texts", 4, cwd=tmp_path)
    assert done.returncode == 0 and not done.stderr, done


def test_quotes_in_a_tsv_are_inches(script, tmp_path):
    put(tmp_path, openp5() | {"items.tsv": 'id\ttitle\ni0\t"Weird Al" live\ni1\t7" single\ni2\t"open\n'})
    done = script("data.py", *"--dataset openp5 --source . --min-count 1 --out out".split(), cwd=tmp_path)
    assert done.returncode == 0
    assert [x["title"] for x in data.load_dataset(tmp_path / "out").items[:3]] == ['"Weird Al" live', '7" single', '"open']


# ---- Fuzz ------------------------------------------------------------------------------------------------------------

def mutated(rng, whole):
    """Some bytes changed, cut out, doubled, swapped for separators; sometimes all of them random."""
    raw = bytearray(whole)
    for _ in range(int(rng.integers(1, 6))):
        at, n, kind = int(rng.integers(len(raw) + 1)), int(rng.integers(1, 20)), rng.integers(5)
        piece = rng.bytes(n) if kind < 2 else b"" if kind == 2 else bytes(raw[at:at + n]) * 3 if kind == 3 else \
            rng.choice([b",", b"\t", b"\n", b'"', b"::", b"|", b"{", b"}", b";", b"-1", b"nan", b"\0", b"\xff", b"[", b"1e999"])
        raw[at:at + n] = bytes(piece)
    return rng.bytes(200) if rng.integers(20) == 0 else bytes(raw)


def read_folder(path):
    data.load_dataset(path.parent)


FUZZED = {  # file: (its whole content, who reads it)
    "u.data": (LOG, lambda p: readers.read_movielens(p.parent)), "u.item": (ITEMS, readers.read_items),
    "ratings.dat": (LOG.replace("\t", "::"), lambda p: readers.read_movielens(p.parent)),
    "ratings.csv": ("userId,movieId,rating,timestamp\n" + LOG.replace("\t", ","), lambda p: readers.read_movielens(p.parent)),
    "user_sequence.txt": (SEQUENCES, lambda p: readers.read_openp5(p.parent)),
    "interactions.csv": (CSV, lambda p: readers.read_csv(p.parent)),
    "items.csv": (ODD["items.csv"], readers.read_items), "items.tsv": (openp5()["items.tsv"], readers.read_items),
    "items.jsonl": ('{"id": "a", "title": "T", "text": null, "attributes": {"x": ["y", 1]}}\n{"asin": 3, "brand": "b|c"}\n',
                    readers.read_items),
    "prompts.txt": ((ROOT / "prompts.txt").read_text(), data.load_prompts)}


@pytest.mark.parametrize("file", FUZZED)
def test_readers_under_fuzz(tmp_path, file):
    """Whatever the bytes: a table, or one InputError of one printable line; never another exception, never a hang."""
    whole, read = FUZZED[file]
    rng, refused = np.random.default_rng(sum(file.encode())), 0
    for _ in range(150):
        (tmp_path / file).write_bytes(mutated(rng, whole.encode()))
        try:
            read(tmp_path / file)
        except data.InputError as error:
            refused += 1
            assert file in str(error) and guard.printable(error)
    assert refused > 10


def test_binary_files_under_fuzz(work, tmp_path):
    """The same for .npz, .safetensors and config.json, and for a prepared folder whose sums are right and whose content is not."""
    import hashlib
    shutil.copytree(work / "data" / "toy", tmp_path / "toy")
    shutil.copytree(work / "train_stage1", tmp_path / "run")
    rng, refused = np.random.default_rng(0), 0
    np.savez(tmp_path / "cf.npz", user=np.ones((6, 2)), item=np.ones((5, 2)))
    cf, weights = (tmp_path / "cf.npz").read_bytes(), (tmp_path / "run/model.safetensors").read_bytes()[:5000]
    meta = json.loads((tmp_path / "toy/meta.json").read_text())
    for turn in range(60):
        (tmp_path / "cf.npz").write_bytes(mutated(rng, cf))
        (tmp_path / "run/model.safetensors").write_bytes(mutated(rng, weights))
        (tmp_path / "run/config.json").write_bytes(mutated(rng, (work / "train_stage1/config.json").read_bytes()))
        file = ("sequences.npz", "cf.npz", "users.txt", "items.jsonl", "tasks.jsonl")[turn % 5]
        (tmp_path / "toy" / file).write_bytes(mutated(rng, whole := (work / "data/toy" / file).read_bytes()))
        sums = meta["sha256"] | {file: hashlib.sha256((tmp_path / "toy" / file).read_bytes()).hexdigest()}
        (tmp_path / "toy/meta.json").write_text(json.dumps(meta | {"sha256": sums}))
        for read in (lambda: readers.load_cf(tmp_path / "cf.npz", [*"uvwxyz"], [*"abcde"]),
                     lambda: run.load_weights({}, tmp_path / "run/model.safetensors"),
                     lambda: run.read_config(tmp_path / "run", "stage1"), lambda: data.load_dataset(tmp_path / "toy")):
            try:
                read()
            except data.InputError:
                refused += 1
        (tmp_path / "toy" / file).write_bytes(whole)
    assert refused > 100


def test_what_a_user_types_under_fuzz(make_ilm):
    """A line of the conversation, mentions in any state of disrepair: token ids, or one InputError."""
    from assets.extras.chat import Chat
    chat, rng, refused = Chat(make_ilm()), np.random.default_rng(0), 0
    pieces = ["{item:", "{user:", "{history:", "{", "}", "[", "]", "001", "7", "-1", "*0.5", "*", "+item:", ",", " amber ", "\x1b[2J", "\0",
              "<|soft|>", "{item}", "{text}", "\ud800", "e", " ", "9" * 30, "{item:001}", "{user:3}", "{history:001,002}",
              "{item:001*0.5+item:002*0.5}"]
    for _ in range(400):
        line = "".join(rng.choice(pieces, size=rng.integers(1, 9)))
        try:
            assert chat.model.prompt_ids([chat.resolve(line)], named=False, guests=chat.guests)
        except data.InputError as error:
            refused += bool(guard.printable(error))
    assert 100 < refused < 400


# ---- Numbers ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, step", [("train_stage1.py", 3), ("train_stage2.py", 3), ("train_stage1.py", 2)])
def test_a_loss_that_is_not_finite_stops_at_once(script, work, tmp_path, name, step):
    """At whatever step, not only where there is a line of the log; what was saved before is kept, and can be gone on from."""
    code = f"""
import ilm, {name[:-3]} as t
rate, forward, pair, now = t.set_learning_rate, ilm.ILM.forward, getattr(t, "pair_loss", None), []
def hooked(optimizer, step, *rest):
    now[:] = [step]
    return rate(optimizer, step, *rest)
def bad(training=True):
    return float("nan") if now == [{step}] and training else 1.0
def spoiled_pair(model, left_cf, right_cf, left_key, *rest):
    loss, accuracy = pair(model, left_cf, right_cf, left_key, *rest)
    return loss * (bad() if left_key[0] < 0 else 1.0), accuracy  # users have negative keys: the UI loss
def spoiled_forward(self, batch):
    return tuple(x * bad(self.training) for x in forward(self, batch))
t.set_learning_rate, t.pair_loss, ilm.ILM.forward = hooked, spoiled_pair, spoiled_forward
"""
    argv = [*STAGES[name], "--out", tmp_path / "run"]
    line = one_line(script(name, *argv, cwd=work, before=code), 2, f"step {step}: loss ", "is nan", "kept", "--lr")
    assert "loss ui" in line if "1" in name else re.search("loss (sequential|straightforward|text)", line)
    state = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    assert state["step"] == 2 and all(torch.isfinite(w).all() for w in state["weights"].values())
    assert script(name, *argv, "--resume", cwd=work).returncode == 0


def test_an_fp16_overflow_is_the_scalers_business():
    """It skips the step and lowers its scale, which the log shows; a loss that overflows is not hidden."""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer, scaler = torch.optim.SGD([weight], 0.1), torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale((weight * torch.inf).sum()).backward()
    norm = train_stage1.clip_and_step(optimizer, scaler)
    assert torch.equal(weight.data, torch.ones(3)) and scaler.get_scale() == 4.0
    run.check_step({"itc": torch.tensor(1.0)}, 7, norm, scaler)
    with pytest.raises(data.InputError, match="step 7: loss itc is inf"):
        run.check_step({"itc": torch.tensor(torch.inf)}, 7, norm, scaler)
    off = torch.amp.GradScaler("cpu", enabled=False)
    with pytest.raises(data.InputError, match="step 7: the norm of the gradient is nan"):
        run.check_step({"itc": torch.tensor(1.0)}, 7, float("nan"), off)


# ---- Leakage ---------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Two prepared folders whose raw data differ in every user's test item alone (the same items in all)."""
    folder, rng = tmp_path_factory.mktemp("planted"), np.random.default_rng(0)
    orders = [rng.permutation(20)[:9] for _ in range(40)]
    for name, shift in (("a", 0), ("b", 7)):
        (folder / name).mkdir()
        ends = [orders[(u + shift) % 40][-1] for u in range(40)]
        rows = "".join(f"u{u:02},i{i:02},{t}\n" for u in range(40) for t, i in enumerate([*orders[u][:-1], ends[u]]))
        put(folder / name, {"interactions.csv": "user,item,timestamp\n" + rows,
                            "items.csv": "id,title,genre\n" + "".join(f"i{i:02},Film {i},g{i % 3}\n" for i in range(20))})
        data.main(["--dataset", "csv", "--source", str(folder / name), "--min-count", "1",
                   "--out", str(folder / name / "out" / "x")])
    a, b = (data.load_dataset(folder / name / "out" / "x") for name in "ab")
    differ = sum(a.target(u, "test") != b.target(u, "test") for u in range(40))
    assert differ > 30 and [x["id"] for x in a.items] == [x["id"] for x in b.items]
    return a, b


def test_test_items_influence_no_prepared_file(planted):
    """CF vectors and their settings, statistics of users, held-out items, text tasks with their neighbours: the same bytes."""
    a, b = planted
    same = {f: (a.path / f).read_bytes() == (b.path / f).read_bytes() for f in ("cf.npz", "items.jsonl", "tasks.jsonl", "users.txt")}
    assert all(same.values()), same
    assert a.meta["held_out"] == b.meta["held_out"] and a.meta["cf"] == b.meta["cf"]
    assert (a.path / "sequences.npz").read_bytes() != (b.path / "sequences.npz").read_bytes()


def test_test_items_influence_no_pair_history_prompt_or_target(planted):
    seen = []
    for dataset in planted:
        pairs, rng = train_stage1.Pairs(dataset), np.random.default_rng(3)
        args = train_stage2.parse_args(["--method", "ilm-rand", "--data", str(dataset.path)])
        torch.manual_seed(0)
        examples = train_stage2.Examples(build_ilm(train_stage2.make_config(args, dataset)[0], dataset, torch.device("cpu")), dataset)
        batches = [examples.batch(kind, 4, rng) for kind in ("sequential", "straightforward", "text")]
        histories = [dataset.items_of(u, "valid").tolist() for u in range(40)]
        seen.append([pairs.ii(200, rng), pairs.ui(30, rng), batches, examples.validation(20, 4_096), histories])
    flat = lambda x: x.tolist() if torch.is_tensor(x) else {k: flat(v) for k, v in x.items()} if isinstance(x, dict) else \
        [flat(v) for v in x] if isinstance(x, (list, tuple)) else x
    assert flat(seen[0]) == flat(seen[1])


def test_test_items_influence_no_weight_and_no_choice_of_a_checkpoint(planted, script, tmp_path):
    """Both stages on both data sets: the same losses, best checkpoint and weights, bit by bit. Learning rates are chosen by the loss
    of validation, which is among them (assets/tables.sh, search)."""
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    found = []
    for name, dataset in zip("ab", planted):
        argv = ["--data", dataset.path, "--steps", 3, "--eval-every", 2]
        one = script("train_stage1.py", *argv, "--out", f"1{name}", "--batch-size", 8, "--width", 32, cwd=tmp_path)
        two = script("train_stage2.py", *argv, "--out", f"2{name}", "--stage1", f"1{name}", "--batch-size", 2, "--valid-users", 8,
                     cwd=tmp_path)
        assert (one.returncode, two.returncode) == (0, 0), (one, two)
        runs = [outcome(tmp_path / f"{stage}{name}") for stage in "12"]
        found.append([{k: v for k, v in run.items() if k != "config"} for run in runs])
    assert found[0] == found[1]


def test_texts_of_held_out_items_are_in_no_training_target(toy):
    dataset = data.load_dataset(toy)
    held_out = {i for split in ("valid", "test") for i in dataset.meta["held_out"][split]}
    train = [t for t in dataset.instances if t["split"] == "train"]
    known = {dataset.items[i]["text"] for i in dataset.items_in("train")}  # two movies of the toy world may have equal texts
    secret = {dataset.items[i]["text"] for i in held_out} - known
    assert train and len(secret) > 30 and not any(text in t["target"] for t in train for text in secret)
    assert all(not held_out & {*t["items"]} for t in train)
    assert not held_out & {*dataset.items_in("train")}
    for split in ("valid", "test"):  # nor does a text task of validation ask about an item of the test
        assert all({*t["items"]} <= {*dataset.meta["held_out"][split]} for t in dataset.instances if t["split"] == split)


def test_the_search_for_learning_rates_reads_the_validation_loss_alone():
    """assets/tables.sh: `search` runs train_stage2.py, takes its best validation loss, and never evaluates; `rate` takes the lowest."""
    shell = (ROOT / "assets" / "tables.sh").read_text()
    search = re.search(r"^search\(\) \{.*?^\}", shell, re.M | re.S)[0]
    assert "evaluate.py" not in search and "metrics" not in search and ".json" not in search and "best validation loss" in search
    rate = re.search(r"^rate\(\) \{.*?^\}", shell, re.M | re.S)[0]
    assert "evaluate.py" not in rate and "search.tsv" in rate
    for module in ("train_stage1.py", "train_stage2.py"):  # and training itself never asks for the test split
        source = (ROOT / module).read_text()
        assert not re.search(r"""(target|items_of|items_in|held_out|tasks)[(\[][^)\]\n]*["']test["']""", source)
