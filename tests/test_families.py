"""Every type of LLM through the same seam: tiny random checkpoints, saved to disk and loaded by path as --llm does."""
import json
import math
from functools import partial

import numpy as np
import pytest
import torch
from conftest import ROOT, embedded, real
from test_ilm import named_children, purchases
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

import data
from assets.extras.chat import CONTROL, Printer
from assets.fast.attention import cut_in_pieces
from assets.plumbing.frames import end_id, frame
from assets.plumbing.llm import EncoderDecoder
from assets.plumbing.run import print_parameters
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


# Further types: packed, read alone, or refused with these words; and what differs from SMALL
SMALL = dict(HEADS, n_embd=32, n_layer=2, n_head=2, n_positions=512, d_model=32, n_heads=2, n_layers=2, max_seq_len=512, ffn_dim=48, dff=48,
             word_embed_proj_dim=32, num_local_experts=4, num_experts_per_tok=1, num_experts=4, moe_intermediate_size=24,
             shared_expert_intermediate_size=24, shared_intermediate_size=48, mamba_n_heads=8, mamba_d_head=8, mamba_d_ssm=64,
             mamba_d_state=8, mamba_chunk_size=16, mamba_dt_rank=4, state_size=8, chunk_size=16, linear_num_key_heads=2,
             linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8, vocab_size_per_layer_input=400)
