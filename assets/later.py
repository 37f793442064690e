"""Users and items that came after training (ilm.py --new): they get CF vectors by fold-in, and nothing is trained again."""
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from assets.guard import InputError
from assets.readers import read_csv, read_items
from data import fold_in, standardise, unique_titles


def new_names(pairs, known, others):
    """Pairs (name, other name) -> {each name that is not known: known others, by number, that it meets}. known, others: {name: number}."""
    met = {name: [] for name, _ in pairs if name not in known}
    for name, other in pairs:
        if name in met and other in others and others[other] not in met[name]:
            met[name].append(others[other])
    return met


def fold_in_new(met, own, other, own_cf):
    """Raw and standardised vectors (N, E) of one side, with a row more for each new name that meets known ones of the other side."""
    vectors = torch.stack([fold_in(other, numbers) for numbers in met.values()]) if met else own[:0]
    return torch.cat([own, vectors]), torch.cat([own_cf, standardise(vectors, own)])


def extend(dataset, folder):
    """The data set with the users and items that are new in folder/interactions.csv after its own (items.csv says what the items are), and
    the histories of all. A new user is folded in from the known items they chose, a new item from the known users who chose it, and
    who meets nothing known is left out with a note; the vectors of known ones stay as they are."""
    if not (Path(folder) / "interactions.csv").is_file():
        raise InputError(f"--new {folder}: no interactions.csv in it")
    users, items, times = read_csv(folder)
    table, pairs = {}, np.stack([users, items], 1)[np.argsort(times, kind="stable")].astype(str).tolist()
    for name in ("items.csv", "items.tsv", "items.jsonl"):
        table |= read_items(Path(folder) / name) if (Path(folder) / name).is_file() else {}
    number = lambda names: {name: k for k, name in enumerate(names)}
    known_users, known_items = number(dataset.users), number(item["id"] for item in dataset.items)
    new_users = new_names(pairs, known_users, known_items)
    new_items = new_names([(item, user) for user, item in pairs], known_items, known_users)
    lost = [name for met in (new_items, new_users) for name in met if not met[name]]
    if lost:
        print(f"note: {len(lost)} users and items of {folder} meet nothing known and are left out, first {lost[0]}", file=sys.stderr)
    new_users, new_items = ({name: numbers for name, numbers in met.items() if numbers} for met in (new_users, new_items))
    raw_users, user_cf = fold_in_new(new_users, *dataset.raw_cf, dataset.user_cf)
    raw_items, item_cf = fold_in_new(new_items, *dataset.raw_cf[::-1], dataset.item_cf)

    catalogue = [*dataset.items, *(dict(table.get(x) or {"id": x, "title": "", "text": "", "attributes": {}}) for x in new_items)]
    unique_titles(catalogue)
    user_number, item_number = number([*dataset.users, *new_users]), number(item["id"] for item in catalogue)
    sequences = [dataset.items_of(u).tolist() for u in range(len(dataset.users))] + [[] for _ in new_users]
    for user, item in pairs:  # what the file repeats counts once
        if user in user_number and item in item_number and item_number[item] not in sequences[user_number[user]]:
            sequences[user_number[user]].append(item_number[item])
    return replace(dataset, items=catalogue, users=[*user_number], item_cf=item_cf, user_cf=user_cf, raw_cf=(raw_users, raw_items),
                   indptr=np.cumsum([0, *map(len, sequences)]), sequence=np.array([i for s in sequences for i in s], dtype=int))
