"""How fast, against what a reader would use instead: same process, same weights, same outputs, in turn. Prints tables, asserts results.

    python tests/bench.py                        # all sections but the largest sizes, about 8 minutes on two cores
    python tests/bench.py stage1 --rounds 7      # one section
    python tests/bench.py cf --large             # 25 million generated interactions: 15 minutes more
    pip install implicit                         # wanted by `cf` alone

Times are asserted nowhere: they are the machine's. Equal results are asserted everywhere.
"""
import argparse
import contextlib
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # `implicit` asks for it, it has threads of its own; torch does not use OpenBLAS

import numpy as np  # noqa: E402
import torch  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM  # noqa: E402

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

import data  # noqa: E402
import ilm  # noqa: E402
import qformer  # noqa: E402
import train_stage2  # noqa: E402
from assets.extras.hub import export  # noqa: E402
from assets.fast.als import length_batches  # noqa: E402
from assets.plumbing import cf  # noqa: E402
from assets.plumbing.llm import DecoderOnly  # noqa: E402
from train_stage1 import FastQFormer  # noqa: E402

SPREAD = "{:8.1f} {:8.1f} {:8.1f}"


def alternate(title, ways, rounds, unit=1000):
    """Run {name: function} in turn, `rounds` times after a warm-up; print min, median, max in ms, and the ratio to the first."""
    times = {name: [] for name in ways}
    for k in range(rounds + 1):
        for name, run in ways.items():
            began = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if k:
                times[name].append(time.perf_counter() - began)
    print(f"\n{title:52}      min   median      max  ms")
    first = np.array(next(iter(times.values())))
    for name, t in times.items():
        ratio = np.array(t) / first
        said = "" if t is next(iter(times.values())) else f"   {np.median(ratio):.2f} times ours ({ratio.min():.2f} to {ratio.max():.2f})"
        print(f"  {name:50} " + SPREAD.format(*(unit * f(t) for f in (np.min, np.median, np.max))) + said, flush=True)
    return {name: float(np.median(t)) for name, t in times.items()}


# ---- Stage 1: the five losses against transformers' Q-Former, driven as BLIP-2 drives it -----------------------------

def blip2_losses(model, twin, cf, ids, mask, same, dec, pairs):
    """The same five losses by Blip2QFormerModel: a pass a purpose (queries, text, 3B pairs, text after queries, two sides of pairs)."""
    Q, B = model.config.num_queries, len(cf)
    words = lambda ids: model.words(ids) + model.positions(torch.arange(ids.shape[1]))
    queries = lambda cf: model.queries.expand(len(cf), -1, -1)
    encode = lambda cf: twin(query_embeds=queries(cf), encoder_hidden_states=model.cf_keys(cf)).last_hidden_state

    def together(cf, ids, mask, pattern):
        embedded = torch.cat([queries(cf), words(ids)], 1)
        return twin(query_embeds=embedded, query_length=Q, attention_mask=qformer.attention_pattern(pattern, Q, mask),
                    encoder_hidden_states=model.cf_keys(cf)).last_hidden_state

    read = twin(query_embeds=words(ids), query_length=0, attention_mask=mask[:, None, None]).last_hidden_state
    text = torch.nn.functional.normalize(model.text_proj(read[:, 0]), dim=-1)
    similarity = qformer.item_text_similarity(model.query_features(encode(cf)), text)
    generator = torch.Generator().manual_seed(0)
    wrong_text, wrong_item = (
        qformer.hard_negatives(x / model.temperature, same, generator) for x in (similarity, similarity.T))
    rows = torch.arange(B)
    item, chosen = torch.cat([rows, rows, wrong_item]), torch.cat([rows, wrong_text, rows])
    matched = together(cf[item], ids[chosen], mask[chosen], "joint")[:, :Q]
    dec_ids = torch.cat([torch.full_like(ids[:, :1], dec), ids[:, 1:]], 1)
    written = together(cf, dec_ids, mask, "causal")[:, Q:]
    losses = {"itc": qformer.contrastive_loss(similarity, model.temperature, same, 0.1),
              "itm": qformer.itm_loss(model.itm_head(matched).mean(1), (item == chosen).long()),
              "itg": torch.nn.functional.cross_entropy(model.lm_logits(written[:, :-1]).flatten(0, 1),
                                                       ids[:, 1:].masked_fill(~mask[:, 1:], -100).flatten(), label_smoothing=0.1)}
    for name, (left, right, same) in pairs.items():
        similarity = qformer.pair_similarity(*(model.query_features(encode(cf)) for cf in (left, right)))
        losses[name] = qformer.contrastive_loss(similarity, model.temperature, same)
    return losses


