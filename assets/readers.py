"""The raw files of each source, read for data.py: interaction logs, item tables, CF vectors from elsewhere. Everything that a user
can get wrong in them is said in one line (InputError). To read a format of your own, write one more function like these.

A log becomes three arrays of equal length, in file order: users, items, times. An item table becomes
{id: {"title", "text", "attributes"}}."""

import csv
import html
import json
import math
import re
from pathlib import Path

import numpy as np
import torch

from assets.guard import CONTROL, InputError, printable, reading

ML_GENRES = (
    "unknown Action Adventure Animation Children's Comedy Crime Documentary Drama Fantasy Film-Noir Horror Musical "
    "Mystery Romance Sci-Fi Thriller War Western"
).split()
MOVIELENS_URL = "https://grouplens.org/datasets/movielens/"
ID_KEYS = ("id", "item", "item_id", "movieId", "asin")


def find(source, names, dataset):
    for name in names:
        if source and (Path(source) / name).is_file():
            return Path(source) / name
    where = f"; get it from {MOVIELENS_URL} and unpack it there" if dataset == "movielens" else ""
    raise InputError(f"--source {source}: no {' or '.join(names)} in it{where}")


def clean_id(value, path, number):
    """Ids stand one a line in users.txt and are looked up as they are: no control characters, nothing empty, nothing endless."""
    value = str(value).strip()
    if not value or len(value) > 1000 or CONTROL.search(value):
        raise InputError(
            f"{path}, line {number}: the id {value[:50]!r} is empty, too long or has control characters; rename it"
        )
    return value


def read_movielens(source):
    """u.data, ratings.dat or ratings.csv: columns user, item, rating, timestamp. numpy's C reader does a million lines a second."""
    path = find(source, ["u.data", "ratings.dat", "ratings.csv"], "movielens")
    separator = {".data": "\t", ".dat": "::", ".csv": ","}[path.suffix]
    with open(path, encoding="utf-8-sig") as f:
        try:
            if separator == "," and not f.readline().lower().startswith("userid,movieid,"):
                raise ValueError("no header")
            begin = f.tell()
            if not f.read(1):
                raise InputError(f"{path}: no interactions in it; unpack it again")
            f.seek(begin)
            rows = (line.replace("::", "\t") for line in f) if separator == "::" else f
            table = np.loadtxt(
                rows,
                delimiter=separator.replace("::", "\t"),
                usecols=(0, 1, 3),
                ndmin=2,
                comments=None,
            )
            if (
                not (np.isfinite(table) & (table >= 0) & (table < 2**53)).all()
                or (table[:, :2] % 1).any()
            ):
                raise ValueError("a number out of range")
        except InputError:
            raise
        except ValueError:
            raise first_bad_line(path, separator) from None
    return table[:, 0].astype(np.int64), table[:, 1].astype(np.int64), table[:, 2]


def first_bad_line(path, separator):
    """Only where numpy's reader has failed: which line it is."""
    number, fits = 0, lambda x, whole: 0 <= float(x) < 2**53 and not (whole and float(x) % 1)
    for number, line in enumerate(open(path, "rb"), 1):
        fields = line.decode("utf-8-sig", "replace").rstrip("\r\n").split(separator)
        header = separator == "," and number == 1
        try:
            right = (
                ",".join(fields).lower().startswith("userid,movieid,")
                if header
                else all(fits(fields[k], k < 3) for k in (0, 1, 3))
            )
            if not right:
                break
        except (ValueError, IndexError):
            break
    wanted = (
        "the header userId,movieId,rating,timestamp and then such lines"
        if separator == ","
        else "user, item, rating, timestamp"
    )
    return InputError(
        f"{path}, line {number}: expected {wanted}, with {separator!r} between them; mend or remove the line"
    )


def read_openp5(source):
    """OpenP5's user_sequence.txt: one user a line, the user's id and then item ids in time order."""
    pairs, seen, path = [], {}, find(source, ["user_sequence.txt"], "openp5")
    with reading(path, "write it again as UTF-8"), open(path, encoding="utf-8-sig") as f:
        for number, line in enumerate(f, 1):
            user, *sequence = [clean_id(x, path, number) for x in line.split()] or [""]
            if not sequence or user in seen:
                why = (
                    f"user {user} has line {seen[user]} already"
                    if user in seen
                    else "expected a user id and item ids, spaces between"
                )
                raise InputError(f"{path}, line {number}: {why}; remove the line")
            seen[user] = number
            pairs += [(user, item) for item in sequence]
    return *np.array(pairs, dtype=str).reshape(-1, 2).T, np.arange(len(pairs))


def read_csv(source):
    """The engineer's own log: interactions.csv with the columns user, item, timestamp and perhaps others."""
    pairs, times, path = [], [], find(source, ["interactions.csv"], "csv")
    for number, row in table_rows(path, ("user", "item", "timestamp")):
        try:
            times.append(float(row["timestamp"]))
        except ValueError:
            times.append(math.nan)
        if not 0 <= times[-1] < math.inf:
            raise InputError(
                f"{path}, line {number}: timestamp {row['timestamp']!r} is not a number from 0; any growing count will do"
            )
        pairs.append((clean_id(row["user"], path, number), clean_id(row["item"], path, number)))
    return *np.array(pairs, dtype=str).reshape(-1, 2).T, np.array(times)


