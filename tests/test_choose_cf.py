"""CF settings are chosen on validation: by MF's own NDCG@10, never on test, the smallest E first."""

import numpy as np
import pytest
import torch

from assets.plumbing import choose_cf as chooser
from assets.plumbing.cf import CFSettings
from assets.plumbing.choose_cf import candidates, choose_cf, ndcg_at_10, some_users
from assets.toy_world import toy_interactions, toy_world


@pytest.fixture(scope="module")
def log():
    """The sequences of 80 toy users: where each begins, and items (nnz,)."""
    users, items, times = toy_interactions(toy_world(0), 80, seed=0)
    order = np.lexsort((times, users))
    users, items = users[order], items[order].astype(int) - 1
    return np.concatenate([[0], np.bincount(users).cumsum()]), items


@pytest.fixture()
def small_grid(monkeypatch):
    monkeypatch.setattr(chooser, "WIDTHS", (4, 12))
    monkeypatch.setattr(chooser, "RECENCIES", (1.0, 0.9, 0.5))
    monkeypatch.setattr(chooser, "RIDGES", ((1.0, 0.0), (0.003, 0.1)))


def test_ndcg_by_hand():
    """Three users; the histories' items are out, the target never, ties count against it."""
    scores = torch.tensor([[9.0, 5, 7, 1], [2, 2, 2, 1], [3, 4, 5, 6]])
    targets = torch.tensor([1, 0, 3])
    found = ndcg_at_10(scores, targets, [np.array([0]), np.array([], dtype=int), np.array([3])])
    # rank 2 behind item 2; rank 3 behind two equal ones; rank 1, though part of the history
    torch.testing.assert_close(found, 1 / torch.log2(torch.tensor([3.0, 4.0, 2.0])))


def test_ndcg_is_zero_beyond_the_tenth_place():
    scores = torch.arange(12.0)[None].repeat(2, 1)
    found = ndcg_at_10(scores, torch.tensor([2, 1]), [np.array([], dtype=int)] * 2)
    torch.testing.assert_close(found, torch.tensor([1 / np.log2(11), 0.0], dtype=torch.float))


def test_test_items_have_no_say_in_the_choice(log, small_grid):
    indptr, items = log
    others = items.copy()
    others[indptr[1:] - 1] = np.roll(items[indptr[1:] - 1], 7)
    assert (others != items).sum() > 60
    first, second = (choose_cf(indptr, x, 120) for x in (items, others))
    assert first == second


def test_validation_items_have_a_say_in_the_choice(log, small_grid):
    indptr, items = log
    others = items.copy()
    others[indptr[1:] - 2] = np.roll(items[indptr[1:] - 2], 7)
    first, second = (choose_cf(indptr, x, 120) for x in (items, others))
    assert first[1]["valid_NDCG@10"] != second[1]["valid_NDCG@10"]


def test_the_choice_is_a_function_of_the_seed(log, small_grid):
    assert choose_cf(*log, 120) == choose_cf(*log, 120)


def test_flags_leave_nothing_to_choose(log):
    found, measured = choose_cf(*log, 120, {"dim": 5, "recency": 0.6, "reg": 0.02, "a0": 0.2})
    assert found == CFSettings(dim=5, alpha=2.0, reg=0.02, a0=0.2, recency=0.6)
    assert set(measured) == {"valid_NDCG@10", "se", "train_NDCG@10"}


@pytest.mark.parametrize(
    "given, widths, ridges, recencies",
    [
        ({}, 3, 4, 8),
        ({"dim": 9}, 1, 4, 8),
        ({"recency": 1.0}, 3, 4, 1),
        ({"reg": 0.5}, 3, 1, 8),
        ({"dim": 9, "reg": 0.5, "a0": 0.1, "recency": 0.3}, 1, 1, 1),
    ],
)
def test_what_a_flag_fixes_has_one_value(given, widths, ridges, recencies):
    assert [*map(len, candidates(10_000, **given))] == [widths, ridges, recencies]


def test_a_small_catalogue_tries_no_wide_vectors():
    assert candidates(120)[0] == (24,)
    assert candidates(130)[0] == (24, 64)
    assert candidates(12)[0] == (24,)


@pytest.fixture()
def staged(log, monkeypatch):
    """staged(ndcg of E 4, of E 12) -> the E that is chosen, whatever the data say. Of each setting
    half of the users have an NDCG .1 above its mean, half .1 below: its standard error is .0112."""
    monkeypatch.setattr(chooser, "WIDTHS", (4, 12))

    def choose(small, large):
        def told(scores, targets, histories):
            mean = {4: small, 12: large}[told.width]
            return mean + 0.1 * (1 - 2 * (torch.arange(len(targets)) % 2))

        def trained(users, items, num_users, num_items, settings, *rest):
            told.width = settings.dim
            return torch.randn(num_items, settings.dim)

        monkeypatch.setattr(chooser, "ndcg_at_10", told)
        monkeypatch.setattr(chooser, "train_cf", trained)
        return choose_cf(*log, 120, {"recency": 0.9, "reg": 1.0})[0].dim

    return choose


def test_within_one_standard_error_the_smaller_width_wins(staged):
    assert staged(0.300, 0.305) == 4


def test_beyond_one_standard_error_the_better_width_wins(staged):
    assert staged(0.300, 0.320) == 12


def test_a_better_small_width_wins(staged):
    assert staged(0.320, 0.300) == 4


def test_the_search_trains_on_whole_users_up_to_a_limit(log):
    indptr, items = log
    users = np.repeat(np.arange(80), np.diff(indptr))
    kept, chosen = some_users(users, items, 500, seed=0)
    assert 400 < len(kept) <= 500
    for user in np.unique(kept):
        assert chosen[kept == user].tolist() == items[indptr[user] : indptr[user + 1]].tolist()
    everything = some_users(users, items, len(users), seed=0)
    assert everything[0] is users and everything[1] is items


def test_nobody_to_validate_on_is_no_obstacle():
    """Two users of two interactions."""
    found, measured = choose_cf(np.array([0, 2, 4]), np.array([0, 1, 1, 2]), 3)
    assert found.dim == 24 and measured == {}


def test_one_user_to_validate_on_is_enough(log, small_grid):
    """There is no standard error of one; the best wins."""
    indptr, items = log
    found, measured = choose_cf(indptr[:2], items[: indptr[1]], 120)
    assert found.dim in (4, 12) and measured["se"] == 0


def test_the_table_says_what_was_chosen(log, small_grid, capsys):
    found, measured = choose_cf(*log, 120)
    printed = capsys.readouterr().out
    assert printed.count("\n  E ") == 2
    row = next(line for line in printed.splitlines() if line.endswith("<- chosen"))
    assert f"E {found.dim:4} " in row
    assert f"{measured['valid_NDCG@10']:.4f} with recency {found.recency:4.2f}" in row


def test_vectors_of_another_engine_keep_their_width(log, small_grid):
    vectors = torch.randn(120, 7, generator=torch.Generator().manual_seed(0))
    found, _ = choose_cf(*log, 120, item_cf=vectors)
    assert found.dim == 7
