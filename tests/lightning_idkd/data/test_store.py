"""The sets that nodes train on, their batches, and the images that nodes predict on."""

import numpy as np
import pytest
import torch
from small_stores import DISTILLED, MANY, TRAIN, VALIDATION, K, noise, numbered_store, numbers, of, soft, store, tuned

from lightning_idkd.data.images import Images
from lightning_idkd.data.store import EVALUATION_BATCH, match_classes
from lightning_idkd.errors import UserError
from lightning_idkd.labels import FineTuning, Labels


@pytest.mark.parametrize(("batch", "steps"), [(1, 5), (2, 3), (4, 2), (5, 1), (100, 1)])
def test_an_epoch_has_all_samples_over_nodes_and_batch_rounded_up(batch, steps):
    """15 training samples on 3 nodes."""
    assert store(batch=batch).steps() == steps


def test_an_epoch_may_follow_a_mean_size():
    s = store(batch=4)
    assert [s.steps(m) for m in (8.0, 8.1, 20 / 3, 12.000000000001)] == [2, 3, 2, 3]


# ---------------------------------------------------------------------- batches


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


def test_a_share_of_a_batch_of_one_is_refused():
    with pytest.raises(
        UserError, match=r"distillation\.tuning\.private_share: 0\.5 given; allowed: null where train\.batch_size is 1"
    ):
        store(batch=1, tuning=FineTuning(private_share=0.5))


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
    given = Labels(
        torch.arange(2), torch.stack([torch.eye(K, dtype=torch.float64)[1], torch.full((K,), 1 / K).double()])
    )
    s = tuned([given, soft(), soft()], confidence=True)
    np.testing.assert_allclose(of(s, 0)[5:], [[0, 1, 0], [0, 0, 0]], atol=1e-15)


def test_temperatures_are_those_of_distilled_samples():
    s = store(public=noise(20, seed=1), tuning=FineTuning(temperature=4.0))
    positions = torch.tensor([[0, 4, 5, 14], [0, 2, 3, 15], [6, 7, 8, 0]])
    assert len(s.batch(positions % 3, 0)) == 2  # nothing is distilled yet
    s.distil(MANY, 0)
    _, _, counts, private, temperature = s.batch(positions, 0)
    assert temperature.tolist() == [[1, 1, 4, 4], [1, 1, 4, 4], [1, 4, 4, 1]]
    assert torch.equal(private, temperature == 1)
    assert counts.tolist() == [np.bincount(np.array(own) % K, minlength=K).tolist() for own in TRAIN]
    assert temperature.dtype == torch.float64
    assert len(tuned().batch(positions, 0)) == 2


def test_a_loss_of_its_own_gets_counts_and_the_mask_of_private_samples_from_the_first_step():
    s = store(public=noise(20, seed=1), plain_loss=False)
    positions = torch.tensor([[0, 4, 5, 14], [0, 2, 3, 15], [6, 7, 8, 0]])
    _, _, counts, private, temperature = s.batch(positions % 3, 0)
    assert counts.dtype == torch.float64
    assert counts.tolist() == [np.bincount(np.array(own) % K, minlength=K).tolist() for own in TRAIN]
    assert private.all()
    assert (temperature == 1).all()
    s.distil(MANY, 0)
    assert s.batch(positions, 0)[3].tolist() == [[p < len(own) for p in row] for own, row in
                                                 zip(TRAIN, positions.tolist(), strict=True)]  # fmt: skip


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
    fresh.restore(s.distilled, s.soft_targets, s.generation, s.generation_start)
    assert (fresh.generation, fresh.generation_start) == (2, 9)
    order = s.order(9, 12)
    assert torch.equal(fresh.order(9, 12), order)
    for a, b in zip(s.batch(order, 9), fresh.batch(order, 9), strict=True):
        assert torch.equal(a, b)


# ---------------------------------------------------------------------- images that nodes predict on


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
    batches, labels = s.evaluation_set(split, None)
    for _ in range(2):  # one asks several times, once a node
        found = torch.cat([numbers(s, b) for b in batches()])
        assert set(found.tolist()) == everything
        assert len(found) == len(everything)
        assert torch.equal(found % K, labels)
    few, few_labels = s.evaluation_set(split, 2)
    assert torch.equal(numbers(s, torch.cat(list(few()))), found[:2])
    assert torch.equal(few_labels, labels[:2])


def test_samples_of_the_test_set_are_not_its_first_ones():
    """Test sets are often sorted by class."""
    s = numbered_store()
    batches, _ = s.evaluation_set("test", 50)
    found = numbers(s, torch.cat(list(batches())))
    assert found.max() > 1200
    assert len(found) == 50


@pytest.mark.parametrize("channels", [1, 3])
def test_batches_lie_channels_last_in_their_strides(channels):
    """Of a single channel every layout is contiguous, and torch's kernels go by the strides."""
    grey = noise(18, channels=channels)
    s = store(grey, grey)
    for batches in (s.evaluation_set("test", None)[0](), s.public_batches()):
        assert next(batches).stride()[1:] == (1, 8 * channels, channels)


def test_public_classes_are_matched_by_name():
    public = Images(torch.zeros(5, 1, 2, 2, dtype=torch.uint8), torch.tensor([0, 1, 2, -1, 9]), ("c", "z", "a"))
    assert match_classes(public, ("a", "b", "c")).tolist() == [2, -1, 0, -1, -1]
    assert match_classes(None, ("a", "b")).shape == (0,)
