import argparse
import json
import math
import subprocess
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import CF, EVALUATE, ROOT

import data
import evaluate
from assets.extras import references, tables
from assets.plumbing.guard import InputError
from ilm import SOFT_BASE
from train_stage2 import Examples


def test_ranks_count_ties_against_the_target():
    scores = torch.tensor([[3.0, 2.0, 1.0], [1.0, 1.0, 0.0], [0.0, -math.inf, -math.inf]])
    assert evaluate.target_ranks(scores, torch.tensor([1, 0, 1])).tolist() == [2, 2, 3]


def test_hr_and_ndcg_of_each_user_by_hand():
    ranks = np.array([1, 3, 6, 11])
    assert evaluate.hr(ranks, 5).tolist() == [1, 1, 0, 0] and evaluate.hr(ranks, 10).tolist() == [1, 1, 1, 0]
    assert evaluate.ndcg(ranks, 5) == pytest.approx([1, 1 / math.log2(4), 0, 0])
    assert evaluate.ndcg(ranks, 10) == pytest.approx([1, 1 / math.log2(4), 1 / math.log2(7), 0])


def test_metrics_by_hand():
    m = evaluate.ranking_metrics([1, 3, 6, 11])
    assert m["HR@5"] == 0.5 and m["HR@10"] == 0.75 and m["users"] == 4
    assert m["NDCG@5"] == pytest.approx((1 + 1 / math.log2(4)) / 4)
    assert m["NDCG@10"] == pytest.approx((1 + 1 / math.log2(4) + 1 / math.log2(7)) / 4)
    assert m["se"]["HR@5"] == pytest.approx(math.sqrt(4 / 3 * 0.25) / 2)


def test_ranks_hold_all_that_the_metrics_need():
    m = evaluate.ranking_metrics(torch.tensor([1, 10, 11, 200, 4]))
    assert m["ranks"] == [1, 10, 11, 200, 4] and {*map(type, m["ranks"])} == {int}
    assert json.loads(json.dumps(m)) == m
    for name, (metric, k) in evaluate.METRICS.items():
        assert metric(np.array(m["ranks"]), k).mean() == m[name]


def test_the_bootstrap_knows_a_difference_from_noise():
    rng = np.random.default_rng(1)
    users = rng.random((1, 400))
    a, b, c = users + rng.normal(0, 0.1, (3, 400)), users + rng.normal(0, 0.1, (3, 400)), users + 0.05 + rng.normal(0, 0.1, (3, 400))
    assert tables.bootstrap(a, c) < 0.01 and tables.bootstrap(a, b) > 0.05 and tables.bootstrap(a, a) > 0.95
    for n, m in ((3, 3), (5, 1)):  # of what training alone makes different (a number a seed), 1 in 20 is taken for a difference
        draw = lambda n: users[:, :50] + rng.normal(0, 0.2, (n, 1)) + rng.normal(0, 0.1, (n, 50))
        assert sum(tables.bootstrap(draw(n), draw(m), 200) < 0.05 for _ in range(200)) <= 20
        assert sum(tables.bootstrap(draw(n), users[:, :50], 200, fixed=True) < 0.05 for _ in range(200)) <= 20  # a reference


def test_the_noise_of_a_seed_on_a_user_is_counted_once():
    """Hits are 0 or 1, so that most of what seeds differ in is this noise: of no difference 1 in 20 is taken for one, no fewer."""
    rng, taken, both = np.random.default_rng(2), 0, 0
    for _ in range(300):
        chance = rng.beta(0.5, 2.2, 400)
        a, b = ((rng.random((3, 400)) < chance).astype(float) for _ in "ab")
        p = tables.bootstrap(a, b, 300)
        taken, both = taken + (p < 0.05), both + (p == tables.bootstrap(b, a, 300))
    assert 6 <= taken <= 30 and both == 300


