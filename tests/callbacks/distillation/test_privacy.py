"""Nothing private leaves a node, and every byte of what does is counted."""

import copy
import inspect

import pytest
import torch
from four_nodes import TRAIN, K, N, counted, images, real_run, train
from torch import Tensor

from lightning_idkd.callbacks import (
    ERA,
    IDKD,
    MSP,
    ClassCount,
    ConfidenceMean,
    Gossiped,
    LaplaceLabels,
    LogitMean,
    Mean,
    MovingAverage,
    MutualKD,
    Packed,
    RandomizedResponse,
    VanillaKD,
    Vote,
    Youden,
)
from lightning_idkd.data.images import Images
from lightning_idkd.labels import FineTuning, Labels
from lightning_idkd.network import Network


class Guarded(Network):
    """Passes what may leave a node, by type, and notes its size; tests set ``run`` and what the method ``declares``."""

    declares = ""
    run = None

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.sent = {"parameter": 0, "label": 0, "other": 0}
        self.ways, self.mixed, self.training = [], [], True

    def note(self, way, kind, nbytes):
        self.ways.append(way)
        self.sent[kind] += nbytes

    def mix(self, T, step=0, *, kind="parameter", messages=True):
        assert type(T) is Tensor
        assert (kind, T.dtype, len(T)) == ("parameter", torch.float64, N)
        if not self.training:  # a teacher's rows: those of the run, or what came of mixing them
            assert any(T is rows for rows in (self.run.stack.X, *self.mixed))
        assert T.shape[1] <= self.run.stack.parameters
        self.note("mix", kind, len(self.edges()) * T.shape[1] * 8)
        self.mixed.append(super().mix(T, step, kind=kind, messages=messages))
        return self.mixed[-1]

    def swap(self, M, step=0, *, kind="parameter", messages=True):
        raise AssertionError("no method here sends a message of its own to each neighbour")

    def receive(self, T, step=0, *, kind="parameter", messages=True):
        raise AssertionError("no rule here aggregates what it receives")

    def welcome(self, T, step):
        assert not self.links.faults
        return super().welcome(T, step)

    def all_reduce(self, T, *, kind="parameter", messages=True, true=False):
        assert true  # numbers of the run, about which no node lies
        assert self.run.distillation.steps == "grow"  # sizes of the sets
        assert (kind, T.shape, T.tolist()) == ("other", (N, 1), [[size] for size in self.run.store.sizes])
        self.note("all_reduce", kind, 2 * (N - 1) * 8)
        return super().all_reduce(T, kind=kind, messages=messages, true=true)

    def exchange(self, labels, step=0, *, kind="label"):
        assert kind == "label"
        for message in labels:
            assert type(message) is Labels
            assert set(vars(message)) == {"index", "probabilities", "weights", "size"}
            assert message.index.dtype == torch.int64
            assert torch.equal(message.index, message.index.unique())
            assert ((message.index >= 0) & (message.index < self.run.store.public)).all()
            assert message.probabilities.shape == (len(message), K)
            assert (message.probabilities >= 0).all()
            torch.testing.assert_close(message.probabilities.sum(1), torch.ones(len(message)))
            if message.weights is not None:
                assert "ranks of the kept samples' scores" in self.declares
                assert message.weights.shape == (len(message),)
                steps = message.weights * len(message)  # ranks and nothing finer
                torch.testing.assert_close(steps.sort().values, torch.arange(1.0, len(message) + 1), atol=0.1, rtol=0)
            assert message.size is None or type(message.size) is int
        self.note("exchange", kind, sum(2 * message.nbytes for message in labels))
        return super().exchange(labels, step, kind=kind)

    def share(self, T, step=0, *, kind="other"):
        assert type(T) is Tensor
        if kind == "parameter":
            assert T is self.run.stack.X
        elif T.dtype == torch.int32:
            assert "class histograms of private data" in self.declares
            assert torch.equal(T, self.run.store.counts())
        else:
            assert "thresholds" in self.declares
            assert (T.shape, T.dtype) == ((N, 1), torch.float64)
        self.note("share", kind, 2 * T.numel() * T.element_size())
        return super().share(T, step, kind=kind)


def test_the_double_covers_everything_that_sends():
    senders = {
        name for name, f in vars(Network).items() if inspect.isfunction(f) and "self.count(" in inspect.getsource(f)
    }
    assert senders == {"mix", "receive", "welcome", "swap", "all_reduce", "exchange", "share"}
    assert senders <= set(vars(Guarded))
    carriers = {"_post_rows", "swap", "all_reduce", "exchange", "counts", "report", "report_mean",
                "collect", "collect_edges", "collect_objects"}  # fmt: skip
    for name, f in vars(Network).items():
        if inspect.isfunction(f) and "self.transport." in inspect.getsource(f):
            assert name in carriers, name


def youden(pooled=False):
    return Youden(MSP(), pooled=pooled)