def table_rows(path, required=()):
    """Yield (line number, dict) for a .csv, .tsv or .jsonl file."""
    number = 0
    with (
        reading(
            path, "write it again as UTF-8, a header first (csv, tsv) or an object a line (jsonl)"
        ),
        open(path, encoding="utf-8-sig", newline="") as f,
    ):
        try:
            if path.suffix == ".jsonl":
                for number, line in enumerate(f, 1):
                    if not isinstance(row := json.loads(line), dict) or not row:
                        raise ValueError(f"{line.strip()[:50]!r} is no object")
                    yield number, row
                return
            tabs = (
                {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.suffix == ".tsv" else {}
            )  # 14" is a length there, not a quote
            reader = csv.DictReader(f, strict=True, **tabs)
            missing = [c for c in required if c not in (reader.fieldnames or [])]
            if missing or not reader.fieldnames:
                raise InputError(
                    f"{path}, line 1: no column {', '.join(missing)}; the header has {reader.fieldnames}"
                )
            for row in reader:
                number = reader.line_num
                if None in row or None in row.values():
                    raise InputError(
                        f"{path}, line {number}: expected {len(reader.fieldnames)} columns; quote the field"
                    )
                yield number, row
        except InputError:
            raise
        except (csv.Error, ValueError, RecursionError) as error:
            number = number if path.suffix == ".jsonl" else number + 1
            raise InputError(
                f"{path}, line {number} or after it: {error}; quote the field, and write the file as UTF-8"
            ) from None


def read_items(path):
    """An item table -> {id: {"title", "text", "attributes"}}. MovieLens's three shapes, or csv, tsv, jsonl with a header."""
    if not path.is_file():
        raise InputError(
            f"{path}: no such file; --items names the item table (u.item, movies.dat, .csv, .tsv, .jsonl)"
        )
    table = {}
    for number, key, item in (
        movielens_items(path) if path.suffix in (".item", ".dat") else other_items(path)
    ):
        if (key := clean_id(key, path, number)) in table:
            raise InputError(
                f"{path}, line {number}: the id {key} stands there for the second time; remove one of the lines"
            )
        table[key] = finish_item(key, item)
    return table


def movielens_items(path):
    """Yield (line number, id, item). The encoding is Latin-1, where a byte order mark does not say otherwise."""
    separator, encoding = "|" if path.suffix == ".item" else "::", "latin-1"
    with open(path, "rb") as f:
        encoding = "utf-8-sig" if f.read(3) == b"\xef\xbb\xbf" else encoding
    with reading(path, "write it again as UTF-8"):
        lines = path.read_text(encoding=encoding).split("\n")
    for number, line in enumerate(lines[:-1] if lines[-1] == "" else lines, 1):
        fields = line.split(separator)
        if len(fields) < 3:
            raise InputError(
                f"{path}, line {number}: expected fields separated by {separator!r}; mend or remove the line"
            )
        genres = (
            [g for g, flag in zip(ML_GENRES, fields[5:]) if flag == "1"]
            if separator == "|"
            else fields[2].split("|")
        )
        yield number, fields[0], {"title": fields[1], "attributes": {"genres": genres}}


def other_items(path):
    """Yield (line number, id, item). The id's column is one of ID_KEYS, else the first; columns of other names are attributes."""
    for number, row in table_rows(path, ("title",)):
        key = next((k for k in ID_KEYS if k in row), next(iter(row)))
        rest = {k: v for k, v in row.items() if k not in (key, "title", "text", "attributes") and v}
        rest = {
            k: [x for x in v.split("|") if x] if isinstance(v, str) else v for k, v in rest.items()
        }
        attributes = row.get("attributes") or rest
        if not isinstance(attributes, dict):
            raise InputError(
                f"{path}, line {number}: `attributes` is to be an object of names and values; mend the line"
            )
        yield (
            number,
            row[key],
            {"title": row.get("title"), "text": row.get("text"), "attributes": attributes},
        )


def finish_item(key, item):
    """Fill in what follows from the rest: a year from "Title (1995)", flat attribute strings, a text made of all of them."""
    clean = lambda value: printable(
        html.unescape(html.unescape(str(value)))
    )  # shops write &amp; for &, some of them twice
    title = clean(item["title"] or "")
    attributes = {
        clean(k): clean(", ".join(map(str, v)) if isinstance(v, list) else v)
        for k, v in item["attributes"].items()
    }
    year = re.search(r"\((\d{4})\)$", title)
    if year and "genres" in attributes:
        attributes["decade"] = year[1][:3] + "0s"
    told = "; ".join(f"{k}: {v}" for k, v in attributes.items())
    text = item.get("text") or (f"{title}. {told}" if title and told else title or told)
    return {"id": key, "title": title, "text": clean(text), "attributes": attributes}


def load_cf(path, num_users, num_items):
    """The user's own embeddings: an .npz with `item` (I, E) and perhaps `user` (U, E), rows in the order of the sorted ids ->
    user (None where there is none), item."""
    with (
        reading(f"--cf {path}", "expected an .npz with the float array `item`, and perhaps `user`"),
        np.load(path, allow_pickle=False) as z,
    ):
        found = {
            name: np.asarray(z[name]).astype(np.float32)
            for name in ("item", *(["user"] if "user" in z else []))
        }
    item, rows = found["item"], {"item": num_items, "user": num_users}
    width = item.shape[1] if item.ndim == 2 else 0
    fits = width and all(
        x.shape == (rows[name], width) and np.isfinite(abs(x).max()) for name, x in found.items()
    )
    if not fits:
        said = ", ".join(f"{name} {x.shape}" for name, x in found.items())
        raise InputError(
            f"--cf {path}: {said}; expected finite numbers, item ({num_items}, E) and, if any, user ({num_users}, E)"
        )
    return torch.from_numpy(found["user"]) if "user" in found else None, torch.from_numpy(item)
