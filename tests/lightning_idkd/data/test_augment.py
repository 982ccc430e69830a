"""Scaling of pixels, random crops and flips."""

import numpy as np
import pytest
import torch
from small_stores import TRAIN, K, noise, soft, store

from lightning_idkd import randomness


def test_pixels_have_mean_zero_and_deviation_one_over_the_training_samples():
    private = noise(18)
    private.pixels[[6, 8, 17]] = 255  # held out: must not count
    private.pixels[:, 2] = 9
    s = store(private)
    train = private.pixels[[i for t in TRAIN for i in t]].double().numpy()
    np.testing.assert_allclose(s.inputs.mean, train.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(s.inputs.std[:2], train[:, :2].std((0, 2, 3)), rtol=1e-12)
    assert s.inputs.std[2] > 0  # a constant channel is not divided by zero
    x, _ = s.batch(torch.tensor([[0], [2], [6]]), 0)
    expected = (private.pixels[[0, 9, 16]].double() - s.inputs.mean[:, None, None]) / s.inputs.std[:, None, None]
    np.testing.assert_allclose(x[:, 0], expected, rtol=1e-12)
    assert (x[:, :, 2] == 0).all()


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
            expected = (expected - s.inputs.mean[:, None, None].numpy()) / s.inputs.std[:, None, None].numpy()
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