WAYS = {
    "IDKD": (lambda: IDKD(start=0, every=1), youden, {"exchange"}, ""),
    "VanillaKD": (lambda: VanillaKD(start=0, every=1), None, {"exchange"}, ""),
    "MutualKD": (lambda: MutualKD(start=0, every=1), None, {"share"}, ""),
    **{
        r.__name__: (lambda r=r: IDKD(start=0, every=1, aggregation=r()), youden, {"exchange"}, "")
        for r in (Mean, LogitMean, ConfidenceMean, ERA, Vote)
    },
    "ClassCount": (lambda: IDKD(start=0, every=1, aggregation=ClassCount()), youden, {"exchange", "share"},
                   "class histograms of private data"),
    "Gossiped": (lambda: IDKD(start=0, every=1, teacher=Gossiped(3)), youden, {"exchange", "mix"}, ""),
    "MovingAverage": (lambda: IDKD(start=0, every=1, teacher=MovingAverage(0.5)), youden, {"exchange"}, ""),
    **{
        f"{values} top {top}": (lambda v=values, t=top: IDKD(start=0, every=1, encoding=Packed(v, t)), youden,
                               {"exchange"}, "")
        for values in ("float32", "float16", "uint8")
        for top in (None, 2)
    },
    **{
        e.__name__: (lambda e=e: VanillaKD(start=0, every=1, encoding=e(1.0)), None, {"exchange"}, "")
        for e in (LaplaceLabels, RandomizedResponse)
    },
    "weighted": (lambda: IDKD(start=0, every=1, weighted=True), youden, {"exchange"},
                 "ranks of the kept samples' scores"),
    "weighted uint8": (lambda: IDKD(start=0, every=1, weighted=True, encoding=Packed("uint8")), youden, {"exchange"},
                       "ranks of the kept samples' scores"),
    "pooled": (lambda: IDKD(start=0, every=1), lambda: youden(True), {"exchange", "share"}, "thresholds"),
    "prior, hard": (lambda: IDKD(start=0, every=1, prior=1.0, hard=True), youden, {"exchange"}, ""),
    "relayed": (lambda: IDKD(start=0, every=1, labels="relayed"), youden, {"exchange"}, ""),
    "accumulated, hops": (lambda: IDKD(start=0, every=1, labels="accumulated", hops=3, min_confidence=0.4), youden,
                          {"exchange"}, ""),
    "growing": (lambda: VanillaKD(start=0, every=1, steps="grow"), None, {"exchange", "all_reduce"},
                "sizes of the nodes' sets"),
    "tuned": (lambda: IDKD(start=0, every=1, tuning=FineTuning(0.5, "cap", 0.5, True, 2.0)), youden, {"exchange"}, ""),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_only_parameters_and_labels_of_public_samples_and_what_is_declared_leave_a_node(way):
    distillation, calibration, ways, declared = WAYS[way]
    distillation = distillation()
    calibration = calibration and calibration()
    run = real_run(distillation, calibration, network=Guarded, public=11 if distillation.public else 0, steps=0)
    run.network.run = run
    run.network.declares = ", ".join([distillation.shares, calibration.shares if calibration else ""]).strip(", ")
    assert run.network.declares == declared
    train(run, 2)
    for epoch in range(3):
        run.network.ways, run.network.mixed, run.network.training = [], [], False
        run.call("on_epoch_start", epoch=epoch)
        assert set(run.network.ways) == ways
        run.network.training = True
        train(run, 2)
    assert {k: v for k, v in counted(run).items() if k != "messages"} == {
        f"{k}_bytes": v for k, v in run.network.sent.items()
    }
    assert run.network.sent["other"] == 0 or declared or "all_reduce" in ways
    assert (run.network.sent["label"] > 0) == distillation.public


def sent_by(distillation, private):
    """Every message of an exchange between nodes that stand on given rows, whatever their data."""
    run = real_run(distillation, network=Recording, private=private, steps=0)
    run.call("on_step_end", step=0, losses=None)  # a moving average begins
    run.call("on_epoch_start", epoch=0)
    return run.network.messages


class Recording(Network):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.messages = []

    def exchange(self, labels, step=0, **kwargs):
        self.messages += [part for message in labels for part in (message.index, message.probabilities)]
        return super().exchange(labels, step, **kwargs)


@pytest.mark.parametrize("options", [
    {}, {"temperature": 0.5}, {"hard": True}, {"hops": 2}, {"aggregation": LogitMean()},
    {"aggregation": ConfidenceMean()}, {"aggregation": ERA()}, {"aggregation": Vote()}, {"teacher": Gossiped(2)},
    {"teacher": MovingAverage()}, {"encoding": Packed("uint8", 2)},
    {"encoding": RandomizedResponse(1.0)}, {"encoding": LaplaceLabels(1.0)},
], ids=lambda options: "-".join(f"{k} {type(v).__name__}" for k, v in options.items()))  # fmt: skip
def test_labels_say_nothing_of_private_data_but_through_the_parameters(options):
    """Other private labels and, normalised alike, pixels in another order: the same messages to the last bit."""
    plain = images(58, 1)
    other = Images(plain.pixels.clone(), (plain.labels + 1) % K, plain.classes)
    for i in TRAIN:
        other.pixels[i] = other.pixels[i[::-1]]
    messages = [sent_by(VanillaKD(start=0, **copy.deepcopy(options)), data) for data in (plain, other)]
    assert len(messages[0]) == 2 * N * options.get("hops", 1)
    assert all(torch.equal(a, b) for a, b in zip(*messages, strict=True))
