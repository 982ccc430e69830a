"""Random numbers as a pure function of (seed, purpose, counters): the same on CPU and GPU, in any order, in any
process.

Every counter (node, step, index, ...) is an integer or an int64 tensor; tensors broadcast. These functions keep no
state, so logging, evaluation, resuming and the number of processes do not change the numbers.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)  # constants of SplitMix64 (Steele et al., OOPSLA 2014), as signed 64-bit
_MIX1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX2 = 0x94D049BB133111EB - (1 << 64)


def _shift(z: Tensor, bits: int) -> Tensor:
    """Shift right without the sign, as a hash needs it; torch's ``>>`` keeps the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shift(z, 30)) * _MIX1
    z = (z ^ _shift(z, 27)) * _MIX2
    return z ^ _shift(z, 31)


def code(purpose: str) -> int:
    """Hash the name of a purpose to a 32-bit number."""
    return zlib.crc32(purpose.encode())


def bits(seed: int | Tensor, purpose: str | int, *counters: int | Tensor, device: torch.device | str = "cpu") -> Tensor:
    """64 hashed bits, as int64, for every combination of the broadcast counters.

    ``purpose`` is a name or its :func:`code`.
    """
    h = (
        seed.to(device, torch.int64)
        if isinstance(seed, Tensor)
        else torch.full((), int(seed), dtype=torch.int64, device=device)
    )
    for c in (code(purpose) if isinstance(purpose, str) else purpose, *counters):
        h = _mix((h + _GAMMA) ^ (c.to(device, torch.int64) if isinstance(c, Tensor) else int(c)))
    return h


def uniform(
    seed: int | Tensor, purpose: str | int, *counters: int | Tensor, device: torch.device | str = "cpu"
) -> Tensor:
    """Uniform numbers in [0, 1) with 24 random bits, float32."""
    return _shift(bits(seed, purpose, *counters, device=device), 40).to(torch.float32) * 2.0**-24


def randint(
    high: int, seed: int | Tensor, purpose: str, *counters: int | Tensor, device: torch.device | str = "cpu"
) -> Tensor:
    """Uniform integers in [0, high), int64."""
    return _shift(bits(seed, purpose, *counters, device=device), 1) % high


def permutation(n: int, seed: int, purpose: str, *counters: int, device: torch.device | str = "cpu") -> Tensor:
    """A random permutation of 0..n-1, int64 [n]."""
    index = torch.arange(n, device=device)
    return torch.argsort(bits(seed, purpose, *counters, index, device=device), stable=True)


def permutations(sizes: Tensor, seed: int, purpose: str, *counters: Tensor) -> list[Tensor]:
    """:func:`permutation` of ``sizes`` [p] samples for every entry of the ``counters`` [p], all at once."""
    which = torch.arange(len(sizes)).repeat_interleave(sizes)
    index = torch.arange(len(which)) - (sizes.cumsum(0) - sizes)[which]
    order = torch.argsort(bits(seed, purpose, *(c[which] for c in counters), index), stable=True)
    order = order[torch.argsort(which[order], stable=True)]
    return list(index[order].split(sizes.tolist()))


def derive_seed(seed: int, purpose: str, *counters: int) -> int:
    """A seed for code that has its own generator (numpy, weight initialisation)."""
    return int(_shift(bits(seed, purpose, *counters), 1))


@contextmanager
def fork_generators(seed: int, purpose: str, *counters: int) -> Iterator[None]:
    """Within the context torch's global generators are seeded from the hash; afterwards they are as before."""
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(seed, purpose, *counters))
        yield


class Dropout(nn.Module):
    """Dropout whose mask depends on ``key``, ``layer`` and the number of calls in the step.

    The engine sets ``key`` before every step from seed, node and step. This layer replaces ``torch.nn.Dropout`` in a
    node, so that the mask is the same for every engine and number of processes; a global generator cannot ensure that.
    """

    key: Tensor

    def __init__(self, p: float, layer: int):
        super().__init__()
        self.p, self.layer, self.calls, self.purpose = p, layer, 0, code("dropout")
        self.register_buffer("key", torch.zeros((), dtype=torch.int64), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0.0:
            return x
        index = torch.arange(x.numel(), device=x.device).view(x.shape)
        keep = uniform(self.key, self.purpose, self.layer, self.calls, index, device=x.device) >= self.p
        self.calls += 1  # a network may apply one layer twice in a pass
        return x * keep / (1.0 - self.p)


def replace_dropout(module: nn.Module) -> nn.Module:
    """Replace every ``torch.nn.Dropout`` in ``module`` by :class:`Dropout`, in place; returns the module."""
    layers = [
        (parent, name) for parent in module.modules() for name, m in parent.named_children() if type(m) is nn.Dropout
    ]
    for layer, (parent, name) in enumerate(layers):
        before = getattr(parent, name)
        setattr(parent, name, Dropout(before.p, layer).train(before.training))
    return module
