"""Raw interaction logs -> one prepared folder that every other script reads. First file to read, first command to run.

    python data.py                                                  # the toy world                          about 3 s
    python data.py --dataset movielens --source ml-100k --out data/ml-100k                                   about 20 s

A recommender knows items through *interactions* (who chose what, in which order), a language model through *text*. This file
prepares both, and the collaborative-filtering (CF) vectors that the item-language model will translate into text space.

    items.jsonl     line i is item i: {"id", "title", "text", "attributes"}          what a text can tell
    users.txt       line u is the original id of user u
    sequences.npz   indptr (U+1,), items (nnz,): every user's items in time order     last = test, last but one = valid
    cf.npz          item (I, E): implicit ALS on the training part                    what interactions can tell
    tasks.jsonl     text tasks: {"task", "split", "prompt", "target", "items", "users"}
    meta.json       counts, settings, sha256 of the files above, and which items are *held out*: no training loss sees their texts (titles
                    are ranked all the same; MovieLens's and Beauty's texts begin with them)

Equal times keep the order of the file (the sort is stable). The folder appears under its name only when it is whole.

A user has no vector of their own: it is a function of a history, solved for *at a moment* (section "Users at a moment")."""

import argparse
import hashlib
import json
import re
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from assets.cf import CFSettings, UserSolver, als_solve, length_batches, train_cf
from assets.guard import (
    CONTROL,
    InputError,
    Parser,
    a_seed,
    end_move,
    printable,
    reading,
    run_script,
    within,
    write_atomically,
)
from assets.readers import FILES, MOVIELENS_URL, READERS, check_ids, find, load_cf, read_items
from assets.tables_in import a_column, split_name
from assets.toy_world import toy_interactions, toy_world

RANKING_TASKS = ("sequential", "straightforward")
HISTORY = 20  # OpenP5: histories are cut to the last 20 items
FORMAT = 2  # of a prepared folder; 1 had a table of users' vectors
SOFT = "<|soft|>"  # stands for one soft token in prompt text; its id never reaches the LLM's embedding table


# ---- The prepared folder, as the other scripts see it ----------------------------------------------------------------


