"""Raw interaction logs -> one prepared folder that every other script reads. Read this first.

    python data.py                                       # the toy world, 3 s
    python data.py --dataset movielens --source ml-100k  # under a minute

A recommender knows items through *interactions* (who chose what, in which order), a language model
through *text*. This file prepares both, and the collaborative-filtering (CF) vectors that the
item-language model will translate into text space. The folder, of I items, U users and nnz
interactions (E: the width of a vector):

    items.jsonl     line i is item i: {"id", "title", "text", "attributes"}. What a text can tell
    users.txt       line u is the original id of user u
    sequences.npz   indptr (U+1,), items (nnz,): every user's items in time order. The last is for
                    test, the last but one for validation
    cf.npz          item (I, E), raw: implicit ALS on the training part. What interactions can tell;
                    and user_stats (2, E), user_gram (E, E), user (U, E) where --cf gave one
    tasks.jsonl     instances of text tasks: {"task", "split", "prompt", "target", "items"}
    meta.json       counts, settings, sha256 of the files above, and which items are *held out*: no
                    training loss sees their texts. Their titles are ranking targets all the same; a
                    text of MovieLens or Beauty begins with the title: that part is seen

A user has no vector of their own: it is a function of a history, solved for *at a moment*. That,
and ALS, stand in assets/plumbing/cf.py, to be read beside this file.
"""

import hashlib
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from assets.fast.nearest import nearest_of_each
from assets.plumbing import checks, names
from assets.plumbing.cf import (
    CFSettings,
    UserSolver,
    standardise,
    train_cf,
    training_pairs,
    users_together,
)
from assets.plumbing.choose_cf import choose_cf
from assets.plumbing.data_flags import check_request, parse_args
from assets.plumbing.guard import InputError, reading, run_script
from assets.plumbing.look import look_at
from assets.plumbing.prepared import read_folder, write_folder
from assets.plumbing.readers import load_cf, read_files
from assets.toy_world import toy_files

RANKING_TASKS = ("sequential", "straightforward")
PROMPT_ITEMS = 20  # OpenP5: histories are cut to the last 20 items
# Last items of a user that are hidden. train and valid see the same; valid asks for what follows
HIDDEN = {"train": 2, "valid": 2, "test": 1, None: 0}


# ---- The prepared folder, as the other scripts see it ----


@dataclass(eq=False)
class Dataset:
    """A prepared folder in memory: I items, U users, E CF dimensions.

    Raw vectors are as ALS left them: a raw user's dot product with a raw item is MF's score.
    Encoders read standardised ones. Users' vectors are solved for when they are asked for:
    vectors_at for validation, test and conversation, vectors_along (one user) and vectors_before
    (many) for training.
    """

    path: Path
    meta: dict
    items: list  # I dicts, see items.jsonl
    users: list  # U original ids
    indptr: np.ndarray  # (U+1,) where each user begins in `sequence`
    sequence: np.ndarray  # (nnz,) item indices
    purchases: torch.Tensor  # (I,) how often each was chosen in the training part
    item_cf: torch.Tensor  # (I, E) standardised
    raw_cf: torch.Tensor  # (I, E) raw
    # (U, E) users of another engine (--cf), the same at every moment; None: ours
    raw_user_cf: torch.Tensor | None
    user_stats: torch.Tensor  # (2, E) mean and deviation of raw users at training moments
    # (E, E) X'X of all users' raw vectors X, order ignored (or --cf's): new items are solved by it
    user_gram: torch.Tensor
    solver: UserSolver  # from histories to raw users
    instances: list  # dicts, see tasks.jsonl

    def items_of(self, user, split=None):
        """Item indices of one user in time order, without what `split` hides."""
        begin, end = self.indptr[user], self.indptr[user + 1] - HIDDEN[split]
        return self.sequence[begin : max(begin, end)]

    def target(self, user, split):
        """The item of one user that valid or test asks for."""
        return int(self.sequence[self.indptr[user + 1] - HIDDEN[split]])

    def eligible(self, least=3):
        """Users with at least so many interactions: one to learn from, one to validate, one to
        test. A training target needs one more before it."""
        return np.flatnonzero(np.diff(self.indptr) >= least)

    def vectors_at(self, users, split=None):
        """Raw vectors (B, E) of users when the target of `split` is asked for. None: now."""
        users = np.asarray(users, dtype=np.int64)
        vectors = self.solver.of_histories([self.items_of(u, split) for u in users])
        if self.raw_user_cf is not None:
            known = users < len(self.raw_user_cf)  # who came later is folded in
            vectors[known] = self.raw_user_cf[users[known]]
        return vectors

    def vectors_along(self, user, places):
        """One user's raw vectors (n, E), each just before the item at one of the places (n,) of
        their history, which is the target.

        A vector never knows its target. It is folded in (solved, item vectors fixed) from what came
        before, or, where order does not matter (recency 1), from all *other* training items, later
        ones too, since short pasts make poor vectors. DEVIATION: the paper gives a user one vector,
        fitted to all training items.
        """
        if self.raw_user_cf is not None and user < len(self.raw_user_cf):
            return self.raw_user_cf[int(user)].repeat(len(places), 1)
        history = self.items_of(user, "train")
        if self.solver.recency < 1:
            return self.solver.before(history, places)
        return self.solver.without(history, places)

    def vectors_before(self, users, places):
        """vectors_along of many users (n,), one place each -> (n, E)."""
        if self.raw_user_cf is None:
            return self.solver.moments([self.items_of(u, "train") for u in users], places)
        vectors = [self.vectors_along(u, [place]) for u, place in zip(users, places)]
        return torch.cat([self.raw_cf[:0], *vectors])

    def standard_users(self, raw):
        """Raw users (..., E) as encoders read them."""
        mean, deviation = self.user_stats
        return (raw - mean) / deviation

    def items_in(self, text_split):
        """Items with a text whose text belongs to train, valid or test; texts of the last two are
        held out of every training loss."""
        held_out = self.meta["held_out"]
        if text_split == "train":
            chosen = {*range(len(self.items))}.difference(*held_out.values())
        else:
            chosen = held_out[text_split]
        return [i for i in sorted(chosen) if self.items[i]["text"]]


