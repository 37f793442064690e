"""assets/extras/sasrec.py: what a position sees, where it stands, what a window holds; it learns."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from assets.extras.sasrec import SASRec, Settings, epoch_windows, laid_out, train_sasrec, windows

SMALL = Settings(history=6, width=16, dropout=0.1, batch_targets=200)
NUM_ITEMS = 11


class Cycle:
    """Item k is followed by item k + 1; user u begins with item u."""

    items = range(NUM_ITEMS)

    def eligible(self):
        return np.arange(33)

    def items_of(self, user, split):
        return (np.arange({"train": 9, "valid": 9, "test": 10}[split]) + user) % NUM_ITEMS

    def share_right(self, score, split="valid"):
        users = self.eligible()
        following = [(self.items_of(user, split)[-1] + 1) % NUM_ITEMS for user in users]
        return float((score(users, split).argmax(1).numpy() == following).mean())


def a_model(**settings):
    torch.manual_seed(0)
    return SASRec(NUM_ITEMS, replace(SMALL, **settings)).eval()


@pytest.mark.parametrize("temperature", [0.0, 0.1])
def test_a_state_does_not_depend_on_later_items(temperature):
    model = a_model(temperature=temperature)
    ids = torch.randint(0, NUM_ITEMS, (3, 5), generator=torch.Generator().manual_seed(0))
    changed = ids.clone()
    changed[:, 3:] = (ids[:, 3:] + 4) % NUM_ITEMS
    before, after = model(ids), model(changed)
    assert torch.equal(before[:, :3], after[:, :3])
    assert ((before - after)[:, 3:].abs().amax(2) > 1e-3).all()


def test_padding_does_not_matter():
    model, pad = a_model(), NUM_ITEMS
    short = torch.tensor([[1, 4, 2]])
    padded = torch.tensor([[1, 4, 2, pad, pad], [5, 6, 7, 8, 9]])
    assert torch.allclose(model(short), model(padded)[:1, :3], atol=1e-6)


def test_positions_are_counted_from_the_last_item():
    model, met = a_model(), []
    model.positions.register_forward_hook(lambda _, inputs, __: met.extend(inputs))
    model(torch.tensor([[1, 4, 2, NUM_ITEMS], [5, 1, 4, 2]]))
    assert met[0][0, :3].tolist() == [3, 4, 5] and met[0][1].tolist() == [2, 3, 4, 5]


def test_windows_end_where_they_should_and_keep_the_newest():
    sequence, begin, end = laid_out([np.array([7, 8, 9]), np.array([1, 2, 3, 4, 5])])
    assert windows(sequence, begin, end, 4, NUM_ITEMS).tolist() == [
        [7, 8, 9, NUM_ITEMS],
        [2, 3, 4, 5],
    ]


def test_an_epoch_stays_within_users_and_reaches_every_item_but_their_first():
    sequence, begin, end = laid_out([100 * n + np.arange(n) for n in (1, 2, 7, 8, 40)])
    seen = set()
    for seed in range(30):
        starts, stops = epoch_windows(begin, end, 6, np.random.default_rng(seed))
        rows = windows(sequence, starts, stops, 7, 9999)
        for row, stop in zip(rows, stops):
            kept = row[row < 9999].numpy()
            assert len(kept) >= 2 and len({*(kept // 100)}) == 1 and kept[-1] == sequence[stop - 1]
            seen.update(kept[1:].tolist())
    assert seen == {*sequence[sequence % 100 > 0].tolist()}


@pytest.mark.parametrize("change", [{}, {"temperature": 0.0}])
def test_it_learns_what_follows_what(change):
    cycle = Cycle()
    score, report = train_sasrec(cycle, cycle.share_right, replace(SMALL, **change), epochs=50, patience=10)
    assert cycle.share_right(score) > 0.9  # chance: .09
    assert report["validation"] == cycle.share_right(score)  # the best epoch's weights are back
    assert cycle.share_right(score, "test") > 0.9


def test_a_row_is_asked_in_training_where_it_is_asked_at_test(monkeypatch):
    """At the last place, also where a batch has longer rows: its last item is padding there, for it has nothing to predict."""
    class Uneven(Cycle):
        def items_of(self, user, split):
            return super().items_of(user, split)[: 4 + user % 5]

    met = []
    forward = SASRec.forward
    monkeypatch.setattr(SASRec, "forward", lambda self, ids: met.append((ids, self.training)) or forward(self, ids))
    train_sasrec(Uneven(), lambda score: 0, SMALL, epochs=1)
    seen = [ids for ids, training in met if training]
    assert seen and all(len(set((ids != NUM_ITEMS).sum(1).tolist())) > 1 for ids in seen)  # rows of unequal length
    lengths = {length for ids in seen for length in (ids != NUM_ITEMS).sum(1).tolist()}
    assert lengths == {3, 4, 5, 6}  # histories of 4 to 8, less the item to be predicted, at most 6
