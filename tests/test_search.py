"""Ranking: the search through the trie finds what its definition, ILM.score, says, and what brute force says."""

import numpy as np
import pytest
import torch
from conftest import ROOT, embedded
from test_ilm import named_children, prompts_of, purchases
from test_packing import log_p

import data
import train_stage2
from assets.plumbing.trie import Trie


def asked(model, task):
    examples = train_stage2.Examples(model, model.dataset)
    return examples.ranking_prompts(task, [0, 1, 2], "valid", "seen")


@pytest.mark.parametrize("method", ["ilm-rand", "mlp", "text"])
@pytest.mark.parametrize("task", ["sequential", "straightforward"])
def test_the_search_gives_every_item_the_score_of_the_definition(make_ilm, method, task):
    model = make_ilm(method)
    prompts = asked(model, task)
    wanted = model.score(prompts, range(120))
    torch.testing.assert_close(model.rank(prompts, model.trie()), wanted, atol=1e-4, rtol=1e-4)


def test_the_catalogue_has_a_probability_of_one(make_ilm):
    model = make_ilm()
    scores = model.score(asked(model, "sequential"), range(120))
    torch.testing.assert_close(scores.exp().sum(1), torch.ones(3), atol=1e-4, rtol=1e-4)


def test_an_llm_that_cannot_be_read_side_by_side_has_the_same_ranking(make_ilm):
    """Every prefix is a row, read from its start."""
    model = make_ilm()
    prompts, trie = asked(model, "sequential"), model.trie()
    wanted = model.rank(prompts, trie)
    model.llm.packs = False
    torch.testing.assert_close(model.rank(prompts, trie), wanted, atol=1e-4, rtol=1e-4)


def brute_force(model, prompt, names, renormalize):
    """Every name scored whole by definition: sum over its tokens and an end token of log p, over all tokens, or over the tokens that a
    name has there, by log (1 + purchases of each item below, summed) + tau * logit."""
    children, scores = named_children(names, purchases(model)), torch.zeros(len(names))
    for length in set(map(len, names)):  # names of one length are a batch without padding
        some = [i for i, name in enumerate(names) if len(name) == length]
        logits = model.llm.network(inputs_embeds=embedded(model, prompt, [names[i] for i in some])).logits[:, len(prompt) - 1:-1].float()
        for i, row in zip(some, logits):
            for k, token in enumerate(names[i]):
                prefix = tuple(names[i][:k])
                if not renormalize:
                    scores[i] += row[k][token] - row[k].logsumexp(0)
                elif len(children[prefix]) > 1:
                    divided = {t: np.log(sum(1 + n for n in below)) + model.tau * row[k][t]
                               for t, below in children[prefix].items()}
                    scores[i] += divided[token] - torch.stack([*divided.values()]).logsumexp(0)
    return scores


@pytest.mark.parametrize("renormalize", [True, False])
def test_exact_ranking_is_brute_force(tangled, renormalize):
    prompts = prompts_of(tangled, (0, 1))
    scores = tangled.rank(prompts, tangled.trie(renormalize))
    with torch.no_grad():
        wanted = torch.stack([brute_force(tangled, p, tangled.name_ids, renormalize) for p in prompts])
    torch.testing.assert_close(scores, wanted, atol=1e-4, rtol=1e-4)
    if renormalize:
        torch.testing.assert_close(scores.exp().sum(1), torch.ones(2))


def test_beam_search_finds_the_exact_top(tangled, make_ilm):
    for model in (tangled, make_ilm()):
        prompts, trie = prompts_of(model), model.trie()
        exact, beam = model.rank(prompts, trie), model.rank(prompts, trie, beams=40)
        torch.testing.assert_close(beam.topk(10)[0], exact.topk(10)[0], atol=1e-4, rtol=1e-4)
        assert torch.equal(beam.topk(10)[1], exact.topk(10)[1])
        narrow = model.rank(prompts, trie, beams=2)
        found = narrow > -torch.inf
        torch.testing.assert_close(narrow[found], exact[found], atol=1e-4, rtol=1e-4)


def test_taken_items_are_not_found_and_cost_no_beam(tangled):
    prompts, trie = prompts_of(tangled), tangled.trie()
    exact = tangled.rank(prompts, trie)
    taken = torch.zeros_like(exact, dtype=torch.bool).scatter_(1, exact.topk(30)[1], True)
    beam = tangled.rank(prompts, trie, 10, taken)
    assert not (beam[taken] > -torch.inf).any() and ((beam > -torch.inf).sum(1) == 10).all()
    best = exact.masked_fill(taken, -torch.inf).topk(10)
    torch.testing.assert_close(tangled.rank(prompts, trie, 0, taken).topk(10)[0], best[0], atol=1e-4, rtol=1e-4)


def test_prefixes_of_taken_items_cost_no_beam(tangled):
    """All is taken but what begins with the least likely first word: its ten best are found all the same."""
    prompts, trie = prompts_of(tangled), tangled.trie()
    exact, first = tangled.rank(prompts, trie), torch.tensor([hash(name.split()[0]) for name in tangled.names])
    words = first.unique()
    mass = torch.stack([exact[:, first == word].exp().sum(1) for word in words], 1)                 # (B, first words)
    taken = first != words[mass.argmin(1)][:, None]
    wanted, found = exact.masked_fill(taken, -torch.inf).topk(10), tangled.rank(prompts, trie, 10, taken).topk(10)
    torch.testing.assert_close(found[0], wanted[0], atol=1e-4, rtol=1e-4)


def test_batch_and_padding_do_not_change_scores(make_ilm):
    model = make_ilm()
    prompts, trie = prompts_of(model), model.trie()
    together = model.rank(prompts, trie)
    for row, prompt in enumerate(prompts):
        torch.testing.assert_close(model.rank([prompt], trie)[0], together[row], atol=1e-4, rtol=1e-4)


def test_equal_names_are_refused():
    with pytest.raises(data.InputError, match="equal tokens"):
        Trie([[1, 2, 0], [1, 2, 0]])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_gpt2_works_the_same(make_ilm, tmp_path, attention):
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "assets" / "toy_llm")
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=48, n_layer=2, n_head=3, attn_implementation=attention)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = make_ilm(llm=str(tmp_path))
    prompt, = prompts_of(model, (0,))
    with torch.no_grad():
        wanted = brute_force(model, prompt, model.name_ids, True)
        examples = train_stage2.Examples(model, model.dataset)
        packed = model(examples.collate([examples.pack([(prompt, t) for t in model.name_ids[:4]])]))[1]
        one_by_one = torch.cat([-log_p(model, prompt, t) for t in model.name_ids[:4]])
    torch.testing.assert_close(model.rank([prompt], model.trie())[0], wanted, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(packed, one_by_one, atol=1e-4, rtol=1e-4)
