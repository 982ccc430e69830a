"""Learning-rate factors and starts of phases."""

import math

import pytest

from lightning_idkd.errors import UserError
from lightning_idkd.schedule import Constant, Cosine, Step, epoch_of


def test_step_falls_at_every_milestone_given_as_fraction_or_epoch():
    schedule = Step((0.5, 80), gamma=0.1)
    for epoch, factor in [(0, 1), (49.99, 1), (50, 0.1), (79.99, 0.1), (80, 0.01), (99.99, 0.01)]:
        assert schedule.factor(epoch, 100) == pytest.approx(factor)
    assert Step((), gamma=0.5).factor(9, 10) == 1


def test_step_falls_at_60_and_80_percent_by_default():
    assert [round(Step().factor(e, 10), 9) for e in range(10)] == [1] * 6 + [0.1] * 2 + [0.01] * 2


def test_cosine_goes_from_one_to_its_floor():
    schedule = Cosine(floor=0.2)
    assert schedule.factor(0, 30) == 1
    assert schedule.factor(10, 30) == pytest.approx(0.2 + 0.8 * 0.75)  # cos 60 degrees = 1/2
    assert schedule.factor(15, 30) == pytest.approx(0.6)
    assert schedule.factor(30 - 1e-9, 30) == pytest.approx(0.2)


def test_cosine_begins_after_the_warm_up():
    schedule = Cosine(floor=0.001, warmup=10)
    assert schedule.factor(10, 30) == 1
    assert schedule.factor(20, 30) == pytest.approx(0.001 + 0.999 / 2)


def test_constant_stays():
    assert {Constant().factor(e / 7, 5) for e in range(35)} == {1.0}


@pytest.mark.parametrize("schedule", [Step((0.5,), 0.1, warmup=4), Cosine(0.01, warmup=4), Constant(warmup=4)])
def test_warm_up_rises_linearly(schedule):
    assert [schedule.factor(e, 20) for e in (1, 2, 3)] == pytest.approx([0.2575, 0.505, 0.7525])
    assert schedule.factor(4, 20) == pytest.approx(1)
    assert schedule.factor(0, 20) == 0.01  # rules divide by the learning rate


def test_warm_up_may_begin_at_any_factor():
    """0.1 to 0.8 in 5 epochs, as the authors of QG-DSGDm do on 16 nodes."""
    rates = [0.8 * Step((0.5, 0.75), warmup=5, warmup_from=0.125).factor(e, 300) for e in (0, 2.5, 5, 149, 150, 225)]
    assert rates == pytest.approx([0.1, 0.45, 0.8, 0.8, 0.08, 0.008])


ANY = [Step(), Step(gamma=1e-3, warmup=1), Cosine(), Cosine(1e-6, 2.5), Cosine(warmup=9), Constant(3)]


@pytest.mark.parametrize("schedule", ANY)
@pytest.mark.parametrize("epochs", [1, 2, 3, 10, 60])
def test_no_step_has_a_learning_rate_of_zero(schedule, epochs):
    steps = 17
    for step in range(epochs * steps):
        assert 0 < schedule.factor(step / steps, epochs) <= 1


def test_a_start_below_one_is_a_fraction_and_an_integer_an_epoch():
    assert [epoch_of(s, 60, "k") for s in (0, 0.0, 0.5, 0.6, 1, 24, 59)] == [0, 0, 30, 36, 1, 24, 59]
    assert epoch_of(0.6, 41, "k") == 24
    assert epoch_of(0.29, 100, "k") == 29  # 0.29 * 100 is a little below 29
    assert isinstance(epoch_of(24.0, 60, "k"), int)


@pytest.mark.parametrize("epochs", range(1, 6))
def test_every_fraction_below_one_names_an_epoch_of_a_short_run(epochs):
    for start in (0.0, 0.3, 0.6, 0.8, 0.99):
        epoch = epoch_of(start, epochs, "k")
        assert 0 <= epoch < epochs
        assert epoch == start * epochs // 1


@pytest.mark.parametrize("start", [60, 100, -1, -0.2, 1.5])
def test_a_start_outside_the_epochs_is_refused_with_its_key(start):
    with pytest.raises(UserError, match=rf"^distillation\.start: {start} .*60 epochs.*1 to 59"):
        epoch_of(start, 60, "distillation.start")


def test_schedules_refuse_what_they_cannot_do():
    with pytest.raises(UserError, match=r"train\.schedule\.milestones: 20"):
        Step((5, 20)).factor(0, 10)
    for gamma in (0, -1, 1.5):
        with pytest.raises(UserError, match=rf"train\.schedule\.gamma: {gamma}"):
            Step(gamma=gamma)
    for floor in (0, -0.1, 2):
        with pytest.raises(UserError, match=rf"train\.schedule\.floor: {floor}"):
            Cosine(floor=floor)


def test_a_cosine_never_rises_after_the_warm_up():
    factors = [Cosine(0.01, 2).factor(2 + e / 10, 12) for e in range(100)]
    assert factors == sorted(factors, reverse=True)
    assert math.isclose(factors[50], 0.01 + 0.99 / 2)