def test_seeds_of_a_method_are_one_line(capsys):
    m = lambda hits: {**evaluate.ranking_metrics([1 if h else 99 for h in hits]), "written": {}}
    runs = [{"run": f"out/{name}", "rec": {"sequential": {"seen": m(h), "unseen": m(h)}}, "references": {"mf": m([1, 0, 0, 0])},
             "retention": 1.0, "yardstick": "mf", "split": "test", "filtered": True, "device": "cpu", "commit": "c"}
            for name, h in (("ilm-s0", [1, 1, 1, 0]), ("ilm-s1", [1, 1, 0, 0]), ("mlp-s0", [0, 0, 0, 1]))]
    def lines(against):
        tables.print_tables(runs, against)
        out = capsys.readouterr().out.splitlines()
        return {line.split("  ")[1].strip(): line.split() for line in out if "prompts" in line or " mf " in line}
    found = lines("ilm")
    assert found["ilm, seen prompts"][-4:] == ["0.625", "±", "0.125", "2"] and found["mf"][-1] == "1"
    assert float(found["mlp, seen prompts"][-1]) < 1
    found = lines("mf")  # a reference has no prompts: every line is compared with it
    assert found["mf"][-1] == "1" and float(found["ilm, seen prompts"][-1]) < 1 and found["mlp, unseen prompts"][-1] == "users"


def test_sentence_embeddings_do_not_depend_on_the_batch(make_ilm):
    model = make_ilm()
    texts = ["a tense western", "comedy", "It is from the seventies."]
    together = evaluate.sentence_embeddings(model.llm.reader, model.tokenizer, texts)
    alone = torch.cat([evaluate.sentence_embeddings(model.llm.reader, model.tokenizer, [t]) for t in texts])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(3))


def test_the_tables_script_is_shell():
    assert subprocess.run(["bash", "-n", str(ROOT / "assets" / "tables.sh")]).returncode == 0


def test_a_score_that_is_not_a_number_is_no_hit():
    scores = torch.tensor([[0.0, math.nan, 1.0], [2.0, math.nan, 1.0]])
    assert evaluate.target_ranks(scores, torch.tensor([1, 0])).tolist() == [3, 2]


def test_history_goes_but_a_repeated_target_stays(toy):
    dataset = data.load_dataset(toy)
    dataset.sequence[dataset.indptr[1] - 5] = dataset.target(0, "test")
    targets, taken = evaluate.targets_and_taken(dataset, [0, 1], "test", keep_history=False)
    for row, u in enumerate((0, 1)):
        history = set(dataset.items_of(u, "test").tolist())
        assert targets[row] == dataset.target(u, "test")
        assert set(taken[row].nonzero()[:, 0].tolist()) == history - {int(targets[row])}
    assert not evaluate.targets_and_taken(dataset, [0, 1], "test", keep_history=True)[1].any()


def test_references_by_definition(toy):
    dataset = data.load_dataset(toy)
    users = dataset.eligible()[:9]
    scores = {name: score(users, "test") for name, score in references.reference_scores(dataset).items()}
    X = torch.zeros(150, 120)
    for u in range(150):
        X[u, torch.as_tensor(dataset.items_of(u, "train").astype(int))] = 1
    H = torch.zeros(9, 120)
    for k, u in enumerate(users):
        H[k, torch.as_tensor(dataset.items_of(u, "test").astype(int))] = 1
    norm = X.norm(dim=0).clamp(min=1)
    cosine = (X.T @ X / norm / norm[:, None]).fill_diagonal_(0)
    torch.testing.assert_close(scores["popularity"][0], X.sum(0))
    torch.testing.assert_close(scores["item-knn"], H @ cosine, atol=1e-4, rtol=1e-4)
    # MF knows the whole history up to the moment, the validation item included
    Y, s = dataset.raw_cf.double(), dataset.solver.settings
    for name, recency in (("mf", 1.0), ("mf, at the moment", 0.9)):
        for row, user in zip(scores[name], users):
            A, b = Y.T @ Y + s.reg * torch.eye(12), 0
            for age, item in enumerate(dataset.items_of(user, "test")[::-1]):
                A = A + s.alpha * recency**age * torch.outer(Y[item], Y[item])
                b = b + (1 + s.alpha) * recency**age * Y[item]
            torch.testing.assert_close(row, (Y @ torch.linalg.solve(A, b)).float(), atol=1e-4, rtol=1e-3)
    weight = references.popularity_weight(dataset)
    wanted = scores["mf, at the moment"] + weight * scores["popularity"].log1p()
    torch.testing.assert_close(scores["mf, at the moment + popularity"], wanted)
    torch.testing.assert_close(scores["oracle"].sum(1), torch.ones(9), atol=1e-4, rtol=1e-4)
    result = evaluate.references(dataset, dataset.eligible(), "test", keep_history=False)
    assert result["oracle"]["HR@10"] > max(result["popularity"]["HR@10"], result["item-knn"]["HR@10"])


