"""Every type of LLM through the same seam: tiny random checkpoints, saved to disk and loaded by path as --llm does."""
import json
import math
from functools import partial

import pytest
import torch
from conftest import ROOT, embedded, real
from test_ilm import named_children, purchases
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedTokenizerFast

import data
from assets.run import print_parameters
from ilm import SOFT_BASE, load_ilm
from train_stage2 import Examples

close = partial(torch.testing.assert_close, atol=1e-4, rtol=1e-4)
SEQUENTIAL = "History of {user}: {history}. Recommend the next one:"
CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
GEMMA = ("{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content }}"
         "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}")

# ---- The checkpoints: configuration of the model, kind of tokenizer, chat template ------------------------------------

SHAPE = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, max_position_embeddings=512,
             initializer_range=0.2)
HEADS = dict(SHAPE, num_key_value_heads=1, head_dim=16)
T5 = dict(d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2, decoder_start_token_id=0)
FAMILIES = {
    "gpt2": (dict(n_embd=32, n_layer=2, n_head=2, n_positions=512, initializer_range=0.2), "bytes", None),    # tied; no bos, no pad
    "gpt_neox": (dict(SHAPE, tie_word_embeddings=False), "bytes", None),
    "llama": (dict(HEADS, tie_word_embeddings=False), "prepend", None),                                      # bos, no pad
    "mistral": (dict(HEADS, sliding_window=160, tie_word_embeddings=False), "metaspace", None),
    "qwen2": (dict(SHAPE, num_key_value_heads=1, tie_word_embeddings=True), "bytes", CHATML),                # pad, no bos
    "qwen3": (dict(HEADS, tie_word_embeddings=False), "bytes", CHATML),
    "gemma": (dict(HEADS, tie_word_embeddings=True), "replace", None),                                       # scales its embeddings
    "gemma2": (dict(HEADS, tie_word_embeddings=True, final_logit_softcapping=3.0, sliding_window=160), "replace", GEMMA),
    "gemma3_text": (dict(HEADS, tie_word_embeddings=True, sliding_window=160), "replace", GEMMA),
    "t5": (dict(T5, feed_forward_proj="relu"), "unigram", None),                                             # tied; scales its logits
    "flan-t5": (dict(T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False), "unigram", None),
    "granite": (dict(SHAPE, embedding_multiplier=6.0, logits_scaling=0.5, tie_word_embeddings=True), "prepend", None),
    "bart": (dict(d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=48,
                  decoder_ffn_dim=48, init_std=0.2, decoder_start_token_id=1, forced_eos_token_id=None), "unigram", None),
    "TinyStories": (None, None, None),                                                                       # the real one
}


def make_tokenizer(kind, chat):
    """A few hundred pieces, learnt from prompts.txt. The kinds write a space, and begin or end a text, as their namesakes do."""
    words = (ROOT / "prompts.txt").read_text(encoding="utf-8").split() + list(map(chr, range(33, 127))) + ["\n"]
    special = ["<pad>", "</s>", "<s>", "<unk>", "<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>"]
    bos = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    eos = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    replace, space = normalizers.Replace(" ", "▁"), [decoders.Replace("▁", " "), decoders.Fuse()]
    first, always = (pre_tokenizers.Metaspace(prepend_scheme=scheme) for scheme in ("first", "always"))
    normalizer, splitter, decoder, processor = {
        "bytes": (None, pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel(), None),                 # GPT-2, Qwen
        "prepend": (normalizers.Sequence([normalizers.Prepend("▁"), replace]), None,
                    decoders.Sequence([*space, decoders.Strip(" ", 1, 0)]), bos),                                      # Llama 2
        "metaspace": (None, first, decoders.Metaspace(prepend_scheme="first"), bos),                                   # Mistral 0.3
        "replace": (replace, None, decoders.Sequence(space), bos),                                                     # Gemma
        "unigram": (normalizers.NFKC(), pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), always]),           # T5
                    decoders.Metaspace(), eos),
    }[kind]
    settings = dict(vocab_size=400, special_tokens=special, show_progress=False)
    tokenizer, trainer = Tokenizer(models.BPE(unk_token="<unk>")), trainers.BpeTrainer(
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if kind == "bytes" else [], **settings)
    if kind == "unigram":
        tokenizer, trainer = Tokenizer(models.Unigram()), trainers.UnigramTrainer(unk_token="<unk>", **settings)
    tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder = normalizer, splitter, decoder
    tokenizer.train_from_iterator([" " * (kind in ("bytes", "replace")) + word for word in words], trainer)
    if processor:
        tokenizer.post_processor = processor
    names = dict(eos_token="</s>", bos_token="<s>" if processor is bos else None, unk_token=None if kind == "bytes" else "<unk>",
                 pad_token="<pad>" if chat or kind in ("replace", "unigram") else None)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=chat, **names)


