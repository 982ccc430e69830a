"""How nodes train on private and distilled samples together."""

import copy
import math

import numpy as np
import pytest
import torch
from four_nodes import TRAIN, K, N, images, real_run, train

from lightning_idkd.callbacks import IDKD, MSP, Fixed, VanillaKD
from lightning_idkd.labels import FineTuning


@pytest.mark.parametrize("tuning", [FineTuning(private_share=0.5), FineTuning(balance="cap"),
                                    FineTuning(balance="draw"),
                                    FineTuning(confidence=True, temperature=2.0)])  # fmt: skip
@pytest.mark.parametrize("steps", ["equal", "grow"])
def test_every_tuning_trains_on_if_no_public_sample_is_kept(tuning, steps):
    run = real_run(IDKD(start=0, steps=steps, tuning=tuning), Fixed(MSP(), threshold=1e6))
    run.call("on_epoch_start", epoch=0)
    assert run.progress.steps == math.ceil(26 / N / 4)
    assert train(run, 3).isfinite().all()


@pytest.mark.parametrize("engine", ["loop", "vmap"])
@pytest.mark.parametrize(
    "tuning",
    [FineTuning(), FineTuning(weight=0.3), FineTuning(confidence=True), FineTuning(temperature=2.5),
     FineTuning(weight=2.0, confidence=True, temperature=0.5, private_share=0.5)],
)  # fmt: skip
def test_the_loss_is_the_weighted_soft_cross_entropy_at_its_temperature(tuning, engine):
    """w T^2 H(target, softmax(z / T)) of a distilled sample, plain cross-entropy of a private one, over the batch."""
    run = real_run(VanillaKD(start=0, tuning=tuning), engine=engine, norm="group")
    run.call("on_epoch_start", epoch=0)
    order = run.store.order(run.step, 1)
    models = [copy.deepcopy(m) for m in run.stack.modules]
    expected = torch.zeros(N, dtype=torch.float64)
    mixed = 0
    for i, (model, positions) in enumerate(zip(models, order, strict=True)):
        for p in positions.tolist():
            own = TRAIN[i]
            if p < len(own):
                target, weight, t = torch.eye(K, dtype=torch.float64)[own[p] % K], 1.0, 1.0
                pixels = images(58, 1).pixels[own[p]]
            else:
                target = run.store.distilled[i].probabilities[p - len(own)].double()
                pixels = images(11, 3).pixels[p - len(own)]
                weight, t = tuning.weight, tuning.temperature
                if tuning.confidence:
                    weight *= float(1 + (target * target.log()).sum() / math.log(K))
            x = (pixels.double() - run.store.inputs.mean[:, None, None]) / run.store.inputs.std[:, None, None]
            with torch.no_grad():
                z = model(x[None])[0]
            expected[i] -= weight * t**2 * (target * (z / t).log_softmax(0)).sum() / 4
            mixed += p >= len(own)
    assert 0 < mixed < 4 * N
    np.testing.assert_allclose(train(run, 1)[0], expected, rtol=1e-9)
