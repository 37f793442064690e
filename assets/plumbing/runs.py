"""Finding run directories, and what is known of a run without loading it."""

import hashlib
import json
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from assets.plumbing.guard import InputError, printable, write_file
from assets.plumbing.run import check_fingerprint, check_name, commit, read_config


def check_tools(args):
    """Is there what is needed after the evaluation? Said before it."""
    if args.plot and not find_spec("matplotlib"):
        raise InputError("--plot needs matplotlib: pip install matplotlib")
    if args.sc_encoder:
        check_name(args.sc_encoder, "--sc-encoder")


def which_run(run, config, args, device):
    """The part of metrics.json that says which run it is, and how it is measured. "curve": the
    validations of log.jsonl. args: those of evaluate.py."""
    log = Path(run) / "log.jsonl"
    lines = log.read_text().split("\n")[:-1] if log.exists() else []  # the last may be cut off
    out = {
        "run": str(run),
        "kind": config["kind"],
        "dataset": config["data"],
        "seed": config["seed"],
        "split": args.split,
        "filtered": not args.keep_history,
        "beams": args.beams,
        "full_vocabulary": args.full_vocabulary,
        "commit": commit(),
        "trained_by": config.get("commit"),
        "device": str(device),
        "steps": config["steps"],
        "lr": config["lr"],
        "num_queries": config["qformer"]["num_queries"],
        "curve": [json.loads(line) for line in lines if '"valid_' in line],
    }
    if config["kind"] == "stage1":
        method = "+".join(config["losses"])
        return out | {"method": method, "text_fraction": config["text_fraction"]}
    frozen = not config["train_llm"]
    return out | {"method": config["method"], "llm": config["llm"], "llm_frozen": frozen}


def is_current(run, data, load_dataset):
    """Does a run found in out/NAME belong to the data as they are now? If not, a line says so."""
    config = read_config(run)
    try:
        check_fingerprint(config, load_dataset(data or config["data"]), run)
    except InputError as error:
        print(printable(f"note: left out: {error}"), file=sys.stderr)
        return False
    return True


def find_runs(named, data, load_dataset):
    """-> run directories, none of them unfinished: those named, else all of out/NAME that belong to
    the data as they are now. data: a prepared folder, or None for data/toy."""
    folder = Path("out", Path(data or "toy").name)
    runs = named or sorted(str(file.parent) for file in folder.glob("*/model.safetensors"))
    if not runs:
        raise InputError(
            f"no runs in {folder}; run train_stage1.py and train_stage2.py first, or name run "
            "directories with --run"
        )
    for run in runs:  # a mistake is said before the first evaluation, not after it
        read_config(run)
    if not named:
        runs = [run for run in runs if is_current(run, data, load_dataset)]
        if not runs:
            raise InputError(f"no runs in {folder} belong to its data; train again")
    return runs


def write_json(path, found):
    """In place of what stands there, whole or not at all."""
    write_file(Path(path), lambda f: f.write_text(json.dumps(found)))


def test_users(dataset, limit):
    """All eligible users, or a sample of them, fixed by a hash of their ids."""
    hashes = [hashlib.sha256(name.encode()).digest() for name in dataset.users]
    return np.sort(sorted(dataset.eligible(), key=hashes.__getitem__)[:limit])