@dataclass(eq=False)
class Dataset:
    """A prepared folder in memory: I items, U users, E CF dimensions. Users' vectors are solved for when they are asked for."""

    path: Path
    meta: dict
    items: list  # I dicts, see items.jsonl
    users: list  # U original ids
    indptr: np.ndarray  # (U+1,)
    sequence: np.ndarray  # (nnz,)
    item_cf: torch.Tensor  # (I, E) standardised: what encoders read
    purchases: torch.Tensor  # (I,) how often each was chosen in the training part
    raw_cf: torch.Tensor  # (I, E) as ALS left them: a dot product with a raw user is MF's score
    user_cf: (
        torch.Tensor
    )  # (U, E) raw, or None: users of another engine (--cf), which stand at every moment
    user_stats: torch.Tensor  # (2, E) mean and standard deviation of raw users at training moments
    user_gram: (
        torch.Tensor
    )  # (E, E) X'X over all users by `all_of`: what a new item is folded in with
    solver: "UserSolver"  # from histories to raw vectors
    tasks: list  # dicts, see tasks.jsonl

    def items_of(self, user, split=None):
        """Item indices of one user in time order, up to what is predicted: without the last two for
        train and valid, the last for test."""
        begin = self.indptr[user]
        end = self.indptr[user + 1] - {None: 0, "train": 2, "valid": 2, "test": 1}[split]
        return self.sequence[begin : max(begin, end)]

    def target(self, user, split):
        return int(self.sequence[self.indptr[user + 1] - {"valid": 2, "test": 1}[split]])

    def eligible(self):
        """Users with at least 3 interactions: one to learn from, one to validate, one to test."""
        return np.flatnonzero(np.diff(self.indptr) >= 3)

    def users_at(self, users, split=None):
        """Raw vectors (B, E) of users when the target of `split` is asked for; None: now."""
        users = np.asarray(users, dtype=np.int64)
        own = users < (0 if self.user_cf is None else len(self.user_cf))  # later users have none
        if own.any() and own.all():
            return self.user_cf[users]
        vectors = self.solver.of_histories([self.items_of(u, split) for u in users])
        if own.any():
            vectors[own] = self.user_cf[users[own]]
        return vectors

    def all_of(self, users):
        """Raw vectors (B, E) of users as ALS has them: all their training items, in no order."""
        if self.user_cf is not None:
            return self.user_cf[users]
        still = UserSolver(
            self.raw_cf, replace(self.solver.settings, recency=1.0), self.solver.gram
        )
        short = np.diff(self.indptr) < 3  # they lend all they have
        histories = [self.items_of(u, None if short[u] else "train") for u in users]
        return still.of_histories(histories)

    def training_users(self, user, places):
        """Raw vectors (n, E) of a user as a training target at each place (n,) of the history meets
        them. No vector knows its target: it is folded in from what came before, or, where order does
        not matter (recency 1), from all *other* training items, since short pasts make poor vectors.
        DEVIATION: the paper gives a user one vector, fitted to all training items."""
        if self.user_cf is not None and user < len(self.user_cf):
            return self.user_cf[[int(user)] * len(places)]
        history = self.items_of(user, "train")
        if self.solver.recency < 1:
            return self.solver.before(history, places)
        return self.solver.without(history, places)

    def moments(self, users, places):
        """Raw vectors (n, E) of many users, each as a training target at one place meets them."""
        if self.user_cf is None:
            return self.solver.moments([self.items_of(u, "train") for u in users], places)
        rows = [self.training_users(u, [place]) for u, place in zip(users, places)]
        return torch.cat(rows) if rows else torch.zeros(0, self.raw_cf.shape[1])

    def standard_users(self, raw):
        """Raw users (..., E) as encoders read them."""
        mean, deviation = self.user_stats
        return (raw - mean) / deviation

    def items_in(self, split):
        """Items with a text whose text belongs to train, valid or test; the last two are held out of
        every training loss."""
        held_out = {s: set(self.meta["held_out"][s]) for s in ("valid", "test")}
        train = set(range(len(self.items))) - held_out["valid"] - held_out["test"]
        return [i for i in sorted(held_out.get(split, train)) if self.items[i]["text"]]


def standardise(x, known=None):
    """Columns of x, less the mean and over the standard deviation of `known` (x itself), of its rows
    that CF has seen (not all zeros)."""
    known = x if known is None else known
    seen = known[known.abs().sum(1) > 0]
    if len(seen) < 2:
        return x
    return (x - seen.mean(0)) / seen.std(0).clamp(min=1e-6)


def load_dataset(path):
    """Read a prepared folder and check it against the sums in its meta.json. Ends a preparation that a kill has cut short."""
    end_move(path := Path(path))
    if not (path / "meta.json").is_file():
        raise InputError(
            f"{path}: not a prepared folder (no meta.json); data.py makes one: is the name right?"
        )
    lines = lambda name: (
        (path / name).read_text(encoding="utf-8").split("\n")[:-1] if (path / name).exists() else []
    )
    with reading(path, "not what data.py writes; prepare the folder again"):
        meta = json.loads((path / "meta.json").read_text())
        if meta.get("format") != FORMAT:
            raise InputError(
                f"{path}: prepared by another version of data.py (format {meta.get('format', 1)}, now {FORMAT}); prepare it again"
            )
        for name, sha in meta["sha256"].items():
            if (
                not (path / name).is_file()
                or hashlib.sha256((path / name).read_bytes()).hexdigest() != sha
            ):
                raise InputError(
                    f"{path / name}: differs from what data.py wrote; prepare the folder again"
                )
        arrays = {
            **np.load(path / "sequences.npz", allow_pickle=False),
            **np.load(path / "cf.npz", allow_pickle=False),
        }
        items, tasks = (
            [json.loads(x) for x in lines(name)] for name in ("items.jsonl", "tasks.jsonl")
        )
        users, indptr, sequence = lines("users.txt"), arrays["indptr"], arrays["items"]
        raw, stats = torch.from_numpy(arrays["item"]), torch.from_numpy(arrays["user_stats"])
        user = torch.from_numpy(arrays["user"]) if "user" in arrays else None
        solver = UserSolver(raw, CFSettings(**meta["cf"]["settings"]))
        unsafe = any(
            CONTROL.search(text)
            for text in [*users, *(x[key] for x in items for key in ("id", "title", "text"))]
        )
        counts = (len(users), len(raw), len(sequence), len(users if user is None else user))
        sizes = (
            counts == (len(indptr) - 1, len(items), indptr[-1], len(users))
            and (sequence < len(items)).all()
        )
        if unsafe or not sizes or {*meta["held_out"]} != {"valid", "test"}:
            raise ValueError("its files do not belong together, or have control characters")
        chosen = torch.from_numpy(sequence[training_part(indptr)].astype(np.int64))
        purchases = torch.bincount(chosen, minlength=len(items)).float()
        return Dataset(
            path,
            meta,
            items,
            users,
            indptr,
            sequence,
            standardise(raw),
            purchases,
            raw,
            user,
            stats,
            torch.from_numpy(arrays["user_gram"]),
            solver,
            tasks,
        )


