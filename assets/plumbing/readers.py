"""The raw files of each source, read for data.py: interaction logs, item tables, CF vectors from
elsewhere. Everything that a user can get wrong in them is said in one line (InputError). What a
table may look like stands in tables_in.py; to read a format of your own, write one more function
like these.

A log becomes three arrays of equal length, in file order: users, items, times. An item table
becomes {id: {"id", "title", "text", "attributes"}}.
"""

import re
from array import array
from pathlib import Path

import numpy as np
import torch

from assets.plumbing.checks import drop_repeats
from assets.plumbing.guard import CONTROL, InputError, reading
from assets.plumbing.names import numbered
from assets.plumbing.tables_in import MISSING, Table, clean, flatten, moment

ML_GENRES = (
    "unknown Action Adventure Animation Children's Comedy Crime Documentary Drama Fantasy "
    "Film-Noir Horror Musical Mystery Romance Sci-Fi Thriller War Western"
).split()
MOVIELENS_URL = "https://grouplens.org/datasets/movielens/"
FILES = {  # of each --dataset: the log, and the item table; each may end in .gz
    "movielens": ("u.data ratings.dat ratings.csv".split(), "u.item movies.dat movies.csv".split()),
    "openp5": (["user_sequence.txt"], "items.tsv items.csv items.jsonl items.json".split()),
    "csv": (
        "interactions.csv interactions.tsv interactions.jsonl interactions.json *.inter".split(),
        "items.tsv items.csv items.jsonl items.json *.item".split(),
    ),
}


def files(source, names):
    """The files of a folder that have one of these names, zipped or not."""
    found = [Path(source).glob(name + end) for name in names for end in ("", ".gz")]
    return [path for paths in found for path in sorted(paths) if path.is_file()]


def find(source, names, dataset):
    """The first file of `source` that has one of these names. InputError where there is none, or
    where a pattern fits several."""
    if found := files(source, names):
        called = [path.name.removesuffix(".gz") for path in found]
        several = sorted({*called} - {*names})  # found by a pattern, as *.inter
        if called[0] in several and len(several) > 1:
            raise InputError(
                f"--source {source}: which of {', '.join(several)}? Join them into one file"
            )
        return found[0]
    where = f"; get it from {MOVIELENS_URL} and unpack it there" if dataset == "movielens" else ""
    raise InputError(f"--source {source}: no {' or '.join(names)} in it{where}")


def tell(table):
    print(table.line())


def clean_id(value, path, number, kind=str):
    """Ids stand one a line in users.txt and are looked up as they are: no control characters,
    nothing empty, nothing endless."""
    value = str(value).strip()
    whole = kind is str or value.isdecimal() and len(value) < 19
    if value in MISSING or len(value) > 1000 or CONTROL.search(value) or not whole:
        raise InputError(
            f"{path}, line {number}: the id {value[:50]!r} is empty, too long, has control "
            "characters or, in MovieLens, is no whole number; rename it"
        )
    return kind(value)


# ---- Logs --------------------------------------------------------------------


def read_log(path, chosen=None, say=tell, kind=str):
    """A log with columns user, item, time -> arrays users, items of `kind`, times. Times that no
    int64 holds become their ranks."""
    table = Table(path, ("user", "item", "time"), chosen)
    users, items, times = [], [], array("q")
    ids = {}  # equal ids are one object: a log may have many millions
    for number, (u, i, t), names, row in table.rows():
        try:
            time = moment(str(row[t]).strip())
        except ValueError:
            raise InputError(
                f"{path}, line {number}: {names[t]} {str(row[t])[:50]!r} is not a number from 0 "
                "(any growing count will do) nor a date like 2023-01-31 or 2023-01-31T10:00:00"
            ) from None
        try:
            times.append(time)
        except (TypeError, OverflowError):  # no int64: from here on a list
            times = [*times, time]
            table.remarks["times are no whole numbers: put in order"] = 0
        for column, value in ((users, str(row[u])), (items, str(row[i]))):
            if value not in ids:
                ids[value] = clean_id(value, path, number, kind)
            column.append(ids[value])
    say(table)
    if isinstance(times, list):
        times = np.unique(np.array(times, dtype=object), return_inverse=True)[1]
    kind = object if kind is str else kind  # pointers: as text, the longest id sets all widths
    return np.array(users, dtype=kind), np.array(items, dtype=kind), np.array(times, dtype=np.int64)


