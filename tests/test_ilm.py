
import numpy as np
import pytest
import torch
from conftest import ROOT, as_read, embedded, real

import data
import ilm
from ilm import SOFT_BASE
from train_stage2 import Examples, collate, pack

SEQUENTIAL = "History of {user}: {history}. Recommend the next one:"


def prompts_of(model, users=(0, 1, 2)):
    return [model.prompt_ids(SEQUENTIAL, user=u, history=model.dataset.items_of(u, "test")[-5 - u:]) for u in users]


def log_p(model, prompt, target):
    """Sum of log p(target | prompt) and its terms, straight from the LLM: no packing, no padding, no cache."""
    logits = model.llm(inputs_embeds=embedded(model, prompt, [target])).logits[0].float().log_softmax(-1)
    return logits[len(prompt) - 1:-1].gather(1, torch.tensor(target)[:, None])[:, 0]


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
    torch.testing.assert_close(now.cf, [as_read(model, [model.dataset.items_of(7)])[0]])
    assert model.prompt_ids("For {user}:", user=7, cf=given).cf[0] is given
    assert make_ilm("text").prompt_ids("For {user}:", user=7).cf == []


def test_an_encoder_that_names_no_history_reads_plain_vectors(make_ilm, monkeypatch):
    class Plain(torch.nn.Module):
        width = 6

        def encode(self, cf):
            assert cf.shape[1] == 12
            return cf.view(-1, 2, 6)

    monkeypatch.setattr(ilm, "make_encoder", lambda *_: Plain())
    model = make_ilm(num_queries=2)
    assert model.history == 0 and model.tau.requires_grad
    vector, = model.prompt_ids("For {user}:", user=7).cf
    torch.testing.assert_close(vector, as_read(model, [model.dataset.items_of(7)])[0])
    assert model.soft_tokens(model.with_history(model.cf)).shape == (120, 2, model.hidden)
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
    out = model.llm(torch.tensor([model.tokenizer(" and ".join(model.names))["input_ids"]]), output_hidden_states=True)
    words = out.hidden_states[1].pow(2).mean(-1).sqrt().median()
    soft = model.soft_tokens(model.with_history(model.cf)).pow(2).mean().sqrt()
    assert 0.8 < soft / words < 1.25


def test_export_writes_all_soft_tokens_in_chunks(make_ilm, tmp_path):
    model = make_ilm()
    assert model.export(tmp_path / "soft.npy", chunk=7) > 0
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
    model.embed(ids, model.soft_index(ids, prompt.cf))
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


# -- packing


@pytest.mark.parametrize("method", ["ilm-rand", "text"])
def test_packed_loss_is_the_loss_of_the_examples_one_by_one(make_ilm, method):
    model = make_ilm(method)
    examples, window = Examples(model, model.dataset), model.dataset.items_of(0)[:9]
    sequential = [(model.prompt_ids(SEQUENTIAL, user=0, history=window[:k]), model.name_ids[window[k]]) for k in range(1, 9)]
    same_prompt = [(model.prompt_ids("What would {user} like?", user=1), model.name_ids[i]) for i in (3, 8, 50)]
    single = [(model.prompt_ids("Describe {item}.", items=[3], named=False), model.target_ids("A western."))]
    template = examples.templates["sequential", "seen"][0]  # the user at its end
    prefixes = examples.prefixes(0, window, examples.training_users(0, np.arange(1, 9)), template)
    shared = [(prompt, model.name_ids[i]) for prompt, i in zip(prefixes, window[1:])]
    rows = [sequential, shared, same_prompt, single]
    with torch.no_grad():
        total, packed = model(examples.collate([examples.pack(row) for row in rows]))
        one_by_one = torch.cat([-log_p(model, prompt, target) for row in rows for prompt, target in row])
    torch.testing.assert_close(packed, one_by_one, atol=1e-4, rtol=1e-4)
    assert total.item() == pytest.approx(packed.sum().item())
    assert len(examples.pack(shared)["ids"]) < sum(len(p) + len(t) for p, t in shared) / 2


def test_packed_rows_by_hand():
    row = pack([([1, 2, 9], [5, 0]), ([1, 2, 3, 9], [6, 7, 0], [0, 4, -1])])
    assert row["cf"] == [] and row["node"] == [-1] * 5 + [0, 4, -1]
    assert row["ids"] == [1, 2, 3, 9, 5, 9, 6, 7]
    assert row["position"] == [0, 1, 2, 2, 3, 3, 4, 5]
    assert row["branch"] == [0, 0, 0, 1, 1, 2, 2, 2]
    assert row["attach"] == [0, 0, 0, 2, 2, 3, 3, 3]
    assert row["label"] == [-100, -100, -100, 5, 0, 6, 7, 0]
    mask = ilm.packed_attention(collate([row]))[0, 0].int().tolist()
    assert mask[4] == [1, 1, 0, 1, 1, 0, 0, 0] and mask[7] == [1, 1, 1, 0, 0, 1, 1, 1]