# ---- Sorting out -----------------------------------------------------------------------------------------------------


def unique_titles(items):
    """A recommender has to name items: equal titles get " (2)", " (3)"; an empty one becomes "item ID". Returns how many."""
    seen, changed = {}, 0
    for item in items:
        title = wanted = item["title"] or f"item {item['id']}"
        while title in seen:
            seen[wanted] += 1
            title = f"{wanted} ({seen[wanted]})"
        changed, item["title"] = changed + (title != item["title"]), title
        seen[title] = 1
    return changed


def k_core(users, items, min_count):
    """Drop users and items with fewer than `min_count` interactions until none is left. Returns a mask of kept rows."""
    frequent = lambda codes, keep: (
        np.bincount(codes[keep], minlength=codes.max(initial=0) + 1)[codes] >= min_count
    )
    keep = np.ones(len(users), dtype=bool)
    while (fewer := keep & frequent(users, keep) & frequent(items, keep)).sum() < keep.sum():
        keep = fewer
    return keep


def training_part(indptr):
    """True at the interactions (nnz,) to train on: all but the last two of each user (last = test, last but one = valid). Users with
    fewer than 3 have no targets and lend all they have."""
    lengths = np.diff(indptr)
    users = np.repeat(np.arange(len(lengths)), lengths)
    return (indptr[users + 1] - np.arange(len(users)) > 2) | (lengths[users] < 3)


def training_moments(indptr, count, seed=0):
    """Up to `count` random training targets -> users (n,), places in their histories (n,). The first
    item of a user is never a target."""
    random = np.random.default_rng([seed, 7])
    targets = np.maximum(np.diff(indptr) - 3, 0)  # all but the first of the training part
    ends = targets.cumsum()
    chosen = np.sort(random.permutation(ends[-1])[:count]) if len(ends) else np.zeros(0, dtype=int)
    users = np.searchsorted(ends, chosen, side="right")
    return users, chosen - (ends - targets)[users] + 1


# ---- Names, prompts, text tasks, held-out items ----------------------------------------------------------------------


