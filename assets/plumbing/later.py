"""Users and items that came after training (ilm.py --new): they get CF vectors by fold-in, and
nothing is trained again."""

import sys
from dataclasses import replace

import numpy as np
import torch

from assets.plumbing.cf import UserSolver, solve_rows, standardise
from assets.plumbing.guard import InputError
from assets.plumbing.names import in_table, numbered, unique_titles
from assets.plumbing.readers import FILES, files, read_csv, read_items


def note(text):
    print(f"note: {text}", file=sys.stderr)


def tell(table):
    """Tables of recommendations are written to stdout: what had to be done to a file goes to
    stderr."""
    if table.remarks:
        note(table.line())


def read_later(folder, columns):
    """folder/interactions.csv in the order of time -> [(user, item)], and the item table {id:
    item}."""
    if not files(folder, FILES["csv"][0]):
        raise InputError(f"--new {folder}: no interactions.csv in it")
    users, items, times = read_csv(folder, columns, tell)
    order = np.argsort(times, kind="stable")
    table = {}
    for path in files(folder, FILES["csv"][1]):
        table |= read_items(path, columns, tell)
    return list(zip(users[order].tolist(), items[order].tolist())), table


def new_names(pairs, known, others):
    """Pairs (name, other name) -> {each name that is not known: known others, by number, that it
    meets}, and the names that meet none. known, others: {name: number}."""
    met = {name: {} for name, _ in pairs if name not in known}
    for name, other in pairs:
        if name in met and other in others:
            met[name][others[other]] = True  # each once, in their order
    return {n: [*found] for n, found in met.items() if found}, [n for n in met if not met[n]]


def whole_vectors(dataset, users):
    """Raw vectors (B, E) of users as ALS has them: all their training items, in no order."""
    if dataset.raw_user_cf is not None:
        return dataset.raw_user_cf[users]
    short = np.diff(dataset.indptr) < 3  # they lend all they have
    histories = [dataset.items_of(u, None if short[u] else "train") for u in users]
    return dataset.solver.still().of_histories(histories)


def fold_in_items(dataset, met):
    """Raw vectors (N, E) of new items from the known users who chose them, {item: users}: one
    row of ALS's other side."""
    everyone = np.array(sorted({user for users in met.values() for user in users}), dtype=int)
    vectors, folded = whole_vectors(dataset, everyone), [dataset.raw_cf[:0]]
    for users in met.values():  # one at a time: S is (E, E)
        X = vectors[np.searchsorted(everyone, users)]
        S, b, weight = (X.T @ X)[None], X.sum(0)[None], torch.tensor([float(len(X))])
        settings, N = dataset.solver.settings, len(dataset.users)
        folded.append(solve_rows(dataset.user_gram, S, b, weight, settings, N))
    return torch.cat(folded)


def longer_sequences(dataset, pairs, users, items, folder):
    """The histories of all users, later pairs behind their own; users, items: {name: number}."""
    sequences = [dataset.items_of(u).tolist() for u in range(len(dataset.users))]
    sequences += [[] for _ in range(len(users) - len(sequences))]
    again = 0
    for user, item in pairs:
        if user in users and item in items:
            sequence, number = sequences[users[user]], items[item]
            again += number in sequence
            if number not in sequence:
                sequence.append(number)
    if again:
        note(f"{again} interactions of {folder} repeat what a user has already; each counts once")
    return sequences


def extend(dataset, folder):
    """The data set with the users and items that are new in folder/interactions.csv after its own
    (items.csv says what the items are), and the histories of all.

    A new user is a history like any other; a new item is folded in from the known users who chose
    it. Who meets nothing known is left out with a note; the vectors of known items stay as they
    are.
    """
    columns = dict(dataset.meta.get("columns") or ())  # data.py --columns: they hold here too
    pairs, table = read_later(folder, columns)

    # Who is new, and whom they meet
    known_users, known_items = numbered(dataset.users), numbered(x["id"] for x in dataset.items)
    turned = [(item, user) for user, item in pairs]
    new_users, lost_users = new_names(pairs, known_users, known_items)
    new_items, lost_items = new_names(turned, known_items, known_users)
    if lost := lost_items + lost_users:
        note(
            f"{len(lost)} users and items of {folder} meet nothing known and are left out, first "
            f"{lost[0]}"
        )
    if idle := sorted(table.keys() - known_items.keys() - {item for _, item in pairs}):
        note(
            f"{len(idle)} items of {folder} were chosen by nobody and are left out, such as "
            f"{idle[0]!r}"
        )

    # All that is known of both; what came later is no training part
    folded = fold_in_items(dataset, new_items)
    raw = torch.cat([dataset.raw_cf, folded])
    catalogue = [*dataset.items, *in_table(table, new_items)]
    unique_titles(catalogue)
    users, items = numbered([*dataset.users, *new_users]), numbered(x["id"] for x in catalogue)
    sequences = longer_sequences(dataset, pairs, users, items, folder)
    return replace(
        dataset,
        items=catalogue,
        users=[*users],
        indptr=np.cumsum([0, *map(len, sequences)]),
        sequence=np.array([i for sequence in sequences for i in sequence], dtype=int),
        purchases=torch.cat([dataset.purchases, torch.zeros(len(new_items))]),
        item_cf=torch.cat([dataset.item_cf, standardise(folded, dataset.raw_cf)]),
        raw_cf=raw,
        solver=UserSolver(raw, dataset.solver.settings, gram=dataset.solver.gram),
    )
