
import numpy as np
import pytest
import torch
from conftest import as_read, embedded, real

import data
import ilm
from assets.extras.hub import export
from assets.fast.packing import SOFT_BASE, soft_index
from train_stage2 import Examples

SEQUENTIAL = "History of {user}: {history}. Recommend the next one:"


def prompts_of(model, users=(0, 1, 2)):
    return [model.prompt_ids(SEQUENTIAL, user=u, history=model.dataset.items_of(u, "test")[-5 - u:]) for u in users]


# -- prompts


@pytest.mark.parametrize("method", ["ilm-rand", "mlp", "text"])
def test_soft_tokens_follow_the_names(make_ilm, method):
    model = make_ilm(method)
    ids = model.prompt_ids("{history} and {item} of {user}:", user=7, history=[3, 5], items=[4])
    slots = [i - SOFT_BASE for i in ids if i >= SOFT_BASE]
    K = model.Q if method != "text" else 0
    assert slots == [e * model.Q + k for e in (3, 5, 4, model.num_items) for k in range(K)]  # beyond the items: the prompt's own vectors
    words = model.tokenizer.decode([i for i in ids if i < SOFT_BASE])
    user = "user " if K else f"user {model.dataset.users[7]}"
    assert words == f"{model.names[3]}, {model.names[5]} and {model.names[4]} of {user}:"


def test_a_prompt_carries_its_users_at_their_moment(make_ilm):
    model = make_ilm()
    now, given = model.prompt_ids("For {user}:", user=7), torch.randn(model.cf.shape[1])
    torch.testing.assert_close(now.vectors, [as_read(model, [model.dataset.items_of(7)])[0]])
    assert model.prompt_ids("For {user}:", user=7, cf=given).vectors[0] is given
    assert make_ilm("text").prompt_ids("For {user}:", user=7).vectors == []


def test_an_encoder_that_names_a_history_reads_the_last_items_as_well(make_ilm, monkeypatch):
    class Reads(torch.nn.Module):
        width, history = 6, 3

        def encode(self, cf):
            assert cf.shape[1] == (1 + 3) * 12
            return cf[:, :12].reshape(-1, 2, 6)

    monkeypatch.setattr(ilm, "make_encoder", lambda *_: Reads())
    model = make_ilm(num_queries=2)
    vector, = model.prompt_ids("For {user}:", user=7).vectors
    latest = model.dataset.items_of(7)[::-1][:3].copy()
    assert model.W == 3 and torch.equal(vector[12:], model.dataset.item_cf[latest].flatten())


def test_an_encoder_that_names_no_history_reads_plain_vectors(make_ilm, monkeypatch):
    class Plain(torch.nn.Module):
        width = 6

        def encode(self, cf):
            assert cf.shape[1] == 12
            return cf.view(-1, 2, 6)

    monkeypatch.setattr(ilm, "make_encoder", lambda *_: Plain())
    model = make_ilm(num_queries=2)
    assert model.W == 0 and model.tau.requires_grad
    vector, = model.prompt_ids("For {user}:", user=7).vectors
    torch.testing.assert_close(vector, as_read(model, [model.dataset.items_of(7)])[0])
    assert model.soft_tokens(model.with_history(model.cf)).shape == (120, 2, model.llm.width)
    for kind in ("sequential", "straightforward", "text"):
        batch = Examples(model, model.dataset).batch(kind, 2, np.random.default_rng(0))
        assert torch.isfinite(model(batch)[0])


def test_text_tasks_never_name_the_item(make_ilm):
    model = make_ilm()
    ids = model.prompt_ids("Describe {item}.", items=[4], named=False)
    assert model.tokenizer.decode([i for i in ids if i < SOFT_BASE]) == "Describe ."
    assert sum(i >= SOFT_BASE for i in ids) == model.Q