def load_dataset(path):
    """Read a prepared folder. InputError where it is not what data.py wrote."""
    path = Path(path)
    with reading(path, "not what data.py writes; prepare the folder again"):
        meta, contents = read_folder(path)
        indptr, sequence = (contents["sequences.npz"][name] for name in ("indptr", "items"))
        cf = {name: torch.from_numpy(x) for name, x in contents["cf.npz"].items()}
        _, trained_on = training_pairs(indptr, sequence.astype(np.int64))
        return Dataset(
            path=path,
            meta=meta,
            items=contents["items.jsonl"],
            users=contents["users.txt"],
            indptr=indptr,
            sequence=sequence,
            purchases=torch.from_numpy(trained_on).bincount(minlength=len(cf["item"])).float(),
            item_cf=standardise(cf["item"]),
            raw_cf=cf["item"],
            raw_user_cf=cf.get("user"),
            user_stats=cf["user_stats"],
            user_gram=cf["user_gram"],
            solver=UserSolver(cf["item"], CFSettings(**meta["cf"]["settings"])),
            instances=contents["tasks.jsonl"],
        )


# ---- Sequences ----------------------------


def k_core(users, items, min_count):
    """True at the interactions (nnz,) that are left when users and items with fewer than
    `min_count` are dropped until there is none. users, items: numbers from 0."""
    keep = np.ones(len(users), dtype=bool)
    while True:
        enough = keep.copy()
        for codes in (users, items):
            count = np.bincount(codes[keep], minlength=codes.max(initial=0) + 1)
            enough &= count[codes] >= min_count
        if enough.sum() == keep.sum():
            return keep
        keep = enough


def filter_and_sort(users, items, times, min_count, max_users=None, seed=0):
    """k-core, a sample of users, time order -> original ids of users and items, and all sequences:
    indptr (U+1,), item indices (nnz,). Equal times keep the order of the file. Of a sample, items
    may have fewer than min_count."""
    user_ids, users = np.unique(users, return_inverse=True)
    item_ids, items = np.unique(items, return_inverse=True)

    # Who is kept
    keep = k_core(users, items, min_count)
    checks.tell_left_out(users, items, keep, min_count)
    if max_users:
        sample = np.random.default_rng(seed).permutation(np.unique(users[keep]))[:max_users]
        keep &= np.isin(users, sample)
    if not keep.any():
        raise InputError(
            f"--min-count {min_count}: nothing is left of {len(users)} interactions; lower it"
        )

    # Numbers from 0 for those, users together and each in time order
    kept_users, users = np.unique(users[keep], return_inverse=True)
    kept_items, items = np.unique(items[keep], return_inverse=True)
    order = np.lexsort((times[keep], users))
    indptr = np.concatenate([[0], np.bincount(users).cumsum()])
    user_ids, item_ids = user_ids[kept_users].astype(str), item_ids[kept_items].astype(str)
    if len(item_ids) < 2:
        raise InputError(
            f"--min-count {min_count}: leaves one item alone, {item_ids[0]}; a recommender needs "
            "some to choose from"
        )
    return user_ids.tolist(), item_ids.tolist(), indptr, items[order]