def item_names(dataset, tokenizer, style="title", max_tokens=0):
    """The string by which each item is named: its title, a random number from 1001 (OpenP5's random indexing), or what one of OpenP5's
    index files says (lines `id name`).

    max_tokens cuts long titles; names that the cut makes equal get a running number within the same length."""
    if style == "random":
        order = torch.randperm(
            dataset.meta["items"], generator=torch.Generator().manual_seed(0)
        ).tolist()
        return [
            f"item_{1001 + k}" for k in [*order, *range(len(order), len(dataset.items))]
        ]  # later items (extend) come last
    if style != "title":
        with reading(f"--item-names {style}", "give title, random or a file with lines `id name`"):
            lines = Path(style).read_text(encoding="utf-8-sig").splitlines()
            known = {item["id"] for item in dataset.items}
            index = dict(split_name(line.strip(), known) for line in lines if len(line.split()) > 1)
        missing = [item["id"] for item in dataset.items if item["id"] not in index]
        if missing:
            raise InputError(
                f"--item-names {style}: no line for {len(missing)} items, the first is {missing[0]}; add `{missing[0]} NAME`"
            )
        return [
            ("item_" if index[item["id"]].isdigit() else "") + index[item["id"]].strip()
            for item in dataset.items
        ]
    encode = lambda text: tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    decode = lambda tokens: tokenizer.decode(tokens, skip_special_tokens=True).strip()
    special = re.compile(
        "|".join(map(re.escape, [SOFT, *tokenizer.all_special_tokens]))
    )  # an end token in a title would end its name
    names, equal = {}, []  # tokens: (id, name); titles that differ in no token are equal to the LLM
    for item in dataset.items:
        name = title = special.sub("", item["title"])
        tokens = ids = encode(" " + title)
        count, before = 1, None
        equal += [item["id"]] if ids in names else []
        while not name or tokens in names or max_tokens and name == title and len(ids) > max_tokens:
            unseen = count > 2 and tokens == before or not decode(tokens)
            if name and tokens in names and unseen:
                raise InputError(
                    f"--item-names title: the tokenizer knows no letter by which the items {names[tokens][0]!r} and {item['id']!r} "
                    "differ; take another LLM or --item-names random"
                )
            # Of numbered names alone: one that was cut may end in that number by itself
            before, suffix = tokens if count > 2 else None, f" {count}" if count > 1 else ""
            short = ids[: max(1, max_tokens - len(encode(suffix)))]
            name = (tokenizer.decode(short).strip() if max_tokens else title) + suffix
            tokens, count = encode(" " + name), count + 1
        names[tokens] = item["id"], name
    if equal:
        print(
            f"note: {len(equal)} titles are equal to others for this tokenizer, such as {equal[0]!r}'s, and got a number",
            file=sys.stderr,
        )
    return [name for _, name in names.values()]


def load_prompts(path=None):
    """Template lines `task; seen|unseen; prompt; target` (OpenP5's format, and its placeholders) -> list of 4-tuples."""
    templates, path = [], path or Path(__file__).with_name("prompts.txt")
    with reading(path, "templates are lines of UTF-8 text, see prompts.txt"):
        text = Path(path).read_text(encoding="utf-8-sig")
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip() and not line.startswith("#"):
            fields = [
                f.strip()
                for f in re.sub(r"(user_)?{user_id}", "{user}", printable(line)).split(";")
            ]
            ranking = fields[0] in RANKING_TASKS
            if (
                len(fields) != 4
                or fields[1] not in ("seen", "unseen")[: 1 + ranking]
                or ranking
                and "{target}" not in fields[3]
            ):
                raise InputError(
                    f"{path}, line {number}: not `task; seen or unseen; prompt; target`; {{target}} to rank, seen to write"
                )
            if ranking:  # what OpenP5's targets have before the name belongs to the prompt
                fields[2] = f"{fields[2]} {fields[3].partition('{target}')[0]}".strip()
            allowed = ("user", "history", "dataset") if ranking else ("item", "neighbour")
            if strange := set(re.findall(r"{(\w+)}", fields[2])) - {*allowed}:
                raise InputError(
                    f"{path}, line {number}: a prompt of {fields[0]} cannot have {{{min(strange)}}}, only {' '.join(allowed)}"
                )
            templates.append(tuple(fields))
    return templates


def ranking_templates(path, name):
    """{(task, "seen" or "unseen"): [prompt, ...]} of the ranking tasks for the data set of that name."""
    lines = load_prompts(path)
    found = {}
    for task in RANKING_TASKS:
        for prompts in ("seen", "unseen"):
            found[task, prompts] = [
                t[2].replace("{dataset}", name) for t in lines if t[:2] == (task, prompts)
            ]
            if not found[task, prompts]:
                raise InputError(
                    f"--prompts {path}: needs a seen and an unseen line for {' and '.join(RANKING_TASKS)}"
                )
    return found


def item_split(name, item_id):
    """train 70 %, valid 10 %, test 20 %: a pure function of the data set's name and the item's id."""
    bucket = int(hashlib.sha256(f"{name}/{item_id}".encode()).hexdigest(), 16) % 10
    return "valid" if bucket == 0 else "test" if bucket < 3 else "train"


FACT_NAMES = {
    "kind": ("genre", "genres", "categories"),
    "when": ("era", "decade"),
    "who": ("director", "brand"),
}  # by what a source has