PACKED, ALONE = True, False
LINEAR = dict(layer_types=["linear_attention", "full_attention"])
VISION = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
OTHERS = {
    "opt": (PACKED, {}), "falcon": (PACKED, dict(alibi=False)), "ctrl": (PACKED, {}),
    "llama4": (PACKED, dict(text_config=dict(SMALL, intermediate_size_mlp=48))),
    "gemma3": (PACKED, dict(text_config=SMALL, vision_config=VISION)),
    # Distances by columns
    "falcon, alibi": (ALONE, dict(alibi=True)), "bloom": (ALONE, {}), "mpt": (ALONE, {}), "openai-gpt": (ALONE, {}),
    "gpt_neo": (ALONE, dict(attention_types=[[["global", "local"], 1]], num_layers=2, num_heads=2, window_size=24)),
    # A state goes from token to token
    "qwen3_5_text": (ALONE, LINEAR), "qwen3_next": (ALONE, LINEAR), "minimax": (ALONE, LINEAR),
    "lfm2": (ALONE, dict(layer_types=["conv", "full_attention"])), "granitemoehybrid": (ALONE, dict(layer_types=["mamba", "attention"])),
    "jamba": (ALONE, dict(attn_layer_period=2, attn_layer_offset=1, use_mamba_kernels=False)), "falcon_h1": (ALONE, {}),
    "bamba": (ALONE, dict(attn_layer_indices=[1])), "recurrent_gemma": (ALONE, dict(num_hidden_layers=3)), "mamba": (ALONE, {}),
    "mamba2": (ALONE, dict(num_heads=8, head_dim=8, n_groups=1)), "rwkv": (ALONE, dict(attention_hidden_size=32)),
    "t5gemma": (ALONE, dict(encoder=SMALL, decoder=dict(SMALL, cross_attention_hidden_size=32))),
    # Words are more than their embeddings; heads of several layers; what comes later is seen
    "gemma4_text": ("cannot read embeddings", dict(hidden_size_per_layer_input=8)),
    "gemma3n_text": ("logits that are not those", dict(laurel_rank=8, num_kv_shared_layers=0, altup_num_inputs=2)),
    "modernbert-decoder": ("logits that are not those", {}),
    "bert-generation": ("sees the words that it shall predict", {}), "xlnet": ("sees the words that it shall predict", {}),
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


def other_settings(family, rows):
    """Those of SMALL that the configuration knows, and its own."""
    own = OTHERS[family][1]
    cls = CONFIG_MAPPING[family.split(",")[0]]
    known = {*cls().to_dict(), *cls.attribute_map}
    sub = {key: value | {"vocab_size": rows, "pad_token_id": 0} for key, value in own.items() if isinstance(value, dict)}
    small = {} if sub else {key: value for key, value in SMALL.items() if key in known}
    return small | own | sub


def write_checkpoint(folder, family):
    """A random LLM of a family, with some rows more than its tokenizer has tokens, as many a real one."""
    settings, kind, chat = FAMILIES.get(family, (None, "bytes", None))
    tokenizer = make_tokenizer(kind, chat)
    rows = len(tokenizer) + 7
    config = AutoConfig.for_model("t5" if family == "flan-t5" else family.split(",")[0], vocab_size=rows, bos_token_id=2, eos_token_id=1,
                                  pad_token_id=0, **(settings or other_settings(family, rows)))
    torch.manual_seed(0)
    llm = (AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM).from_config(config)
    if family == "flan-t5":  # transformers ties every T5 that it makes; one on disk with a head of its own keeps it
        llm.lm_head.weight = torch.nn.Parameter(torch.randn_like(llm.lm_head.weight) / 4)
    for name, parameter in llm.named_parameters():  # zero in a fresh one: Gemma 3n would hear nothing of what it learnt
        if "correct_output_scale" in name:
            torch.nn.init.ones_(parameter)
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
    targets, seq2seq = torch.tensor(targets), model.llm.network.config.is_encoder_decoder
    ids = torch.tensor([prompt]).expand(len(targets), -1)
    if not seq2seq:
        ids = torch.cat([ids, targets[:, :-1]], 1)
    inputs = {"input_ids": ids}
    if max(prompt) >= SOFT_BASE:
        inputs = {"inputs_embeds": embedded(model, prompt, targets.tolist() if not seq2seq else [[]] * len(targets))}
        if not seq2seq:
            inputs["inputs_embeds"] = inputs["inputs_embeds"][:, :-1]
    if seq2seq:
        config = model.llm.network.config
        start = getattr(config, "decoder_start_token_id", None)
        start = torch.full_like(targets[:, :1], config.bos_token_id if start is None else start)
        return model.llm.network(**inputs, decoder_input_ids=torch.cat([start, targets[:, :-1]], 1)).logits.float().log_softmax(-1)
    return model.llm.network(**inputs).logits[:, len(prompt) - 1:].float().log_softmax(-1)


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


def seq2seq(model):
    return isinstance(model.llm, EncoderDecoder)


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
    states = lambda embeddings: model.llm.reader(inputs_embeds=embeddings, output_hidden_states=True).hidden_states
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
    monkeypatch.setattr(model.llm.network.generation_config, "eos_token_id", [3, out[0]])  # a chat model may know several ends
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
        batch |= cut_in_pieces(batch["branch"], long=0)
        nll, (row, column) = shared(batch)[1], (batch["label"] >= 0).nonzero(as_tuple=True)
    assert batch["ids"].shape[1] > 160
    packed = torch.zeros(3, len(some)).index_put((row, batch["branch"][row, column] - 1), -nll, accumulate=True)
    close(packed, scores_of(shared, prompts)[:, some])


def test_prompt_and_name_are_tokenised_as_one_text_would_be(shared):
    model = shared
    tokenize = lambda text, special=False: model.tokenizer(text, add_special_tokens=special)["input_ids"]
    name, eos = model.names[3], end_id(model.tokenizer)
    assert model.name_ids[3][-1] == eos and model.tokenizer.decode(model.name_ids[3][:-1]).strip() == name
    prompt = model.prompt_ids("The next one:")
    if model.tokenizer.chat_template:  # the template in place of what the tokenizer would add, once, and the name begins the reply
        turn = [{"role": "user", "content": "The next one:"}]
        text = model.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        assert "start" in text and tokenize(text) == prompt and tokenize(text + name) == prompt + model.name_ids[3][:-1]
        end = "<end_of_turn>" if "<start_of_turn>" in text else "<|im_end|>"
        assert model.tokenizer.convert_ids_to_tokens(model.name_ids[3][-1]) == end
        talk = model.tokenizer.decode(model.prompt_ids(["one", "two", "three"]))
        assert [talk.count(part) for part in ("one", "two", "three", "user\n")] == [1, 1, 1, 2]
        assert talk.count("<|im_start|>assistant\n") + talk.count("<start_of_turn>model\n") == 2
    elif seq2seq(model):
        assert prompt == tokenize("The next one:", True) and prompt[-1] == eos and model.name_ids[3][:-1] == tokenize(name)
    elif not any("▁" in token[1:] for token in model.tokenizer.get_vocab()):  # TinyStories' pieces span words: there is no cut between
        assert prompt + model.name_ids[3][:-1] == tokenize("The next one: " + name, True)
    assert prompt.count(model.tokenizer.bos_token_id) == (model.tokenizer.bos_token_id is not None)


def test_nothing_stands_between_a_user_and_the_name_that_is_asked_for(shared):
    """A chat LLM reads the user's soft tokens in the answer that it has begun; the question is what stands before."""
    user = shared.dataset.standard_users(shared.dataset.vectors_at([1]))[0]
    prompt = shared.prompt_ids("So far: {history}. Next for {user}:", user=1, history=[3, 4], cf=shared.with_history(user[None])[0])
    if seq2seq(shared):  # the end token, which T5 and its like put behind every text
        prompt = prompt[:-1]
    if not shared.tokenizer.chat_template:
        return
    soft = [SOFT_BASE + shared.num_items * shared.Q + q for q in range(shared.Q)]
    assert prompt[-shared.Q:] == soft
    words = shared.tokenizer.decode([i for i in prompt if i < SOFT_BASE])
    question, answer = words.split("Next for")
    assert answer.rstrip().endswith("For user") and ("assistant" in answer or "model" in answer) and "So far:" in question


def test_a_chat_template_that_asks_for_the_date_gets_a_fixed_one():
    tokenizer = make_tokenizer("bytes", "{{ strftime_now('%d %b %Y') }}|{{ messages[-1]['content'] }}|")
    assert frame(["hello"], tokenizer) == ("26 Jul 2024|hello|", False)
    assert frame(["hello", "well,"], tokenizer, "2001-02-03") == ("03 Feb 2001|hello|well,", False)


def test_of_several_chat_templates_the_default_one_is_used():
    tokenizer = make_tokenizer("bytes", {"default": "{{ messages[-1]['content'] }}|", "tool_use": "tools"})
    assert frame(["hello"], tokenizer) == ("hello|", False)


def test_writing_is_greedy_whatever_the_checkpoint_says(make_ilm, tmp_path):
    """Beams would make a conversation fail, which prints while it is written."""
    path = write_checkpoint(tmp_path, "llama")
    own = make_ilm(llm=path)
    prompts = prompts_of(own)[1:]
    GenerationConfig(num_beams=4, repetition_penalty=1.5, min_length=56, do_sample=True, bos_token_id=2, eos_token_id=1,
                     pad_token_id=0).save_pretrained(path)
    other = make_ilm(llm=path)
    assert other.llm.network.generation_config.num_beams != 4
    assert other.generate(prompts, max_new_tokens=20) == own.generate(prompts, max_new_tokens=20)


def test_a_micro_batch_of_an_llm_that_reads_one_by_one_is_cut_by_what_it_reads(make_ilm, tmp_path, monkeypatch):
    model = make_ilm(llm=write_checkpoint(tmp_path, "lfm2"))
    examples, read, forward = Examples(model, model.dataset), [], model.llm.body
    monkeypatch.setattr(model.llm, "body", lambda x, *more: read.append(x.shape[0] * x.shape[1]) or forward(x, *more))
    rows = examples.rows("sequential", 6, np.random.default_rng(0))
    parts = [*examples.cut(rows, 14_000)]
    with torch.no_grad():
        total = sum(model(examples.collate(part))[0].item() for part in parts)
        assert 1 < len(parts) == len(read) < 6 and max(read) <= 14_000
        assert total == pytest.approx(model(examples.collate(rows))[0].item(), rel=1e-4)


def test_layers_are_compiled_under_checkpoints_too(make_ilm, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # which needs no C++ compiler
    counters = torch._dynamo.utils.counters
    model = make_ilm()
    batch = Examples(model, model.dataset).batch("sequential", 2, np.random.default_rng(0))
    wanted = model.train()(batch)[0].item()
    counters.clear()
    model.llm.compile_layers()
    model.llm.checkpoint_layers()
    loss = model(batch)[0]
    loss.backward()
    assert counters["stats"]["unique_graphs"] > 0 and loss.item() == pytest.approx(wanted, rel=1e-4)


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
    for module in ("assets.plumbing.llm", "assets.plumbing.run"):
        monkeypatch.setattr(f"{module}.precision", lambda device: dtype)


def test_half_precision_ranks_nearly_as_full_precision_does(shared, make, monkeypatch):
    wanted = scores_of(shared)
    for dtype in (torch.float16, torch.bfloat16):
        at_precision(monkeypatch, dtype)
        model = make() if dtype == torch.bfloat16 else shared
        assert model.llm.network.dtype == (torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
        assert model.llm.network.config._attn_implementation.startswith("sdpa") or not model.llm.network._supports_sdpa
        with model.autocast():
            assert torch.is_autocast_enabled("cpu") == (dtype == torch.bfloat16 or not seq2seq(model))  # fp16 is nothing for T5
            scores = scores_of(model)
        close(scores.exp().sum(1), torch.ones(3), atol=1e-3)
        assert torch.corrcoef(torch.stack([scores.flatten(), wanted.flatten()]))[0, 1] > 0.98


@pytest.mark.parametrize("dtype, train_llm, wanted", [
    (torch.bfloat16, False, torch.bfloat16), (torch.float16, False, torch.float32),
    (torch.bfloat16, True, torch.float32)])  # a step of AdamW is less than bf16 can tell apart
def test_a_frozen_llm_is_in_bf16_where_there_is_one_and_a_trained_one_in_fp32(make_ilm, monkeypatch, dtype, train_llm, wanted):
    at_precision(monkeypatch, dtype)
    assert make_ilm(train_llm=train_llm).llm.network.dtype == wanted


# ---- Types that do not pack, and types that are refused -----------------------------------------------------------------

@pytest.mark.parametrize("family", OTHERS)
def test_other_types_are_read_as_the_llm_itself_reads_or_refused_in_one_line(make_ilm, tmp_path, capsys, family):
    """Loss of a packed batch, ranking and writing equal the LLM's own, one by one."""
    path, verdict = write_checkpoint(tmp_path, family), OTHERS[family][0]
    if isinstance(verdict, str):
        with pytest.raises(data.InputError, match=verdict) as error:
            make_ilm(llm=path)
        assert "\n" not in str(error.value) and path in str(error.value)
        return
    model = make_ilm(llm=path)
    assert model.llm.packs == verdict
    told = [f"--llm {path}: of type {model.llm.network.config.model_type}, which reads one by one: slower"]
    assert capsys.readouterr().out.splitlines() == told * (verdict is ALONE and family != "t5gemma")
    examples, some, prompts = Examples(model, model.dataset), [3, 77, 5], prompts_of(model)[1:]
    wanted = torch.stack([brute_force(model, prompt)[0] for prompt in prompts])
    assert wanted.std() > 0.05
    close(scores_of(model, prompts), wanted)
    rows = [examples.pack([(prompt, *model.names_trie.paths[i]) for i in some]) for prompt in prompts]
    total, nll = model(examples.collate(rows))
    total.backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.adapter.maps.parameters())
    lengths = [len(model.names_trie.paths[i][0]) for _ in prompts for i in some]
    close(torch.stack([-part.sum() for part in nll.split(lengths)]).view(2, 3), wanted[:, some])
    for prompt, text in zip(prompts, model.generate(prompts, max_new_tokens=3)):
        assert model.generate([prompt], 3) == [text]
        out = []
        while len(out) < 3 and model.tokenizer.eos_token_id not in out:
            out.append(own_log_p(model, prompt, [[*out, 0]])[0, -1].argmax().item())
        assert text == model.tokenizer.decode(out, skip_special_tokens=True).strip()


def test_a_reply_is_printed_while_it_is_written_one_by_one(make_ilm, tmp_path, capsys):
    model = make_ilm(llm=write_checkpoint(tmp_path, "falcon_h1"))
    assert not model.llm.generates
    prompt = prompts_of(model)[:1]
    printer = Printer(model.tokenizer)
    assert CONTROL.sub(" ", model.generate(prompt, 8, streamer=printer)[0]) == printer.text.strip() != ""


def test_a_tokenizer_may_have_one_entry_more_than_the_llm_has_rows(make_ilm, tmp_path):
    """Gemma 3's has one for images, which no text uses. Two more, and it is another LLM's."""
    path = write_checkpoint(tmp_path, "gemma3_text")
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.add_tokens([f"<{k}>" for k in range(7)] + ["<image_soft_token>"], special_tokens=True)
    tokenizer.save_pretrained(path)
    assert scores_of(make_ilm(llm=path)).isfinite().all()
    tokenizer.add_tokens(["<one more>"], special_tokens=True)
    tokenizer.save_pretrained(path)
    with pytest.raises(data.InputError, match="another LLM's"):
        make_ilm(llm=path)


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


@pytest.mark.parametrize("template, end", [
    (CHATML, "<|im_end|>"), (CHATML.replace("m.content", "m.content | upper"), "</s>"),
    ("{% for m in messages %}{% if m.role == 'assistant' %}{{ raise_exception('no') }}{% endif %}{% endfor %}", "</s>")])
def test_an_answer_ends_as_the_template_ends_a_turn(template, end):
    """By the tokenizer's end token where a template changes what is said, or has no turn of the model."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "assets/toy_llm")
    tokenizer.add_special_tokens({"eos_token": "</s>", "additional_special_tokens": ["<|im_end|>"]})
    tokenizer.chat_template = template
    assert tokenizer.decode([end_id(tokenizer)]) == end