def at_recency(dataset, recency):
    """The data set, with users folded in so."""
    settings = replace(dataset.solver.settings, recency=recency)
    return replace(dataset, solver=data.UserSolver(dataset.raw_cf, settings))


def test_another_engines_users_have_no_row_at_the_moment(toy):
    dataset = replace(data.load_dataset(toy), raw_user_cf=torch.randn(150, 12))
    scores = references.reference_scores(dataset)
    assert [*scores] == ["popularity", "item-knn", "mf", "oracle"] and references.yardstick(dataset) == "mf"
    torch.testing.assert_close(scores["mf"]([3, 9], "test"), dataset.raw_user_cf[[3, 9]] @ dataset.raw_cf.T)


def test_where_tastes_stand_still_there_is_no_row_at_the_moment(toy):
    dataset = at_recency(data.load_dataset(toy), 1.0)
    names = references.reference_scores(dataset)
    assert "mf, at the moment" not in names and references.yardstick(dataset) in names


@pytest.mark.parametrize("weight, recency, wanted", [
    (0.0, 0.9, "mf, at the moment"),
    (0.03, 0.9, "mf, at the moment + popularity"),
    (0.0, 1.0, "mf, at the moment + popularity"),
])
def test_retention_is_against_the_better_mf_at_the_moment(toy, monkeypatch, weight, recency, wanted):
    monkeypatch.setattr(references, "popularity_weight", lambda dataset: weight)
    assert references.yardstick(at_recency(data.load_dataset(toy), recency)) == wanted


def test_the_weight_of_popularity_is_chosen_on_validation(toy):
    """The best of the grid by NDCG@10 of validation users; test items have no say."""
    dataset = data.load_dataset(toy)
    found = {}
    for weight in (0.0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3):
        def score(batch, split):
            return dataset.vectors_at(batch, split) @ dataset.raw_cf.T + weight * dataset.purchases.log1p()
        metrics = evaluate.evaluate_reference(score, dataset, dataset.eligible(), "valid", keep_history=False)
        found[weight] = metrics["NDCG@10"]
    other = replace(dataset, sequence=dataset.sequence.copy())
    other.sequence[other.indptr[1:] - 1] = np.roll(dataset.sequence[dataset.indptr[1:] - 1], 7)
    assert references.popularity_weight(dataset) == max(found, key=found.get) == references.popularity_weight(other)


def test_the_toy_world_orders_the_references(tmp_path):
    """Order is half of the signal, and there is something left to know: popularity < MF of the
    whole history < MF at the moment < the oracle."""
    flags = "--cf-dim 24 --recency 0.8 --reg 1 --max-users 700".split()
    data.main([*flags, "--out", str(tmp_path / "toy")])
    dataset = data.load_dataset(tmp_path / "toy")
    found = evaluate.references(dataset, dataset.eligible()[::2], "test", keep_history=False)
    order = [found[name]["HR@10"] for name in ("popularity", "mf", "mf, at the moment", "oracle")]
    assert order == sorted(order) and min(np.diff(order)) > 0.01, order


