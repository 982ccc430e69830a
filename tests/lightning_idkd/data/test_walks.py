"""The order in which nodes walk their samples: permutations, private share, caps and balanced draws."""

import numpy as np
import pytest
import torch
from small_stores import DISTILLED, MANY, TRAIN, K, noise, of, soft, split, store, tuned

from lightning_idkd.data.store import Store
from lightning_idkd.labels import FineTuning, Labels


def test_each_pass_is_a_permutation_and_wraps_into_the_next():
    s = store()
    order = s.order(0, 14)  # 56 positions a node
    assert order.shape == (3, 56)
    for walk, size in zip(order, [5, 3, 7], strict=True):
        passes = [walk[i : i + size] for i in range(0, 56 - size + 1, size)]
        assert all(p.sort().values.tolist() == list(range(size)) for p in passes)
        assert len({tuple(p.tolist()) for p in passes}) > 1


def test_the_order_asked_for_later_is_the_same():
    s = store()
    order = s.order(0, 20)
    for step in (1, 5, 13):
        assert torch.equal(s.order(step, 20 - step), order[:, 4 * step :])
    assert torch.equal(store(rows=range(1, 3)).order(0, 20), order[1:])  # in another process
    assert not torch.equal(store(seed=1).order(0, 20), order)


def test_a_distilled_set_is_walked_from_its_first_step_on():
    s = store(public=noise(20, seed=1))
    s.distil(DISTILLED, step=6)
    assert s.sizes == [8, 3, 9]
    order = s.order(6, 9)  # 36 positions
    assert [sorted(walk[:size].tolist()) for walk, size in zip(order, s.sizes, strict=True)] == [
        list(range(n)) for n in s.sizes
    ]
    assert torch.equal(s.order(8, 7), order[:, 8:])
    middle = order[1]
    s.distil(DISTILLED, step=6)
    assert not torch.equal(s.order(6, 9)[1], middle)  # the next exchange draws anew, also where the size stays


def hard(counts):
    """Labels of ``counts`` samples of each class, in random order; the class has most, not all, of the probability."""
    classes = torch.arange(K).repeat_interleave(torch.tensor(counts))
    classes = classes[torch.randperm(len(classes), generator=torch.Generator().manual_seed(len(classes)))]
    return Labels(torch.arange(len(classes)), (5 * torch.eye(K, dtype=torch.float64)[classes]).softmax(1))


def classes_of(labels):
    return np.bincount(labels.argmax(1).numpy(), minlength=K).tolist()


@pytest.mark.parametrize(("share", "batch", "private"), [(0.5, 4, 2), (0.3, 10, 3), (0.26, 10, 3), (0.99, 4, 3),
                                                         (0.01, 4, 1), (0.5, 2, 1), (0.75, 4, 3)])  # fmt: skip
def test_every_batch_begins_with_the_private_share(share, batch, private):
    """Rounded, but at least one of each."""
    s = tuned(batch=batch, private_share=share)
    order = s.order(0, 30).view(3, 30, batch)
    for walk, own in zip(order, map(len, TRAIN), strict=True):
        assert (walk[:, :private] < own).all()
        assert (walk[:, private:] >= own).all()


def test_both_sets_are_walked_by_permutations_of_their_own():
    """5, 3 and 7 private samples, 10, 13 and 2 distilled ones; two of each in every batch."""
    s = tuned(private_share=0.5)
    order = s.order(0, 60).view(3, 60, 4)
    for i, (walk, own) in enumerate(zip(order, map(len, TRAIN), strict=True)):
        for part, size in ((walk[:, :2].flatten(), own), (walk[:, 2:].flatten() - own, len(MANY[i]))):
            passes = [part[a : a + size].tolist() for a in range(0, 120 - size + 1, size)]
            assert all(sorted(p) == list(range(size)) for p in passes)
            assert size < 4 or len({tuple(p) for p in passes}) > 1
    assert torch.equal(s.order(7, 20), order[:, 7:27].flatten(1))  # as asked later
    s.restore(MANY, None, 1, 0)
    assert torch.equal(s.order(7, 20), order[:, 7:27].flatten(1))
    s.distil(MANY, 7)
    assert not torch.equal(s.order(7, 20), order[:, :20].flatten(1))


@pytest.mark.parametrize("balance", ["none", "draw"])
def test_the_two_walks_do_not_go_hand_in_hand(balance):
    """Nor where both sets have the same size and classes."""
    own = [Labels(torch.arange(len(t)), torch.eye(K, dtype=torch.float64)[torch.tensor(t) % K]) for t in TRAIN]
    s = tuned(own, private_share=0.5, balance=balance)
    for walk, size in zip(s.order(0, 30).view(3, 30, 4), map(len, TRAIN), strict=True):
        same = walk[:, :2] == walk[:, 2:] - size
        assert 0.05 < same.double().mean() < 0.7


