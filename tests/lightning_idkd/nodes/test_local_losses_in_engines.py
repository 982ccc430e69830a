"""Losses of private samples under autocast, in every engine on the CPU (compile: in test_stack)."""

import pytest
import torch
from test_stack import K, N, batch, every_engine, spread, stack

from lightning_idkd.callbacks import (
    BalancedSoftmax,
    CalibratedLogits,
    CentredLogits,
    Focal,
    LabelSmoothing,
    RestrictedSoftmax,
)

LOSSES = [
    BalancedSoftmax(1.0),
    CalibratedLogits(0.5),
    CentredLogits(0.5),
    RestrictedSoftmax(0.5),
    LabelSmoothing(0.1),
    Focal(2.0),
]


def lossy(loss, engine):
    return spread(stack("group norm", engine, torch.float32, loss=loss))


def labelled(dtype):
    """Images [n, b, C, S, S], soft targets, counts with classes that are missing, a mask, and temperatures."""
    x, y = batch(dtype=dtype)
    counts = torch.randint(0, 9, (N, K), generator=torch.Generator().manual_seed(3)).to(dtype)
    private = torch.arange(x.shape[1]).expand(N, -1) % 3 != 2
    return x, y, 0, counts, private, torch.ones(private.shape, dtype=dtype).where(private, 2.0)


@every_engine
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
def test_autocast_changes_a_local_loss_by_rounding_alone(engine, loss):
    plain, cast = (lossy(loss, engine) for _ in range(2))
    cast.autocast = True
    given = labelled(torch.float32)
    losses = cast.step(*given)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, plain.step(*given), rtol=0.03, atol=0)
    assert not torch.equal(cast.G, plain.G)
    assert (cast.G - plain.G).norm() < 0.3 * plain.G.norm()