def read_movielens(source, chosen=None, say=tell):
    """u.data, ratings.dat or ratings.csv; ids are whole numbers, and are sorted as such."""
    return read_log(find(source, FILES["movielens"][0], "movielens"), chosen, say, int)


def read_csv(source, chosen=None, say=tell):
    """The engineer's own log: interactions.csv with the columns user, item, timestamp and perhaps
    others; or RecBole's .inter."""
    return read_log(find(source, FILES["csv"][0], "csv"), chosen, say)


def read_openp5(source, chosen=None, say=tell):
    """OpenP5's user_sequence.txt: one user a line, the user's id and then item ids in time
    order."""
    path = find(source, FILES["openp5"][0], "openp5")
    table = Table(path, ("user",))
    table.columns["user"] = "first word of a line"
    pairs, seen = [], {}
    with reading(path, "write it again as UTF-8"), table.open() as f:
        for number, line in enumerate(f, 1):
            user, *sequence = [clean_id(x, path, number) for x in line.split()] or [""]
            if not sequence or user in seen:
                why = "expected a user id and item ids, spaces between"
                if user in seen:
                    why = f"user {user} has line {seen[user]} already"
                raise InputError(f"{path}, line {number}: {why}; remove the line")
            seen[user] = number
            pairs += [(user, item) for item in sequence]
    say(table)
    return *np.array(pairs, dtype=str).reshape(-1, 2).T, np.arange(len(pairs))


READERS = {"movielens": read_movielens, "openp5": read_openp5, "csv": read_csv}


# ---- Item tables -------------------------------------------------------------


def read_items(path, chosen=None, say=tell):
    """An item table -> {id: {"id", "title", "text", "attributes"}}. What is no id, title or text
    is an attribute."""
    if not path.is_file():
        raise InputError(
            f"{path}: no such file; --items names the item table (u.item, movies.dat, .csv, .tsv, "
            ".jsonl)"
        )
    table = Table(path, ("id", "title", "text"), chosen)
    found = {}
    for number, places, names, values in table.rows():
        row = dict(zip(names, values))
        if path.name.startswith("u.item"):  # a column of 0 and 1 for each genre
            flags = zip(ML_GENRES, values[5:])
            row["genres"] = [genre for genre, flag in flags if flag.strip() == "1"]
            table.others["genres"] = None
        item = read_item(table, number, row, *(k if k is None else names[k] for k in places))
        key = item["id"]
        if found.setdefault(key, item) is not item:
            if found[key] != item:
                raise InputError(
                    f"{path}, line {number}: the id {key} stands there for the second time; remove "
                    "one of the lines"
                )
            table.remarks["repeated lines left out"] += 1
    missing = sorted({"title", *table.chosen} & {*table.roles} - {*table.columns})
    if found and missing:
        raise table.unfit(missing, names, 1)
    say(table)
    return found


def read_item(table, number, row, *columns):
    """A row {name: value} -> item. columns: those of id, title and text, or None. Objects and
    addresses are counted among the table's remarks."""
    key = clean_id(row[columns[0]], table.path, number)
    told = row.get("attributes")
    if told and not isinstance(told, (dict, str)):  # a column of words may be called so
        raise InputError(
            f"{table.path}, line {number}: `attributes` is to be an object of names and values; "
            "mend the line"
        )

    # Attributes: words between | or, in RecBole's lists, between spaces; objects are left out.
    rest = told
    if not isinstance(told, dict) or not told:
        rest = {k: v for k, v in row.items() if k and k not in columns}
    attributes = {}
    for name, value in rest.items():
        words = name in table.lists
        if isinstance(value, str) and (words or "|" in value):
            value = value.split(None if words else "|")
        texts, objects = flatten(value)
        if objects:
            table.remarks[f"values of {name} left out (objects, addresses)"] += 1
        if texts:
            attributes[clean(name).lower()] = ", ".join(texts)  # "Genre" is what prompts call genre

    # Title and text; MovieLens's titles end with a year.
    title, text = (" ".join(flatten(row.get(column))[0]) for column in columns[1:])
    year = re.search(r"\((\d{4})\)$", title)
    if year and "genres" in rest:
        attributes["decade"] = year[1][:3] + "0s"
    told = "; ".join(f"{k}: {v}" for k, v in attributes.items())
    text = text or ". ".join(filter(None, (title, told)))
    return {"id": key, "title": title, "text": text, "attributes": attributes}


