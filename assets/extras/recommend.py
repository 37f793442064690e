"""The best items of many users at a time (evaluate.py --recommend), a line each, with tabs."""

import sys
from pathlib import Path

from assets.fast.search import best_items
from assets.plumbing.guard import InputError, reading
from assets.plumbing.names import numbered
from ilm import load_ilm
from train_stage2 import Examples


def read_users(path, dataset):
    """A file of user ids, one a line -> their numbers. Blank lines count for nothing."""
    with reading(f"--recommend {path}", "give a file of UTF-8 text, a user id a line"):
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    numbers, users = numbered(dataset.users), []
    for line, name in enumerate(map(str.strip, lines), 1):
        if name and name not in numbers:
            raise InputError(
                f"{path}, line {line}: no user {name!r} in {dataset.path}: left out by "
                "--min-count, or one who came later and needs --new, and a known item there"
            )
        if name:
            users.append(numbers[name])
    return users


def recommend(model, users, batch_size, top):
    """Print user, place, item, title and log p of the `top` best items of each user (U,)."""
    dataset, examples = model.dataset, Examples(model, model.dataset)
    template = examples.templates["sequential", "seen"][0]
    print("user\tplace\titem\ttitle\tlog_p")
    for start in range(0, len(users), batch_size):
        chunk = users[start : start + batch_size]
        had = [dataset.items_of(u) for u in chunk]  # all of it: nothing is being tested here
        prompts = [
            examples.ranking_prompt("sequential", u, items, template, cf)
            for u, items, cf in zip(chunk, had, examples.read_at(chunk, None))
        ]
        for u, found in zip(chunk, best_items(model, prompts, had, top)):
            if not found:
                print(f"note: {dataset.users[u]} has every item already", file=sys.stderr)
            for place, (i, log_p) in enumerate(found, 1):
                item = dataset.items[i]
                print(dataset.users[u], place, item["id"], item["title"], f"{log_p:.3f}", sep="\t")


def recommend_file(args, device):
    """evaluate.py --recommend FILE [--run RUN] [--data FOLDER] [--new FOLDER] [--top K]
    [--batch-size N]"""
    run = args.run[0] if args.run else Path("out", Path(args.data or "toy").name, "ilm")
    model = load_ilm(run, device, args.data, args.new)
    users = read_users(args.recommend, model.dataset)
    recommend(model, users, args.batch_size, args.top)