def test_vectors_of_prompts_packed_and_collated_stay_with_their_prompts(make_ilm):
    """Three rows, of which two have users: each soft token of a user is that user's, wherever it stands."""
    model = make_ilm()
    examples = Examples(model, model.dataset)
    prompts = [[model.prompt_ids("For {user} and {user:9}:", user=u) for u in (1, 2)],
               [model.prompt_ids("About {item}:", items=[5])],
               [model.prompt_ids("For {user}:", user=4)]]
    batch = collate([examples.pack([(prompt, [7, 0]) for prompt in row]) for row in prompts], model.num_items, model.Q)
    own = batch["ids"][batch["ids"] >= SOFT_BASE + model.num_items * model.Q] - SOFT_BASE
    found = [batch["cf"][e // model.Q - model.num_items] for e in own.tolist()[::model.Q]]
    wanted = as_read(model, [model.dataset.items_of(u) for u in (1, 9, 2, 9, 4)])
    torch.testing.assert_close(torch.stack(found), wanted)


# -- ranking and writing


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


def brute_force(model, prompt, names, renormalize):
    """Every name scored whole by definition: sum over its tokens and an end token of log p, over all tokens, or over the tokens that a
    name has there, by log (1 + purchases of each item below, summed) + tau * logit."""
    children, scores = named_children(names, purchases(model)), torch.zeros(len(names))
    for length in set(map(len, names)):  # names of one length are a batch without padding
        some = [i for i, name in enumerate(names) if len(name) == length]
        logits = model.llm(inputs_embeds=embedded(model, prompt, [names[i] for i in some])).logits[:, len(prompt) - 1:-1].float()
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


@pytest.fixture()
def tangled(make_ilm):
    """An ILM whose 120 names share beginnings, and where one name extends another."""
    model = make_ilm()
    words = ["Amber", "Jade", "Velvet", "Iron", "Golden"]
    model.names = [f"{words[i % 5]} {words[i // 5 % 5]} {words[i // 25]}" for i in range(120)]
    model.names[7] = "Amber Jade"
    model.name_ids = [model.target_ids(name) for name in model.names]
    model.names_trie = ilm.Trie(model.name_ids)
    model.set_prior("popularity", "learned")
    with torch.no_grad():
        model.tau.fill_(0.7)
    return model


@pytest.mark.parametrize("renormalize", [True, False])
def test_exact_ranking_is_brute_force(tangled, renormalize):
    prompts = prompts_of(tangled, (0, 1))
    scores = tangled.rank(prompts, tangled.trie(renormalize))
    with torch.no_grad():
        wanted = torch.stack([brute_force(tangled, p, tangled.name_ids, renormalize) for p in prompts])
    torch.testing.assert_close(scores, wanted, atol=1e-4, rtol=1e-4)
    if renormalize:
        torch.testing.assert_close(scores.exp().sum(1), torch.ones(2))


def test_the_training_loss_of_a_name_is_its_ranking_score(tangled):
    """p divided among the names of the catalogue, and no token after a name is decided."""
    prompts, paths, examples = prompts_of(tangled, (0, 1)), tangled.names_trie.paths, Examples(tangled, tangled.dataset)
    with torch.no_grad():
        batch = examples.collate([examples.pack([(prompt, *paths[i]) for i in range(0, 120, 3)]) for prompt in prompts])
        nll, row = tangled(batch)[1], (batch["label"] >= 0).nonzero()
    scores = torch.zeros(2, 41).index_put((row[:, 0], batch["branch"][row[:, 0], row[:, 1]]), -nll, accumulate=True)[:, 1:]
    wanted = tangled.rank(prompts, tangled.trie())
    torch.testing.assert_close(scores, wanted[:, ::3], atol=1e-4, rtol=1e-4)
    assert len(paths[8][0]) == 3 and len(paths[7][0]) == 3 and paths[7][0][-1] == tangled.tokenizer.eos_token_id  # 7 is a prefix of others


def test_shuffled_vectors_are_those_of_others(make_ilm):
    a, b = make_ilm(), make_ilm(shuffle_cf=True)
    everyone = np.arange(len(a.dataset.users))
    users = [Examples(model, model.dataset).users_at(everyone, "test") for model in (a, b)]
    for own, dealt in ((a.cf, b.cf), users):
        assert (own == dealt).all(1).float().mean() < 0.05  # chance may give one of them their own
        torch.testing.assert_close(own.sort(0)[0], dealt.sort(0)[0])


def test_shuffled_vectors_are_those_of_others_at_training_moments_too(make_ilm):
    a, b = make_ilm(), make_ilm(shuffle_cf=True)
    own, dealt = (Examples(model, model.dataset).training_users(4, np.arange(1, 9)) for model in (a, b))
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
    ids = examples.ranking("sequential", 5, [3, 4], examples.templates["sequential", "seen"][0])
    assert model.tokenizer.decode(ids) == ("Considering toy user 5 has interacted with toy items item_2003, item_2004 . What next ? toy")
    index.write_text("001 7\n")
    with pytest.raises(data.InputError, match="no line for 119 items, the first is 002"):
        make_ilm("text", item_names=str(index))


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


def test_generate_is_greedy(make_ilm):
    model = make_ilm()
    prompts = prompts_of(model, (0, 1))
    texts = model.generate(prompts, max_new_tokens=6)
    for prompt, text in zip(prompts, texts):
        out = []
        while len(out) < 6 and (not out or out[-1] != model.tokenizer.eos_token_id):
            with torch.no_grad():
                out.append(model.llm(inputs_embeds=embedded(model, prompt, [out])).logits[0, -1].argmax().item())
        assert text == model.tokenizer.decode(out, skip_special_tokens=True).strip()


def test_equal_names_are_refused():
    with pytest.raises(data.InputError, match="equal tokens"):
        ilm.Trie([[1, 2, 0], [1, 2, 0]])


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
        examples = Examples(model, model.dataset)
        packed = model(examples.collate([examples.pack([(prompt, t) for t in model.name_ids[:4]])]))[1]
        one_by_one = torch.cat([-log_p(model, prompt, t) for t in model.name_ids[:4]])
    torch.testing.assert_close(model.rank([prompt], model.trie())[0], wanted, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(packed, one_by_one, atol=1e-4, rtol=1e-4)


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