def facts_of(item, other=None):
    """What targets may name: an item's text and attributes, `facts` (all of them), and FACT_NAMES, the same thing in all sources; of
    two items also what they have in `common`, how the second does `differ`, and what lies `between` them."""
    mine = item["attributes"]
    facts = {"text": item["text"], "facts": ", ".join(mine.values()), **mine}
    facts |= {name: mine[key] for name, keys in FACT_NAMES.items() for key in keys if key in mine}
    if other:
        both = [(k, v, other["attributes"][k]) for k, v in mine.items() if k in other["attributes"]]
        facts["common"] = ", ".join(f"{k} {v}" for k, v, w in both if v == w) or "nothing"
        facts["differ"] = ", ".join(f"{k} {w}" for k, v, w in both if v != w) or "nothing"
        facts["between"] = ", ".join(v if v == w else f"{v} or {w}" for k, v, w in both)
    return facts


def text_tasks(items, splits, templates, item_cf, seed, limit=5000):
    """Fill each text template for every item (of `limit` a split) that has what its target names. A second {item} is any other of
    the same split, {neighbour} the one whose CF vector has the highest cosine. A prompt never holds a title, only soft tokens."""
    rng, tasks, unit = np.random.default_rng([seed, 24]), [], F.normalize(item_cf).numpy()
    pools = {
        s: np.array([i for i, x in enumerate(splits) if x == s and items[i]["text"]], dtype=int)
        for s in ("train", "valid", "test")
    }
    pools = {s: np.sort(rng.permutation(pool)[:limit]) for s, pool in pools.items()}
    for task, _, prompt, target in (t for t in templates if t[0] not in RANKING_TASKS):
        filled = prompt.replace("{neighbour}", "{item}")
        for split, pool in pools.items():
            for i in pool.tolist():
                others, chosen = pool[pool != i], [i]
                if "{neighbour}" in prompt:
                    chosen += others[(unit[others] @ unit[i]).argsort()[-1:]].tolist()
                elif filled.count("{item}") == 2:
                    chosen += rng.permutation(others)[:1].tolist()
                facts = facts_of(*(items[k] for k in chosen))
                if len(chosen) == filled.count("{item}") and all(
                    facts.get(x) for x in re.findall(r"\{(\w+)\}", target)
                ):
                    tasks.append(
                        {
                            "task": task,
                            "split": split,
                            "prompt": filled,
                            "target": re.sub(r"\{(\w+)\}", lambda m: facts[m[1]], target),
                            "items": chosen,
                            "users": [],
                        }
                    )
    return tasks


def read_source(args):
    """The raw files -> users, items, times (equal length, file order) and the item table {id: item}."""
    if args.dataset == "toy":
        world = toy_world(args.world_seed)
        return *toy_interactions(world, args.max_users or 1000, args.seed), {
            item["id"]: item for item in world["items"]
        }
    chosen = dict(args.columns or ())
    log = READERS[args.dataset](args.source, chosen)
    path = Path(args.items or find(args.source, FILES[args.dataset][1], args.dataset))
    table = read_items(path, chosen)
    if not len(log[0]):
        raise InputError(
            f"--source {args.source}: no interactions in its {' or '.join(FILES[args.dataset][0])}"
        )
    check_ids(path, log[1], table)
    return *log, table


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


def filter_and_sort(user_ids, item_ids, times, args):
    """Repeats dropped, k-core, sample of users, time order -> original ids of users and items, and codes
    (nnz,) sorted by user, then time."""
    users, items = (np.unique(ids, return_inverse=True)[1] for ids in (user_ids, item_ids))
    first = first_of_each(users, items, times)
    if (
        not first.all()
    ):  # a log that says an event twice would put test items into the training part
        print(
            f"note: {(~first).sum():,} interactions repeat another (same user, item and time); each counts once"
        )
        user_ids, item_ids, times, users, items = (
            x[first] for x in (user_ids, item_ids, times, users, items)
        )
    keep = k_core(users, items, args.min_count)
    if args.max_users and args.dataset != "toy":
        keep &= np.isin(
            users,
            np.random.default_rng(args.seed).permutation(np.unique(users[keep]))[: args.max_users],
        )
    if not keep.any():
        raise InputError(
            f"--min-count {args.min_count}: nothing is left of {len(users)} interactions; lower it"
        )
    user_names, users = np.unique(user_ids[keep], return_inverse=True)
    item_names, items = np.unique(item_ids[keep], return_inverse=True)
    order = np.lexsort((times[keep], users))  # stable: equal times keep file order
    return (
        user_names.astype(str).tolist(),
        item_names.astype(str).tolist(),
        users[order],
        items[order],
    )


