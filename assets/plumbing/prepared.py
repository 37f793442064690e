"""The files of a prepared folder, written whole and read with every check. What they say: data.py.

In memory a folder is {file name: content}: a list of objects for .jsonl, of lines for .txt, and
{name: array} for .npz.
"""

import hashlib
import json

import numpy as np

from assets.plumbing.guard import CONTROL, InputError, end_move, write_atomically

FORMAT = 2  # of a prepared folder; 1 had a table of users' vectors


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_folder(folder, meta, contents):
    """Write contents {file name: content} and meta.json, which gets the sums of the others. The
    folder appears under its name when it is whole; what stood there before is kept until then."""

    def write(new):
        for name, content in contents.items():
            if name.endswith(".npz"):
                np.savez(new / name, **content)
                continue
            if name.endswith(".jsonl"):
                content = [json.dumps(row, ensure_ascii=False) for row in content]
            (new / name).write_text("\n".join([*content, ""]), encoding="utf-8")
        sums = {file.name: sha256(file) for file in sorted(new.iterdir())}
        known = {"format": FORMAT, **meta, "sha256": sums}
        (new / "meta.json").write_text(json.dumps(known, indent=1, default=str))

    write_atomically(folder, write)


def read_folder(folder):
    """-> meta, contents {file name: content}. Ends a preparation that a kill has cut short.

    InputError where it is no prepared folder, one of another format, or one that was changed.
    """
    end_move(folder)
    if not (folder / "meta.json").is_file():
        raise InputError(
            f"{folder}: not a prepared folder (no meta.json); data.py makes one: is the name right?"
        )
    meta = json.loads((folder / "meta.json").read_text())
    if meta.get("format") != FORMAT:
        raise InputError(
            f"{folder}: prepared by another version of data.py (format {meta.get('format', 1)}, "
            f"now {FORMAT}); prepare it again"
        )
    contents = {}
    for name, wanted in meta["sha256"].items():
        file = folder / name
        if not file.is_file() or sha256(file) != wanted:
            raise InputError(f"{file}: differs from what data.py wrote; prepare the folder again")
        if name.endswith(".npz"):
            contents[name] = dict(np.load(file, allow_pickle=False))
            continue
        lines = file.read_text(encoding="utf-8").split("\n")[:-1]
        contents[name] = [json.loads(x) for x in lines] if name.endswith(".jsonl") else lines
    check_folder(meta, contents)
    return meta, contents


def check_folder(meta, contents):
    """Do the files belong together? ValueError where not: their sums may be right all the same."""
    users, items = contents["users.txt"], contents["items.jsonl"]
    sequences, cf = contents["sequences.npz"], contents["cf.npz"]
    chosen, indptr = sequences["items"], sequences["indptr"]
    texts = [*users, *(item[key] for item in items for key in ("id", "title", "text"))]
    if (
        any(CONTROL.search(text) for text in texts)
        or (len(indptr) - 1, indptr[-1]) != (len(users), len(chosen))
        or (len(cf["item"]), len(cf.get("user", users))) != (len(items), len(users))
        or not (chosen < len(items)).all()
        or {*meta["held_out"]} != {"valid", "test"}
        or "tasks.jsonl" not in contents
    ):
        raise ValueError("its files do not belong together, or have control characters")
