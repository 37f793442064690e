"""How fast, against what a reader would use instead: same process, same weights, same outputs, in turn. Prints tables, asserts results.

    python tests/bench.py                        # all sections but the largest sizes, about ... minutes on two cores
    python tests/bench.py stage1 --rounds 7      # one section
    python tests/bench.py cf --large             # 25 million generated interactions
    pip install implicit                         # wanted by `cf` alone

Times are asserted nowhere: they are the machine's. Equal results are asserted everywhere.
"""
import argparse
import contextlib
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

import data  # noqa: E402
import ilm  # noqa: E402
import qformer  # noqa: E402

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
    wrong_text, wrong_item = qformer.hard_negatives(similarity * model.scale(), same, torch.Generator().manual_seed(0))
    rows = torch.arange(B)
    item, chosen = torch.cat([rows, rows, wrong_item]), torch.cat([rows, wrong_text, rows])
    matched = together(cf[item], ids[chosen], mask[chosen], "joint")[:, :Q]
    dec_ids = torch.cat([torch.full_like(ids[:, :1], dec), ids[:, 1:]], 1)
    written = together(cf, dec_ids, mask, "causal")[:, Q:]
    losses = {"itc": qformer.itc_loss(similarity, model.scale(), same),
              "itm": qformer.itm_loss(model.itm_head(matched).mean(1), ((item == chosen) | same[item, chosen]).long()),
              "itg": torch.nn.functional.cross_entropy(model.lm_logits(written[:, :-1]).flatten(0, 1),
                                                       ids[:, 1:].masked_fill(~mask[:, 1:], -100).flatten(), label_smoothing=0.1)}
    for name, (left, right, same) in pairs.items():
        similarity = qformer.pair_similarity(*(model.query_features(encode(cf)) for cf in (left, right)))
        losses[name] = qformer.ii_loss(similarity, model.scale(), same)
    return losses


def bench_stage1(args):
    from test_qformer import hf_twin
    for width, layers, B, T in ((64, 2, 64, 20), (64, 2, 64, 48), (256, 4, 64, 32), (768, 8, 16, 32)):
        torch.manual_seed(0)
        config = qformer.QFormerConfig(cf_dim=24, vocab_size=2000, width=width, layers=layers, heads=width // 32, dropout=0.0)
        model = qformer.QFormer(config)
        twin, _ = hf_twin(model)
        twin.train()
        mask = torch.arange(T) < torch.randint(T // 2, T + 1, (B, 1))
        ids, cf, same = torch.randint(2000, (B, T)), torch.randn(B, 24), torch.eye(B, dtype=torch.bool)
        label = torch.arange(B)
        vectors = {name: (torch.randn(B, 24), torch.randn(B, 24)) for name in ("ii", "ui")}
        apart = torch.zeros(B, B, dtype=torch.bool)

        def ours():
            losses, _ = qformer.item_text_losses(model, cf, ids, mask, same, 1, torch.Generator().manual_seed(0))
            for name, (left, right) in vectors.items():
                losses[name], _ = qformer.pair_loss(name, model, left, right, label, label + B)
            return losses

        theirs = lambda: blip2_losses(model, twin, cf, ids, mask, same, 1, {k: (*v, apart) for k, v in vectors.items()})
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
        data.prepare(data.parse_args(["--max-users", "150", "--out", str(folder)]))
    dataset = data.load_dataset(folder)
    shutil.rmtree(folder.parent)
    tokenizer = AutoTokenizer.from_pretrained(Path(__file__).parent.parent / "assets" / "toy_llm")
    encoder = None if method == "text" else qformer.QFormer(qformer.QFormerConfig(dataset.item_cf.shape[1], 1, queries, dropout=0.0))
    if encoder:
        encoder.freeze_text()
    config = {"train_llm": False, "item_names": "title", "name_tokens": 0, "prompt_items": "names+tokens"}
    return ilm.ILM(llm, tokenizer, encoder, queries, dataset, config)


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

            def theirs():
                ids, mask, _ = model.left_pad(prompts)
                with torch.no_grad():
                    return model.llm.generate(inputs_embeds=model.embed(ids), attention_mask=mask, num_beams=beams, eos_token_id=0,
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
        trie = ilm.Trie(random_names(count, 32_000, rng))
        ways[f"{count:,} names"] = lambda trie=trie: model.rank(prompts, trie, beams)
    alternate("ranking: the size of the catalogue", ways, args.rounds)


SECTIONS = {"stage1": bench_stage1, "ranking": bench_ranking}


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("sections", nargs="*", help=f"of {' '.join(SECTIONS)} [all]")
    p.add_argument("--rounds", type=int, default=5, help="alternations [5]")
    p.add_argument("--large", action="store_true", help="cf: 25 million interactions as well")
    args = p.parse_args()
    torch.set_num_threads(2)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent).stdout
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, commit {commit}")
    for name in args.sections or SECTIONS:
        SECTIONS[name](args)


if __name__ == "__main__":
    main()