def find_cf(users, items, indptr, num_items, args):
    """-> item vectors (I, E), users' own vectors (U, E) of another engine or None, settings, and what
    validation said of them (for meta.json). users, items (nnz,): all interactions, by user and time."""
    from assets.choose_cf import choose_cf  # it needs this file

    train = training_part(indptr)
    if not args.cf:
        settings, measured = choose_cf(users, items, indptr, num_items, args)
        item_cf = train_cf(
            users[train], items[train], len(indptr) - 1, num_items, settings, seed=args.seed
        )
        return item_cf, None, settings, measured
    user_cf, item_cf = load_cf(args.cf, len(indptr) - 1, num_items)
    if user_cf is not None:
        return item_cf, user_cf, CFSettings(dim=item_cf.shape[1]), {}
    settings, measured = choose_cf(users, items, indptr, num_items, args, item_cf)
    return item_cf, None, settings, measured


def user_statistics(solver, user_cf, sequence, indptr, count=10_000):
    """Mean and standard deviation (2, E) of raw users at `count` training moments."""
    moments = training_moments(indptr, count)
    raw = user_cf
    if raw is None:
        users, places = moments
        raw = solver.moments([sequence[indptr[u] : indptr[u + 1] - 2] for u in users], places)
    if len(raw) < 2:
        return torch.stack(
            [torch.zeros(solver.item_cf.shape[1]), torch.ones(solver.item_cf.shape[1])]
        )
    return torch.stack([raw.mean(0), raw.std(0).clamp(min=1e-6)])


def prepare(args):
    """The whole of this file in order: read, filter, sort, index, train CF, make text tasks, write."""
    *log, table = read_source(args)
    user_ids, item_ids, users, items = filter_and_sort(*log, args)
    U, I = len(user_ids), len(item_ids)
    if I < 2:
        raise InputError(
            f"--source {args.source}: one item alone, {item_ids[0]}; a recommender needs some to choose from"
        )
    indptr = np.concatenate([[0], np.bincount(users, minlength=U).cumsum()])
    lengths = np.diff(indptr)
    print(f"{args.dataset}: {U:,} users, {I:,} items, {len(users):,} interactions")
    catalogue = [
        dict(table.get(x) or {"id": x, "title": "", "text": "", "attributes": {}}) for x in item_ids
    ]
    if renamed := unique_titles(catalogue):
        print(
            f'note: {renamed} titles were empty or equal to another and got a name of their own ("item ID", " (2)")'
        )
    if args.look:
        from assets.look import look  # it needs this file

        return look(catalogue)
    item_cf, user_cf, settings, measured = find_cf(users, items, indptr, I, args)
    solver = UserSolver(item_cf, settings)
    stats = user_statistics(solver, user_cf, items, indptr)
    X = user_cf
    if X is None:
        train = training_part(indptr)
        owner, chosen = (
            torch.as_tensor(np.repeat(np.arange(U), lengths)[train]),
            torch.as_tensor(items[train]),
        )
        X = als_solve(item_cf, length_batches(owner, chosen, U, I), U, settings)
    gram = X.T @ X
    splits = [item_split(Path(args.out).name, x) for x in item_ids]
    tasks = text_tasks(catalogue, splits, load_prompts(), item_cf, args.seed)
    meta = {
        "format": FORMAT,
        "name": Path(args.out).name,
        "dataset": args.dataset,
        "source": args.source,
        "columns": args.columns,
        "seed": args.seed,
        "world_seed": args.world_seed,
        "min_count": args.min_count,
        "users": U,
        "items": I,
        "interactions": len(users),
        "short_users": int((lengths < 3).sum()),
        "renamed_titles": renamed,
        "cf": {"algorithm": args.cf or "implicit ALS", "settings": asdict(settings), **measured},
        "held_out": {
            s: [i for i, split in enumerate(splits) if split == s] for s in ("valid", "test")
        },
    }

    def write(folder):
        jsonl = lambda rows: "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        for file, text in (
            ("items.jsonl", jsonl(catalogue)),
            ("tasks.jsonl", jsonl(tasks)),
            ("users.txt", "\n".join([*user_ids, ""])),
        ):
            (folder / file).write_text(text, encoding="utf-8")
        np.savez(folder / "sequences.npz", indptr=indptr, items=items.astype(np.int32))
        own = {} if user_cf is None else {"user": user_cf.numpy()}
        np.savez(
            folder / "cf.npz",
            item=item_cf.numpy(),
            user_stats=stats.numpy(),
            user_gram=gram.numpy(),
            **own,
        )
        meta["sha256"] = {
            f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.iterdir())
        }
        (folder / "meta.json").write_text(json.dumps(meta, indent=1))

    write_atomically(args.out, write)
    print(
        f"wrote {args.out}: {len(tasks):,} text-task instances; {meta['short_users']} users have fewer than 3 interactions (CF alone)"
    )


