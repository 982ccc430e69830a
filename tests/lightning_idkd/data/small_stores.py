"""Stores of three nodes with few images, for the tests of sets, orders and augmentation."""

import numpy as np
import torch

from lightning_idkd.data.images import Images
from lightning_idkd.data.partition import Split
from lightning_idkd.data.store import Store
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
    """The numbers that scaled `numbered` images spell."""
    raw = x * store.inputs.std[:, None, None] + store.inputs.mean[:, None, None]
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


def tuned(distilled=MANY, batch=4, seed=0, **tuning):
    """Nodes that train on 20 public samples under ``tuning``."""
    s = store(public=noise(20, seed=1), tuning=FineTuning(**tuning), batch=batch, seed=seed)
    s.distil(distilled, step=0)
    return s


def of(s, i):
    """Targets [size, K], times weights, of all samples that node ``i`` trains on."""
    positions = torch.zeros(3, s.sizes[i], dtype=torch.int64)
    positions[i] = torch.arange(s.sizes[i])
    return s.batch(positions, 0)[1][i]
