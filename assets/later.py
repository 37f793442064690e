"""Users and items that came after training (ilm.py --new): they get CF vectors by fold-in, and nothing is trained again."""

import sys
from dataclasses import replace

import numpy as np
import torch

from assets.cf import UserSolver, solve_rows
from assets.guard import InputError
from assets.readers import FILES, files, read_csv, read_items
from data import standardise, unique_titles


def note(text):
    print(f"note: {text}", file=sys.stderr)


def tell(table):
    """Tables of recommendations are written to stdout: what had to be done to a file goes to stderr."""
    if table.remarks:
        note(table.line())


def new_names(pairs, known, others):
    """Pairs (name, other name) -> {each name that is not known: known others, by number, that it meets}. known, others: {name: number}."""
    met = {name: [] for name, _ in pairs if name not in known}
    for name, other in pairs:
        if name in met and other in others and others[other] not in met[name]:
            met[name].append(others[other])
    return met


def fold_in_items(dataset, met):
    """Raw vectors (N, E) of new items from the known users who chose them, {item: users}: one row of ALS's other side."""
    settings, X = dataset.solver.settings, dataset.raw_cf.new_zeros(0, dataset.raw_cf.shape[1])
    if not met:
        return X
    sums = []
    for users in met.values():
        X = dataset.all_of(users)
        sums.append((X.T @ X, X.sum(0), torch.tensor(float(len(users)))))
    S, b, weight = (torch.stack(part) for part in zip(*sums))
    return solve_rows(dataset.user_gram, S, b, weight, settings, len(dataset.users))


def extend(dataset, folder):
    """The data set with the users and items that are new in folder/interactions.csv after its own (items.csv says what the items are), and
    the histories of all. A new user is a history like any other; a new item is folded in from the known users who chose it. Who meets
    nothing known is left out with a note; the vectors of known items stay as they are."""
    if not files(folder, FILES["csv"][0]):
        raise InputError(f"--new {folder}: no interactions.csv in it")
    chosen = dict(
        dataset.meta.get("columns") or ()
    )  # data.py --columns: they hold for later files too
    users, items, times = read_csv(folder, chosen, tell)
    order = np.argsort(times, kind="stable")
    pairs, table = np.stack([users, items], 1)[order].astype(str).tolist(), {}
    for path in files(folder, FILES["csv"][1]):
        table |= read_items(path, chosen, tell)
    number = lambda names: {name: k for k, name in enumerate(names)}
    known_users, known_items = number(dataset.users), number(item["id"] for item in dataset.items)
    new_users = new_names(pairs, known_users, known_items)
    new_items = new_names([(item, user) for user, item in pairs], known_items, known_users)
    lost = [name for met in (new_items, new_users) for name in met if not met[name]]
    if lost:
        note(
            f"{len(lost)} users and items of {folder} meet nothing known and are left out, first {lost[0]}"
        )
    if idle := sorted(table.keys() - known_items.keys() - {item for _, item in pairs}):
        note(
            f"{len(idle)} items of {folder} were chosen by nobody and are left out, such as {idle[0]!r}"
        )
    new_users, new_items = (
        {name: numbers for name, numbers in met.items() if numbers}
        for met in (new_users, new_items)
    )
    folded = fold_in_items(dataset, new_items)
    raw = torch.cat([dataset.raw_cf, folded])
    item_cf = torch.cat([dataset.item_cf, standardise(folded, dataset.raw_cf)])

    catalogue = [
        *dataset.items,
        *(
            dict(table.get(x) or {"id": x, "title": "", "text": "", "attributes": {}})
            for x in new_items
        ),
    ]
    unique_titles(catalogue)
    user_number, item_number = (
        number([*dataset.users, *new_users]),
        number(item["id"] for item in catalogue),
    )
    sequences = [dataset.items_of(u).tolist() for u in range(len(dataset.users))] + [
        [] for _ in new_users
    ]
    again = 0
    for user, item in pairs:
        if user in user_number and item in item_number:
            if item_number[item] in sequences[user_number[user]]:
                again += 1
            else:
                sequences[user_number[user]].append(item_number[item])
    if again:
        note(f"{again} interactions of {folder} repeat what a user has already; each counts once")
    solver = UserSolver(raw, dataset.solver.settings, gram=dataset.solver.gram)
    purchases = torch.cat(
        [dataset.purchases, torch.zeros(len(new_items))]
    )  # what came later is no training part
    return replace(
        dataset,
        items=catalogue,
        purchases=purchases,
        users=[*user_number],
        item_cf=item_cf,
        raw_cf=raw,
        solver=solver,
        indptr=np.cumsum([0, *map(len, sequences)]),
        sequence=np.array([i for s in sequences for i in s], dtype=int),
    )