def parse_args(argv=None):
    p = Parser(description=__doc__.split("\n")[0])
    p.add_argument(
        "--dataset",
        default="toy",
        choices=["toy", "movielens", "openp5", "csv"],
        help="format of --source [toy]",
    )
    p.add_argument("--source", help="folder with the raw files")
    p.add_argument(
        "--items",
        help="item table, where it is not in --source (u.item, movies.dat, csv, tsv, jsonl)",
    )
    p.add_argument(
        "--columns",
        nargs="+",
        type=a_column,
        metavar="ROLE=NAME",
        help="columns that are not found by their names: user=A item=B time=C, of the item table id=A title=B text=C",
    )
    p.add_argument(
        "--look",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="print what was understood of the files, and write nothing",
    )
    p.add_argument(
        "--out", help="prepared folder to write [data/toy, or data/ and the source's name]"
    )
    p.add_argument(
        "--cf", help="your own CF vectors (.npz with item, and perhaps user) in place of ALS"
    )
    p.add_argument(
        "--cf-dim",
        type=within(int, 1, 4096),
        help="width E of the CF vectors [chosen on validation]",
    )
    p.add_argument(
        "--recency",
        type=within(float, 0.01, 1),
        help="weight of an item a step back; 1: order does not matter [chosen]",
    )
    p.add_argument(
        "--reg",
        type=within(float, 1e-6),
        help="regularisation of CF: flat, or with --a0 a row's weight times it [chosen]",
    )
    p.add_argument(
        "--a0",
        type=within(float, 0),
        help="with --reg: what the empty part of a row weighs [0: flat]",
    )
    p.add_argument(
        "--min-count",
        type=within(int, 1),
        default=5,
        help="drop users and items with fewer interactions, iterated [5]",
    )
    p.add_argument(
        "--max-users",
        type=within(int, 1),
        help="keep a random sample of users (toy: how many to generate) [all; toy 1000]",
    )
    p.add_argument(
        "--seed",
        type=a_seed,
        default=0,
        help="users and interactions of the toy world, start of ALS [0]",
    )
    p.add_argument(
        "--world-seed",
        type=a_seed,
        default=0,
        help="catalogue of the toy world; the shipped LLM knows world 0 [0]",
    )
    args = p.parse_args(argv)
    if args.a0 is not None and args.reg is None:
        raise InputError("--a0 goes with --reg: together they are the ridge")
    if args.dataset != "toy" and not args.source:
        raise InputError(
            f"--dataset {args.dataset} needs --source, the folder with the raw files; MovieLens: {MOVIELENS_URL}"
        )
    args.out = args.out or f"data/{Path(args.source).resolve().name if args.source else 'toy'}"
    if args.source and Path(args.out).resolve() == Path(args.source).resolve():
        raise InputError(
            f"--source {args.source}: the prepared folder would take its place; name another by --out"
        )
    return args


if __name__ == "__main__":
    run_script(lambda: prepare(parse_args()))