def test_the_oldest_items_go_when_the_context_is_short(make_ilm):
    model = make_ilm()
    model.context = 64 + 40
    ids = model.prompt_ids(SEQUENTIAL, user=0, history=list(range(30)))
    entities = [(i - SOFT_BASE) // model.Q for i in ids if i >= SOFT_BASE][::model.Q]
    assert len(ids) <= 40 and len(entities) > 3
    assert entities == [model.num_items, *range(30 - len(entities) + 1, 30)]
    with pytest.raises(data.InputError, match="do not fit"):
        model.prompt_ids("word " * 200)


def test_a_soft_token_in_user_text_is_not_one(make_ilm):
    ids = make_ilm().prompt_ids(f"hello {ilm.SOFT} there")
    assert all(i < SOFT_BASE for i in ids)


def test_cut_names_stay_unique_and_short(make_ilm):
    model = make_ilm()
    model.dataset.items[0]["title"] = "Amber Window Window Window One"
    model.dataset.items[1]["title"] = "Amber Window Window Window Two"
    for tokens in (2, 4):
        names = ilm.item_names(model.dataset, model.tokenizer, max_tokens=tokens)
        assert len(set(names)) == 120
    lengths = [len(model.tokenizer(" " + n, add_special_tokens=False)["input_ids"]) for n in names]
    assert max(lengths) <= 4 and names[5] == model.dataset.items[5]["title"]
    assert sorted(ilm.item_names(model.dataset, model.tokenizer, "random"))[0] == "item_1001"


def test_a_cut_name_that_ends_in_a_number_by_itself_is_no_unknown_letter(make_ilm):
    model = make_ilm()
    for item, end in enumerate(("Ounce", "oz", "Pack")):
        model.dataset.items[item]["title"] = f"Amber Window 2 {end}"
    names = ilm.item_names(model.dataset, model.tokenizer, max_tokens=4)
    assert len(set(names)) == 120 and names[0] == "Amber Window 2"


# -- the model


@pytest.mark.parametrize("method", ["ilm-rand", "mlp"])
def test_soft_tokens_start_as_loud_as_the_middle_layers(make_ilm, method):
    model = make_ilm(method)
    out = model.llm.network(torch.tensor([model.tokenizer(" and ".join(model.names))["input_ids"]]), output_hidden_states=True)
    words = out.hidden_states[1].pow(2).mean(-1).sqrt().median()
    soft = model.soft_tokens(model.with_history(model.cf)).pow(2).mean().sqrt()
    assert 0.8 < soft / words < 1.25


def test_whitening_evens_out_what_varies_and_spares_what_hardly_does():
    torch.manual_seed(0)
    states = torch.randn(4000, 6) * torch.tensor([30.0, 10, 3, 3, 3, 1e-6]) @ torch.linalg.qr(torch.randn(6, 6))[0] + 5
    adapter = ilm.Adapter(num_queries=2, width=6, hidden=3)
    adapter.whiten_(states)
    white = adapter.whitening(states)
    assert white.mean(0).abs().max() < 1e-4
    variances = torch.linalg.eigvalsh(white.T @ white / len(white))  # v / (v + 9) of each v before
    assert torch.allclose(variances, torch.tensor([0.0, 0.5, 0.5, 0.5, 0.917, 0.99]), atol=0.03)
    assert torch.allclose(adapter(states.view(-1, 2, 6))[:, 1], adapter.maps[1](white[1::2]))  # each query its own map
    adapter.whiten_(torch.ones(4, 6))  # an encoder that says nothing yet
    assert adapter.whitening(torch.ones(4, 6)).abs().max() < 1e-2


def test_export_writes_all_soft_tokens_in_chunks(make_ilm, tmp_path):
    model = make_ilm()
    assert export(model, tmp_path / "soft.npy", chunk=7) > 0
    written, dataset = torch.from_numpy(np.load(tmp_path / "soft.npy")), model.dataset
    users = as_read(model, [dataset.items_of(u) for u in range(len(dataset.users))])  # as they are now
    wanted = model.soft_tokens(torch.cat([model.with_history(model.cf), users])).detach()
    torch.testing.assert_close(written, wanted, atol=1e-5, rtol=1e-5)


def test_each_item_is_encoded_once(make_ilm):
    model, seen = make_ilm(), []
    encode = model.encoder.encode
    model.encoder.encode = lambda cf: seen.append(len(cf)) or encode(cf)
    prompt = model.prompt_ids("{history} for {user}", user=3, history=[4, 9, 4, 4])
    ids = torch.tensor([prompt, prompt])
    model.embed(ids, soft_index(ids, prompt.vectors, model.num_items, model.Q))
    assert seen == [3]


def test_the_llm_is_frozen_bitwise_and_stays_in_eval(make_ilm):
    model = make_ilm()
    before = {n: p.clone() for n, p in model.llm.named_parameters()}
    model.train()
    assert model.encoder.training and not any(m.training for m in model.llm.modules())
    examples = Examples(model, model.dataset)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    start = [p.clone() for p in model.adapter.maps.parameters()]
    for step in range(2):
        total, nll = model(examples.batch("sequential", 2, np.random.default_rng(step)))
        (total / len(nll)).backward()
        optimizer.step()
    assert all(torch.equal(before[n], p) and p.grad is None for n, p in model.llm.named_parameters())
    assert not any(torch.equal(a, b) for a, b in zip(start, model.adapter.maps.parameters()))
    assert not any(p.requires_grad for p in model.adapter.whitening.parameters())  # the whitening stays as it began


# -- controls, other people's files, writing


def purchases(model):
    """How often each item was chosen in the training part, one by one."""
    count = [0] * model.num_items
    for u in range(len(model.dataset.users)):
        for i in model.dataset.items_of(u, "train"):
            count[i] += 1
    return count


def named_children(names, items_below):
    """{prefix: {next token: items whose names go on so}}"""
    children = {}
    for i, name in enumerate(names):
        for k, token in enumerate(name):
            children.setdefault(tuple(name[:k]), {}).setdefault(token, []).append(items_below[i])
    return children


def test_shuffled_vectors_are_those_of_others(make_ilm):
    a, b = make_ilm(), make_ilm(shuffle_cf=True)
    everyone = np.arange(len(a.dataset.users))
    users = [Examples(model, model.dataset).read_at(everyone, "test") for model in (a, b)]
    for own, dealt in ((a.cf, b.cf), users):
        assert (own == dealt).all(1).float().mean() < 0.05  # chance may give one of them their own
        torch.testing.assert_close(own.sort(0)[0], dealt.sort(0)[0])


def test_shuffled_vectors_are_those_of_others_at_training_moments_too(make_ilm):
    a, b = make_ilm(), make_ilm(shuffle_cf=True)
    own, dealt = (Examples(model, model.dataset).read_before(4, np.arange(1, 9)) for model in (a, b))
    assert own.shape == dealt.shape and not (own == dealt).all(1).any()


def test_openp5s_prompt_and_index_files_load_as_they_are(make_ilm, tmp_path):
    prompts, index = tmp_path / "prompt.txt", tmp_path / "item_index.txt"
    lines = [f"{task}; {seen}; Considering {{dataset}} user_{{user_id}} has interacted with {{dataset}} items {{history}} . What next ?; "
             "{dataset} {target}" for task in data.RANKING_TASKS for seen in ("seen", "unseen")]
    prompts.write_text("\n".join(lines))
    model = make_ilm("text")
    index.write_text("".join(f"{item['id']} {2000 + i}\n" for i, item in enumerate(model.dataset.items)))
    model = make_ilm("text", prompts=str(prompts), item_names=str(index))
    examples = Examples(model, model.dataset)
    ids = examples.ranking_prompt("sequential", 5, [3, 4], examples.templates["sequential", "seen"][0])
    assert model.tokenizer.decode(ids) == ("Considering toy user 5 has interacted with toy items item_2003, item_2004 . What next ? toy")
    index.write_text("001 7\n")
    with pytest.raises(data.InputError, match="no line for 119 items, the first is 002"):
        make_ilm("text", item_names=str(index))


def test_generate_is_greedy(make_ilm):
    model = make_ilm()
    prompts = prompts_of(model, (0, 1))
    texts = model.generate(prompts, max_new_tokens=6)
    for prompt, text in zip(prompts, texts):
        out = []
        while len(out) < 6 and (not out or out[-1] != model.tokenizer.eos_token_id):
            with torch.no_grad():
                out.append(model.llm.network(inputs_embeds=embedded(model, prompt, [out])).logits[0, -1].argmax().item())
        assert text == model.tokenizer.decode(out, skip_special_tokens=True).strip()


def test_a_real_checkpoint(make_ilm):
    model = make_ilm(llm=real("llm/TinyStories-656K"), name_tokens=6)
    prompts, trie = prompts_of(model), model.trie()
    exact = model.rank(prompts, trie)
    torch.testing.assert_close(model.rank(prompts, trie, beams=60).topk(10)[0], exact.topk(10)[0], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(exact.exp().sum(1), torch.ones(3), atol=1e-3, rtol=1e-3)
    assert len(model.generate(prompts, 5)) == 3


def test_what_is_missing_is_said_in_one_line(tmp_path, script):
    for argv, message in ((["--run", "nowhere"], "not a finished stage2 run"), (["--run", str(tmp_path)], "no config.json")):
        done = script("ilm.py", *argv, "hi")
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr
