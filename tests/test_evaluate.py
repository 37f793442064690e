import json
import math
import subprocess

import numpy as np
import pytest
import torch
from conftest import EVALUATE, ROOT

import data
import evaluate
from assets import tables


def test_ranks_count_ties_against_the_target():
    scores = torch.tensor([[3.0, 2.0, 1.0], [1.0, 1.0, 0.0], [0.0, -math.inf, -math.inf]])
    assert evaluate.target_ranks(scores, torch.tensor([1, 0, 1])).tolist() == [2, 2, 3]


def test_metrics_by_hand():
    m = evaluate.ranking_metrics([1, 3, 6, 11])
    assert m["HR@5"] == 0.5 and m["HR@10"] == 0.75 and m["users"] == 4
    assert m["NDCG@5"] == pytest.approx((1 + 1 / math.log2(4)) / 4)
    assert m["NDCG@10"] == pytest.approx((1 + 1 / math.log2(4) + 1 / math.log2(7)) / 4)
    assert m["se"]["HR@5"] == pytest.approx(math.sqrt(4 / 3 * 0.25) / 2)


def test_hits_hold_all_that_the_metrics_need():
    m = evaluate.ranking_metrics(torch.tensor([1, 10, 11, 200, 4]))
    assert m["hits"] == "1a004"
    assert evaluate.per_user(m, "HR@5").tolist() == [1, 0, 0, 0, 1]
    assert evaluate.per_user(m, "NDCG@10").mean() == pytest.approx(m["NDCG@10"])


def test_the_bootstrap_knows_a_difference_from_noise():
    rng = np.random.default_rng(1)
    users = rng.random((1, 400))
    a, b, c = users + rng.normal(0, 0.1, (3, 400)), users + rng.normal(0, 0.1, (3, 400)), users + 0.05 + rng.normal(0, 0.1, (3, 400))
    assert tables.bootstrap(a, c) < 0.01 and tables.bootstrap(a, b) > 0.05 and tables.bootstrap(a, a) > 0.95
    for n, m in ((3, 3), (5, 1)):  # of what training alone makes different (a number a seed), 1 in 20 is taken for a difference
        draw = lambda n: users[:, :50] + rng.normal(0, 0.2, (n, 1)) + rng.normal(0, 0.1, (n, 50))
        assert sum(tables.bootstrap(draw(n), draw(m), 200) < 0.05 for _ in range(200)) <= 20
        assert sum(tables.bootstrap(draw(n), users[:, :50], 200, fixed=True) < 0.05 for _ in range(200)) <= 20  # a reference


