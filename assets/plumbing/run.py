"""What surrounds a run: device and precision, checkpoints and what they were trained on, the run
directory, several processes. No method here; read it when you want to know how --resume, torchrun
or a checkpoint's safety work."""

import inspect
import json
import math
import os
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from assets.plumbing.guard import (
    InputError,
    Interrupted,
    check_place,
    drop_previous,
    end_move,
    has_key,
    reading,
    run_script,
    signals,
    write_atomically,
    write_file,
)

BEGAN = time.time()
# Flags that config.json leaves out, or has elsewhere
LOCAL_ARGS = (
    "out",
    "resume",
    "device",
    "layers",
    "width",
    "eval_every",
    "gradient_checkpointing",
    "compile",
    "batch_tokens",
)

# ---- Device and precision ------------------------------------------------------------------------


def pick_device(name=None):
    # cuDNN's attention builds a plan for every new shape of a batch, and no two are alike
    torch.backends.cuda.enable_cudnn_sdp(False)
    with reading(f"--device {name}", "cpu always works"):
        return torch.zeros(
            0, device=name or ("cuda" if torch.cuda.is_available() else "cpu")
        ).device


def precision(device):
    """The number type of autocast: bf16 on CUDA devices that have it, fp16 (with a GradScaler) on
    those that do not, fp32 on CPU."""
    if device.type != "cuda":
        return torch.float32
    return (
        torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    )


def autocast(device):
    dtype = precision(device)
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


# ---- Checkpoints, ours and strangers' ------------------------------------------------------------


ROOT = Path(__file__).resolve().parents[2]


def check_name(name, flag):
    """The folder of a model, or its hub id. What is not in the working directory may be beside the
    scripts: assets/toy_llm."""
    if not Path(name).exists() and (ROOT / name).is_dir():
        return str(ROOT / name)
    if not Path(name).exists() and (name.startswith((".", "/")) or name.count("/") != 1):
        raise InputError(
            f"{flag} {name}: no such folder (give a folder with config.json, or a hub id like "
            "org/model)"
        )
    return name


def from_pretrained(auto_class, name, flag, **kwargs):
    """auto_class.from_pretrained of a folder or a hub id; what goes wrong is said in one line. Code
    that comes with it is not run."""
    name = check_name(name, flag)
    with reading(
        f"{flag} {name}",
        "give the folder of a model that transformers can load without its own code",
    ):
        return auto_class.from_pretrained(name, trust_remote_code=False, **kwargs)


def load_weights(parameters, path):
    """Copy a safetensors file into named parameters, strictly: same names, same shapes."""
    with reading(path, "train again"):
        tensors = load_file(path)
    wrong = sorted(set(tensors) ^ set(parameters)) or [
        n for n in tensors if tensors[n].shape != parameters[n].shape
    ]
    if wrong:
        raise InputError(
            f"{path}: does not fit this configuration ({len(wrong)} tensors differ, the first is "
            f"{wrong[0]})"
        )
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)


STAGE2_KEYS = (
    "llm method num_queries train_llm item_names name_tokens prompt_items full_vocabulary "
    "prior temperature shuffle_cf chat_date mix"
)
REQUIRED_KEYS = {"stage1": {"losses", "text_fraction"}, "stage2": {*STAGE2_KEYS.split()}}


def read_config(run, kind=None):
    """config.json of a run directory of the given kind, stage1, stage2 or any. Ends a save that a
    kill has cut short."""
    end_move(run)
    path = Path(run) / "config.json"
    if not path.is_file() or not (Path(run) / "model.safetensors").is_file():
        raise InputError(
            f"{run}: not a finished {kind or ''} run (no config.json and model.safetensors); run "
            f"train_{kind or 'stage2'}.py"
        )
    with reading(path, "not what our training scripts write; train again"):
        config = json.loads(path.read_text())
        if kind not in (None, config["kind"]):
            raise InputError(f"{run}: is a {config['kind']} run, expected {kind}")
        if missing := (
            {"data", "seed", "steps", "lr", "qformer"} | REQUIRED_KEYS[config["kind"]]
        ) - {*config}:
            raise InputError(
                f"{path}: has no {', '.join(sorted(missing))}; not what our training scripts "
                "write; train again"
            )
    return config


def describe(args, dataset, **more):
    """What config.json says of a run: its flags, but for those that are local, and more."""
    flags = {name: value for name, value in vars(args).items() if name not in LOCAL_ARGS}
    return {**flags, **more, "fingerprint": fingerprint(dataset)}