def write_checkpoint(folder, family):
    """A random LLM of a family, with some rows more than its tokenizer has tokens, as many a real one."""
    settings, kind, chat = FAMILIES[family]
    tokenizer = make_tokenizer(kind, chat)
    config = AutoConfig.for_model("t5" if family == "flan-t5" else family, vocab_size=len(tokenizer) + 7, bos_token_id=2, eos_token_id=1,
                                  pad_token_id=0, **settings)
    torch.manual_seed(0)
    llm = (AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM).from_config(config)
    if family == "flan-t5":  # transformers ties every T5 that it makes; one on disk with a head of its own keeps it
        llm.lm_head.weight = torch.nn.Parameter(torch.randn_like(llm.lm_head.weight) / 4)
    llm.save_pretrained(folder)
    if family == "flan-t5":
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": False}))
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session", params=FAMILIES)
def checkpoint(request, tmp_path_factory):
    """Every test of this file that asks for it runs once for each family."""
    if request.param == "TinyStories":
        return real("llm/TinyStories-656K")
    return write_checkpoint(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="session")
def shared(make_ilm, checkpoint):
    """An ILM on it, with a prior of popularity, for the tests that read it and change nothing."""
    return make_ilm(llm=checkpoint)


@pytest.fixture()
def make(make_ilm, checkpoint):
    return partial(make_ilm, llm=checkpoint)


# ---- The LLM's own answer, without anything of ilm.py but embed() ------------------------------------------------------

@torch.no_grad()
def own_log_p(model, prompt, targets):
    """log-probabilities (N, T, V) along targets of equal length after one prompt, straight from the LLM: no packing, padding or cache.
    A prompt without soft tokens goes in as ids, not as embeddings: the LLM embeds it by itself."""
    targets, seq2seq = torch.tensor(targets), model.llm.config.is_encoder_decoder
    ids = torch.tensor([prompt]).expand(len(targets), -1)
    if not seq2seq:
        ids = torch.cat([ids, targets[:, :-1]], 1)
    inputs = {"input_ids": ids}
    if max(prompt) >= SOFT_BASE:
        inputs = {"inputs_embeds": embedded(model, prompt, targets.tolist() if not seq2seq else [[]] * len(targets))}
        if not seq2seq:
            inputs["inputs_embeds"] = inputs["inputs_embeds"][:, :-1]
    if seq2seq:
        start = torch.full_like(targets[:, :1], model.llm.config.decoder_start_token_id)
        return model.llm(**inputs, decoder_input_ids=torch.cat([start, targets[:, :-1]], 1)).logits.float().log_softmax(-1)
    return model.llm(**inputs).logits[:, len(prompt) - 1:].float().log_softmax(-1)


@torch.no_grad()
def brute_force(model, prompt):
    """The score of every name by definition, (I,): the sum of log p over its tokens and its end token. Twice: with p divided among the
    tokens that any name has there, by their prior and the LLM's p; and among all tokens."""
    names, (divided, whole) = model.name_ids, torch.zeros(2, len(model.name_ids))
    allowed = named_children(names, [1 + n for n in purchases(model)])
    for length in {len(name) for name in names}:
        rows = [i for i, name in enumerate(names) if len(name) == length]
        for i, log_p in zip(rows, own_log_p(model, prompt, [names[i] for i in rows])):
            whole[i] = log_p[range(length), names[i]].sum()
            for k, token in enumerate(names[i]):
                prefix = tuple(names[i][:k])
                if len(allowed[prefix]) > 1:
                    loud = {t: math.log(sum(below)) + model.tau * log_p[k, t] for t, below in allowed[prefix].items()}
                    divided[i] += loud[token] - torch.stack([*loud.values()]).logsumexp(0)
    return divided, whole


def prompts_of(model):
    """Three prompts of unequal length, the last of words alone."""
    return [model.prompt_ids(SEQUENTIAL, user=u, history=model.dataset.items_of(u, "test")[-4 + 2 * u:]) for u in (0, 1)] + [
        model.prompt_ids("Name any title:")]


def scores_of(model, prompts=None):
    return model.rank(prompts or prompts_of(model), model.trie())


def train(model, steps, lr=0.02):
    """A few steps on one batch of four users, each with one item -> first and last loss."""
    examples = Examples(model, model.dataset)
    rows = [examples.pack([(model.prompt_ids("What would {user} like?", user=u), *model.names_trie.paths[29 * u])]) for u in range(4)]
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    batch, losses = examples.collate(rows), []
    model.train()
    for _ in range(steps):
        total, nll = model(batch)
        optimizer.zero_grad()
        (total / len(nll)).backward()
        optimizer.step()
        losses.append(total.item() / len(rows))
    model.eval()
    return losses[0], losses[-1]


# ---- One property a test, for every family -----------------------------------------------------------------------------

