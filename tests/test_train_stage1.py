import json
import sys

import numpy as np
import pytest
import torch
from conftest import CF, ROOT, real
from safetensors.torch import load_file
from transformers import AutoTokenizer

import data
import qformer
import train_stage1
from qformer import QFormer, QFormerConfig

SMALL = ["--width", "32", "--layers", "2", "--num-queries", "2", "--batch-size", "8"]


@pytest.fixture(scope="module")
def run(script):
    return lambda toy, out, *argv: script("train_stage1.py", "--data", toy, "--out", out, *SMALL, *argv)


@pytest.fixture(scope="module")
def texts(toy):
    return train_stage1.Texts(data.load_dataset(toy), AutoTokenizer.from_pretrained(ROOT / "assets" / "toy_llm"), 48)


def test_one_batch_is_overfitted(toy, texts):
    dataset = data.load_dataset(toy)
    torch.manual_seed(0)
    model = QFormer(QFormerConfig(cf_dim=12, vocab_size=texts.size, num_queries=2, width=48, layers=2, heads=4, dropout=0.0))
    (ids, mask, key), history = texts.batch(torch.arange(8)), []
    optimizer = train_stage1.make_optimizer(model, 3e-3, 0.0)
    for step in range(130):
        losses = qformer.item_text_losses(model, dataset.item_cf[:8], ids, mask, key, texts.dec)
        sum(losses.values()).backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append({k: v.item() for k, v in losses.items()})
    first = history[0]
    assert first["itc"] == pytest.approx(np.log(8), rel=0.2) and first["itg"] == pytest.approx(np.log(texts.size), rel=0.15)
    assert losses["itc"] < 0.75 and losses["itg"] < 1.8 and losses["itm"] < 0.4  # label smoothing keeps itc and itg off zero


def test_text_rows(toy, texts):
    dataset = data.load_dataset(toy)
    row = texts.ids[3][texts.mask[3]].tolist()
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "assets" / "toy_llm")
    assert tokenizer.decode(row[1:-1]) == dataset.items[3]["text"]
    assert len({row[0], row[-1], texts.dec}) == 3 and min(row[0], row[-1], texts.dec) >= len(tokenizer)  # new rows, all different


def test_pairs_are_training_items_of_one_user_within_five_steps(toy):
    dataset = data.load_dataset(toy)
    pairs, rng = train_stage1.Pairs(dataset), np.random.default_rng(0)
    near = set()
    for u in range(len(dataset.users)):
        s = dataset.items_of(u, "train")
        near |= {(a, b) for k, a in enumerate(s) for b in s[k + 1:k + 6]}
    a, b = pairs.ii(500, rng)
    assert all((int(x), int(y)) in near for x, y in zip(a, b))
    again = dataset.items_of(int(pairs.users[0]), "train")
    again[:] = again[0]  # bought again and again, but for the last
    again[-1] = 1 - min(1, again[0])
    pairs.users, pairs.window = pairs.users[:1], len(again)
    assert not any(x == y for x, y in zip(*pairs.ii(200, rng)))  # the last one is within reach of all
    pairs = train_stage1.Pairs(dataset := data.load_dataset(toy))
    u, _, i = pairs.ui(100, rng)
    assert len(set(u.tolist())) == 100 and all(int(y) in dataset.items_of(int(x), "train")[1:] for x, y in zip(u, i))


def test_a_user_of_a_pair_is_who_they_were_before_the_item(toy):
    dataset = data.load_dataset(toy)
    users, vectors, items = train_stage1.Pairs(dataset).ui(40, np.random.default_rng(0))
    for user, vector, item in zip(users.tolist(), vectors, items.tolist()):
        past = dataset.items_of(user, "train").tolist()
        past = past[:past.index(item)]
        wanted = dataset.standard_users(dataset.solver.of_histories([past]))[0]
        torch.testing.assert_close(vector, wanted, atol=1e-4, rtol=1e-4)