def fingerprint(dataset):
    """What a run's config.json keeps to know its data set again: sizes, which items are held out
    (the sums of their numbers), and 16 CF numbers each of items and users (equal up to rounding on
    other machines)."""
    some = lambda cf: [round(x, 3) for x in cf.flatten()[:: max(1, cf.numel() // 16)][:16].tolist()]
    return [
        len(dataset.users),
        *dataset.item_cf.shape,
        *(sum(dataset.meta["held_out"][split]) for split in ("valid", "test")),
        *some(dataset.item_cf),
        *some(dataset.user_stats),
    ]


def same_fingerprint(before, now):
    return (
        len(before) == len(now)
        and before[:5] == now[:5]
        and np.allclose(before[5:], now[5:], atol=0.1)
    )


def check_fingerprint(config, dataset, run):
    with reading(
        f"{run}: fingerprint in config.json", "not what our training scripts write; train again"
    ):
        same = same_fingerprint(
            config.get("fingerprint", fingerprint(dataset)), fingerprint(dataset)
        )
    if not same:
        raise InputError(
            f"{run}: was trained on {config['data']}, {dataset.path} has other CF vectors or holds "
            "out other items; train again, or name the former"
        )
    return dataset


# ---- The run directory of a training script ------------------------------------------------------


def stop_unless_finite(values, step):
    """{name: number}. One that is not finite ends the run before anything of the step is saved."""
    for name, value in values.items():
        if not math.isfinite(value):
            raise InputError(
                f"step {step}: {name} is {value}; the last good checkpoint is kept; lower --lr"
            )


def check_step(losses, step, norm, scaler):
    """A loss that is not finite leaves no finite gradient: one look at the gradient's norm is
    enough. With fp16 an overflow of the gradient alone is the scaler's business: it skips the step,
    and the log shows its scale."""
    if not math.isfinite(norm):
        stop_unless_finite({f"loss {name}": x.item() for name, x in losses.items()}, step)
        if not scaler.is_enabled():
            stop_unless_finite({"the norm of the gradient": norm}, step)


def commit():
    """The git commit of this checkout, or None."""
    with suppress(OSError):
        found = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
        )
        return found.stdout.strip() or None


RUN_FILES = (
    "config.json log.jsonl metrics.json model.safetensors previous state.pt tokenizer".split()
)
INPUTS = "data stage1 llm tokenizer init_bert".split()  # flags that name folders


class RunDirectory:
    """config.json, model.safetensors (best weights so far), state.pt (everything to go on from),
    log.jsonl. The first checkpoint of a new run takes the place of an older run's files all
    together; those stand in `previous` until the new run has finished.

    log.jsonl has two kinds of lines: the losses of a training step, every 20 steps, and
    validations, whose keys begin with valid_.
    """

    def __init__(self, args, config, tokenizer=None):
        self.path, self.args, self.config, self.tokenizer = Path(args.out), args, config, tokenizer
        self.start, self.best, self.targets = 0, math.inf, 0  # step, loss, target tokens
        self.state, self.validated = None, None  # the step of the log's last line
        self.begun, self.writes = args.resume, process()[0] == 0
        inputs = [(f"--{k.replace('_', '-')}", getattr(args, k, None)) for k in INPUTS]
        names = [] if args.resume else RUN_FILES
        check_place(self.path, lambda f: has_key(f / "config.json", "kind"), names, inputs)
        end_move(self.path, tidy=self.writes)
        if args.resume:
            self.read_state()

    def read_state(self):
        """What --resume goes on from; the flags have to be those of the run, but for --steps."""
        if not (self.path / "state.pt").is_file():
            raise InputError(f"--resume: no state.pt in {self.path}; run without --resume to start")
        with reading(f"--resume: {self.path}", "run without --resume to start again"):
            before = json.loads((self.path / "config.json").read_text())
            state = torch.load(self.path / "state.pt", map_location="cpu", weights_only=True)
            self.state, self.start, self.best = state, state["step"], state["best"]
            self.targets = state["targets"]
            # What a full disk has cut off is no line
            log = [json.loads(x) for x in (self.path / "log.jsonl").read_text().split("\n")[:-1]]
            done = [row for row in log if (row["step"], "seconds" not in row) < (self.start, True)]
            if same_fingerprint(before["fingerprint"], self.config["fingerprint"]):
                before["fingerprint"] = self.config["fingerprint"]  # rounded elsewhere
            self.check_flags(before)
        if self.writes:
            # What comes again leaves the log, but for a validation of these very weights
            self.validated = done[-1]["step"] if done else None
            kept = "".join(json.dumps(row) + "\n" for row in done)
            write_file(self.path / "log.jsonl", lambda f: f.write_text(kept))
            if before.get("steps") != self.config["steps"]:
                write_file(self.path / "config.json", self.write_config)

    def check_flags(self, before):
        if self.args.steps < self.start:
            raise InputError(
                f"--resume: {self.path} has reached step {self.start}; --steps {self.args.steps} "
                f"is less: give {self.start} or more, or run without --resume to start again"
            )
        changed = [k for k, v in self.config.items() if k != "steps" and before.get(k, v) != v]
        if changed:
            raise InputError(
                f"--resume: {self.path}/config.json has another {', '.join(changed)}; "
                "give the same arguments"
            )

    def write_config(self, file):
        file.write_text(json.dumps({**self.config, "commit": commit()}, indent=1))

    def restore(self, parameters, optimizer, scaler):
        """What save() and stop_if_asked() save, set to what was saved last. Called right before the
        first step: from now on a first signal waits for stop_if_asked, a second one does not."""
        self.parameters, self.optimizer, self.scaler = parameters, optimizer, scaler
        if self.state:
            with (
                torch.no_grad(),
                reading(self.path / "state.pt", "run without --resume to start again"),
            ):
                for name, parameter in parameters.items():
                    parameter.copy_(self.state["weights"][name])
                optimizer.load_state_dict(self.state["optimizer"])
                scaler.load_state_dict(self.state["scaler"])
        self.state = None  # as large as the optimizer's own
        signals.gently = True

    # -- log

    def log(self, **row):
        if self.writes:
            row = {k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()}
            with open(self.path / "log.jsonl", "a") as f:
                f.write(json.dumps(row) + "\n")

    def log_step(self, step, norm, **values):
        """Losses and whatever else is worth a curve."""
        rate, scale = self.optimizer.param_groups[0]["lr"], self.scaler.get_scale()
        self.log(step=step, **values, grad_norm=norm, lr=rate, scale=scale)

    def log_validation(self, step, losses):
        seconds = time.time() - BEGAN
        if step != self.validated:
            self.log(step=step, **{f"valid_{k}": v for k, v in losses.items()}, seconds=seconds)
        said = "".join(f"  valid {k} {v:.3f}" for k, v in losses.items())
        say(f"step {step:5}{said}  {seconds:.0f} s")

    def finish(self, said=""):
        best = f"best validation loss {self.best:.4f}, " if self.best > 0 else ""
        say(f"wrote {self.path}: {best}{said}{time.time() - BEGAN:.0f} s")

    # -- checkpoints

    def save(self, step, loss=None, targets=0):
        """Called after each validation: the state always, the weights when they are the best so
        far. loss=None: the state alone."""
        better = False
        if loss is not None:
            stop_unless_finite({"loss validation": loss}, step)
            better, self.best = loss < self.best, min(loss, self.best)
        weights = {n: p.detach().cpu().contiguous() for n, p in self.parameters.items()}
        state = {
            "step": step,
            "best": self.best,
            "targets": targets,
            "weights": weights,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

        def write(folder):
            # In this order: killed between the two, a resumed run makes the same model.safetensors
            if better:
                (folder / "metrics.json").unlink(missing_ok=True)  # those of other weights
                write_file(folder / "model.safetensors", lambda f: save_file(weights, f))
            write_file(folder / "state.pt", lambda f: torch.save(state, f))

        def write_all(folder):
            self.write_config(folder / "config.json")
            (folder / "log.jsonl").write_text("")
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(folder / "tokenizer")
            write(folder)

        if self.writes:
            write(self.path) if self.begun else write_atomically(self.path, write_all, keep=True)
            self.begun = True
            if step == self.args.steps:
                drop_previous(self.path)

    def stop_if_asked(self, step, targets=0):
        """After SIGINT or SIGTERM, to whichever process: all save and leave at the same step."""
        if any(sum_over_processes(signals.came or 0)):
            self.save(step, targets=targets)
            again = shlex.join(["python", *sys.argv, *{"--resume"}.difference(sys.argv)])
            if (world := process()[1]) > 1:
                again = again.replace("python", f"torchrun --nproc_per_node {world}", 1)
            raise Interrupted(
                signals.came or 15,
                f"step {step} of {self.args.steps} is saved in {self.path}; go on with: {again}",
            )


def progress(start, steps, what):
    """range(start, steps + 1) with a progress bar, silent where there is no terminal
    (disable=None)."""
    return tqdm(
        range(start, steps + 1),
        desc=what,
        initial=start,
        total=steps,
        disable=process()[0] > 0 or None,
        leave=False,
    )


# ---- More than one process: torchrun --nproc_per_node N train_stage1.py ... ----------------------
# N processes make the run that one would make (dropout apart). A batch is drawn whole by each; each
# computes its own rows; gradients are averaged by DistributedDataParallel. So a loss that is a mean
# over rows is scaled by (its own count) * N / (count of all), and a contrastive loss, which needs
# every row beside every other, is computed whole by each from gathered features.


def start_processes(args):
    """-> device, rank, number of processes. A single process never touches the process group."""
    device, world = pick_device(args.device), int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        return device, 0, 1
    if args.batch_size % world:
        raise InputError(
            f"--batch-size {args.batch_size}: not a multiple of the {world} processes, which share "
            "it"
        )
    if device.type == "cuda":
        if int(os.environ["LOCAL_WORLD_SIZE"]) > (gpus := torch.cuda.device_count()):
            raise InputError(
                f"more processes than GPUs here: --nproc_per_node {gpus}, or --device cpu"
            )
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device, *process()


def process():
    """-> rank, number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def own_rows(count):
    """The rows of a batch of `count` that this process computes."""
    rank, world = process()
    return slice(rank * count // world, (rank + 1) * count // world)


def sum_over_processes(*values):
    """Numbers -> their sums over all processes."""
    values = torch.tensor(values, dtype=torch.double)
    if dist.is_initialized():
        values = values.to("cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(values)
    return values.tolist()


def mean_over_processes(values):
    """{name: tensor of one number} -> {name: its mean over all processes}."""
    sums = sum_over_processes(*(x.item() for x in values.values()))
    return {name: x / process()[1] for name, x in zip(values, sums)}


class GatherRows(torch.autograd.Function):
    """(B, ...) -> (B * N, ...). Backward: what all processes want changed in ours, summed."""

    @staticmethod
    def forward(ctx, rows):
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


class Gather:
    """The rows of this process -> those of all, in the order of their ranks (qformer.py, Alone)."""

    def __init__(self):
        self.rank, self.world = process()

    def __call__(self, rows):
        return rows if self.world == 1 else GatherRows.apply(rows)


def distribute(module, world, unused=False):
    """DistributedDataParallel, told not to send the CF vectors round in every step (the flag's name
    depends on torch's version). unused: some parameters get no gradient."""
    ddp = nn.parallel.DistributedDataParallel
    known = inspect.signature(ddp).parameters
    flag = next(f for f in ("forward_sync_buffers", "broadcast_buffers") if f in known)
    return ddp(module, find_unused_parameters=unused, **{flag: False}) if world > 1 else module


def averaging(module, now):
    """A context for backward(): gradients meet those of the other processes only now."""
    waits = isinstance(module, nn.parallel.DistributedDataParallel) and not now
    return module.no_sync() if waits else nullcontext()


def drawn_ahead(draw, start, stop):
    """draw(step) of each step; the next one's is made while the device computes with this one's."""
    with ThreadPoolExecutor(1) as thread:
        following = thread.submit(draw, start) if start < stop else None
        for step in range(start, stop):
            drawn = following.result()
            if step + 1 < stop:
                following = thread.submit(draw, step + 1)
            yield drawn


def say(text):
    """Print by the first process alone, above the progress bar."""
    if process()[0] == 0:
        tqdm.write(text)


def introduce(what, model, device):
    """A line on the run, and one a child of the model: what trains, what is frozen."""
    say(f"{what}, {process()[1]} x {device}, {precision(device)}")
    print_parameters(model)


def print_parameters(model):
    for name, child in model.named_children():
        total = sum(p.numel() for p in child.parameters())
        train = sum(p.numel() for p in child.parameters() if p.requires_grad)
        frozen = "  (frozen)" if total and not train else ""
        say(f"  {name:12} {total:>12,} parameters, {train:>12,} trainable{frozen}")


def run_training(main):
    """run_script; where another process of the run has died, one line says so and how to go on."""
    try:
        run_script(main)
        if dist.is_initialized():
            dist.destroy_process_group()
    except RuntimeError as error:
        if not dist.is_initialized() or not (
            isinstance(error, dist.DistError) or "gloo" in str(error).lower()
        ):
            raise
        raise SystemExit(
            f"error: process {dist.get_rank()}: lost another process of this run; the last "
            "checkpoint is kept, go on with --resume"
        ) from None