def printed(model, capsys):
    """The line of what is trained that says it of the LLM: its numbers, and whether it is called frozen."""
    capsys.readouterr()
    print_parameters(model)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.split()[0] == "llm")
    return line.split()[1:4], "(frozen)" in line


@pytest.fixture(scope="session")
def trained(make_ilm, checkpoint):
    """An ILM after some steps, the LLM's tensors before them, first and last loss."""
    model = make_ilm(llm=checkpoint)
    before = {n: p.clone() for n, p in model.llm.state_dict().items()}
    return model, before, *train(model, 30)


def test_one_batch_is_overfitted_and_the_llm_stays_frozen_bitwise(trained, capsys):
    model, before, first, last = trained
    total = sum(p.numel() for p in model.llm.parameters())
    assert printed(model, capsys) == ([f"{total:,}", "parameters,", "0"], True)
    assert last < 0.7 * first, (first, last)
    assert all(torch.equal(before[n], p) for n, p in model.llm.state_dict().items()) and all(p.grad is None for p in model.llm.parameters())


@torch.no_grad()
def test_soft_tokens_start_as_loud_in_the_first_layer_as_words_are_half_way_up(shared):
    model = shared
    reader = model.llm.get_encoder() if model.seq2seq else model.llm.base_model
    states = lambda embeddings: reader(inputs_embeds=embeddings, output_hidden_states=True).hidden_states
    loudness = lambda state: state.pow(2).mean(-1).sqrt().median()
    words = loudness(states(model.embed(torch.tensor([sum(model.name_ids[:64], [])[:256]])))[1])
    assert 0.75 < loudness(states(model.soft_tokens(model.with_history(model.cf)).flatten(0, 1)[None])[0]) / words < 1.33


def test_the_trie_ranks_as_the_llm_does_by_brute_force(shared):
    prompts = prompts_of(shared)
    for renormalize, wanted in zip((True, False), zip(*(brute_force(shared, prompt) for prompt in prompts))):
        scores = shared.rank(prompts, shared.trie(renormalize))
        assert scores.std() > 0.05  # there is something to get wrong
        close(scores, torch.stack(wanted))


def test_it_writes_what_the_llm_finds_likeliest(shared, monkeypatch):
    model = shared
    prompts = prompts_of(model)
    for prompt, text in zip(prompts, model.generate(prompts, max_new_tokens=5)):
        out = []
        while len(out) < 5 and model.tokenizer.eos_token_id not in out:
            out.append(own_log_p(model, prompt, [[*out, 0]])[0, -1].argmax().item())
        assert text == model.tokenizer.decode(out, skip_special_tokens=True).strip()
    monkeypatch.setattr(model.llm.generation_config, "eos_token_id", [3, out[0]])  # a chat model may know several ends
    assert model.generate([prompt], max_new_tokens=5) == [model.tokenizer.decode(out[:1], skip_special_tokens=True).strip()]


def test_a_saved_model_gives_the_same_scores_bitwise(trained, tmp_path):
    model = trained[0]
    model.save_pretrained(tmp_path)
    wanted = scores_of(model)
    loaded = load_ilm(tmp_path, torch.device("cpu"))
    assert torch.equal(scores_of(loaded), wanted) and loaded.generate(prompts_of(loaded), 4) == model.generate(prompts_of(model), 4)


def test_padding_batch_size_and_order_do_not_change_a_score(shared):
    model = shared
    prompts = prompts_of(model)
    together = scores_of(model, prompts)
    close(scores_of(model, prompts[::-1]).flip(0), together)
    close(torch.cat([scores_of(model, [prompt]) for prompt in prompts]), together)
    texts = model.generate(prompts, 4)
    assert [model.generate([prompt], 4)[0] for prompt in prompts] == texts == model.generate(prompts[::-1], 4)[::-1]


def test_the_loss_of_a_name_is_minus_its_score(shared):
    """The loss pads on the right, and packs many names in a row, more than a sliding window holds."""
    examples, some, prompts = Examples(shared, shared.dataset), range(0, 120, 4), prompts_of(shared)
    rows = [examples.pack([(prompt, *shared.names_trie.paths[i]) for i in some]) for prompt in prompts]
    with torch.no_grad():
        batch = examples.collate(rows)
        nll, (row, column) = shared(batch)[1], (batch["label"] >= 0).nonzero(as_tuple=True)
    assert batch["ids"].shape[1] > 160
    packed = torch.zeros(3, len(some)).index_put((row, batch["branch"][row, column] - 1), -nll, accumulate=True)
    close(packed, scores_of(shared, prompts)[:, some])