def test_without_distilled_samples_the_share_does_not_matter():
    s, plain = (store(public=noise(20, seed=1), tuning=t) for t in (FineTuning(private_share=0.5), None))
    assert torch.equal(s.order(0, 9), plain.order(0, 9))
    for both in (s, plain):
        both.distil([soft(), MANY[1], soft()], 0)
    assert torch.equal(s.order(0, 9)[[0, 2]], plain.order(0, 9)[[0, 2]])
    assert not torch.equal(s.order(0, 9)[1], plain.order(0, 9)[1])


@pytest.mark.parametrize(
    ("counts", "left"),
    [((9, 4, 2), (4, 4, 2)), ((5, 5, 5), (5, 5, 5)), ((12, 0, 3), (3, 0, 3)), ((0, 7, 0), (0, 7, 0)),
     ((0, 0, 0), (0, 0, 0)), ((1, 18, 1), (1, 1, 1))],
)  # fmt: skip
def test_a_cap_leaves_at_most_the_median_count_of_a_class(counts, left):
    """The lower one of two middle counts, of those that occur."""
    given = hard(counts)
    s = tuned([given, soft(), given], balance="cap")
    for i, own in ((0, TRAIN[0]), (2, TRAIN[2])):
        distilled = of(s, i)[len(own) :]
        assert classes_of(distilled) == list(left)
        assert all(any(torch.equal(row, p) for p in given.probabilities) for row in distilled)
    assert s.sizes == [5 + sum(left), 3, 7 + sum(left)]
    assert s.distilled[0] is given  # what is relayed and saved is whole
    assert s.mass()[0].tolist() == pytest.approx(of(s, 0).sum(0).tolist())


def test_what_the_cap_leaves_out_is_drawn_by_seed_node_and_exchange():
    given = hard((12, 2, 2))

    def left(s, i):
        """Where in the labels those of class 0 stood, by their place in the pool."""
        first = sum(s.sizes[:i]) + s.parts[i][0]
        return (s._index[first : first + s.parts[i][1]] - s.private).tolist()

    s, again, other = (
        tuned([given] * 3, balance="cap"),
        tuned([given] * 3, balance="cap"),
        tuned([given] * 3, balance="cap", seed=1),
    )
    assert [left(s, i) for i in range(3)] == [left(again, i) for i in range(3)]
    assert left(s, 0) == sorted(left(s, 0))
    assert left(s, 0) != left(s, 1)
    assert left(s, 0) != left(other, 0)
    part = Store(
        noise(18), noise(5), noise(20, seed=1), split(), range(1, 3), batch=4, tuning=FineTuning(balance="cap")
    )
    part.distil([given] * 2, 0)
    assert left(part, 0) == left(s, 1)  # in another process
    first = [left(s, i) for i in range(3)]
    s.distil([given] * 3, 5)
    assert [left(s, i) for i in range(3)] != first
    s.restore([given] * 3, None, 1, 0)
    assert [left(s, i) for i in range(3)] == first


def test_draws_take_every_class_equally_often_and_every_sample_of_a_class():
    """4000 draws a node: a class is off by less than four standard errors."""
    s = tuned([hard((14, 2, 1)), hard((1, 1, 18)), soft()], balance="draw")
    order = s.order(0, 1000)
    for i, walk in enumerate(order):
        targets = of(s, i)
        occurs = np.unique(targets.argmax(1))
        frequency = np.bincount(targets[walk].argmax(1), minlength=K) / 4000
        p = 1 / len(occurs)
        np.testing.assert_allclose(frequency[occurs], p, rtol=0, atol=4 * np.sqrt(p * (1 - p) / 4000))
        times = np.bincount(walk, minlength=s.sizes[i])
        size = np.bincount(targets.argmax(1), minlength=K)[targets.argmax(1)]  # of a sample's class
        expected = 4000 * p / size
        assert (abs(times - expected) < 5 * np.sqrt(expected)).all()
    assert torch.equal(s.order(300, 50), order[:, 1200:1400])
    s.restore(s.distilled, None, 1, 0)
    assert torch.equal(s.order(300, 50), order[:, 1200:1400])
    assert not torch.equal(tuned(s.distilled, balance="draw", seed=1).order(0, 1000), order)


def test_draws_keep_the_private_share_and_are_balanced_on_either_side():
    s = tuned([hard((14, 2, 1)), hard((1, 1, 18)), hard((3, 0, 9))], private_share=0.25, balance="draw")
    order = s.order(0, 3000).view(3, 3000, 4)
    for i, walk in enumerate(order):
        own, targets = len(TRAIN[i]), of(s, i)
        assert (walk[:, :1] < own).all()
        assert (walk[:, 1:] >= own).all()
        for part, side in ((walk[:, :1], targets[:own]), (walk[:, 1:], targets[own:])):
            p = 1 / len(np.unique(side.argmax(1)))
            frequency = np.bincount(targets[part.flatten()].argmax(1), minlength=K) / part.numel()
            np.testing.assert_allclose(
                frequency[frequency > 0], p, rtol=0, atol=4 * np.sqrt(p * (1 - p) / part.numel())
            )


def test_before_an_exchange_samples_are_walked_not_drawn():
    s = store(public=noise(20, seed=1), tuning=FineTuning(balance="draw"))
    assert torch.equal(s.order(0, 9), store().order(0, 9))
