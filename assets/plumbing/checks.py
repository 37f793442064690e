"""What data.py verifies aside: repeats in a log, the lines of a template file."""

import re
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from assets.plumbing.guard import InputError, printable, reading


@contextmanager
def solvable(file):
    """Least squares that have no answer in float32. file: --cf, or None."""
    try:
        yield
    except torch.linalg.LinAlgError:
        scaled = f"scale the vectors of --cf {file} to a length of about 1, or "
        raise InputError(
            "the least squares of CF have no answer in 32 bits; "
            f"{scaled if file else ''}give a larger --reg{'' if file else ' or a smaller --cf-dim'}"
        ) from None


def drop_repeats(users, items, times):
    """A log (nnz,) without the rows that repeat another, and a note of how many: a log that says an
    event twice would put test items into the training part."""
    codes = [np.unique(column, return_inverse=True)[1] for column in (users, items)]
    first = first_of_each(*codes, times)
    if first.all():
        return users, items, times
    print(
        f"note: {(~first).sum():,} interactions repeat another (same user, item and time); each "
        "counts once"
    )
    return users[first], items[first], times[first]


def first_of_each(*columns):
    """True at the rows (nnz,) that no earlier row equals in all columns."""
    order = np.lexsort(columns)  # stable: of equal rows the first of the file comes first
    again = np.ones(len(order), dtype=bool)
    for column in columns:
        again[1:] &= column[order][1:] == column[order][:-1]
    again[:1] = False
    first = np.ones(len(order), dtype=bool)
    first[order[again]] = False
    return first


def tell_left_out(users, items, keep, min_count):
    """A note of how many users and items, numbers from 0 in a log (nnz,), have no interaction among
    those kept."""
    lost = [codes.max() + 1 - len(np.unique(codes[keep])) for codes in (users, items)]
    if any(lost):
        print(f"note: --min-count {min_count} leaves out {lost[0]:,} users and {lost[1]:,} items")


def template_lines(path):
    """Yield (line number, [task, seen or unseen, prompt, target]) of a template file. OpenP5's
    word for a user becomes ours."""
    with reading(path, "templates are lines of UTF-8 text, see prompts.txt"):
        text = Path(path).read_text(encoding="utf-8-sig")
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip() and not line.startswith("#"):
            line = re.sub(r"(user_)?{user_id}", "{user}", printable(line))
            yield number, [field.strip() for field in line.split(";")]


def check_template(path, number, fields, ranking):
    """InputError where a line of a template file is none of a ranking task, or of a text task."""
    kinds = ("seen", "unseen") if ranking else ("seen",)
    whole = len(fields) == 4 and fields[1] in kinds
    if not whole or ranking and "{target}" not in fields[3]:
        raise InputError(
            f"{path}, line {number}: not `task; seen or unseen; prompt; target`; {{target}} to "
            "rank, seen to write"
        )
    asked = fields[2] + (fields[3].partition("{target}")[0] if ranking else "")
    allowed = ("user", "history", "dataset") if ranking else ("item", "neighbour")
    if strange := set(re.findall(r"{(\w+)}", asked)) - {*allowed}:
        raise InputError(
            f"{path}, line {number}: a prompt of {fields[0]} cannot have {{{min(strange)}}}, only "
            f"{' '.join(allowed)}"
        )