def test_from_nothing_to_the_table(tmp_path, script):
    """All scripts with few steps in a folder of their own; the same files a user's first run leaves."""
    def run(*argv, **more):
        done = script(*argv, cwd=tmp_path, **more)
        assert done.returncode == 0 and not done.stderr, done.stderr
        return done.stdout
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    run("data.py", "--max-users", "60", *CF)
    run("train_stage1.py", "--steps", "4", "--width", "32", "--layers", "2")
    run("train_stage2.py", "--steps", "3", "--batch-size", "2", "--valid-users", "8")
    few = "import assets.extras.sasrec as s, functools; s.train_sasrec = functools.partial(s.train_sasrec, epochs=1)"
    limits = ["--max-users", "12", "--max-texts", "4"]
    out = run("evaluate.py", "--controls", "--sasrec", "--json", "all.json", *limits, before=few)
    for word in ("popularity", "item-knn", "mf", "oracle", "ilm, seen prompts", "ilm, unseen prompts", "ilm, shuffled_cf", "retention",
                 "stage 1, held-out items", "log_ppl", "sasrec"):
        assert word in out, out
    results = json.loads((tmp_path / "all.json").read_text())
    assert [r["kind"] for r in results] == ["stage2", "stage1"]
    assert results[0] == json.loads((tmp_path / "out/toy/ilm/metrics.json").read_text())
    seen, yardstick = results[0]["rec"]["sequential"]["seen"], results[0]["yardstick"]
    assert {*map(type, seen["ranks"])} == {int} and len(seen["ranks"]) == seen["users"] == 12 and min(seen["ranks"]) >= 1
    assert yardstick.startswith("mf, at the moment") and f"(sequential HR@10 over that of {yardstick})" in out
    assert results[0]["retention"] == pytest.approx(seen["HR@10"] / results[0]["references"][yardstick]["HR@10"])
    assert 0 < results[0]["text"]["sc"] < 1 and len(results[0]["curve"]) == 4
    pytest.importorskip("matplotlib", reason="figures need matplotlib")
    again = run("evaluate.py", "--table", "all.json", "--plot", "figures")
    assert again in out and (tmp_path / "figures/alignment.png").is_file() and (tmp_path / "figures/stage1.png").is_file()
    assert set(results[0]["rec"]) == {"sequential", "straightforward"} and results[0]["llm_frozen"] and results[0]["filtered"]
    assert set(results[0]["controls"]) == {"shuffled_cf", "zero_soft_tokens", "text_only"} == set(results[0]["text_controls"]) - {"title"}
    assert "ilm, title" in out
    run("train_stage2.py", "--steps", "1", "--batch-size", "2", "--mix", "0", "0", "1", "--text-fraction", "0.2", "--method", "mlp",
        "--valid-users", "8")
    assert "sequential" not in run("evaluate.py", "--run", "out/toy/mlp", *limits)  # what was not trained is not measured
    run("evaluate.py", "--table", "out/toy/mlp/metrics.json", "--plot", "texts")
    assert (tmp_path / "texts/budget.png").is_file() and not (tmp_path / "texts/stage1.png").exists()  # nor drawn
    assert run("ilm.py", "--run", "out/toy/ilm", "Describe {item:007}. {history:001,002} {user:3}").count("\n") == 1  # of 3 steps: or empty


def test_runs_of_other_settings_are_no_seeds_of_each_other():
    runs = [{"run": f"out/toy/{name}", "steps": steps, "lr": 1e-3} for name, steps in (("ilm-s0", 200), ("ilm-s1", 200), ("mlp", 200))]
    assert {k: len(v) for k, v in tables.by_method(runs, lambda r: r["steps"]).items()} == {"ilm": 2, "mlp": 1}
    runs.append({"run": "out/toy/ilm", "steps": 600, "lr": 1e-3})
    assert set(tables.by_method(runs, lambda r: r["steps"])) == {"ilm-s0", "ilm-s1", "ilm", "mlp"}
    runs = [{"run": f"{folder}/ilm-s0", "steps": steps, "split": "test"} for folder, steps in (("a", 240), ("b", 120))]
    runs.append({**runs[0], "split": "valid"})
    assert [len(v) for v in tables.by_method(runs, lambda r: r["steps"]).values()] == [1, 1, 1]


def test_a_run_given_twice_is_one_and_splits_have_tables_of_their_own(capsys):
    def run(name, split):
        return {"run": f"out/toy/{name}", "dataset": "toy", "split": split, "filtered": True, "steps": 9, "lr": 1e-3, "retention": 1.0}
    args = argparse.Namespace(against="ilm", plot=None)
    tables.show([run("ilm-s0", "test"), run("ilm-s0", "test"), run("mlp-s0", "valid")], args)
    out = capsys.readouterr().out
    assert out.count("== toy (test)") == out.count("== toy (valid)") == 1 and out.count("retention") == 2


def test_other_held_out_items_are_refused(script, work, tmp_path):
    """The same data prepared under another name holds out other items: those that a run was trained on would be called new."""
    other = tmp_path / "other"
    assert script("data.py", "--max-users", 60, *CF, "--out", other, cwd=work).returncode == 0
    done = script("evaluate.py", "--run", "train_stage2", "--data", other, *EVALUATE, cwd=work)
    assert done.returncode == 2 and "other items" in done.stderr