# ---- CF vectors ---------------------------


def find_cf(user_ids, item_ids, indptr, sequence, file, fixed, seed):
    """-> what cf.npz holds, {name: tensor}, and what meta.json says of it. file: --cf, vectors of
    another engine; fixed: {name: setting, or None where choose_cf chooses it}."""
    raw_user_cf, raw_cf = load_cf(file, user_ids, item_ids) if file else (None, None)

    # Chosen on validation; another engine's users need no settings
    settings, measured = None, {}
    if raw_user_cf is None:
        settings, measured = choose_cf(indptr, sequence, len(item_ids), fixed, seed, raw_cf)
    elif any(fixed.values()):
        raise InputError(
            f"--cf {file} has users as well, who stand as they are: --recency, --reg and --a0 do "
            "nothing then; leave them out"
        )
    if raw_cf is None:
        pairs = training_pairs(indptr, sequence)
        raw_cf = train_cf(*pairs, len(user_ids), len(item_ids), settings, seed=seed)
    settings = settings or CFSettings(dim=raw_cf.shape[1])

    solver = UserSolver(raw_cf, settings)
    vectors = {"item": raw_cf, **users_together(solver, indptr, sequence, raw_user_cf)}
    return vectors, {"algorithm": file or "implicit ALS", "settings": asdict(settings), **measured}


# ---- Prompts ------------------------------


def load_prompts(path=None):
    """Template lines `task; seen|unseen; prompt; target` (OpenP5's format, and its placeholders) ->
    list of 4-tuples."""
    path = path or Path(__file__).with_name("prompts.txt")
    templates = []
    for number, fields in checks.template_lines(path):
        ranking = fields[0] in RANKING_TASKS
        checks.check_template(path, number, fields, ranking)
        task, seen, prompt, target = fields
        if ranking:  # OpenP5 writes `{dataset} {target}`: what stands before the name is prompt
            prompt = f"{prompt} {target.partition('{target}')[0]}".strip()
        templates.append((task, seen, prompt, target))
    return templates


def ranking_templates(path, name):
    """{(task, "seen" or "unseen"): [prompt, ...]} of the ranking tasks for the data set of that
    name."""
    found = {(task, seen): [] for task in RANKING_TASKS for seen in ("seen", "unseen")}
    for task, seen, prompt, _ in load_prompts(path):
        if task in RANKING_TASKS:
            found[task, seen].append(prompt.replace("{dataset}", name))
    if not all(found.values()):
        raise InputError(
            f"--prompts {path}: needs a seen and an unseen line for {' and '.join(RANKING_TASKS)}"
        )
    return found


# ---- Text tasks ---------------------------
# Two splits: of a user's sequence (HIDDEN), and of items by their texts (item_split)


def item_split(name, item_id):
    """train 70 %, valid 10 %, test 20 %: a function of the folder's name and the item's id."""
    bucket = int(hashlib.sha256(f"{name}/{item_id}".encode()).hexdigest(), 16) % 10
    if bucket < 3:
        return "valid" if bucket == 0 else "test"
    return "train"


FACT_NAMES = {  # one name for the same thing in all sources
    "kind": ("genre", "genres", "category", "categories"),
    "when": ("era", "decade"),
    "who": ("director", "brand"),
}


def facts_of(item, other=None):
    """What targets may name: an item's text and attributes, `facts` (all of them), and
    FACT_NAMES; of two items also what they have in `common`, how the second does `differ`, and
    what lies `between`."""
    mine = item["attributes"]
    facts = {**mine, "text": item["text"], "facts": ", ".join(mine.values())}
    for name, keys in FACT_NAMES.items():
        facts |= {name: mine[key] for key in keys if key in mine}
    if other:
        theirs = other["attributes"]
        both = [(key, mine[key], theirs[key]) for key in mine if key in theirs]
        facts["common"] = ", ".join(f"{k} {v}" for k, v, w in both if v == w) or "nothing"
        facts["differ"] = ", ".join(f"{k} {w}" for k, v, w in both if v != w) or "nothing"
        facts["between"] = ", ".join(v if v == w else f"{v} or {w}" for k, v, w in both)
    return facts


def nearest(unit, pool, item):
    """The other item of a pool (n,) whose CF vector has the highest cosine, a list of one; of none
    where there is no other. unit (I, E): vectors of length 1."""
    others = pool[pool != item]
    return others[(unit[others] @ unit[item]).argsort()[-1:]].tolist()


