"""Nothing is let in: bad input ends in one line and changes nothing, odd input works, files of strangers run no code, test items leak nowhere."""
import json
import os
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_interruption import EVALUATE, STAGES, one_line, tree, work  # noqa: F401

import data
import train_stage1
import train_stage2
from assets import guard, readers

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
        (openp5() | {"user_sequence.txt": "Jos\xe9 i1\n".encode("latin-1")}, [], ["user_sequence.txt", "UTF-8"]),
        (openp5() | {"items.tsv": "id\ttitle\ni1\tA\tB\n"}, [], ["items.tsv, line 2", "columns"]),
        (openp5() | {"items.tsv": ""}, [], ["items.tsv", "line 1"]),
        (openp5() | {"items.tsv": "id\ttitle\ni1\tA\ni1\tB\n"}, [], ["items.tsv, line 3", "second time"]),
        (openp5() | {"items.tsv": "id\ttitle\n\tA\n"}, [], ["items.tsv, line 2", "empty"])],
    "csv": [
        (csv(interactions_csv=""), [], ["interactions.csv, line 1", "no column user, item, timestamp"]),
        (csv(interactions_csv="user,item,timestamp\n"), [], ["no interactions"]),
        (csv(interactions_csv=CSV.replace("timestamp", "time")), [], ["interactions.csv, line 1", "no column timestamp"]),
        (csv(interactions_csv=CSV.replace(",", ";")), [], ["interactions.csv, line 1", "no column"]),
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
        (csv(interactions_csv=CSV.encode() + b"Jos\xe9,i1,3\n"), [], ["interactions.csv", "UTF-8"]),
        (csv(items_csv=TABLE + "i1,Again\n"), [], ["items.csv, line 8", "second time"]),
        (csv(items_csv="name\nFilm\n"), [], ["items.csv", "knows none"]),
        (csv(items_csv=TABLE.encode() + b"i9,caf\xe9\n"), [], ["items.csv", "UTF-8"]),
        ({"interactions.csv": CSV, "items.jsonl": '{"id": "i1"'}, [], ["items.jsonl, line 1"]),
        ({"interactions.csv": CSV, "items.jsonl": '{"id": "i1"}\n[1]\n'}, [], ["items.jsonl, line 2", "no object"]),
        ({"interactions.csv": CSV, "items.jsonl": '{"id": "i1", "attributes": [1]}\n'}, [], ["items.jsonl, line 1", "attributes"]),
        ({"interactions.csv": CSV, "items.jsonl": '{"id": {}}\n' + "[" * 100000}, [], ["items.jsonl, line 2"]),
        (csv(cf_npz="text"), ["--cf", "cf.npz"], ["--cf", "cf.npz"]),
        (csv(cf_npz=npz(user=np.ones((6, 2)))), ["--cf", "cf.npz"], ["cf.npz", "`user` and `item`"]),
        (csv(cf_npz=npz(user=np.ones((5, 2)), item=np.ones((6, 2)))), ["--cf", "cf.npz"], ["cf.npz", "(5, 2)", "(6, E)"]),
        (csv(cf_npz=npz(user=np.ones((6, 2)), item=np.ones((6, 3)))), ["--cf", "cf.npz"], ["cf.npz", "(6, 3)"]),
        (csv(cf_npz=npz(user=np.ones(6), item=np.ones(6))), ["--cf", "cf.npz"], ["cf.npz", "(6,)"]),
        (csv(cf_npz=npz(user=np.ones((6, 2)), item=np.full((6, 2), np.nan))), ["--cf", "cf.npz"], ["cf.npz", "finite"]),
        (csv(cf_npz=npz(user=np.ones((6, 2)), item=np.array([["x", "y"]] * 6))), ["--cf", "cf.npz"], ["cf.npz"]),
        (csv(cf_npz=npz(user=np.ones((6, 0)), item=np.ones((6, 0)))), ["--cf", "cf.npz"], ["cf.npz", "(6, 0)"]),
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
        (["--cf-dim", 0], ["--cf-dim", "at least 1"]), (["--cf-dim", "many"], ["--cf-dim", "many"]), (["--min-count", -1], ["--min-count"]),
        (["--min-count", 10**9], ["nothing is left", "lower it"]), (["--max-users", 0], ["--max-users", "at least 1"]),
        (["--seed", -1], ["--seed", "at least 0"]), (["--seed", 2**64], ["--seed", "at most"]), (["--wordl-seed", 1], ["--wordl-seed"]),
        (["--dataset", "csv", "--source", "nowhere"], ["nowhere", "interactions.csv"])]),
    *(("train_stage1.py", argv, files, words) for argv, files, words in [
        (["--data", "nowhere"], {}, ["nowhere", "not a prepared folder", "data.py"]),
        (["--steps", 0], {}, ["--steps", "at least 1"]), (["--steps", "x"], {}, ["--steps"]), (["--steps", "1e3"], {}, ["--steps"]),
        (["--batch-size", 1], {}, ["--batch-size", "at least 2"]), (["--lr", "nan"], {}, ["--lr"]), (["--lr", "inf"], {}, ["--lr"]),
        (["--lr", -1], {}, ["--lr"]), (["--text-fraction", 0], {}, ["--text-fraction"]), (["--text-fraction", 2], {}, ["--text-fraction"]),
        (["--losses", "itx"], {}, ["--losses", "itx"]), (["--losses"], {}, ["--losses"]), (["--width", 0], {}, ["--width"]),
        (["--num-queries", 0], {}, ["--num-queries"]), (["--layers", 0], {}, ["--layers"]), (["--eval-every", -1], {}, ["--eval-every"]),
        (["--seed", -5], {}, ["--seed"]), (["--tokenizer", "./nowhere"], {}, ["--tokenizer ./nowhere", "no such folder"]),
        (["--tokenizer", "."], {}, ["--tokenizer ."]), (["--tokenizer", "."], {"tokenizer.json": "{"}, ["--tokenizer ."]),
        (["--init-bert", "./nowhere"], {}, ["./nowhere"]), (["--init-bert", "assets/toy_llm"], {}, ["--init-bert assets/toy_llm"]),
        (["--resume", "--out", "nowhere"], {}, ["no state.pt", "without --resume"])]),
    *(("train_stage2.py", argv, files, words) for argv, files, words in [
        (["--stage1", "nowhere"], {}, ["nowhere", "train_stage1.py"]), (["--stage1", "WORK/train_stage2"], {}, ["stage2 run"]),
        (["--method", "magic"], {}, ["--method", "ilm-rand"]), (["--mix", 0, 0, 1], {}, ["--mix"]), (["--mix", 1, 1], {}, ["--mix"]),
        (["--mix", "nan", 1, 1], {}, ["--mix"]), (["--mix", -1, 1, 1], {}, ["--mix"]), (["--valid-users", 0], {}, ["--valid-users"]),
        (["--accumulate", 0], {}, ["--accumulate"]), (["--name-tokens", -1], {}, ["--name-tokens"]),
        (["--llm", "./nowhere"], {}, ["--llm ./nowhere", "no such folder"]), (["--llm", "."], {}, ["--llm ."]),
        (["--llm", "."], {"config.json": "{}"}, ["--llm ."]), (["--llm", "."], {"config.json": '{"model_type": "llama"}'}, ["--llm ."]),
        (["--item-names", "nowhere"], {}, ["--item-names nowhere"]), (["--item-names", "names"], {"names": "001 7\n"}, ["no line for"]),
        (["--item-names", "names"], {"names": b"001 \xff\n"}, ["--item-names names", "lines `id name`"]),
        (["--prompts", "nowhere"], {}, ["nowhere"]), (["--prompts", "."], {}, ["error: ."]), (["--prompts", "p"], {"p": b"\xff"}, ["p: "]),
        (["--prompts", "p"], {"p": PROMPTS.format("seen", "seen")}, ["--prompts p", "unseen"]),
        (["--prompts", "p"], {"p": "sequential; never; {history}; {target}\n"}, ["p, line 1", "seen or unseen"]),
        (["--prompts", "p"], {"p": "# one\nsequential; seen; {histroy}; {target}\n"}, ["p, line 2", "{histroy}", "history"]),
        (["--prompts", "p"], {"p": "sequential; seen; {item}; {target}\n"}, ["p, line 1", "{item}"]),
        (["--prompts", "p"], {"p": "sequential; seen; {history}; it\n"}, ["p, line 1", "{target}"]),
        (["--prompts", "p"], {"p": "sequential; seen; {history}\n"}, ["p, line 1"]),
        (["--prompts", "p"], {"p": "".join(f"{t}; {s}; {LONG}" for t in data.RANKING_TASKS for s in ("seen", "unseen"))},
         ["does not fit", "context"]),
        (["--resume"], {}, ["no state.pt"]), (["--resume", "--out", "WORK/train_stage2", "--seed", 3], {}, ["another", "seed"])]),
    *(("evaluate.py", argv, files, words) for argv, files, words in [
        (["--run", "nowhere"], {}, ["nowhere", "not a run"]), (["--run", "."], {"config.json": "{"}, ["model.safetensors"]),
        (["--table", "nowhere"], {}, ["nowhere"]), (["--run", "WORK/train_stage2", "--data", "nowhere"], {}, ["nowhere", "data.py"]),
        (["--run", "WORK/train_stage2", "--data", "WORK/data/toy", "--sc-encoder", "./nowhere", *EVALUATE, "--tasks", "text"], {},
         ["--sc-encoder ./nowhere"])]),
    *(("ilm.py", argv, {}, words) for argv, words in [
        (["--run", "nowhere"], ["nowhere", "train_stage2.py"]), (["--run", "WORK/train_stage1"], ["stage1 run"]),
        (["--run", "WORK/train_stage2", "--data", "WORK/data/toy", "About {item:999}"], ["no item", "999"]),
        (["--run", "WORK/train_stage2", "--data", "WORK/data/toy", "About {item}"], ["{item:ID}"]),
        (["--run", "WORK/train_stage2", "--data", "WORK/data/toy", "--new", "nowhere"], ["nowhere"])])]


@pytest.mark.parametrize("name", ["data.py", *STAGES, "evaluate.py", "ilm.py"])
def test_bad_flags(script, work, tmp_path, name):  # noqa: F811
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
