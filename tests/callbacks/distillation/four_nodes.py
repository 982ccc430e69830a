"""Runs of four nodes: on a chain, with outputs and selections that are given, and real ones, tiny."""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import numpy as np
import torch
from lightning.fabric import Fabric

from lightning_idkd.callback import HOOKS
from lightning_idkd.callbacks import DSGD
from lightning_idkd.config import TrainConfig
from lightning_idkd.data.images import Images
from lightning_idkd.data.partition import Split
from lightning_idkd.data.store import Store
from lightning_idkd.graph import Chain, Graph, Ring
from lightning_idkd.labels import Labels, Outputs, Selection
from lightning_idkd.models import CNN
from lightning_idkd.network import Network
from lightning_idkd.nodes.node import NodeModule
from lightning_idkd.nodes.stack import NodeStack
from lightning_idkd.training.orchestrator import Orchestrator

PUBLIC = 6
K = 3


def labels(rows):
    """Labels from {index: probabilities}."""
    index = torch.tensor(list(rows), dtype=torch.int64)
    return Labels(index, torch.tensor(list(rows.values())).reshape(len(rows), 2))


def as_dict(labels):
    return dict(zip(labels.index.tolist(), labels.probabilities.tolist(), strict=True))


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


class FakeRun:
    """Nodes on a chain whose outputs and selections are given; only what an exchange needs."""

    def __init__(self, outputs, kept, epochs=10):
        self.outputs, self.kept, self.epochs, self.step = outputs, kept, epochs, 0
        self.network = Network(Graph(Chain(), len(outputs)))
        self.stack = SimpleNamespace(n=len(outputs), X=None, use_parameters=lambda X: nullcontext())
        self.held = torch.tensor([[5, 0, 1], [0, 9, 2], [3, 3, 3], [0, 0, 20]]).repeat(3, 1)[: len(outputs)].int()
        self.store = SimpleNamespace(distilled=None, public=len(outputs[0]), k=K, counts=lambda: self.held)
        self.store.log_prior = ((self.held + 1) / (self.held + 1).sum(1, keepdim=True)).log()
        self.scores = [torch.zeros(len(z)) for z in outputs]
        self.calibrated, self.called, self.before = 0, [], []

    @contextmanager
    def exchanging(self):
        self.before.append(self.network.counts()["messages"])
        yield

    def answers(self):
        return [Outputs(logits) for logits in self.outputs]

    def calibrate(self, public, offsets=None):
        assert all(torch.equal(p.logits, o) for p, o in zip(public, self.outputs, strict=True))
        self.calibrated += 1
        empty = torch.empty(0)
        return [Selection(kept, 0.0, empty, score, empty) for kept, score in zip(self.kept, self.scores, strict=True)]

    def distil(self, distilled):
        self.store.distilled = distilled

    def call(self, hook, **payload):
        assert {"run", *payload} == set(HOOKS[hook])
        self.called.append((hook, payload))


def chain(nodes, public=None):
    """Node i keeps public sample i, of which it alone has a label."""
    public = public or nodes
    outputs = [torch.randn(public, K, generator=torch.Generator().manual_seed(i)) for i in range(nodes)]
    return FakeRun(outputs, [torch.arange(public) == i for i in range(nodes)])


def chain_of_four():
    return chain(4, PUBLIC)


def counted(run):
    return run.network.counts()


# ---------------------------------------------------------------------- real runs, tiny

N, SIZE, HELD_OUT = 4, 8, 8


def images(count, seed):
    pixels = torch.randint(
        256, (count, 1, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    return Images(pixels, torch.arange(count) % K, ("a", "b", "c"))


def split():
    """Node i has 5 + i training samples, most of class i, and 8 held out: 58 samples of the classes 0, 1, 2, 0, ..."""
    free, train = [list(range(c, 58, K)) for c in range(K)], []
    for i in range(N):
        train.append([free[i % K].pop() for _ in range(4 + i)] + [free[(i + 1) % K].pop()])
    rest = sorted(s for of in free for s in of)
    validation = [rest[i * HELD_OUT : (i + 1) * HELD_OUT] for i in range(N)]
    return Split(
        *([np.array(p) for p in part] for part in (train, validation)), "", np.zeros((N, K), np.int64), "IID", None
    )


TRAIN = [samples.tolist() for samples in split().train]


def real_run(distillation, calibration=None, *, topology=None, public=11, network=Network, engine="loop",
             dtype=torch.float64, norm="batch", epochs=10, steps=3, batch=4, private=None, seed=0):  # fmt: skip
    """All the parts of a run of four nodes with random images, whose rows lie apart; ``steps`` are trained."""
    store = Store(images(58, 1) if private is None else private, images(5, 2), images(public, 3) if public else None,
                  split(), range(N), batch=batch, tuning=distillation.tuning, dtype=dtype)  # fmt: skip
    stack = NodeStack(
        lambda: NodeModule(CNN(4, norm=norm).build(1, SIZE, K)), range(N), seed, dtype=dtype, engine=engine
    )
    stack.X.add_(0.3 * torch.randn(stack.X.shape, generator=torch.Generator().manual_seed(9)).to(dtype))
    run = Orchestrator(Fabric(accelerator="cpu", devices=1), stack, network(Graph(topology or Ring(), N)), store,
                       DSGD(), TrainConfig(epochs=epochs, batch_size=batch), calibration, distillation)  # fmt: skip
    train(run, steps)
    return run


def train(run, steps):
    """Losses [steps, rows] of some steps of an epoch."""
    order, losses, run.progress.epoch_step = run.store.order(run.step, max(steps, 1)), [], 0
    for _ in range(steps):
        losses.append(run.train_step(order))
        run.call("on_step_end", step=run.step, losses=losses[-1])
    run.progress.epoch_step = 0
    return torch.stack(losses) if losses else torch.empty(0, N)


def everything(store, i):
    """All that node ``i`` trains on, in order: images, targets times weights, and temperatures where there are some."""
    positions = torch.zeros(N, store.sizes[i], dtype=torch.int64)
    positions[i] = torch.arange(store.sizes[i])
    return [part[i] for part in store.batch(positions, 0)]