def text_tasks(items, text_splits, templates, raw_cf, seed, limit=5000):
    """An instance of each text template for every item (of `limit` a split) that has what its
    target names.

    A second {item} is any other of the same split, {neighbour} the one whose CF vector has the
    highest cosine (raw_cf None: no such tasks). The prompt keeps {item}, for which prompt_ids puts
    soft tokens, never a title.
    """
    # Of each split, the items to ask about, and the neighbour of each
    rng = np.random.default_rng([seed, 24])
    unit = None if raw_cf is None else F.normalize(raw_cf).numpy()
    pools, neighbour = {}, {}
    for split in ("train", "valid", "test"):
        pool = [i for i, s in enumerate(text_splits) if s == split and items[i]["text"]]
        pools[split] = np.sort(rng.permutation(np.array(pool, dtype=int))[:limit])
        if raw_cf is not None:
            neighbour |= nearest_of_each(unit, pools[split], nearest)

    # Every template for every item
    instances = []
    for task, _, prompt, target in (t for t in templates if t[0] not in RANKING_TASKS):
        wanted = re.findall(r"\{(\w+)\}", target)
        asked = prompt.replace("{neighbour}", "{item}")
        for split, pool in pools.items():
            for i in pool.tolist():
                about = [i]
                if "{neighbour}" in prompt:
                    about += neighbour.get(i, [])
                elif asked.count("{item}") == 2:
                    about += rng.permutation(pool[pool != i])[:1].tolist()
                facts = facts_of(*(items[k] for k in about))
                if len(about) == asked.count("{item}") and all(map(facts.get, wanted)):
                    said = re.sub(r"\{(\w+)\}", lambda found: facts[found[1]], target)
                    row = {"task": task, "split": split, "prompt": asked, "target": said}
                    instances.append(row | {"items": about})
    return instances


# ---- All of it ----------------------------


def prepare(
    out=None,
    dataset="toy",
    source=None,
    items=None,
    columns=None,
    look=False,
    cf=None,
    cf_dim=None,
    recency=None,
    reg=None,
    a0=None,
    min_count=5,
    max_users=None,
    seed=0,
    world_seed=0,
):
    """The whole of this file in order: read, sort, name, find CF, make text tasks, write.
    Parameters are the flags of parse_args; prepare("data/toy") makes the toy world's folder."""
    out = check_request(dataset, source, items, columns, out, cf, cf_dim, reg, a0)

    # Who chose what, in which order
    if dataset == "toy":
        *log, table = toy_files(world_seed, max_users or 1000, seed)
    else:
        *log, table = read_files(dataset, source, items, columns)
    user_ids, item_ids, indptr, sequence = filter_and_sort(*log, min_count, max_users, seed)
    del log  # of many millions it takes more than all that follows
    U, I = len(user_ids), len(item_ids)
    print(f"{dataset}: {U:,} users, {I:,} items, {len(sequence):,} interactions")

    # What is known of the items, which need names of their own to be recommended by
    catalogue = names.in_table(table, item_ids)
    renamed = names.unique_titles(catalogue, say=True)
    text_splits = [item_split(out.name, x) for x in item_ids]
    if look:
        return look_at(catalogue, text_tasks(catalogue, ["train"] * I, load_prompts(), None, 0, 20))

    # CF vectors, and tasks for the LLM
    fixed = {"dim": cf_dim, "recency": recency, "reg": reg, "a0": a0}
    with checks.solvable(cf):
        vectors, said_of_cf = find_cf(user_ids, item_ids, indptr, sequence, cf, fixed, seed)
    instances = text_tasks(catalogue, text_splits, load_prompts(), vectors["item"], seed)

    # The folder
    held_out = {s: np.flatnonzero(np.array(text_splits) == s).tolist() for s in ("valid", "test")}
    short_users = int(np.sum(np.diff(indptr) < 3))
    meta = {"name": out.name, "dataset": dataset, "source": source, "columns": columns}
    meta |= {"seed": seed, "world_seed": world_seed, "min_count": min_count}
    meta |= {"users": U, "items": I, "interactions": len(sequence), "short_users": short_users}
    meta |= {"renamed_titles": renamed, "cf": said_of_cf, "held_out": held_out}
    contents = {
        "items.jsonl": catalogue,
        "tasks.jsonl": instances,
        "users.txt": user_ids,
        "sequences.npz": {"indptr": indptr, "items": sequence.astype(np.int32)},
        "cf.npz": {name: x.numpy() for name, x in vectors.items()},
    }
    write_folder(out, meta, contents)
    short = f"{short_users} users have fewer than 3 interactions (CF alone)"
    print(f"wrote {out}: {len(instances):,} text-task instances; {short}")


def main(argv=None):
    prepare(**vars(parse_args(argv)))


if __name__ == "__main__":
    run_script(main)