def test_held_out_texts_influence_no_training_loss(toy, tmp_path, monkeypatch):
    """Another text for every held-out item leaves the trained weights bitwise the same."""
    weights = []
    for name in ("as they are", "scrambled"):
        dataset = data.load_dataset(toy)
        if name == "scrambled":
            for split in ("valid", "test"):
                for i in dataset.meta["held_out"][split]:
                    dataset.items[i]["text"] = f"Nothing like it {i}."
        monkeypatch.setattr(train_stage1, "load_dataset", lambda _: dataset)
        monkeypatch.setattr(sys, "argv", ["x", "--data", str(toy), "--out", str(tmp_path / name), *SMALL, "--steps", "4"])
        train_stage1.main()
        weights.append(torch.load(tmp_path / name / "state.pt", weights_only=True)["weights"])
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


def test_bad_arguments(run, toy, tmp_path):
    assert run(toy, tmp_path / "a", "--steps", 2, "--losses", "ii", "ui").returncode == 0
    for argv, message in ((["--steps", 0], "at least 1"), (["--steps", 4, "--resume"], "no state.pt"),
                          (["--init-bert", str(tmp_path)], "--tokenizer")):
        done = run(toy, tmp_path / "b", *argv)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr
    done = run(toy, tmp_path / "a", "--steps", 1, "--losses", "ii", "ui", "--resume")
    assert done.returncode == 2 and "has reached step 2; --steps 1 is less" in done.stderr and done.stderr.count("\n") == 1


def test_init_bert_from_a_folder(run, toy, tmp_path):
    from transformers import BertConfig, BertModel
    AutoTokenizer.from_pretrained(ROOT / "assets" / "toy_llm").save_pretrained(tmp_path / "bert")
    BertModel(BertConfig(vocab_size=1024, hidden_size=48, num_hidden_layers=2, num_attention_heads=12, intermediate_size=192)
              ).save_pretrained(tmp_path / "bert")
    done = run(toy, tmp_path / "out", "--steps", 1, "--width", 48, "--init-bert", tmp_path / "bert")
    assert done.returncode == 0, done.stderr
    assert "layers.1.query_ffn.up.weight" in done.stdout and "not loaded, fresh: queries" in done.stdout
    loaded, fresh = done.stdout.split("not loaded, fresh")
    assert "lm_bias" in fresh and "lm_norm" not in loaded  # it was saved without its head
    done = run(toy, tmp_path / "out2", "--steps", 1, "--width", 36, "--init-bert", tmp_path / "bert")
    assert done.returncode == 2 and "set --width" in done.stderr


def test_real_data(run, tmp_path):
    out = tmp_path / "data"
    data.main(["--dataset", "movielens", "--source", real("data/ml-100k"), "--out", str(out), *CF])
    assert run(out, tmp_path / "run", "--steps", 2, "--tokenizer", real("llm/TinyStories-656K")).returncode == 0
    assert load_file(tmp_path / "run" / "model.safetensors")["queries"].shape == (1, 2, 32)


def test_a_loss_that_is_not_finite_is_never_saved(tmp_path):
    args = train_stage1.parse_args(["--out", str(tmp_path)])
    run, model = train_stage1.RunDirectory(args, {}), torch.nn.Linear(2, 2)
    run.restore(dict(model.named_parameters()), torch.optim.SGD(model.parameters()), torch.amp.GradScaler("cpu", enabled=False))
    run.save(0, 1.0)
    with pytest.raises(data.InputError, match="step 5: loss validation is nan"):
        run.save(5, float("nan"))
    assert torch.load(tmp_path / "state.pt", weights_only=True)["step"] == 0


def test_a_smaller_share_of_items_is_part_of_a_larger_one():
    small, large, whole = (train_stage1.share_of(range(5, 60), fraction, seed=1).tolist() for fraction in (0.1, 0.5, 1))
    assert len(small) == 6 and set(small) < set(large) and whole == [*range(5, 60)]


def test_the_logged_loss_is_the_sum_that_is_optimised(toy, tmp_path, monkeypatch):
    argv = ["--data", str(toy), "--out", str(tmp_path), *SMALL, "--steps", "1", "--losses", "itc", "itg", "ui"]
    monkeypatch.setattr(sys, "argv", ["x", *argv])
    train_stage1.main()
    row = next(row for row in map(json.loads, open(tmp_path / "log.jsonl")) if "loss" in row)
    assert row["loss"] == pytest.approx(row["itc"] + row["itg"] + row["ui"], abs=2e-5) and not {"itm", "ii"} & {*row}
