"""The order of training samples."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from datasets import order
from datasets.order import EndlessOrder

counts, sizes = st.integers(1, 40), st.integers(1, 50)


@given(counts, sizes, st.integers(0, 2**63))
def test_every_epoch_shows_each_sample_once(count, batch_size, seed):
    endless = EndlessOrder(count, batch_size, seed)
    updates = -(-3 * count // batch_size)
    stream = np.concatenate([endless.indices(update, 0, batch_size) for update in range(updates)])
    for epoch in range(3):
        assert sorted(stream[epoch * count : (epoch + 1) * count]) == list(range(count))


@given(counts, sizes, st.data())
def test_any_division_of_a_batch_gives_the_same_samples(count, batch_size, data):
    endless, update = EndlessOrder(count, batch_size, 3), data.draw(st.integers(0, 10**6))
    cuts = sorted(data.draw(st.lists(st.integers(0, batch_size), max_size=4)))
    parts = [endless.indices(update, low, high) for low, high in zip([0, *cuts], [*cuts, batch_size], strict=True)]
    np.testing.assert_array_equal(np.concatenate(parts), endless.indices(update, 0, batch_size))


def test_a_resumed_run_sees_what_would_have_come():
    straight, resumed = EndlessOrder(100, 32, 1), EndlessOrder(100, 32, 1)
    expected = [straight.indices(update, 0, 32) for update in range(50)]
    np.testing.assert_array_equal(resumed.indices(49, 0, 32), expected[49])


def test_position_of_a_long_run_is_found_without_walking_there(monkeypatch):
    drawn, draw = [], order._permutation.__wrapped__
    monkeypatch.setattr(order, "_permutation", lambda *words: drawn.append(words) or draw(*words))
    EndlessOrder(1000, 128, 0).indices(10**9, 0, 128)
    assert len(drawn) <= 2  # at most the epochs that this batch touches


def test_epochs_and_seeds_have_different_orders():
    orders = [EndlessOrder(50, 50, seed).indices(epoch, 0, 50).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(map(tuple, orders))) == 4


def test_order_stays_the_same_across_versions():
    """A run that is resumed after an upgrade must go on with the same samples."""
    endless = EndlessOrder(10, 10, 42)
    assert endless.indices(0, 0, 10).tolist() == [3, 1, 7, 8, 6, 5, 9, 4, 0, 2]
    assert endless.indices(7, 0, 10).tolist() == [6, 2, 8, 7, 9, 1, 0, 5, 4, 3]