def test_seeds_of_a_method_are_one_line(capsys):
    m = lambda hits: {**evaluate.ranking_metrics([1 if h else 99 for h in hits]), "written": {}}
    runs = [{"run": f"out/{name}", "rec": {"sequential": {"seen": m(h), "unseen": m(h)}}, "references": {"mf": m([1, 0, 0, 0])},
             "retention": 1.0, "split": "test", "filtered": True, "device": "cpu", "commit": "c"}
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


def test_sasrec_learns_what_follows_what():
    from assets.sasrec import train_sasrec
    class Cycle:  # item k is followed by item k + 1
        items = range(12)
        eligible = lambda self: np.arange(40)
        items_of = lambda self, u, split: (np.arange(9) + u) % 12
    right = lambda score: sum(i == (u + 9) % 12 for u, i in enumerate(score(range(12), "test").argmax(1).tolist()))
    assert right(train_sasrec(Cycle(), right, steps=400, batch_size=32)) >= 11  # of 12; chance: 1


def test_sentence_embeddings_do_not_depend_on_the_batch(make_ilm):
    model = make_ilm()
    texts = ["a tense western", "comedy", "It is from the seventies."]
    together = evaluate.sentence_embeddings(model.llm.base_model, model.tokenizer, texts)
    alone = torch.cat([evaluate.sentence_embeddings(model.llm.base_model, model.tokenizer, [t]) for t in texts])
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


def test_the_oracle_is_bayes_rule_by_enumeration():
    rng = np.random.default_rng(0)
    world = {"taste": np.exp(rng.normal(size=(5, 6))).astype(np.float32), "follow": np.exp(rng.normal(size=(6, 6))).astype(np.float32)}
    histories = [np.array([4]), np.array([1, 5, 2]), np.array([0, 3, 4, 1])]
    got = evaluate.toy_oracle(world, histories)
    for row, history in zip(got, histories):
        wanted = np.zeros(6)
        joint = np.full(5, 1 / 5)  # p(type, history so far)
        follow = lambda past, i: world["follow"][past[-1], i] if past else 1
        conditional = lambda kind, past: np.array([0 if i in past else world["taste"][kind, i] * follow(past, i) for i in range(6)])
        for step, item in enumerate(history):
            for kind in range(5):
                p = conditional(kind, list(history[:step]))
                joint[kind] *= p[item] / p.sum()
        for kind in range(5):
            p = conditional(kind, list(history))
            wanted += joint[kind] / joint.sum() * p / p.sum()
        torch.testing.assert_close(row, torch.tensor(wanted, dtype=torch.float32), atol=1e-5, rtol=1e-4)


def test_references_by_definition(toy):
    dataset = data.load_dataset(toy)
    users = dataset.eligible()[:9]
    scores = {name: score(users) for name, score in evaluate.reference_scores(dataset, "test")}
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
    torch.testing.assert_close(scores["mf"], dataset.raw_cf[0][users] @ dataset.raw_cf[1].T)
    torch.testing.assert_close(scores["oracle"].sum(1), torch.ones(9), atol=1e-4, rtol=1e-4)
    result = evaluate.references(dataset, dataset.eligible(), "test", keep_history=False)
    assert result["oracle"]["HR@10"] > max(result["popularity"]["HR@10"], result["item-knn"]["HR@10"])


def test_from_nothing_to_the_table(tmp_path, script):
    """All scripts with few steps in a folder of their own; the same files a user's first run leaves."""
    def run(*argv, **more):
        done = script(*argv, cwd=tmp_path, **more)
        assert done.returncode == 0 and not done.stderr, done.stderr
        return done.stdout
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    run("data.py", "--max-users", "60")
    run("train_stage1.py", "--steps", "4", "--width", "32", "--layers", "2")
    run("train_stage2.py", "--steps", "3", "--batch-size", "2")
    few = "import evaluate, functools; evaluate.train_sasrec = functools.partial(evaluate.train_sasrec, steps=20)"
    out = run("evaluate.py", "--controls", "--sasrec", "--json", "all.json", before=few)
    for word in ("popularity", "item-knn", "mf", "oracle", "ilm, seen prompts", "ilm, unseen prompts", "ilm, shuffled_cf", "retention",
                 "stage 1, held-out items", "log_ppl", "sasrec"):
        assert word in out, out
    results = json.loads((tmp_path / "all.json").read_text())
    assert [r["kind"] for r in results] == ["stage2", "stage1"]
    assert results[0] == json.loads((tmp_path / "out/toy/ilm/metrics.json").read_text())
    assert 0 < results[0]["text"]["sc"] < 1 and len(results[0]["curve"]) == 4
    pytest.importorskip("matplotlib", reason="figures need matplotlib")
    again = run("evaluate.py", "--table", "all.json", "--plot", "figures")
    assert again in out and (tmp_path / "figures/alignment.png").is_file() and (tmp_path / "figures/stage1.png").is_file()
    assert set(results[0]["rec"]) == {"sequential", "straightforward"} and results[0]["llm_frozen"] and results[0]["filtered"]
    assert set(results[0]["controls"]) == set(results[0]["text_controls"]) == {"shuffled_cf", "zero_soft_tokens", "text_only"}
    run("train_stage2.py", "--steps", "1", "--batch-size", "2", "--mix", "0", "0", "1", "--text-fraction", "0.2", "--method", "mlp")
    assert "sequential" not in run("evaluate.py", "--run", "out/toy/mlp")  # what was not trained is not measured
    run("evaluate.py", "--table", "out/toy/mlp/metrics.json", "--plot", "texts")
    assert (tmp_path / "texts/budget.png").is_file() and not (tmp_path / "texts/stage1.png").exists()  # nor drawn
    assert run("ilm.py", "--run", "out/toy/ilm", "Describe {item:007}. {history:001,002} {user:3}").count("\n") == 1  # of 3 steps: or empty


def test_runs_of_other_settings_are_no_seeds_of_each_other():
    runs = [{"run": f"out/toy/{name}", "steps": steps, "lr": 1e-3} for name, steps in (("ilm-s0", 200), ("ilm-s1", 200), ("mlp", 200))]
    assert {k: len(v) for k, v in tables.by_method(runs, lambda r: r["steps"]).items()} == {"ilm": 2, "mlp": 1}
    runs.append({"run": "out/toy/ilm", "steps": 600, "lr": 1e-3})
    assert set(tables.by_method(runs, lambda r: r["steps"])) == {"ilm-s0", "ilm-s1", "ilm", "mlp"}


def test_other_held_out_items_are_refused(script, work, tmp_path):
    """The same data prepared under another name holds out other items: those that a run was trained on would be called new."""
    other = tmp_path / "other"
    assert script("data.py", "--max-users", 60, "--cf-dim", 8, "--out", other, cwd=work).returncode == 0
    done = script("evaluate.py", "--run", "train_stage2", "--data", other, *EVALUATE, cwd=work)
    assert done.returncode == 2 and "other items" in done.stderr


def test_nothing_to_evaluate(tmp_path, script):
    done = script("evaluate.py", cwd=tmp_path)
    assert done.returncode == 2 and "no runs in out/toy" in done.stderr and done.stderr.count("\n") == 1
