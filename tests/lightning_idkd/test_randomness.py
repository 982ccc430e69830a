"""Hashed randomness: SplitMix64, uniformity, permutations, forked generators, keyed dropout."""

import zlib

import pytest
import torch
from torch import nn

from lightning_idkd import randomness
from lightning_idkd.randomness import (
    Dropout,
    bits,
    derive_seed,
    fork_generators,
    permutation,
    permutations,
    randint,
    replace_dropout,
    uniform,
)

MASK = (1 << 64) - 1


def splitmix(state):
    """The output function of SplitMix64 on unsigned integers, after its increment."""
    z = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ z >> 27) * 0x94D049BB133111EB & MASK
    return z ^ z >> 31


def hashed(seed, purpose, *counters):
    h = seed & MASK
    for c in (zlib.crc32(purpose.encode()), *counters):
        h = splitmix((h + 0x9E3779B97F4A7C15 & MASK) ^ (c & MASK))
    return h


def test_bits_without_counters_are_the_published_splitmix64_stream():
    """An empty purpose has CRC 0, so one hash is one draw; seed 1234567 is the usual test vector of SplitMix64."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423,
                 4593380528125082431, 16408922859458223821]  # fmt: skip
    gamma = 0x9E3779B97F4A7C15 - (1 << 64)
    states = 1234567 + torch.arange(5) * gamma
    assert [int(b) & MASK for b in bits(states, "")] == published


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, 123456789012345678])
def test_bits_agree_with_unbounded_integers(seed):
    for counters in [(), (0,), (1, 2), (-3, 2**62, 7)]:
        expected = hashed(seed, "order", *counters)
        assert int(bits(seed, "order", *counters)) & MASK == expected
        assert float(uniform(seed, "order", *counters)) == (expected >> 40) / 2**24
        assert int(randint(10, seed, "order", *counters)) == (expected >> 1) % 10
        assert derive_seed(seed, "order", *counters) == expected >> 1


def test_tensors_of_counters_broadcast_to_the_scalars():
    node, index = torch.arange(3)[:, None], torch.tensor([0, 5, 2**40, -1])
    table = bits(7, "crop", node, 11, index)
    assert table.shape == (3, 4)
    assert table.dtype == torch.int64
    assert table.tolist() == [[int(bits(7, "crop", i, 11, int(j))) for j in index] for i in range(3)]
    assert bits(torch.tensor([7, 8]), "crop", 1).tolist() == [int(bits(7, "crop", 1)), int(bits(8, "crop", 1))]


def test_every_argument_matters():
    variants = [(0, "a", 1, 2), (1, "a", 1, 2), (0, "b", 1, 2), (0, "a", 2, 1), (0, "a", 1), (0, "a", 1, 2, 0)]
    assert len({int(bits(*v)) for v in variants}) == len(variants)


def test_uniform_lies_in_the_unit_interval_and_is_flat():
    count = 160_000
    u = uniform(3, "flat", torch.arange(count))
    assert u.dtype == torch.float32
    assert u.min() >= 0
    assert u.max() < 1
    bins = torch.histc(u, 16, 0, 1)
    chi2 = float(((bins - count / 16) ** 2 / (count / 16)).sum())
    assert chi2 < 37.7  # the 0.999 quantile of chi-squared with 15 degrees of freedom
    neighbours = torch.corrcoef(torch.stack([u[1:], u[:-1]]))[0, 1]
    assert abs(float(neighbours)) < 4 / count**0.5


def test_uniform_never_rounds_up_to_one(monkeypatch):
    monkeypatch.setattr(randomness, "bits", lambda *a, **k: torch.tensor([-1, 0]))  # all 64 bits set, or none
    assert uniform(0, "edge").tolist() == [1 - 2**-24, 0.0]


def test_randint_covers_its_range_and_stays_in_it():
    draws = randint(5, 0, "die", torch.arange(10_000))
    counts = draws.bincount(minlength=5)
    assert len(counts) == 5
    assert (counts - 2000).abs().max() < 4 * (10_000 * 0.2 * 0.8) ** 0.5


def test_permutations_are_permutations_and_differ():
    first, again, other = (permutation(100, 0, "order", 4, p) for p in (0, 0, 1))
    assert first.sort().values.tolist() == list(range(100))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert permutation(1, 0, "order").tolist() == [0]
    assert permutation(0, 0, "order").tolist() == []
    # ordered as signed numbers
    assert first.tolist() == sorted(range(100), key=lambda i: (hashed(0, "order", 4, 0, i) + 2**63) % 2**64)


def test_forked_draws_depend_on_its_arguments_alone_and_leave_no_trace():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    with fork_generators(5, "initialisation", 2):
        first = torch.randn(4)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    with fork_generators(5, "initialisation", 2):
        again = torch.randn(4)
    with fork_generators(5, "initialisation", 3):
        other = torch.randn(4)
    with pytest.raises(ZeroDivisionError), fork_generators(5, "initialisation", 2):
        torch.randn(int(4 / 0))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_dropout_keeps_the_stated_share_and_the_mean():
    drop, x = Dropout(0.3, layer=0), torch.ones(100, 1000)
    kept = drop(x)
    assert set(kept.unique().tolist()) == {0.0, float(torch.tensor(1.0) / 0.7)}
    assert abs(float((kept > 0).double().mean()) - 0.7) < 4 * (0.3 * 0.7 / x.numel()) ** 0.5


def test_a_dropout_mask_depends_on_key_layer_call_and_place_only():
    x = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    drop, other_layer = Dropout(0.5, layer=0), Dropout(0.5, layer=1)

    def anew(x):
        drop.calls = 0
        return drop(x)

    first = drop(x)
    assert not torch.equal(drop(x), first)  # a second application in the same pass
    torch.manual_seed(99)
    assert torch.equal(anew(x), first)
    assert torch.equal(anew(2 * x), 2 * first)
    assert not torch.equal(other_layer(x), first)
    drop.key.fill_(1)
    assert not torch.equal(anew(x), first)
    keep = [uniform(1, "dropout", 0, 0, i) >= 0.5 for i in range(x.numel())]
    assert torch.equal(anew(x) != 0, torch.tensor(keep).view(8, 32))


def test_dropout_is_the_identity_in_evaluation_and_at_zero():
    x = torch.randn(3, 3)
    assert Dropout(0.5, layer=0).eval()(x) is x
    assert Dropout(0.0, layer=0)(x) is x


def test_replace_dropout_numbers_the_layers_and_keeps_everything_else():
    inner = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1))
    module = nn.Sequential(nn.Dropout(0.2), inner, nn.Dropout2d(0.4), nn.ReLU())
    assert replace_dropout(module) is module
    found = [m for m in module.modules() if isinstance(m, Dropout)]
    assert sorted(m.p for m in found) == [0.1, 0.2]
    assert sorted(m.layer for m in found) == [0, 1]
    assert not any(type(m) is nn.Dropout for m in module.modules())
    assert type(module[2]) is nn.Dropout2d
    assert isinstance(inner[0], nn.Linear)
    assert module.state_dict().keys() == {"1.0.weight", "1.0.bias"}  # the key is no state of the network


def test_permutations_at_once_are_those_one_by_one():
    sizes, node, count = torch.tensor([5, 1, 300, 5]), torch.tensor([0, 3, 1, 0]), torch.tensor([2, 0, 0, 3])
    found = permutations(sizes, 7, "order", node, count)
    for size, i, k, p in zip(sizes.tolist(), node.tolist(), count.tolist(), found, strict=True):
        assert torch.equal(p, permutation(size, 7, "order", i, k))