def check_ids(path, items, table):
    """Do the ids of a log's items and of the item table {id: item} meet? None in common:
    InputError; those without a counterpart: a line with an example of each side."""
    chosen = set(np.unique(items).astype(str).tolist())
    unknown, idle = sorted(chosen - table.keys()), sorted(table.keys() - chosen)
    if len(unknown) == len(chosen):
        raise InputError(
            f"{path}: knows none of the items of the log, which has {unknown[0]!r} where the table "
            f"has {(idle or [''])[0]!r}; give the item table of this log by --items, or name the "
            "column by --columns id=NAME"
        )
    told = []
    if unknown:
        what = f"of the log's {len(chosen)} items have no line in {path.name}"
        told.append(f"{len(unknown)} {what}, such as {unknown[0]!r}")
    if idle:
        what = f"items of {path.name} were chosen by nobody and are left out"
        told.append(f"{len(idle)} {what}, such as {idle[0]!r}")
    if told:
        print("note: " + "; ".join(told))


def read_files(dataset, source, items=None, columns=None):
    """The files of a --dataset in the folder `source` -> users, items, times, item table.

    items: the table's path, where it stands elsewhere; columns: --columns.
    """
    columns = dict(columns or ())
    log = READERS[dataset](source, columns)
    path = Path(items or find(source, FILES[dataset][1], dataset))
    table = read_items(path, columns)
    if not len(log[0]):
        names = " or ".join(FILES[dataset][0])
        raise InputError(f"--source {source}: no interactions in its {names}")
    check_ids(path, log[1], table)
    return *drop_repeats(*log), table


# ---- CF vectors --------------------------------------------------------------


def vectors_in(path, z, name, ids, width=None):
    """An array of an .npz -> vectors (N, E) of ids (N,), E = width if that is given. Its rows are
    found by NAME_id, if the file has that too; else they are in the order of the ids."""
    vectors = torch.from_numpy(np.asarray(z[name]).astype(np.float32))
    if f"{name}_id" in z:
        rows = numbered(z[f"{name}_id"].astype(str).tolist())
        missing = [key for key in ids if key not in rows]
        if missing or len(rows) != len(vectors):
            raise InputError(
                f"--cf {path}: {name}_id names {len(rows)} of {len(vectors)} rows, and lacks "
                f"{missing[:3]}; name each row once, and give zeros to what has no vector"
            )
        vectors = vectors[[rows[key] for key in ids]]
    fits = vectors.shape == (len(ids), width or vectors.shape[-1])
    if not fits or not vectors.numel() or not vectors.isfinite().all():
        raise InputError(
            f"--cf {path}: {name} {tuple(vectors.shape)}; expected finite numbers "
            f"({len(ids)}, {width or 'E'})"
        )
    return vectors


def load_cf(path, user_ids, item_ids):
    """The user's own embeddings: an .npz with `item` (I, E) and perhaps `user` (U, E), `item_id`,
    `user_id` -> user (None where there is none), item."""
    wanted = "expected an .npz with the float array `item`, and perhaps `user` and ids (no objects)"
    with reading(f"--cf {path}", wanted), np.load(path, allow_pickle=False) as z:
        item = vectors_in(path, z, "item", item_ids)
        E = item.shape[1]
        return vectors_in(path, z, "user", user_ids, E) if "user" in z else None, item
