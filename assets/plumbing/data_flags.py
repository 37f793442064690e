"""The flags of data.py, and whether they go together."""

import argparse
from pathlib import Path

from assets.plumbing.flags import add_choice, add_number, add_switch
from assets.plumbing.guard import InputError, Parser, a_seed, check_place, has_key, within
from assets.plumbing.readers import MOVIELENS_URL
from assets.plumbing.tables_in import NAMES

FOLDER_FILES = (
    "cf.npz items.jsonl meta.json metrics.json sequences.npz tasks.jsonl users.txt".split()
)


def parse_args(argv=None):
    p = Parser(
        description="Raw interaction logs -> one prepared folder that every other script reads"
    )
    add_choice(p, "--dataset", ("toy", "movielens", "openp5", "csv"), "format of --source")
    p.add_argument("--source", help="folder with the raw files")
    p.add_argument(
        "--items",
        help="item table, where it is not in --source (u.item, movies.dat, csv, tsv, jsonl)",
    )
    p.add_argument(
        "--columns",
        nargs="+",
        type=a_column,
        metavar="ROLE=NAME",
        help="columns that are not found by their names: user=A item=B time=C, of the item table "
        "id=A title=B text=C",
    )
    add_switch(p, "--look", "print what was understood of the files, and write nothing")
    p.add_argument(
        "--out", help="prepared folder to write [data/toy, or data/ and the source's name]"
    )
    p.add_argument(
        "--cf",
        help="your own CF vectors in place of ALS: .npz with item, item_id, perhaps user, user_id",
    )
    p.add_argument(
        "--cf-dim",
        type=within(int, 1, 4096),
        help="width E of the CF vectors [chosen on validation]",
    )
    p.add_argument(
        "--recency",
        type=within(float, 0.01, 1),
        help="weight of an item a step back; 1: order does not matter [chosen]",
    )
    p.add_argument(
        "--reg",
        type=within(float, 1e-6),
        help="regularisation of CF: flat, or with --a0 a row's weight times it [chosen]",
    )
    p.add_argument(
        "--a0",
        type=within(float, 0),
        help="with --reg: what the empty part of a row weighs [0: flat]",
    )
    fewer = "drop users and items with fewer interactions, iterated"
    add_number(p, "--min-count", 5, fewer, 1)
    p.add_argument(
        "--max-users",
        type=within(int, 1),
        help="keep a random sample of users (toy: how many to generate) [all; toy 1000]",
    )
    p.add_argument(
        "--seed",
        type=a_seed,
        default=0,
        help="users and interactions of the toy world, start of ALS [0]",
    )
    p.add_argument(
        "--world-seed",
        type=a_seed,
        default=0,
        help="catalogue of the toy world; the shipped LLM knows world 0 [0]",
    )
    return p.parse_args(argv)


def a_column(text):
    """A type for argparse: "user=A" -> ("user", "A")."""
    role, _, name = text.partition("=")
    if role not in NAMES or not name:
        raise argparse.ArgumentTypeError(
            f"{text}: give {'=, '.join(NAMES)}= and the name of a column"
        )
    return role, name


def check_request(dataset, source, items, columns, out, cf, cf_dim, reg, a0):
    """Do the arguments of data.prepare go together? -> the folder to write."""
    if a0 is not None and reg is None:
        raise InputError("--a0 goes with --reg: together they are the ridge")
    if cf and cf_dim:
        raise InputError(f"--cf-dim {cf_dim}: the vectors of --cf {cf} have a width; leave one out")
    if dataset == "toy" and (source or items or columns):
        raise InputError(
            "--source, --items and --columns need --dataset csv, movielens or openp5; the toy "
            "world has no files"
        )
    if dataset != "toy" and not source:
        raise InputError(
            f"--dataset {dataset} needs --source, the folder with the raw files; MovieLens: "
            f"{MOVIELENS_URL}"
        )
    out = Path(out or f"data/{Path(source).resolve().name if source else 'toy'}")
    # The folders it reads from, and what stands where it writes
    inputs = [("--source", source)]
    for flag, file in (("--items", items), ("--cf", cf)):
        if file:
            inputs.append((f"the folder of {flag}", Path(file).parent))
    check_place(out, lambda f: has_key(f / "meta.json", "sha256"), FOLDER_FILES, inputs)
    return out