def test_controls_leave_the_model_as_it_is(make_ilm):
    """Each is another model: the frozen LLM is shared, nothing else, and nothing has to be put back."""
    model = make_ilm()
    prompt = Examples(model, model.dataset).ranking_prompts("sequential", [3], "test", "seen")[0]
    before = model.score([prompt], range(20)), {name: x.clone() for name, x in model.state_dict().items()}, model.cf.clone()
    scores = {}
    for name, examples in evaluate.controls(model):
        assert examples.model.llm is model.llm and examples.dataset is model.dataset
        asked = examples.ranking_prompts("sequential", [3], "test", "seen")
        scores[name] = examples.model.score(asked, range(20))
    assert [*scores] == ["shuffled_cf", "zero_soft_tokens", "text_only"]
    assert torch.equal(model.score([prompt], range(20)), before[0]) and torch.equal(model.cf, before[2])
    assert all(torch.equal(x, before[1][name]) for name, x in model.state_dict().items())
    found = [before[0], *scores.values()]  # four different answers
    assert all((a - b).abs().max() > 1e-4 for k, a in enumerate(found) for b in found[:k])


def test_the_line_above_reads_a_title_where_others_read_nothing(make_ilm):
    model = make_ilm()
    found = dict(evaluate.controls(model, evaluate.TEXT_CONTROLS))
    instance = {"prompt": "Describe {item}.", "items": [7], "target": "a story"}
    texts = {name: model.tokenizer.decode([i for i in found[name].text(instance)[0] if i < SOFT_BASE]) for name in found}
    assert model.names[7] in texts["title"] and "this item" in texts["text_only"]
    assert all(model.names[7] not in texts[name] for name in texts if name != "title")


def test_silent_soft_tokens_say_nothing(make_ilm):
    model = dict(evaluate.controls(make_ilm()))["zero_soft_tokens"].model
    assert not model.soft_tokens(model.with_history(model.cf[:5])).any()


def test_log_perplexity_is_that_of_the_examples_one_by_one(make_ilm):
    examples = Examples(model := make_ilm(), model.dataset)
    instances = evaluate.text_instances(examples, "test", 3)
    found = evaluate.log_perplexity(examples, instances)
    assert max(map(len, instances.values())) == 3 and len(instances) > 5
    nats, tokens, of_task = 0, 0, {}
    for task in instances:
        for t in instances[task]:
            prompt, target = examples.text(t)
            kept = model.llm.read(*model.embed_prompts([prompt]))
            words = model.llm.head(model.llm.states(kept, [target])).log_softmax(1)
            nll = -words.gather(1, torch.tensor(target)[:, None])
            nats, tokens = nats + nll.sum().item(), tokens + len(target)
            of_task.setdefault(task, []).extend(nll[:, 0].tolist())
    assert found["log_ppl"] == pytest.approx(nats / tokens, rel=1e-4)
    assert found["per_task"] == pytest.approx({task: np.mean(x) for task, x in of_task.items()}, rel=1e-4)
    assert set(found["per_item"]) == {t["items"][0] for some in instances.values() for t in some}
    assert np.mean(found["per_item_share"]) == pytest.approx(found["log_ppl"], rel=1e-3)


def test_an_attribute_is_right_or_wrong(toy):
    written = {"genre": [("western", "western"), ("drama", "comedy")], "pitch": [("a", "a")]}
    assert evaluate.attribute_accuracy(data.load_dataset(toy), written) == {"genre": 0.5}


@pytest.mark.parametrize("argv", [
    "--table x --run y", "--table x --json y", "--recommend x --json y", "--recommend x --run y z", "--new x", "--top 5",
    "--recommend x --split valid", "--recommend x --keep-history", "--recommend x --controls", "--recommend x --tasks text",
    "--recommend x --max-users 5", "--recommend x --sasrec", "--recommend x --beams 5", "--recommend x --full-vocabulary",
    "--sc-encoder x --tasks sequential", "--beams 5"])
def test_no_flag_is_ignored_in_silence(argv):
    with pytest.raises(InputError, match=argv.split()[0]):
        evaluate.parse_args(argv.split())


def test_nothing_to_evaluate(tmp_path, script):
    done = script("evaluate.py", cwd=tmp_path)
    assert done.returncode == 2 and "no runs in out/toy" in done.stderr and done.stderr.count("\n") == 1