def bench_stage1(args):
    from test_qformer import hf_twin
    for width, layers, B, T in ((64, 2, 64, 20), (64, 2, 64, 48), (256, 4, 64, 32), (768, 8, 16, 32)):
        torch.manual_seed(0)
        config = qformer.QFormerConfig(cf_dim=24, vocab_size=2000, width=width, layers=layers, heads=width // 32, dropout=0.0)
        model = FastQFormer(config)
        twin, _ = hf_twin(model)
        twin.train()
        mask = torch.arange(T) < torch.randint(T // 2, T + 1, (B, 1))
        ids, cf = torch.randint(2000, (B, T)), torch.randn(B, 24)
        label = torch.arange(B)
        vectors = {name: (torch.randn(B, 24), torch.randn(B, 24)) for name in ("ii", "ui")}
        apart = torch.zeros(B, B, dtype=torch.bool)

        def ours():
            losses = qformer.item_text_losses(model, cf, ids, mask, label, 1, torch.Generator().manual_seed(0))
            for name, (left, right) in vectors.items():
                losses[name], _ = qformer.pair_loss(model, left, right, label, label + B)
            return losses

        theirs = lambda: blip2_losses(model, twin, cf, ids, mask, apart, 1, {k: (*v, apart) for k, v in vectors.items()})
        for name, value in theirs().items():
            torch.testing.assert_close(value, ours()[name], atol=1e-4, rtol=1e-4)

        def step(losses):
            def run():
                model.zero_grad(), twin.zero_grad()
                sum(losses().values()).backward()
            return run

        alternate(f"stage 1: width {width}, {layers} layers, {B} texts of {T} tokens", {
            "ours": step(ours), "transformers' Q-Former, as BLIP-2 drives it": step(theirs)}, args.rounds)


# ---- Ranking: constrained beam search against transformers' own ------------------------------------------------------

def random_llm(width, layers, vocab, seed=0):
    """A Llama with random weights, loud enough that its likelihoods differ; its tokenizer is the toy LLM's and is not used."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=vocab, hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 64, initializer_range=0.06,
        intermediate_size=3 * width, max_position_embeddings=2048, tie_word_embeddings=False)).eval()


def make_ilm(llm, method="text", queries=4):
    """An ILM around any LLM, on 150 users of the toy world."""
    folder = Path(tempfile.mkdtemp()) / "toy"
    with contextlib.redirect_stdout(None):
        data.main(["--max-users", "150", "--cf-dim", "24", "--recency", "0.9", "--reg", "1", "--out", str(folder)])
    dataset = data.load_dataset(folder)
    shutil.rmtree(folder.parent)
    tokenizer = AutoTokenizer.from_pretrained(Path(__file__).parent.parent / "assets" / "toy_llm")
    encoder = None if method == "text" else qformer.QFormer(qformer.QFormerConfig(dataset.item_cf.shape[1], 1, queries, dropout=0.0))
    if encoder:
        encoder.freeze_all_but_encode()
    config = {"num_queries": queries, "train_llm": False, "item_names": "title", "name_tokens": 0, "prompt_items": "names+tokens"}
    return ilm.ILM(DecoderOnly(llm, tokenizer), encoder, dataset, config)


def random_names(count, vocab, rng):
    """Different names of 2 to 8 tokens and an end token (0), words as unequal in frequency as in English."""
    names, p = set(), 1 / np.arange(5, vocab)
    while len(names) < count:
        names.add((*(1 + rng.choice(vocab - 5, size=rng.integers(2, 9), p=p / p.sum())).tolist(), 0))
    return sorted(names)


def allowed_by(names):
    """What prefix_allowed_tokens_fn wants: a function of the tokens so far, here by a dict of prefixes, made beforehand."""
    children = {}
    for name in names:
        for k in range(len(name)):
            children.setdefault(name[:k], set()).add(name[k])
    children = {prefix: sorted(tokens) for prefix, tokens in children.items()}
    return lambda _, ids: children.get(tuple(ids.tolist()), [0])


def bench_ranking(args, beams=10, users=8, prompt=250):
    rng = np.random.default_rng(0)
    for vocab in (2_000, 32_000):
        model = make_ilm(random_llm(256, 4, vocab))
        prompts = [rng.integers(1, vocab, size=rng.integers(prompt - 50, prompt + 1)).tolist() for _ in range(users)]
        for count in (1_000, 12_000):
            names = random_names(count, vocab, rng)
            trie, allowed, index = ilm.Trie(names), allowed_by(names), {name: i for i, name in enumerate(names)}
            model.log_count = torch.zeros(len(trie.token))  # no prior

            def theirs():
                embeddings, mask = model.embed_prompts(prompts)
                with torch.no_grad():
                    return model.llm.network.generate(inputs_embeds=embeddings, attention_mask=mask, num_beams=beams, eos_token_id=0,
                                              num_return_sequences=beams, max_new_tokens=9, renormalize_logits=True, do_sample=False,
                                              prefix_allowed_tokens_fn=allowed, pad_token_id=0, length_penalty=0.0, output_scores=True,
                                              return_dict_in_generate=True)

            out, ours = theirs(), model.rank(prompts, trie, beams)
            scores, found = ours.topk(beams)
            same = 0
            for u in range(users):
                rows = range(u * beams, (u + 1) * beams)
                texts = [tuple(out.sequences[r].tolist()) for r in rows]
                their = {index[t[:t.index(0) + 1]]: out.sequences_scores[r].item() for r, t in zip(rows, texts) if 0 in t}
                for i, score in their.items():  # the same name has the same score
                    assert ours[u, i] == -torch.inf or abs(ours[u, i].item() - score) < 1e-3, (ours[u, i], score)
                same += set(their) == set(found[u].tolist())
                for mine, theirs_k in zip(scores[u].tolist(), sorted(their.values(), reverse=True)):
                    assert mine > theirs_k - 1e-3, "a better top 10 was missed"
            alternate(f"ranking: {count:,} names, vocabulary {vocab:,}, {users} users, {beams} beams", {
                "ours": lambda: model.rank(prompts, trie, beams), "generate(prefix_allowed_tokens_fn)": theirs}, args.rounds)
            print(f"  top {beams}: the same for {same} of {users} users, for the others ours scores higher")
    model, ways = make_ilm(random_llm(256, 4, 32_000)), {}
    for count in (1_000, 10_000, 100_000):
        names, began = random_names(count, 32_000, rng), time.perf_counter()
        trie = ilm.Trie(names)
        model.log_count = torch.zeros(len(trie.token))  # the largest trie is the last
        print(f"  a trie of {count:,} names is built once, in {time.perf_counter() - began:.2f} s")
        ways[f"{count:,} names"] = lambda trie=trie: model.rank(prompts, trie, beams)
    alternate("ranking: the size of the catalogue", ways, args.rounds)


# ---- Stage 2: packed prefixes against one example a prefix -----------------------------------------------------------

def loss_and_gradient(model, batches):
    """One optimizer step's worth of forward and backward over batches -> the sum of -log p."""
    model.zero_grad()
    total = 0.0
    for batch in batches:
        loss, _ = model(batch)
        loss.backward()
        total += loss.item()
    return total


def windows(model, users):
    """[(prompt, target)] of every position of the last 21 training items of each user; four users share a template, as in a batch."""
    examples = train_stage2.Examples(model, model.dataset)
    templates, out = examples.templates["sequential", "seen"], []
    for u in users:
        s = model.dataset.items_of(u, "train")
        w, template = s[-21:], templates[u // 4 % len(templates)]
        cf = examples.read_before(u, np.arange(len(s) - len(w) + 1, len(s)))
        out.append([(examples.ranking_prompt("sequential", u, w[:k], template, cf[k - 1]), model.name_ids[w[k]]) for k in range(1, len(w))])
    return out


def bench_stage2(args):
    toy = AutoModelForCausalLM.from_pretrained(Path(__file__).parent.parent / "assets" / "toy_llm")
    for name, llm, users in (("toy LLM, width 160, 3 layers", toy, 40), ("Llama, width 512, 8 layers", random_llm(512, 8, 2_000), 12)):
        model = make_ilm(llm, "ilm-rand").train()
        users, examples = windows(model, range(users)), train_stage2.Examples(model, model.dataset)
        packed = [examples.collate([examples.pack(u) for u in users[k:k + 4]]) for k in range(0, len(users), 4)]
        singles = [examples.pack([e]) for u in users for e in u]
        batches = lambda rows: [examples.collate(rows[k:k + 32]) for k in range(0, len(rows), 32)]
        shuffled = batches([singles[k] for k in np.random.default_rng(0).permutation(len(singles))])
        like = batches(sorted(singles, key=lambda row: len(row["ids"])))  # little padding: more than OpenP5 does
        a, b = loss_and_gradient(model, packed), loss_and_gradient(model, like)
        assert abs(a - b) < 1e-4 * abs(b), (a, b)
        times = alternate(f"stage 2: {name}, {len(singles)} targets", {
            "ours: prefixes packed": lambda: loss_and_gradient(model, packed),
            "one example a prefix, shuffled (OpenP5)": lambda: loss_and_gradient(model, shuffled),
            "one example a prefix, batches of like lengths": lambda: loss_and_gradient(model, like)}, args.rounds)
        rates = ", ".join(f"{len(singles) / t:,.0f}" for t in times.values())
        print(f"  names a second: {rates}; the same loss, {a:.3f} and {b:.3f}")


# ---- CF: ALS against `implicit` --------------------------------------------------------------------------------------

SIZES = {"100k": (943, 1_682, 100_000), "1M": (6_040, 3_706, 1_000_000), "25M": (162_000, 62_000, 25_000_000)}


def interactions(num_users, num_items, count):
    """Generated pairs (users, items), each once; users and items as unequal as in MovieLens."""
    rng = np.random.default_rng(0)
    length, popularity = rng.lognormal(0, 1.1, num_users), rng.lognormal(0, 1.8, num_items)
    length = np.maximum(3, length / length.sum() * count).astype(int)
    users = np.repeat(np.arange(num_users), length)
    items = np.searchsorted(np.cumsum(popularity / popularity.sum()), rng.random(len(users))).clip(max=num_items - 1)
    pairs = np.unique(users * num_items + items)
    return pairs // num_items, pairs % num_items


def als_loss(users, items, X, Y, alpha=2.0, reg=1.0):
    """What both minimise: squared error over all pairs, 1 + alpha times as much where there is an interaction, + reg |vectors|^2."""
    X, Y, total = X.double(), Y.double(), 0.0
    for k in range(0, len(users), 1 << 20):
        p = (X[users[k:k + (1 << 20)]] * Y[items[k:k + (1 << 20)]]).sum(1)
        total += ((1 + alpha) * (1 - p) ** 2 - p**2).sum().item()
    return total + ((X.T @ X) * (Y.T @ Y)).sum().item() + reg * (X.pow(2).sum() + Y.pow(2).sum()).item()


def fit(users, items, num_users, num_items, iterations):
    """Our ALS at E 24, with the users' side that train_cf throws away -> both sides."""
    settings = data.CFSettings(24, alpha=2.0, reg=1.0)
    Y = cf.train_cf(users, items, num_users, num_items, settings, iterations)
    return cf.als_solve(Y, length_batches(users, items, num_users, num_items), num_users, settings), Y


def bench_cf(args):
    import scipy.sparse
    from implicit.als import AlternatingLeastSquares
    for name in ("100k", "1M", "25M") if args.large else ("100k", "1M"):
        U, I, _ = SIZES[name]
        users, items = interactions(*SIZES[name])
        matrix = scipy.sparse.csr_matrix((np.ones(len(users), np.float32), (users, items)), (U, I))

        def theirs():
            model = AlternatingLeastSquares(24, regularization=1.0, alpha=3.0, iterations=15, num_threads=torch.get_num_threads(),
                                            random_state=0)
            model.fit(matrix, show_progress=False)
            return torch.from_numpy(model.user_factors), torch.from_numpy(model.item_factors)

        goal, u, i = als_loss(users, items, *theirs()), torch.from_numpy(users), torch.from_numpy(items)
        for n in (5, 10, 15, 20, 30, 40):  # as many iterations as it takes to be at least as good
            loss = als_loss(users, items, *fit(u, i, U, I, n))
            if loss <= goal:
                break
        alternate(f"CF: {len(users):,} interactions, {U:,} users, {I:,} items", {
            f"ours, {n} iterations, loss {loss:,.0f}": lambda: fit(u, i, U, I, n),
            f"implicit, 15 iterations, loss {goal:,.0f}": theirs}, args.rounds if name != "25M" else min(2, args.rounds))


# ---- Users at a moment -----------------------------------------------------------------------------------------------

def bench_moment(args, E=128, I=3_706, users=8, length=2_300, targets=20):
    """What the vectors of a micro-batch cost: users with the longest histories of ML-1M, 20 targets each."""
    random = np.random.default_rng(0)
    item_cf = torch.from_numpy(random.normal(0, 0.3, (I, E)).astype(np.float32))
    histories = [random.permutation(I)[:length] for _ in range(users)]
    windows = [np.arange(start, start + targets) for start in random.integers(1, length - targets, users)]
    for recency, reg in ((0.7, 1.0), (1.0, 1.0)):
        solver = data.UserSolver(item_cf, data.CFSettings(E, reg=reg, recency=recency))
        prefixes = [history[:place] for history, window in zip(histories, windows) for place in window]
        others = [np.delete(history, place) for history, window in zip(histories, windows) for place in window]
        ask = solver.before if recency < 1 else solver.without
        ours = lambda: torch.cat([ask(history, window) for history, window in zip(histories, windows)])
        one_by_one = lambda: solver.of_histories(prefixes if recency < 1 else others)
        torch.testing.assert_close(ours(), one_by_one(), atol=1e-3, rtol=1e-2)
        alternate(f"moments: {users} x {targets} targets, histories of {length:,}, E {E}, d {recency}", {
            "ours: prefixes share their sums" if recency < 1 else "ours: the sums less the target's": ours,
            "each folded in from its own history": one_by_one}, args.rounds)


def prepare_memory(interactions, rows, dim=24):
    """GiB that data.py needs: torch and Python, the sorted log and its indices, texts and vectors of users and items."""
    return 0.24 + (100 * interactions + (1000 + 12 * dim) * rows) / 2**30


def bench_prepare(args):
    """data.py end to end in a process of its own."""
    print(f"\n{'preparation, end to end':52}  seconds    GiB")
    for name in ("100k", "1M", "25M") if args.large else ("100k", "1M"):
        with tempfile.TemporaryDirectory() as folder:
            users, items = interactions(*SIZES[name])
            with open(f"{folder}/ratings.csv", "w") as f:
                f.write("userId,movieId,rating,timestamp\n")
                for k in range(0, len(users), 1 << 20):
                    f.writelines(f"{a},{b},4,{b * 7919 % 1_000_003}\n" for a, b in zip(users[k:k + (1 << 20)].tolist(),
                                                                                    items[k:k + (1 << 20)].tolist()))
            with open(f"{folder}/movies.csv", "w") as f:
                f.write("movieId,title,genres\n")
                f.writelines(f"{k},Movie {k} ({1950 + k % 70}),{'Drama|War' if k % 2 else 'Action'}\n" for k in range(SIZES[name][1]))
            command = f"{sys.executable} data.py --dataset movielens --source {folder} --out {folder}/out"
            code = ("import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=2);"
                    "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20)")
            began = time.perf_counter()
            done = subprocess.run([sys.executable, "-c", code, *command.split()], capture_output=True, text=True, check=True,
                                  cwd=Path(__file__).parent.parent)
            seconds, size, formula = time.perf_counter() - began, float(done.stdout), prepare_memory(len(users), sum(SIZES[name][:2]))
            print(f"  {len(users):>12,} interactions {'':24} {seconds:11.1f} {size:6.2f}   formula {formula:.2f}", flush=True)
            assert 0.7 < size / formula < 1.4


# ---- A large catalogue, and the share of the machine -----------------------------------------------------------------

def bench_catalogue(args):
    model = make_ilm(random_llm(256, 2, 2_000), "ilm-rand").eval()
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    cf, rates = torch.randn(1_000_000, model.cf.shape[1]), []
    model.cf, model.num_items = cf[:100_000], 100_000
    export(model, "/dev/null")
    before = peak()
    for _ in range(args.rounds):
        model.cf, model.num_items = cf, len(cf)
        rates.append(export(model, "/dev/null"))
    print(f"\ncatalogue: 1,000,000 items to soft tokens, {min(rates):,.0f} / {np.median(rates):,.0f} / {max(rates):,.0f} a second (min, "
          f"median, max); peak memory {peak() - before:+.0f} MiB against 100,000 items")
    assert peak() - before < 128  # the soft tokens themselves are 4,000 MiB


def matmul_peak(n=2048):
    """Floating-point operations a second of a large matrix multiplication, the best of five."""
    a = torch.randn(n, n)
    best = np.inf
    for _ in range(5):
        began = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - began)
    return 2 * n**3 / best


def bench_share(args):
    """Arithmetic of the stage-2 step over the matrix-multiplication peak, and the formulas of the README's cost tables."""
    from torch.utils.flop_counter import FlopCounterMode
    print(f"\n{'stage-2 step: forward and backward':40} tokens  GFLOP  formula  MiB saved  formula      ms  share of matmul peak")
    toy = AutoModelForCausalLM.from_pretrained(Path(__file__).parent.parent / "assets" / "toy_llm")
    for name, llm, users in (("toy LLM, width 160, 3 layers", toy, 16), ("Llama, width 256, 4 layers", random_llm(256, 4, 2_000), 8),
                             ("Llama, width 512, 8 layers", random_llm(512, 8, 2_000), 4),
                             ("Llama, width 1024, 8 layers", random_llm(1024, 8, 2_000), 2)):
        model = make_ilm(llm, "ilm-rand").train()
        examples = train_stage2.Examples(model, model.dataset)
        batch = examples.collate([examples.pack(u) for u in windows(model, range(users))])
        vectors = torch.cat([model.with_history(model.cf[batch["soft_item"]]), batch["soft_cf"]])
        measured = []  # operations and bytes kept, of the whole step and of the item encoder alone: each target has its own user
        for step in (lambda: loss_and_gradient(model, [batch]), lambda: model.soft_tokens(vectors).sum().backward()):
            saved = {}
            keep = lambda x: saved.update({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()}) or x
            with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
                step()
            weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
            measured.append((counter.get_total_flops(), sum(n for pointer, n in saved.items() if pointer not in weights) / 2**20))
        (flop, activations), (encoder_flop, encoder_kept) = measured
        c, (B, L), targets, times, peaks = llm.config, batch["ids"].shape, int((batch["label"] >= 0).sum()), [], []
        flop += attention_flop(c, B, L) - encoder_flop  # the counter does not know the CPU's attention kernel; the formulas are the LLM's
        activations -= encoder_kept
        for _ in range(args.rounds):
            peaks.append(matmul_peak())
            began = time.perf_counter()
            loss_and_gradient(model, [batch])
            times.append(time.perf_counter() - began)
        f, m = costs(c, B, L, targets)
        share = [flop / t / p for t, p in zip(times, peaks)]
        print(f"  {name:38} {B * L:6,} {flop / 1e9:6.1f} {f / 1e9:8.1f} {activations:10.0f} {m / 2**20:8.0f} {1000 * np.median(times):7.0f}"
              f"  {min(share):.2f} / {np.median(share):.2f} / {max(share):.2f}", flush=True)
        assert 0.85 < flop / f < 1.15 and 0.85 < activations * 2**20 / m < 1.15
    print("\na step of 16 packed rows of 430 tokens (320 names of 3 tokens), by the same formulas, weights and activations in bf16:")
    for D, layers, F, vocab in ((160, 3, 480, 1024), (1024, 24, 2816, 32_000), (2048, 24, 5632, 32_000), (4096, 32, 11_008, 32_000)):
        config = SimpleNamespace(hidden_size=D, num_hidden_layers=layers, intermediate_size=F, vocab_size=vocab)
        flop, saved = costs(config, 16, 430, 960)
        weights = layers * (4 * D * D + 3 * D * F) + 2 * D * vocab
        gib = 2 * weights / 2**30, saved / 2 / 2**30
        print(f"  {weights / 1e6:7,.0f} M weights: {flop / 1e12:7.2f} TFLOP, GiB: weights {gib[0]:6.2f}, activations {gib[1]:6.2f}")


def attention_flop(config, rows, length):
    """q.k and p.v forward, their four gradients backward, whole rows: 12 L D a token and layer. Nothing is counted twice."""
    return 12 * config.num_hidden_layers * length * config.hidden_size * rows * length


def costs(config, rows, length, targets):
    """What a stage-2 step with a frozen Llama costs -> floating-point operations, bytes of saved activations in fp32.

    A frozen weight is used twice, forward and for the gradient of its input: 4 operations a weight and token. What is kept for the
    backward pass, a token and layer: about 6.5 vectors of width D (norms, queries, keys, values, attention) and 3 of the feed-forward's.
    """
    c, D, F, tokens = config, config.hidden_size, config.intermediate_size, rows * length
    weights = c.num_hidden_layers * (4 * D * D + 3 * D * F)
    flop = 4 * weights * tokens + attention_flop(c, rows, length) + 4 * D * c.vocab_size * targets
    saved = 4 * tokens * c.num_hidden_layers * (6.5 * D + 3 * F) + 4 * (rows * length * length + targets * c.vocab_size)
    return flop, saved


SECTIONS = {"stage1": bench_stage1, "ranking": bench_ranking, "stage2": bench_stage2, "cf": bench_cf, "moment": bench_moment,
            "prepare": bench_prepare,
            "catalogue": bench_catalogue, "share": bench_share}


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("sections", nargs="*", help=f"of {' '.join(SECTIONS)} [all]")
    p.add_argument("--rounds", type=int, default=5, help="alternations [5]")
    p.add_argument("--large", action="store_true", help="cf, prepare: 25 million interactions as well")
    args = p.parse_args()
    torch.set_num_threads(2)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent).stdout
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, commit {commit}")
    for name in args.sections or SECTIONS:
        SECTIONS[name](args)


if __name__ == "__main__":
    main()
