"""Ranking: the search through the trie finds what its definition, ILM.score, says."""

import pytest
import torch

import train_stage2


def prompts_of(model, task):
    examples = train_stage2.Examples(model, model.dataset)
    return examples.ranking_prompts(task, [0, 1, 2], "valid", "seen")


@pytest.mark.parametrize("method", ["ilm-rand", "mlp", "text"])
@pytest.mark.parametrize("task", ["sequential", "straightforward"])
def test_the_search_gives_every_item_the_score_of_the_definition(make_ilm, method, task):
    model = make_ilm(method)
    prompts = prompts_of(model, task)
    wanted = model.score(prompts, range(120))
    torch.testing.assert_close(model.rank(prompts, model.trie()), wanted, atol=1e-4, rtol=1e-4)


def test_scores_do_not_depend_on_the_chunks_they_are_computed_in(make_ilm):
    model = make_ilm()
    prompts = prompts_of(model, "sequential")[:1]
    whole, parts = model.score(prompts, range(30)), model.score(prompts, range(30), chunk=7)
    torch.testing.assert_close(whole, parts, atol=1e-4, rtol=1e-4)


def test_the_catalogue_has_a_probability_of_one(make_ilm):
    model = make_ilm()
    scores = model.score(prompts_of(model, "sequential"), range(120))
    torch.testing.assert_close(scores.exp().sum(1), torch.ones(3), atol=1e-4, rtol=1e-4)