def test_prompt_and_name_are_tokenised_as_one_text_would_be(shared):
    model = shared
    tokenize = lambda text, special=False: model.tokenizer(text, add_special_tokens=special)["input_ids"]
    name, eos = model.names[3], model.tokenizer.eos_token_id
    assert model.name_ids[3][-1] == eos and model.tokenizer.decode(model.name_ids[3][:-1]).strip() == name
    prompt = model.prompt_ids("The next one:")
    if model.tokenizer.chat_template:  # the template in place of what the tokenizer would add, once, and the name begins the reply
        turn = [{"role": "user", "content": "The next one:"}]
        text = model.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        assert "start" in text and tokenize(text) == prompt and tokenize(text + name) == prompt + model.name_ids[3][:-1]
        talk = model.tokenizer.decode(model.prompt_ids(["one", "two", "three"]))
        assert [talk.count(part) for part in ("one", "two", "three", "user\n")] == [1, 1, 1, 2]
        assert talk.count("<|im_start|>assistant\n") + talk.count("<start_of_turn>model\n") == 2
    elif model.seq2seq:
        assert prompt == tokenize("The next one:", True) and prompt[-1] == eos and model.name_ids[3][:-1] == tokenize(name)
    elif not any("▁" in token[1:] for token in model.tokenizer.get_vocab()):  # TinyStories' pieces span words: there is no cut between
        assert prompt + model.name_ids[3][:-1] == tokenize("The next one: " + name, True)
    assert prompt.count(model.tokenizer.bos_token_id) == (model.tokenizer.bos_token_id is not None)


def test_the_llm_trains_fully_if_it_is_asked_to_and_is_part_of_the_run(make, tmp_path, capsys):
    model = make(train_llm=True)
    total = sum(p.numel() for p in model.llm.parameters())
    assert printed(model, capsys) == ([f"{total:,}", "parameters,", f"{total:,}"], False)
    before = {n: p.clone() for n, p in model.llm.named_parameters()}
    train(model, 1, lr=1e-3)
    assert not any(torch.equal(before[n], p) for n, p in model.llm.named_parameters())
    model.save_pretrained(tmp_path)
    assert torch.equal(scores_of(load_ilm(tmp_path, torch.device("cpu"))), scores_of(model))


def at_precision(monkeypatch, dtype):
    for module in ("ilm", "assets.run"):
        monkeypatch.setattr(f"{module}.precision", lambda device: dtype)


def test_half_precision_ranks_nearly_as_full_precision_does(shared, make, monkeypatch):
    wanted = scores_of(shared)
    for dtype in (torch.float16, torch.bfloat16):
        at_precision(monkeypatch, dtype)
        model = make() if dtype == torch.bfloat16 else shared
        assert model.llm.dtype == (torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
        assert model.llm.config._attn_implementation == "sdpa" or not model.llm._supports_sdpa
        with model.autocast():
            assert torch.is_autocast_enabled("cpu") == (dtype == torch.bfloat16 or not model.seq2seq)  # fp16 is nothing for T5
            scores = scores_of(model)
        close(scores.exp().sum(1), torch.ones(3), atol=1e-3)
        assert torch.corrcoef(torch.stack([scores.flatten(), wanted.flatten()]))[0, 1] > 0.98


@pytest.mark.parametrize("dtype, train_llm, wanted", [
    (torch.bfloat16, False, torch.bfloat16), (torch.float16, False, torch.float32),
    (torch.bfloat16, True, torch.float32)])  # a step of AdamW is less than bf16 can tell apart
def test_a_frozen_llm_is_in_bf16_where_there_is_one_and_a_trained_one_in_fp32(make_ilm, monkeypatch, dtype, train_llm, wanted):
    at_precision(monkeypatch, dtype)
    assert make_ilm(train_llm=train_llm).llm.dtype == wanted


# ---- What no checkpoint may do -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("known", [False, True])
def test_code_in_a_checkpoint_never_runs(make_ilm, tmp_path, monkeypatch, known):
    """A type that transformers does not know is refused in one line, unasked; for one that it knows its own code is used."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    write_checkpoint(tmp_path, "llama")
    bomb = f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\nclass Model: pass\nclass Words: pass\n"
    (tmp_path / "bomb.py").write_text(bomb)
    (tmp_path / "custom_generate").mkdir()
    (tmp_path / "custom_generate" / "generate.py").write_text(bomb)
    for file, more in (("config.json", {"model_type": "llama" if known else "bomb", "auto_map": {
            "AutoConfig": "bomb.Config", "AutoModelForCausalLM": "bomb.Model", "AutoTokenizer": [None, "bomb.Words"]}}),
            ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": [None, "bomb.Words"]}})):
        (tmp_path / file).write_text(json.dumps(json.loads((tmp_path / file).read_text()) | more))
    if known:
        make_ilm(llm=str(tmp_path)).generate([[5, 6]], 2)
    else:
        with pytest.raises(data.InputError, match="custom code") as error:
            make_ilm(llm=str(tmp_path))
        assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)
    assert not (tmp_path / "ran").exists()
