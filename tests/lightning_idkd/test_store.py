"""What the nodes train on and in which order, augmentation, and what they are asked about."""

import numpy as np
import pytest
import torch

from lightning_idkd import randomness
from lightning_idkd.data.images import Images
from lightning_idkd.data.partition import Split
from lightning_idkd.data.store import EVALUATION_BATCH, Store, same_named
from lightning_idkd.errors import UserError
from lightning_idkd.labels import FineTuning, Labels

K = 3
TRAIN = [[0, 3, 4, 7, 10], [1, 2, 9], [5, 11, 12, 13, 14, 15, 16]]
VALIDATION = [[6], [], [8, 17]]


def noise(count, size=8, channels=3, seed=0, labels=None):
    g = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (count, channels, size, size), dtype=torch.uint8, generator=g)
    return Images(pixels, torch.arange(count) % K if labels is None else labels, ("a", "b", "c"))


def numbered(count, first):
    """Images whose two channels spell their number."""
    number = torch.arange(first, first + count)
    pixels = torch.stack([number // 200, number % 200], 1)[:, :, None, None].expand(-1, -1, 4, 4)
    return Images(pixels.to(torch.uint8).contiguous(), number % K, ("a", "b", "c"))


def numbers(store, x):
    """The numbers that normalised `numbered` images spell."""
    raw = x * store.std[:, None, None] + store.mean[:, None, None]
    assert (raw - raw.round()).abs().max() < 1e-3
    raw = raw.round().long()
    assert (raw == raw[..., :1, :1]).all()
    return raw[..., 0, 0, 0] * 200 + raw[..., 1, 0, 0]


def split():
    train, validation = ([np.array(i, dtype=np.int64) for i in part] for part in (TRAIN, VALIDATION))
    return Split(train, validation, "", np.zeros((3, K), np.int64), "IID", None)


def store(private=None, public=None, rows=range(3), batch=4, **options):
    options = {"dtype": torch.float64} | options
    private = noise(18) if private is None else private
    return Store(private, noise(5, private.size, private.channels, 2), public, split(), rows, batch=batch, **options)


def numbered_store(seed=0):
    private, test, public = numbered(18, 0), numbered(310, 1000), numbered(300, 500)
    return Store(private, test, public, split(), range(3), batch=4, seed=seed, dtype=torch.float64)


def soft(*indices):
    """Labels of these public samples."""
    p = torch.rand(len(indices), K, generator=torch.Generator().manual_seed(len(indices)), dtype=torch.float64)
    return Labels(torch.tensor(indices, dtype=torch.int64), p.softmax(1))


DISTILLED = [soft(0, 7, 19), soft(), soft(3, 4)]
MANY = [soft(*range(0, 20, 2)), soft(*range(13)), soft(1, 5)]


# ---------------------------------------------------------------------- order


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
    assert [sorted(walk[:size].tolist()) for walk, size in zip(order, s.sizes, strict=True)] == [list(range(n)) for n in s.sizes]
    assert torch.equal(s.order(8, 7), order[:, 8:])
    middle = order[1]
    s.distil(DISTILLED, step=6)
    assert not torch.equal(s.order(6, 9)[1], middle)  # the next exchange draws anew, also where the size stays


@pytest.mark.parametrize(("batch", "steps"), [(1, 5), (2, 3), (4, 2), (5, 1), (100, 1)])
def test_an_epoch_has_all_samples_over_nodes_and_batch_rounded_up(batch, steps):
    """15 training samples on 3 nodes."""
    assert store(batch=batch).steps() == steps


def test_an_epoch_may_follow_a_mean_size():
    s = store(batch=4)
    assert [s.steps(m) for m in (8.0, 8.1, 20 / 3, 12.000000000001)] == [2, 3, 2, 3]


# ---------------------------------------------------------------------- batches


def test_pixels_have_mean_zero_and_deviation_one_over_the_training_samples():
    private = noise(18)
    private.pixels[[6, 8, 17]] = 255  # held out: must not count
    private.pixels[:, 2] = 9
    s = store(private)
    train = private.pixels[[i for t in TRAIN for i in t]].double().numpy()
    np.testing.assert_allclose(s.mean, train.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(s.std[:2], train[:, :2].std((0, 2, 3)), rtol=1e-12)
    assert s.std[2] > 0  # a flat channel divides by no zero
    x, _ = s.batch(torch.tensor([[0], [2], [6]]), 0)
    expected = (private.pixels[[0, 9, 16]].double() - s.mean[:, None, None]) / s.std[:, None, None]
    np.testing.assert_allclose(x[:, 0], expected, rtol=1e-12)
    assert (x[:, :, 2] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_batches_are_channels_last_with_one_hot_targets(dtype):
    s = store(dtype=dtype)
    positions = torch.tensor([[4, 0, 0, 1], [2, 1, 0, 2], [0, 6, 5, 3]])
    x, y = s.batch(positions, 0)
    assert x.shape == (3, 4, 3, 8, 8)
    assert x.dtype == y.dtype == dtype
    assert all(part.is_contiguous(memory_format=torch.channels_last) for part in x)
    samples = [[TRAIN[i][p] for p in row] for i, row in enumerate(positions.tolist())]
    assert y.tolist() == [[[float(sample % K == c) for c in range(K)] for sample in row] for row in samples]


def test_a_nodes_samples_do_not_depend_on_who_else_is_here():
    positions = torch.tensor([[4, 0, 0, 1], [2, 1, 0, 2], [0, 6, 5, 3]])
    options = {"augment": "crop_flip", "public": noise(20, seed=1), "augment_public": True}
    all_, two = store(**options), store(rows=range(1, 3), **options)
    all_.distil(DISTILLED, 0)
    two.distil(DISTILLED[1:], 0)
    for a, b in zip(all_.batch(positions, 5), two.batch(positions[1:], 5), strict=True):
        assert torch.equal(a[1:], b)


def test_a_nodes_set_is_its_own_samples_and_the_distilled_public_ones():
    s = numbered_store()
    s.distil(DISTILLED, 0)
    assert s.sizes == [8, 3, 9]
    for own, labels, i, size in zip(TRAIN, DISTILLED, range(3), s.sizes, strict=True):
        positions = torch.zeros(3, size, dtype=torch.int64)
        positions[i] = torch.arange(size)
        x, y = s.batch(positions, 0)
        assert numbers(s, x[i]).tolist() == own + (500 + labels.index).tolist()
        assert y[i, : len(own)].tolist() == [[float(sample % K == c) for c in range(K)] for sample in own]
        assert torch.equal(y[i, len(own) :], labels.probabilities)
    s.distil([soft(1), soft(2), soft()], 3)  # the next exchange replaces the last
    assert s.sizes == [6, 4, 7]


def test_training_walks_through_the_distilled_samples():
    s = numbered_store()
    s.distil(DISTILLED, 0)
    x, _ = s.batch(s.order(0, 2), 0)
    assert set(numbers(s, x[0]).tolist()) == {*TRAIN[0], 500, 507, 519}


def test_labels_of_public_and_held_out_samples_never_enter_training():
    garbage = torch.full((20,), 10**9)
    clean = [store(public=noise(20, seed=1, labels=labels)) for labels in (None, garbage)]
    for s in clean:
        s.distil(DISTILLED, 0)
    for a, b in zip(*(s.batch(s.order(0, 6), 0) for s in clean), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(*(s.mass() for s in clean))
    assert all(torch.equal(a, b) for a, b in zip(*(s.public_batches() for s in clean), strict=True))
    private = noise(18)
    private.labels[[6, 8, 17]] = 10**9
    assert torch.equal(store(private).batch(store().order(0, 6), 0)[1], store().batch(store().order(0, 6), 0)[1])


def test_label_mass_counts_soft_labels_by_their_probabilities():
    s = store(public=noise(20, seed=1))
    own = torch.tensor([[2, 3, 0], [1, 1, 1], [2, 2, 3]], dtype=torch.float64)  # of TRAIN modulo 3
    assert s.mass().tolist() == own.tolist()
    s.distil(DISTILLED, 0)
    np.testing.assert_allclose(s.mass(), own + torch.stack([d.probabilities.sum(0) for d in DISTILLED]), rtol=1e-12)


# ---------------------------------------------------------------------- fine-tuning


def tuned(distilled=MANY, batch=4, seed=0, **tuning):
    """Nodes that train on 20 public samples under ``tuning``."""
    s = store(public=noise(20, seed=1), tuning=FineTuning(**tuning), batch=batch, seed=seed)
    s.distil(distilled, step=0)
    return s


def of(s, i):
    """Targets [size, K], times weights, of all that node ``i`` trains on."""
    positions = torch.zeros(3, s.sizes[i], dtype=torch.int64)
    positions[i] = torch.arange(s.sizes[i])
    return s.batch(positions, 0)[1][i]


def hard(counts):
    """Labels of so many samples of each class, not quite sure, in an order of their own."""
    classes = torch.arange(K).repeat_interleave(torch.tensor(counts))
    classes = classes[torch.randperm(len(classes), generator=torch.Generator().manual_seed(len(classes)))]
    return Labels(torch.arange(len(classes)), (5 * torch.eye(K, dtype=torch.float64)[classes]).softmax(1))


def classes_of(labels):
    return np.bincount(labels.argmax(1).numpy(), minlength=K).tolist()


@pytest.mark.parametrize(("share", "batch", "private"), [(0.5, 4, 2), (0.3, 10, 3), (0.26, 10, 3), (0.99, 4, 3), (0.01, 4, 1),
                                                         (0.5, 2, 1), (0.75, 4, 3)])  # fmt: skip
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


def test_without_distilled_samples_the_share_is_no_matter():
    s, plain = (store(public=noise(20, seed=1), tuning=t) for t in (FineTuning(private_share=0.5), None))
    assert torch.equal(s.order(0, 9), plain.order(0, 9))
    for both in (s, plain):
        both.distil([soft(), MANY[1], soft()], 0)
    assert torch.equal(s.order(0, 9)[[0, 2]], plain.order(0, 9)[[0, 2]])
    assert not torch.equal(s.order(0, 9)[1], plain.order(0, 9)[1])


def test_a_share_of_a_batch_of_one_is_refused():
    with pytest.raises(
        UserError, match=r"distillation\.tuning\.private_share: 0\.5 given; allowed: null where train\.batch_size is 1"
    ):
        store(batch=1, tuning=FineTuning(private_share=0.5))


@pytest.mark.parametrize(
    ("counts", "left"),
    [((9, 4, 2), (4, 4, 2)), ((5, 5, 5), (5, 5, 5)), ((12, 0, 3), (3, 0, 3)), ((0, 7, 0), (0, 7, 0)), ((0, 0, 0), (0, 0, 0)),
     ((1, 18, 1), (1, 1, 1))],
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
    part = Store(noise(18), noise(5), noise(20, seed=1), split(), range(1, 3), batch=4, tuning=FineTuning(balance="cap"))
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
            np.testing.assert_allclose(frequency[frequency > 0], p, rtol=0, atol=4 * np.sqrt(p * (1 - p) / part.numel()))


def test_before_an_exchange_samples_are_walked_not_drawn():
    s = store(public=noise(20, seed=1), tuning=FineTuning(balance="draw"))
    assert torch.equal(s.order(0, 9), store().order(0, 9))


@pytest.mark.parametrize(("weight", "confidence"), [(0.25, False), (3.0, False), (1.0, True), (0.5, True)])
def test_targets_of_distilled_samples_are_scaled_by_their_weight(weight, confidence):
    s, plain = tuned(weight=weight, confidence=confidence), tuned()
    for i, own in enumerate(map(len, TRAIN)):
        p = of(plain, i).numpy()
        scale = np.full(len(p), weight)
        if confidence:
            scale *= 1 + np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0).sum(1) / np.log(K)
        scale[:own] = 1
        np.testing.assert_allclose(of(s, i), p * scale[:, None], rtol=1e-12)
    assert torch.equal(s.mass(), plain.mass())  # homogeneity is that of the labels


def test_sure_labels_weigh_one_and_uniform_ones_nothing():
    given = Labels(torch.arange(2), torch.stack([torch.eye(K, dtype=torch.float64)[1], torch.full((K,), 1 / K).double()]))
    s = tuned([given, soft(), soft()], confidence=True)
    np.testing.assert_allclose(of(s, 0)[5:], [[0, 1, 0], [0, 0, 0]], atol=1e-15)


def test_temperatures_are_those_of_distilled_samples():
    s = store(public=noise(20, seed=1), tuning=FineTuning(temperature=4.0))
    positions = torch.tensor([[0, 4, 5, 14], [0, 2, 3, 15], [6, 7, 8, 0]])
    assert len(s.batch(positions % 3, 0)) == 2  # nothing is distilled yet
    s.distil(MANY, 0)
    _, _, temperature = s.batch(positions, 0)
    assert temperature.tolist() == [[1, 1, 4, 4], [1, 1, 4, 4], [1, 4, 4, 1]]
    assert temperature.dtype == torch.float64
    assert len(tuned().batch(positions, 0)) == 2


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_logit_adjustment_offsets_private_samples_by_the_log_of_their_nodes_label_frequencies(share):
    s = store(public=noise(20, seed=1), tuning=FineTuning(logit_adjustment=share))
    positions = torch.tensor([[0, 4, 5, 14], [0, 2, 3, 15], [6, 7, 8, 0]])
    assert len(s.batch(positions % 3, 0)) == 2  # nothing is distilled yet
    s.distil(MANY, 0)
    _, _, temperature, offset = s.batch(positions, 0)
    assert (temperature == 1).all()
    for i, own in enumerate(TRAIN):
        counts = np.bincount(np.array(own) % K, minlength=K) + 1
        expected = [share * np.log(counts / counts.sum()) if p < len(own) else np.zeros(K) for p in positions[i].tolist()]
        np.testing.assert_allclose(offset[i], expected, rtol=1e-12)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_answers_soften_the_labels_of_own_samples_alone(weight):
    s = store(public=noise(20, seed=1))
    order = s.order(2, 9)
    answers = [torch.rand(len(own), K, generator=torch.Generator().manual_seed(len(own))).softmax(1) for own in TRAIN]
    s.soften(answers, weight)
    for i, own in enumerate(TRAIN):
        expected = (1 - weight) * np.eye(K)[np.array(own) % K] + weight * answers[i].double().numpy()
        np.testing.assert_allclose(of(s, i), expected, rtol=1e-12)
    assert torch.equal(s.order(2, 9), order)
    assert s.sizes == [5, 3, 7]
    s.distil(MANY, 0)
    np.testing.assert_allclose(of(s, 2)[:7], expected, rtol=1e-12)
    assert torch.equal(of(s, 2)[7:], MANY[2].probabilities)


def test_restored_sets_are_those_that_were_saved():
    s, fresh = (store(public=noise(20, seed=1), tuning=FineTuning(0.5, "cap", 0.5, True, 2.0)) for _ in range(2))
    s.distil(DISTILLED, 3)
    s.soften([torch.full((len(own), K), 1 / K) for own in TRAIN], 0.4)
    s.distil(MANY, 9)
    fresh.restore(s.distilled, s.answers, s.generation, s.generation_start)
    assert (fresh.generation, fresh.generation_start) == (2, 9)
    order = s.order(9, 12)
    assert torch.equal(fresh.order(9, 12), order)
    for a, b in zip(s.batch(order, 9), fresh.batch(order, 9), strict=True):
        assert torch.equal(a, b)


# ---------------------------------------------------------------------- augmentation


def cropped(image, seed, node, step, place, flips):
    """One image [C, S, S]: padded by black, cropped, perhaps flipped, pixel by pixel."""
    channels, size, _ = image.shape
    pad = max(1, size // 8)
    dy, dx = (int(randomness.randint(2 * pad + 1, seed, which, node, step, place)) - pad for which in ("dy", "dx"))
    flip = flips and int(randomness.randint(2, seed, "flip", node, step, place)) == 1
    out = np.zeros((channels, size, size))
    for c in range(channels):
        for y in range(size):
            for x in range(size):
                v, u = y + dy, (size - 1 - x if flip else x) + dx
                out[c, y, x] = image[c, v, u] if 0 <= v < size and 0 <= u < size else 0
    return out, (dy, dx, flip)


@pytest.mark.parametrize("size", [4, 16])
@pytest.mark.parametrize("augment", ["crop", "crop_flip"])
def test_crops_and_flips_are_the_hashed_ones(size, augment):
    private, step, seed = noise(18, size, 2), 9, 5
    s = store(private, augment=augment, seed=seed, batch=6, rows=range(1, 3))
    positions = torch.tensor([[0, 1, 2, 2, 1, 0], [6, 5, 4, 3, 2, 1]])
    x, y = s.batch(positions, step)
    drawn = set()
    for i, node in enumerate((1, 2)):
        for place, p in enumerate(positions[i].tolist()):
            sample = TRAIN[node][p]
            expected, draw = cropped(private.pixels[sample].numpy(), seed, node, step, place, augment == "crop_flip")
            expected = (expected - s.mean[:, None, None].numpy()) / s.std[:, None, None].numpy()
            np.testing.assert_allclose(x[i, place], expected, rtol=1e-12)
            assert y[i, place].argmax() == sample % K
            drawn.add(draw)
    assert len(drawn) > 3
    assert {flip for *_, flip in drawn} == ({False, True} if augment == "crop_flip" else {False})
    assert not torch.equal(s.batch(positions, step + 1)[0], x)
    assert x[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("augment_public", [False, True])
def test_public_samples_are_augmented_only_where_asked(augment_public):
    public = noise(20, seed=1)
    plain, augmented = (store(public=public, augment=a, augment_public=augment_public) for a in ("none", "crop_flip"))
    for s in (plain, augmented):
        s.distil([soft(0, 7, 19), soft(1, 2, 5), soft(3, 4, 6)], 0)
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 0, 1, 3, 4, 5], [0, 1, 2, 3, 4, 7, 8, 9]])
    same = (plain.batch(positions, 0)[0] == augmented.batch(positions, 0)[0]).flatten(2).all(2)
    assert not same[:, :5].all()  # private ones
    assert same[:, 5:].all() == (not augment_public)


# ---------------------------------------------------------------------- what nodes are asked about


def test_public_batches_come_in_one_shuffled_order_whatever_the_seed():
    s = numbered_store()
    order = s.public_order()
    assert order.sort().values.tolist() == list(range(300))
    assert order.tolist() != list(range(300))
    batches = list(s.public_batches())
    assert [len(b) for b in batches] == [EVALUATION_BATCH, 300 - EVALUATION_BATCH]
    assert torch.equal(numbers(s, torch.cat(batches)), 500 + order)
    assert torch.equal(numbered_store(seed=4).public_order(), order)


def test_private_batches_and_held_out_samples_are_the_nodes_own():
    s = numbered_store()
    assert [s.held_out(i).tolist() for i in range(3)] == VALIDATION
    (batch,) = s.private_batches(s.held_out(2))
    assert numbers(s, batch).tolist() == VALIDATION[2]


@pytest.mark.parametrize(("split", "everything"), [("test", set(range(1000, 1310))), ("validation", {6, 8, 17})])
def test_examined_images_and_labels_belong_together(split, everything):
    s = numbered_store()
    batches, labels = s.examined(split, None)
    for _ in range(2):  # one asks several times, once a node
        found = torch.cat([numbers(s, b) for b in batches()])
        assert set(found.tolist()) == everything
        assert len(found) == len(everything)
        assert torch.equal(found % K, labels)
    few, few_labels = s.examined(split, 2)
    assert torch.equal(numbers(s, torch.cat(list(few()))), found[:2])
    assert torch.equal(few_labels, labels[:2])


def test_a_sample_of_the_test_set_is_no_prefix():
    """Test sets are often sorted by class."""
    s = numbered_store()
    batches, _ = s.examined("test", 50)
    found = numbers(s, torch.cat(list(batches())))
    assert found.max() > 1200
    assert len(found) == 50


def test_public_classes_are_matched_by_name():
    public = Images(torch.zeros(5, 1, 2, 2, dtype=torch.uint8), torch.tensor([0, 1, 2, -1, 9]), ("c", "z", "a"))
    assert same_named(public, ("a", "b", "c")).tolist() == [2, -1, 0, -1, -1]
    assert same_named(None, ("a", "b")).shape == (0,)
