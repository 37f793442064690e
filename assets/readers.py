"""The raw files of each source, read for data.py: interaction logs, item tables, CF vectors from elsewhere. Everything that a user
can get wrong in them is said in one line (InputError). To read a format of your own, write one more function like these.

A log becomes three arrays of equal length, in file order: users, items, times. An item table becomes
{id: {"title", "text", "attributes"}}."""
import csv
import json
import re
from pathlib import Path

import numpy as np
import torch

ML_GENRES = ("unknown Action Adventure Animation Children's Comedy Crime Documentary Drama Fantasy Film-Noir Horror Musical "
             "Mystery Romance Sci-Fi Thriller War Western").split()
MOVIELENS_URL = "https://grouplens.org/datasets/movielens/"


class InputError(ValueError):
    """Something the user gave us is wrong; the message names the file, the line and the remedy."""


def find(source, names, dataset):
    for name in names:
        if source and (Path(source) / name).is_file():
            return Path(source) / name
    where = f"; get it from {MOVIELENS_URL} and unpack it there" if dataset == "movielens" else ""
    raise InputError(f"--source {source}: no {' or '.join(names)} in it{where}")


def read_movielens(source):
    """u.data, ratings.dat or ratings.csv: columns user, item, rating, timestamp. numpy's C reader does a million lines a second."""
    path = find(source, ["u.data", "ratings.dat", "ratings.csv"], "movielens")
    separator = {".data": "\t", ".dat": "::", ".csv": ","}[path.suffix]
    with open(path, encoding="utf-8-sig") as f:
        rows = (line.replace("::", "\t") for line in f) if separator == "::" else f
        try:
            table = np.loadtxt(rows, delimiter=separator.replace("::", "\t"), usecols=(0, 1, 3), ndmin=2, skiprows=int(separator == ","))
        except ValueError as error:
            raise InputError(f"{path}: {error} (rows from 0, a header apart); expected user{separator}item{separator}rating{separator}"
                             "timestamp") from None
    return table[:, 0].astype(np.int64), table[:, 1].astype(np.int64), table[:, 2]


def read_openp5(source):
    """OpenP5's user_sequence.txt: one user a line, the user's id and then item ids in time order."""
    pairs, path = [], find(source, ["user_sequence.txt"], "openp5")
    for number, line in enumerate(open(path, encoding="utf-8"), 1):
        user, *sequence = line.split() or [""]
        if not sequence:
            raise InputError(f"{path}, line {number}: expected a user id and item ids separated by spaces; remove the line")
        pairs += [(user, item) for item in sequence]
    return *np.array(pairs).reshape(-1, 2).T, np.arange(len(pairs))


def read_csv(source):
    """The engineer's own log: interactions.csv with the columns user, item, timestamp and perhaps others."""
    pairs, times, path = [], [], find(source, ["interactions.csv"], "csv")
    for number, row in table_rows(path, ("user", "item", "timestamp")):
        try:
            times.append(float(row["timestamp"]))
        except ValueError:
            raise InputError(f"{path}, line {number}: timestamp {row['timestamp']!r} is not a number; any growing count will do") from None
        pairs.append((row["user"], row["item"]))
    return *np.array(pairs).reshape(-1, 2).T, np.array(times)


def table_rows(path, required=()):
    """Yield (line number, dict) for a .csv, .tsv or .jsonl file."""
    with open(path, encoding="utf-8-sig", newline="") as f:
        try:
            if path.suffix == ".jsonl":
                for number, line in enumerate(f, 1):
                    yield number, json.loads(line)
                return
            reader = csv.DictReader(f, delimiter="\t" if path.suffix == ".tsv" else ",")
            missing = [c for c in required if c not in (reader.fieldnames or [])]
            if missing:
                raise InputError(f"{path}, line 1: no column {', '.join(missing)}; the header has {reader.fieldnames}")
            for row in reader:
                if None in row or None in row.values():
                    raise InputError(f"{path}, line {reader.line_num}: expected {len(reader.fieldnames)} columns; quote the field")
                yield reader.line_num, row
        except (csv.Error, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: {error}; write it again as UTF-8") from None


def read_items(path):
    """An item table -> {id: {"title", "text", "attributes"}}. MovieLens's three shapes, or csv, tsv, jsonl with a header."""
    table = {}
    if path.suffix in (".item", ".dat"):
        separator = "|" if path.suffix == ".item" else "::"
        for number, line in enumerate(open(path, encoding="latin-1"), 1):
            fields = line.rstrip("\n").split(separator)
            if len(fields) < 3:
                raise InputError(f"{path}, line {number}: expected fields separated by {separator!r}")
            genres = [g for g, flag in zip(ML_GENRES, fields[5:]) if flag == "1"] if separator == "|" else fields[2].split("|")
            table[fields[0]] = {"title": fields[1], "attributes": {"genres": genres}}
    else:
        for number, row in table_rows(path):
            key = next((k for k in ("id", "item", "item_id", "movieId", "asin") if k in row), next(iter(row)))
            rest = {k: v for k, v in row.items() if k not in (key, "title", "text", "attributes") and v}
            rest = {k: [x for x in v.split("|") if x] if isinstance(v, str) else v for k, v in rest.items()}
            table[str(row[key])] = {"title": row.get("title") or "", "text": row.get("text"), "attributes": row.get("attributes") or rest}
    return {key: finish_item(key, item) for key, item in table.items()}


def finish_item(key, item):
    """Fill in what follows from the rest: a year from "Title (1995)", flat attribute strings, a text made of all of them."""
    title = " ".join(item["title"].split())
    attributes = {k: ", ".join(map(str, v)) if isinstance(v, list) else str(v) for k, v in item["attributes"].items()}
    year = re.search(r"\((\d{4})\)$", title)
    if year and "genres" in attributes:
        attributes["decade"] = year[1][:3] + "0s"
    told = "; ".join(f"{k}: {v}" for k, v in attributes.items())
    text = item.get("text") or (f"{title}. {told}" if title and told else title or told)
    return {"id": key, "title": title, "text": " ".join(text.split()), "attributes": attributes}


def load_cf(path, num_users, num_items):
    """The user's own embeddings: an .npz with `user` (U, E) and `item` (I, E), rows in the order of the sorted ids."""
    try:
        with np.load(path, allow_pickle=False) as z:
            user, item = z["user"], z["item"]
    except (ValueError, KeyError) as error:
        raise InputError(f"--cf {path}: {error}; expected an .npz with the float arrays `user` and `item`") from None
    fits = user.ndim == 2 and len(user) == num_users and item.shape == (num_items, user.shape[1])
    if not fits or not np.isfinite([user.sum(), item.sum()]).all():
        raise InputError(f"--cf {path}: user {user.shape}, item {item.shape}; expected finite ({num_users}, E) and ({num_items}, E)")
    return torch.from_numpy(user.astype(np.float32)), torch.from_numpy(item.astype(np.float32))
