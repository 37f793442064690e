"""The schemes by which items are named: titles that a tokenizer can tell apart, running
numbers, and OpenP5's index files."""

import itertools
import re
import sys
from pathlib import Path

import torch

from assets.plumbing.guard import InputError, reading

SOFT = "<|soft|>"  # one soft token in prompt text; its id never reaches the LLM's embedding table


def item_names(dataset, tokenizer, style="title", max_tokens=0):
    """The string by which each item is named: its title (cut to max_tokens; no two alike), a random
    number from 1001 (OpenP5's random indexing), or what an index file of OpenP5's says."""
    if style == "title":
        return distinct_titles(dataset.items, tokenizer, max_tokens)
    if style == "random":
        return random_names(dataset.meta["items"], len(dataset.items))
    return index_file_names(style, dataset.items)


def in_table(table, ids):
    """The items of these ids, copied from an item table {id: item}; what it lacks has no title
    and no text."""
    unknown = {"title": "", "text": "", "attributes": {}}
    return [dict(table.get(x) or {"id": x, **unknown}) for x in ids]


def numbered(ids):
    """{id: its number}."""
    return {name: number for number, name in enumerate(ids)}


def unique_titles(items, say=False):
    """Equal titles get " (2)", " (3)"; an empty one becomes "item ID". Returns how many, and may
    say so."""
    seen, changed = {}, 0
    for item in items:
        title = wanted = item["title"] or f"item {item['id']}"
        while title in seen:
            seen[wanted] += 1
            title = f"{wanted} ({seen[wanted]})"
        changed += title != item["title"]
        item["title"] = title
        seen[title] = 1
    if changed and say:
        print(
            f"note: {changed} titles were empty or equal to another and got a name of their own "
            '("item ID", " (2)")'
        )
    return changed


def random_names(prepared, total):
    """OpenP5's random indexing: numbers from 1001. Items after the first `prepared`
    (later.extend) come last, so that they change no name."""
    order = torch.randperm(prepared, generator=torch.Generator().manual_seed(0)).tolist()
    return [f"item_{1001 + k}" for k in [*order, *range(prepared, total)]]


def index_file_names(path, items):
    """What a file of lines `id name` calls each item; a number gets "item_" before it."""
    known = {item["id"] for item in items}
    with reading(f"--item-names {path}", "give title, random or a file with lines `id name`"):
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
        index = dict(split_name(line.strip(), known) for line in lines if len(line.split()) > 1)
    missing = [item["id"] for item in items if item["id"] not in index]
    if missing:
        raise InputError(
            f"--item-names {path}: no line for {len(missing)} items, the first is {missing[0]}; "
            f"add `{missing[0]} NAME`"
        )
    names = [index[item["id"]] for item in items]
    return [("item_" if name.isdigit() else "") + name.strip() for name in names]


def split_name(line, known):
    """A line `id name` -> (id, name). An id may have spaces: the longest known one that begins the
    line."""
    spaces = [space.span() for space in re.finditer(r"\s+", line)]
    fitting = [span for span in spaces if line[: span[0]] in known]
    start, end = fitting[-1] if fitting else spaces[0]
    return line[:start], line[end:]


def distinct_titles(items, tokenizer, max_tokens):
    """Titles, cut to `max_tokens` (0: whole), of which no two are the same tokens; else they get a
    running number within the same length.

    SOFT and the tokenizer's special tokens are taken out: an end token would end its name.
    """

    def encode(text):
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])

    special = re.compile("|".join(map(re.escape, [SOFT, *tokenizer.all_special_tokens])))
    names, equal = {}, []  # {tokens: (id, name)}; ids of titles that are equal to the LLM
    last = {}  # the last number of titles that begin alike: the next one need not try those before
    for item in items:
        name = title = special.sub("", item["title"])
        tokens = ids = encode(" " + title)
        before = None
        if ids in names:
            equal.append(item["id"])
        beginning = ids[: max(1, max_tokens - 1)] if max_tokens else ids
        first = last.get(beginning, 2)
        for count in itertools.chain([1], itertools.count(first)):
            too_long = max_tokens and name == title and len(ids) > max_tokens
            if name and tokens not in names and not too_long:
                break

            # A number that the tokenizer does not see either; `before` is a numbered name, since
            # one that was cut may end in a number by itself
            unseen = count > first and tokens == before
            unseen = unseen or not tokenizer.decode(tokens, skip_special_tokens=True).strip()
            if name and tokens in names and unseen:
                raise InputError(
                    "--item-names title: the tokenizer knows no letter by which the items "
                    f"{names[tokens][0]!r} and {item['id']!r} differ; take another LLM or "
                    "--item-names random"
                )

            # The next try: cut, then with 2, 3 ...
            suffix = f" {count}" if count > 1 else ""
            short = ids[: max(1, max_tokens - len(encode(suffix)))]
            name = (tokenizer.decode(short).strip() if max_tokens else title) + suffix
            before = tokens if count > first else None
            tokens = encode(" " + name)
        names[tokens] = item["id"], name
        last[beginning] = max(count, 2)
    if equal:
        print(
            f"note: {len(equal)} titles are equal to others for this tokenizer, such as "
            f"{equal[0]!r}'s, and got a number",
            file=sys.stderr,
        )
    return [name for _, name in names.values()]
