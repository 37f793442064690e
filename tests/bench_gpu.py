"""How busy is the device? Stage 2's micro-batches and ranking, in under a minute; tiny sizes on a CPU.

    python tests/bench_gpu.py                                                             # toy world: checks the script itself
    python tests/bench_gpu.py --data data/ml-1m --llm HuggingFaceTB/SmolLM2-135M-Instruct --rows 8 32 --users 64 256 --compile

build: making a batch on the CPU. new: a batch of a shape that was never seen (plans, allocations). seen: the same again (median).
tokens/s: with building behind one another, in training a thread hides it. share: needed arithmetic / seconds of `seen` / the matmul peak
that is measured first, where needed is 4 per LLM weight and real token, plus 12 D a layer and pair (query, key) that may attend: padding
and masked pairs are no work. asks: how often the host waits for the device in forward and backward. Ranking: milliseconds a user."""
import argparse
import statistics
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_stage2  # noqa: E402
from assets.fast.attention import packed_attention  # noqa: E402
from data import load_dataset  # noqa: E402
from evaluate import targets_and_taken  # noqa: E402
from ilm import build_ilm  # noqa: E402

p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
p.add_argument("--data", default="data/toy")
p.add_argument("--llm", default="assets/toy_llm")
p.add_argument("--rows", type=int, nargs="+", default=[2])
p.add_argument("--users", type=int, nargs="+", default=[4])
p.add_argument("--num-queries", default="4")
p.add_argument("--compile", action="store_true", help="compile the LLM's layers as well (10 to 30 s) and measure again")
p.add_argument("--pieces", action="store_true", help="attention in pieces as well (the CPU's way), eager, and measure again")
p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
args = p.parse_args()
device, gpu, began = torch.device(args.device), args.device.startswith("cuda"), time.time()


def timed(f, *arguments):
    wait = torch.cuda.synchronize if gpu else lambda: None
    wait()
    start = time.perf_counter()
    out = f(*arguments)
    wait()
    return time.perf_counter() - start, out


def measured_peak():
    n, dtype = (8192, torch.bfloat16) if gpu else (768, torch.float32)
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    return 2 * n**3 / min(timed(torch.matmul, a, b)[0] for _ in range(8))


def asks(f):
    """How often the host waits for the device during f(), by torch's sync debug mode; nothing waits on a CPU."""
    if not gpu:
        return 0
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        f()
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(w.message) for w in seen)


dataset = load_dataset(args.data)
arguments = ["--method", "ilm-rand", "--data", args.data, "--llm", args.llm, "--num-queries", args.num_queries, "--name-tokens", "8"]
torch.manual_seed(0)
model = build_ilm(train_stage2.make_config(train_stage2.parse_args(arguments), dataset)[0], dataset, device).train()
examples = train_stage2.Examples(model, dataset)
weights = sum(x.numel() for name, x in model.llm.named_parameters() if "embed" not in name and "head" not in name)
shape, peak = model.llm.network.config.get_text_config(), measured_peak()
print(f"{torch.cuda.get_device_name() if gpu else 'CPU'}, torch {torch.__version__}, matmul {peak / 1e12:.2f} TFLOP/s, "
      f"{weights / 1e6:.1f} M weights in the layers")


def step(batch):
    with model.autocast():
        total, _ = model(batch)
    total.backward()
    model.zero_grad(set_to_none=True)
    return total


def one_a_row(kind, rows, rng):
    """The batch of the same examples without packing, every prefix a row: what a user would do instead."""
    kept, examples.pack = examples.pack, list
    found = sum(examples.rows(kind, rows, rng), [])
    examples.pack = kept
    return examples.collate([examples.pack([example]) for example in found])


def training(name, kind, rows, batch=examples.batch):
    made = [timed(batch, kind, rows, np.random.default_rng(k)) for k in range(4)]
    build, batches = statistics.median(seconds for seconds, _ in made), [batch for _, batch in made]
    step(batches[0])  # libraries, kernels
    new = statistics.median(timed(step, batch)[0] for batch in batches[1:])
    seen = statistics.median(timed(step, batch)[0] for _ in range(3) for batch in batches[1:])
    tokens = pairs = targets = 0
    for batch in batches[1:]:
        real = batch["branch"] >= 0
        tokens += int(real.sum()) / 3
        pairs += int((packed_attention(batch["branch"])[:, 0] & real[:, :, None]).sum()) / 3
        targets += len(batch["target_at"]) / 3
    loss = step(batches[1]).item() / len(batches[1]["target_at"])
    needed = 4 * weights * tokens + 12 * shape.hidden_size * shape.num_hidden_layers * pairs
    memory = torch.cuda.max_memory_allocated() / 2**30 if gpu else float("nan")
    print(f"{name:9} {kind:15} {rows:3} rows {tokens:7,.0f} tokens {targets:6,.0f} targets | build {build * 1e3:6.1f} new {new * 1e3:7.1f} "
          f"seen {seen * 1e3:7.1f} ms | {tokens / (build + seen):9,.0f} tokens/s, alone {tokens / seen:9,.0f} "
          f"| share {needed / seen / peak:.3f} | loss {loss:.3f} | asks {asks(lambda: step(batches[1]))} | {memory:.1f} GiB", flush=True)


@torch.no_grad()
def ranking(count):
    model.eval()
    users = dataset.eligible()[:count]
    build, prompts = timed(examples.ranking_prompts, "sequential", users, "test", "seen")
    taken, trie = targets_and_taken(dataset, users, "test", False)[1].to(device), model.trie()

    def rank():
        with model.autocast():
            return model.rank(prompts, trie, None, taken)
    new, seen = timed(rank)[0], min(timed(rank)[0] for _ in range(2))
    one, _ = timed(model.generate, prompts[:8], 16)  # what a user would do instead: a title written word by word, which is one item
    model.train()
    milliseconds = [1e3 * seconds / len(users) for seconds in (build, new, seen)]
    print("ranking   {:4} users, {:,} names | prompts {:5.2f} new {:6.2f} seen {:6.2f} ms a user".format(
        len(users), len(dataset.items), *milliseconds), f"| generate, 16 tokens: {one / 8 * 1e3:.1f} | asks {asks(rank)}", flush=True)


for kind in ("sequential", "straightforward"):
    for rows in args.rows:
        training("eager", kind, rows)
training("one a row", "sequential", args.rows[0], one_a_row)
for users in args.users:
    ranking(users)
if args.pieces:
    whole, model.llm.in_pieces = model.llm.in_pieces, True
    for rows in args.rows:
        training("pieces", "sequential", rows)
    model.llm.in_pieces = whole
if args.compile:
    model.llm.compile_layers()
    for rows in args.rows[::-1]:
        training("compiled", "sequential", rows)
print(f"{time.time() - began:.0f} s in all")
