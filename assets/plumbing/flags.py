"""The flags that both training scripts have."""

import argparse
import math
from pathlib import Path

from assets.plumbing.guard import InputError, a_seed, within

NOT_WITH = {  # --method: flags that do nothing there
    "ilm-rand": ("stage1",),
    "mlp": ("stage1", "layers", "width"),
    "text": ("stage1", "layers", "width", "num_queries", "history", "shuffle_cf"),
}


def add_number(p, name, default, help, low, high=math.inf):
    """A flag for an int or a float, as its default is, from low to high."""
    kind = within(type(default), low, high)
    p.add_argument(name, type=kind, default=default, help=f"{help} [{default}]")


def add_choice(p, name, choices, help):
    """A flag for one of some words, the first by default."""
    p.add_argument(name, default=choices[0], choices=choices, help=f"{help} [{choices[0]}]")


def add_switch(p, name, help):
    switch = argparse.BooleanOptionalAction
    p.add_argument(name, action=switch, default=False, help=f"{help} [no]")


def add_run_flags(p, out, steps, batch_size, lr, rows):
    """Where a run reads and writes, and how long it trains; rows: the smallest batch."""
    run = p.add_argument_group("run")
    run.add_argument("--data", default="data/toy", help="prepared folder [data/toy]")
    run.add_argument("--out", help=f"run directory [out/NAME/{out}, NAME that of --data]")
    run.add_argument("--device", help="[cuda if there is one, else cpu]")
    run.add_argument("--seed", type=a_seed, default=0, help="[0]")
    add_number(run, "--steps", steps, "optimizer steps", 1)
    add_number(run, "--batch-size", batch_size, "rows of all processes", rows)
    peak = "peak, after 5 %% of the steps; then cosine to a tenth"
    add_number(run, "--lr", lr, peak, 0, 100)
    every = (
        f"steps between validations; 0: {'a tenth' if out == 'stage1' else 'a sixth'} of --steps"
    )
    add_number(run, "--eval-every", 0, every, 0)
    again = "go on from the last checkpoint; with more --steps on the longer cosine"
    run.add_argument("--resume", action="store_true", help=again)


def add_qformer_flags(p, **defaults):
    """The shape of the Q-Former; None for what another run or QFormerConfig says."""
    shape = p.add_argument_group("item encoder")
    for name, high, help in (
        ("num_queries", 1024, "Q, soft tokens per item [4]"),
        ("layers", 256, "layers; cross-attention in every second [2]"),
        ("width", 1 << 16, "Q-Former width D [128]"),
    ):
        kind, default = within(int, 1, high), defaults.get(name)
        shape.add_argument(f"--{name.replace('_', '-')}", type=kind, default=default, help=help)
    return shape


def shape_of(args):
    """What was said of the shape of the Q-Former."""
    shape = {name: getattr(args, name) for name in ("num_queries", "layers", "width")}
    return {name: value for name, value in shape.items() if value is not None}


def refuse_unused(args):
    """A flag that --method does not read is a mistake."""
    for name in NOT_WITH.get(args.method, ()):
        value = getattr(args, name)
        if value is not None and value is not False:
            flag = f"--{name.replace('_', '-')}"
            raise InputError(f"{flag} does nothing with --method {args.method}; leave it out")


def settled(args, out, validations):
    """The defaults that depend on other flags: out/NAME/..., so many validations a run."""
    args.out = args.out or f"out/{Path(args.data).name}/{out}"
    args.eval_every = args.eval_every or max(1, args.steps // validations)
    return args
