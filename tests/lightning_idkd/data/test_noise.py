"""Noise: its moments against their closed forms, and which image depends on what."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lightning_idkd.config.parse import configure
from lightning_idkd.data.noise import Noise
from lightning_idkd.errors import UserError

KINDS = ["uniform", "gaussian"]
every_kind = pytest.mark.parametrize("kind", KINDS)


def probabilities(kind):
    """Of the levels 0..255."""
    if kind == "uniform":
        return np.full(256, 1 / 256)
    edges = [-math.inf, *(level + 0.5 for level in range(255)), math.inf]
    below = np.array([0.5 * math.erfc(-(edge - 127.5) / (64 * math.sqrt(2))) for edge in edges])
    return np.diff(below)


def load(kind, samples=200, size=None, channels=None, **arguments):
    return Noise(kind, samples, **arguments).load("train", size, channels, key="data.public")


@every_kind
@pytest.mark.parametrize("channels", [None, 1, 3])
def test_every_level_is_as_frequent_as_its_probability(kind, channels):
    pixels, p, level = load(kind, channels=channels).pixels, probabilities(kind), np.arange(256)
    mean = p @ level
    deviation = math.sqrt(p @ level**2 - mean**2)
    assert mean == pytest.approx(127.5)
    n = pixels.numel()
    assert pixels.double().mean() == pytest.approx(127.5, abs=4 * deviation / math.sqrt(n))
    assert pixels.double().std() == pytest.approx(deviation, rel=0.01)
    found = pixels.flatten().bincount(minlength=256).numpy()
    chi_square = ((found - n * p) ** 2 / (n * p)).sum()
    assert abs(chi_square - 255) < 4 * math.sqrt(2 * 255)


@every_kind
def test_pixels_and_channels_are_independent(kind):
    pixels = load(kind, 500, 8).pixels.double() - 127.5
    variance, bound = pixels.square().mean(), 4 / math.sqrt(pixels[..., 1:].numel())
    for product in (pixels[..., 1:] * pixels[..., :-1], pixels[:, 1:] * pixels[:, :-1], pixels[1:] * pixels[:-1]):
        assert abs(product.mean() / variance) < bound * 1.5


@every_kind
def test_image_i_is_the_same_in_every_set(kind):
    few, many = load(kind, 5), load(kind, 50)
    assert torch.equal(few.pixels, many.pixels[:5])
    assert torch.equal(load(kind, 50).pixels, many.pixels)
    assert torch.equal(load(kind, 5, channels=1).pixels, load(kind, 50, channels=1).pixels[:5])


def test_the_kinds_differ():
    assert (load("uniform").pixels == load("gaussian").pixels).double().mean() < 0.02


@pytest.mark.parametrize(
    ("size", "channels", "shape"), [(None, None, (3, 32, 32)), (8, 1, (1, 8, 8)), (48, 3, (3, 48, 48))]
)
def test_images_have_the_size_and_channels_asked_for_and_no_labels(size, channels, shape):
    images = load("uniform", 3, size, channels)
    assert images.pixels.shape == (3, *shape)
    assert images.stored == f"{shape[1]}x{shape[1]} {'grey' if channels == 1 else 'RGB'}"
    assert images.pixels.is_contiguous()
    assert images.pixels.dtype == torch.uint8
    assert (images.labels.tolist(), images.classes) == ([-1] * 3, ())
    assert len(load("uniform", 9, size, channels, limit=4)) == 4


def test_noise_has_no_test_split_and_no_classes():
    with pytest.raises(UserError, match=r"^data\.private: Noise is a public set"):
        Noise().load("test")
    with pytest.raises(UserError, match=r"^data\.public\.classes: this set has no class 'a'\. It has: no labels"):
        load("uniform", classes=["a"])


@pytest.mark.parametrize(("arguments", "said"), [
    ({"samples": 0}, r"samples: 0 given; allowed: 1 or more"),
    ({"kind": "gausian"}, r"kind: gausian given; allowed: uniform or gaussian"),
])  # fmt: skip
def test_wrong_values_are_refused(arguments, said):
    with pytest.raises(UserError, match=rf"^data\.public\.{said}"):
        Noise(**arguments).load("train", key="data.public")


def test_noise_is_chosen_on_the_command_line():
    config = configure(["--data.private", "Digits", "--data.public", "Noise", "--data.public.kind", "gaussian"])
    assert config.data.public == Noise("gaussian")
