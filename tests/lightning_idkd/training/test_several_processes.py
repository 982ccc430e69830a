"""Runs whose nodes are spread over processes: the bits of one process, few messages, and rows in one place only."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from short_runs import same
from threads import in_threads

from lightning_idkd import callbacks as c
from lightning_idkd import network, transport
from lightning_idkd.config import TrainConfig
from lightning_idkd.data.images import Images
from lightning_idkd.data.partition import Split
from lightning_idkd.data.store import Store
from lightning_idkd.errors import UserError
from lightning_idkd.graph import Chain, Graph, Ring
from lightning_idkd.labels import Labels
from lightning_idkd.links import Links
from lightning_idkd.models import CNN
from lightning_idkd.network import Network
from lightning_idkd.nodes.node import NodeModule
from lightning_idkd.nodes.stack import NodeStack
from lightning_idkd.topologies import EpidemicLocal, ErdosRenyi, OnePeerExponential, RandomMatchings
from lightning_idkd.training.checkpoint import gather
from lightning_idkd.training.gossip_step import GossipStep
from lightning_idkd.training.orchestrator import Orchestrator

N, K, EACH = 5, 3, 12
CASES = {
    "QGDSGDm": (lambda: c.QGDSGDm(nesterov=True), Ring, ()),
    "CombineThenAdapt": (c.CombineThenAdapt, Ring, ()),
    "GradientTracking": (c.GradientTracking, Ring, ()),
    "SGP": (c.SGP, Ring, ()),
    "RelaySGD": (c.RelaySGD, Chain, ()),
    "AllReduce": (c.AllReduce, Ring, ()),
    "NGC": (c.NGC, Ring, ()),
    "ChocoSGD": (lambda: c.ChocoSGD(c.TopK(0.1), gamma=0.3), Ring, ()),
    "median": (lambda: c.Robust(c.DSGD(), c.CoordinateMedian()), Ring, ()),
    "RFA": (lambda: c.Robust(c.DSGD(), c.RFA()), Ring, ()),
    "UBAR": (lambda: c.Robust(c.DSGD(), c.UBAR()), Ring, ()),
    "a graph that changes": (c.DSGD, OnePeerExponential, ()),
    "epidemic learning": (c.DSGD, EpidemicLocal, ()),
    "random matchings": (c.DSGD, RandomMatchings, ()),
    "a dense graph": (c.DSGD, lambda: ErdosRenyi(0.9), ()),
    "lost messages": (c.DSGD, Ring, (c.MessageLoss(0.3), c.Churn(0.2, 0.5))),
    "liars": (c.DSGD, Ring, (c.Liars([1], c.ALIE(0.5), c.WrongLabels()),)),
    "liars who know the others": (c.DSGD, Ring, (c.Liars([1], c.Dissensus()),)),
    "lying about a mean": (lambda: c.GossipPGA(2), Ring, (c.Liars([3], c.SignFlip()),)),
}
"""Rule, topology and faults."""


def images(count, seed):
    pixels = torch.randint(256, (count, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return Images(pixels, torch.arange(count) % K, ("a", "b", "c"))


def split():
    """Node i has 8 training samples, four of them of class i mod 3, and 4 held out."""
    order = np.arange(N * EACH)
    order = np.concatenate([order[order % K == 0], order[order % K > 0]]).reshape(N, EACH)
    return Split(list(order[:, 4:]), list(order[:, :4]), "", np.zeros((N, K), np.int64), "IID", None)


def build(name, rank, world, nodes=N):
    """The parts of a run in process ``rank``, and what makes the run of them: that already sends messages."""
    make_rule, topology, faults = CASES[name]
    rule, graph = make_rule(), Graph(topology(), nodes)
    net = Network(graph, rank, world, Links(graph, faults, takes=rule.takes))
    distillation = c.IDKD(start=0, every=1)
    store = Store(images(N * EACH, 1), images(8, 2), images(9, 3), split(), net.rows, batch=4,
                  tuning=distillation.tuning)  # fmt: skip
    stack = NodeStack(lambda: NodeModule(CNN(4).build(1, 8, K)), net.rows, 0)
    fabric = SimpleNamespace(is_global_zero=rank == 0, device=torch.device("cpu"))
    return lambda: Orchestrator(fabric, stack, net, store, rule, TrainConfig(epochs=10, batch_size=4),
                                c.Youden(c.MSP()), distillation, [*faults])  # fmt: skip


def live(make_run):
    """Two steps, an exchange of labels, two more steps, a mix without gradients, an evaluation, and a checkpoint."""
    run = make_run()
    for _ in range(2):
        run.progress.epoch_step = 0
        run.call("on_epoch_start", epoch=run.epoch)
        order = run.store.order(run.step, 2)
        for _ in range(2):
            losses = run.train_step(order)
            run.call("on_step_end", step=run.step, losses=losses)
    run.run_final_gossip()
    line = run.recorder.add_line(None, lambda: False)
    return {k: v for k, v in line.items() if not k.startswith("throughput")}, gather(run)


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", CASES)
def test_any_number_of_processes_gives_the_bits_of_one(name, monkeypatch):
    monkeypatch.setattr(network, "BLOCK", 1000)  # one process treats several blocks of columns
    monkeypatch.setattr(transport, "PIECE", 1000)
    monkeypatch.setattr(transport, "TOGETHER", 1)
    alone, stored = live(build(name, 0, 1))
    assert stored["distilled"] is not None
    for world in (2, 3, 4) if name in ("QGDSGDm", "a graph that changes") else (3,):
        results = in_threads(monkeypatch).run([partial(live, build(name, rank, world)) for rank in range(world)])
        assert [line for line, _ in results] == [alone] * world
        first, *others = [state for _, state in results]
        assert same(stored | {"devices": 0}, first) is None
        assert others == [None] * (world - 1)


# ---------------------------------------------------------------------- messages


@pytest.mark.parametrize("block", [2**20, 64])
@pytest.mark.parametrize("world", range(2, 9))
def test_a_mix_is_one_message_per_pair_of_processes(world, block, monkeypatch):
    """A ring of 16 nodes crosses ``world`` borders between processes in both directions; both of two are one pair."""
    monkeypatch.setattr(network, "BLOCK", block)
    threads, columns = in_threads(monkeypatch), 1000

    def update(rank):
        net = Network(Graph(Ring(), 16), rank, world)
        node = SimpleNamespace(has_features=False)
        X = torch.ones(len(net.rows), columns)
        stack = SimpleNamespace(X=X, G=X.clone(), parameters=columns, modules=[node])
        GossipStep(c.DSGD(), stack, net).update(0, 0.1, ())

    threads.run([partial(update, rank) for rank in range(world)])
    assert len(threads.posted) == (2 if world == 2 else 2 * world)
    assert len({(sender, receiver) for sender, receiver, _ in threads.posted}) == len(threads.posted)
    assert sum(nbytes for *_, nbytes in threads.posted) == 2 * world * 4 * columns


@pytest.mark.parametrize(("name", "early"), [("CombineThenAdapt", 2), ("QGDSGDm", 0)])
def test_rows_leave_before_the_gradients_where_the_rule_mixes_them_as_they_are(name, early, monkeypatch):
    threads, before = in_threads(monkeypatch), []

    def step(make_run):
        run = make_run()
        count, gradients = lambda: sum(q == run.network.rank for q, *_ in threads.posted), run.stack.step
        start = count()
        run.stack.step = lambda *batch: (before.append(count() - start), gradients(*batch))[1]
        run.train_step(run.store.order(0, 2))
        return count() - start

    assert threads.run([partial(step, build(name, rank, 3)) for rank in range(3)]) == [2] * 3
    assert before == [early] * 3


def test_a_rule_that_mixes_something_else_first_is_refused(monkeypatch):
    nets = [Network(Graph(Ring(), 4), rank, 2) for rank in range(2)]

    def mix(net):
        X = torch.ones(2, 3)
        net.send_early(X, 0)
        with pytest.raises(UserError, match="a rule with mixes_first = True must mix X before anything else"):
            net.mix(2 * X)

    in_threads(monkeypatch).run([partial(mix, net) for net in nets])


@pytest.mark.parametrize("world", [2, 3, 4])
def test_a_mean_takes_two_messages_per_pair_of_processes(world, monkeypatch):
    """A share of the columns of the rows, and its mean: of 12 nodes, together those of 12 rows and the mean."""
    threads, columns = in_threads(monkeypatch), 1200
    rows = torch.ones(12 // world, columns)
    threads.run([partial(Network(Graph(Ring(), 12), rank, world).all_reduce, rows) for rank in range(world)])
    assert len(threads.posted) == 2 * world * (world - 1)
    assert sum(nbytes for *_, nbytes in threads.posted) == (world - 1) * (12 + world) * columns * 4 // world


def test_labels_take_two_messages_per_pair_of_processes(monkeypatch):
    threads = in_threads(monkeypatch)
    labels = [Labels(torch.arange(i), torch.ones(i, K)) for i in range(6)]
    nets = [Network(Graph(Ring(), 6), rank, 3) for rank in range(3)]
    threads.run([partial(net.exchange, [labels[i] for i in net.rows]) for net in nets])
    assert len(threads.posted) == 2 * 3 * 2


def test_rows_reach_the_first_process_in_pieces(monkeypatch):
    threads = in_threads(monkeypatch)
    monkeypatch.setattr(transport, "PIECE", 256)
    sizes, send = [], threads.send
    monkeypatch.setattr(threads, "send", lambda T, q: (sizes.append((q, T.nbytes)), send(T, q)))
    T = torch.randn(6, 100)
    nets = [Network(Graph(Ring(), 6), rank, 3) for rank in range(3)]
    collected = threads.run([partial(net.collect, T[net.rows.start : net.rows.stop]) for net in nets])
    assert torch.equal(collected[0], T)
    assert collected[1:] == [None, None]
    assert {q for q, _ in sizes} == {0}
    assert max(nbytes for _, nbytes in sizes) == 256
    assert sum(nbytes for _, nbytes in sizes) == 4 * 100 * 4


# ---------------------------------------------------------------------- interrupts


@pytest.mark.parametrize("asked", [0, 1])
def test_all_processes_stop_at_the_same_step_and_ask_seldom(asked, monkeypatch):
    """A step takes a tenth of a second, so that they ask after the first step and then after every fifth."""
    threads, questions = in_threads(monkeypatch), []
    clocks = [[0.0], [0.0]]

    def work(rank):
        run = runs[rank]()
        run.start_session()
        report = run.network.report
        monkeypatch.setattr(run.network, "report", lambda T: (questions.append((rank, run.step)), report(T))[1])
        for step in range(1, 50):
            clocks[rank][0] += 0.1
            run.progress.step = step
            run.interrupted = rank == asked and step >= 8
            if run.stop_requested():
                return step
        return None

    runs = [build("QGDSGDm", rank, 2) for rank in range(2)]
    monkeypatch.setattr("lightning_idkd.training.orchestrator.time",
                        SimpleNamespace(perf_counter=lambda: clocks[threads.thread.rank][0]))  # fmt: skip
    assert threads.run([partial(work, rank) for rank in range(2)]) == [11, 11]
    assert sorted(questions) == [(rank, step) for rank in range(2) for step in (1, 6, 11)]
