"""What crosses edges: mixing, swaps, means, labels; every byte of it; and the same with real processes."""

import time

import networkx as nx
import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing import spawn

from lightning_idkd.callback import Attack, Fault, LabelAttack
from lightning_idkd.errors import UserError
from lightning_idkd.graph import Chain, Complete, Graph, Ring, Social15, Topology, Torus
from lightning_idkd.labels import Labels
from lightning_idkd.links import Links
from lightning_idkd.network import Network, assign_rows
from lightning_idkd.topologies import ErdosRenyi


class OneWayRing(Topology):
    directed = True

    def graph(self, nodes, step, seed):
        return nx.cycle_graph(nodes, create_using=nx.DiGraph)


class Alternating(Topology):
    """Even steps: 0-1 and 2-3; odd steps: 1-2 and 3-0."""

    period = 2

    def graph(self, nodes, step, seed):
        graph = nx.empty_graph(nodes)
        graph.add_edges_from([[(0, 1), (2, 3)], [(1, 2), (3, 0)]][step])
        return graph


GRAPHS = {"ring": (Ring, 5), "social": (Social15, 15), "torus": (lambda: Torus(3, 4), 12), "one-way": (OneWayRing, 5),
          "dense": (lambda: ErdosRenyi(0.7), 20)}  # fmt: skip
LYING = {"lying ring": (Ring, 5), "lying arrows": (OneWayRing, 5), "lying dense": (lambda: ErdosRenyi(0.7), 20)}
KINDS = {"parameter_bytes": 0, "label_bytes": 0, "other_bytes": 0, "messages": 0}


class Random(Attack):
    def __call__(self, T, sight):
        return sight.uniform("test", T.shape[1]).to(T) - T


class Mirror(Attack):
    omniscient = True

    def __call__(self, T, sight):
        return torch.stack([sight.targets[i].rows.mean(0) - sight.targets[i].own for i in sight.receivers.tolist()])


class Hush(LabelAttack):
    def __call__(self, labels, sight):
        return labels[:0]


class Lying(Fault):
    """Nodes 1 and 3 lie."""

    labels = Hush()

    def __init__(self, attack):
        self.attack = attack

    def lying(self, moment):
        return np.isin(np.arange(moment.nodes), [1, 3])


def network(name, rank=0, world=1):
    topology, nodes = (GRAPHS | LYING)[name]
    graph, faults = Graph(topology(), nodes), []
    if name in LYING:
        faults = [Lying(Random() if name == "lying ring" else Mirror())]
    return Network(graph, rank, world, Links(graph, faults))


def chain(nodes=3):
    return Network(Graph(Chain(), nodes))


def rows(n, columns, dtype=torch.float64):
    return torch.randn(n, columns, dtype=dtype, generator=torch.Generator().manual_seed(n))


def labels(n, k=3):
    """Node i has i + 1 samples."""
    g = torch.Generator().manual_seed(n)
    return [
        Labels(torch.randperm(50, generator=g)[: i + 1], torch.rand(i + 1, k, generator=g).softmax(1)) for i in range(n)
    ]


@pytest.mark.parametrize("name", GRAPHS)
def test_mix_is_the_product_with_the_weights(name):
    net = network(name)
    assert net.graph.mixing(0).dense == (name == "dense")
    T = rows(net.graph.nodes, 100)
    mixed, W = net.mix(T), net.graph.mixing(0).W
    np.testing.assert_allclose(mixed, W @ T.numpy(), rtol=0, atol=1e-12)
    np.testing.assert_allclose(mixed.mean(0), T.mean(0), rtol=0, atol=1e-12)
    assert not torch.equal(mixed, T)


def test_mix_follows_a_graph_that_changes():
    net, T = Network(Graph(Alternating(), 4)), torch.tensor([[0.0], [2.0], [4.0], [8.0]])
    assert net.mix(T, step=0).flatten().tolist() == [1, 1, 6, 6]
    assert net.mix(T, step=1).flatten().tolist() == [4, 3, 3, 4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("block", [1, 7, 64, 1000])
def test_mixing_blocks_of_columns_gives_the_same_bits(block, dtype):
    net, T = network("social"), rows(15, 2003, dtype)
    assert torch.equal(torch.cat([net.mix(part) for part in T.split(block, 1)], 1), net.mix(T))


def test_sums_run_over_the_senders_in_ascending_order():
    """In float32 2^25 swallows a 1, so only the last of 2^25 + 1 - 2^25 + 1 is left; another order leaves 0 or 2."""
    net = Network(Graph(Complete(), 4))  # all weights 1/4
    T = torch.tensor([[2.0**25], [1.0], [-(2.0**25)], [1.0]])
    assert net.mix(T).flatten().tolist() == [0.25] * 4
    assert net.all_reduce(T).flatten().tolist() == [0.25] * 4


def test_mix_leaves_what_was_sent():
    net, T = network("ring"), rows(5, 9)
    kept = T.clone()
    net.mix(T)
    assert torch.equal(T, kept)


def test_a_swap_returns_what_the_other_end_sent():
    net = chain()
    assert net.edges().tolist() == [[0, 1], [1, 0], [1, 2], [2, 1]]
    sent = torch.tensor([[1.0], [10.0], [12.0], [21.0]])  # named after sender and receiver
    assert net.swap(sent).flatten().tolist() == [10.0, 1.0, 21.0, 12.0]
    assert sent.flatten().tolist() == [1.0, 10.0, 12.0, 21.0]


def test_nothing_is_swapped_over_arrows():
    with pytest.raises(
        UserError, match="messages can be swapped over undirected edges only, and OneWayRing is directed"
    ):
        network("one-way").swap(rows(5, 3))


@pytest.mark.parametrize("name", ["social", "torus"])
def test_swapping_twice_changes_nothing(name):
    net = network(name)
    M = rows(len(net.edges()), 3)
    once = net.swap(M)
    for (i, j), got in zip(net.edges().tolist(), once, strict=True):
        sent = [e == [j, i] for e in net.edges().tolist()].index(True)
        assert torch.equal(got, M[sent])
    assert torch.equal(net.swap(once), M)


def test_all_reduce_puts_the_mean_in_every_row():
    T = rows(5, 8)
    mean = network("ring").all_reduce(T)
    np.testing.assert_allclose(mean, np.tile(T.numpy().mean(0), (5, 1)), rtol=0, atol=1e-14)
    mean[0] = 0  # every node owns its copy
    assert mean[1].abs().sum() > 0


def test_exchange_brings_the_neighbours_labels_and_ones_own():
    sent = labels(3)
    received = chain().exchange(sent)
    assert [list(r) for r in received] == [[0, 1], [0, 1, 2], [1, 2]]
    for r in received:
        for sender, message in r.items():
            assert torch.equal(message.index, sent[sender].index)
            assert torch.equal(message.probabilities, sent[sender].probabilities)


class Smuggled(Labels):
    """Labels that could carry more."""


@pytest.mark.parametrize("payload", [torch.zeros(2, 3), (torch.zeros(2), torch.zeros(2, 3)), "histogram",
                                     Smuggled(torch.zeros(2), torch.zeros(2, 3))])  # fmt: skip
def test_exchange_refuses_anything_but_labels(payload):
    net = chain()
    with pytest.raises(TypeError, match=f"only labels.*not {type(payload).__name__}"):
        net.exchange([*labels(2), payload])
    assert net.counts() == KINDS


@pytest.mark.parametrize(("dtype", "itemsize"), [(torch.float32, 4), (torch.float64, 8)])
def test_a_chain_of_three_counts_every_directed_edge(dtype, itemsize):
    """Four directed edges; 7 columns."""
    net = chain()
    net.mix(rows(3, 7, dtype))
    assert net.counts() == KINDS | {"parameter_bytes": 4 * 7 * itemsize, "messages": 4}
    net.mix(rows(3, 7, dtype), kind="other", messages=False)  # a further block of the same message
    assert net.counts() == KINDS | {"parameter_bytes": 28 * itemsize, "other_bytes": 28 * itemsize, "messages": 4}
    net = chain()
    net.mix(rows(3, 7, dtype), size=5)  # written shorter than it is
    assert net.counts() == KINDS | {"parameter_bytes": 4 * 5, "messages": 4}
    net = chain()
    net.swap(rows(4, 7, dtype))
    assert net.counts() == KINDS | {"parameter_bytes": 4 * 7 * itemsize, "messages": 4}
    net.swap(rows(4, 7, dtype), messages=False)
    assert net.counts() == KINDS | {"parameter_bytes": 8 * 7 * itemsize, "messages": 4}


@pytest.mark.parametrize("nodes", [3, 4])
def test_an_all_reduce_counts_as_a_ring_of_nodes(nodes):
    net = chain(nodes)
    net.all_reduce(rows(nodes, 7, torch.float32))
    expected = {"parameter_bytes": 2 * (nodes - 1) * 7 * 4, "messages": 2 * (nodes - 1) * nodes}
    assert net.counts() == KINDS | expected
    net.all_reduce(rows(nodes, 7, torch.float32), messages=False)
    assert net.counts() == KINDS | expected | {"parameter_bytes": 4 * (nodes - 1) * 7 * 4}


def test_labels_count_a_four_byte_index_and_float32_for_every_edge():
    """Nodes have 1, 2 and 3 samples of 3 classes and 1, 2 and 1 neighbours; nothing is sent to oneself."""
    net = chain()
    net.exchange(labels(3))
    assert net.counts() == KINDS | {"label_bytes": (1 * 1 + 2 * 2 + 3 * 1) * (4 + 4 * 3), "messages": 4}
    net = chain()
    net.exchange([Labels(m.index, m.probabilities.double()) for m in labels(3)])  # how they lie in memory is no matter
    assert net.counts()["label_bytes"] == 8 * 16


def test_weights_cost_four_bytes_and_an_encoding_its_length():
    m = labels(3)[2]  # three samples of three classes
    assert m.nbytes == 3 * 4 + 9 * 4
    m.weights = torch.ones(3, dtype=torch.float64)
    assert m.nbytes == 3 * 4 + 9 * 4 + 3 * 4
    m.size = 7
    assert m.nbytes == m.to("cpu").nbytes == 7
    net = chain()
    net.exchange([*labels(2), m])
    assert net.counts() == KINDS | {"label_bytes": 1 * 16 + 2 * 2 * 16 + 1 * 7, "messages": 4}


def test_weights_cross_with_their_labels():
    sent = labels(3)
    sent[1].weights = torch.tensor([0.5, 1.0])
    received = chain().exchange(sent)
    assert [torch.equal(r[1].weights, sent[1].weights) for r in received] == [True] * 3
    assert received[0][0].weights is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int32])
@pytest.mark.parametrize("kind", ["other", "parameter"])
def test_shared_rows_reach_the_neighbours_and_are_counted(dtype, kind):
    """Rows of 7 over four directed edges."""
    net, T = chain(), (100 * rows(3, 7)).to(dtype)
    known = net.share(T, kind=kind)
    assert sorted(known) == [0, 1, 2]
    assert all(torch.equal(known[i], T[i]) for i in range(3))
    assert net.counts() == KINDS | {f"{kind}_bytes": 4 * 7 * T.element_size(), "messages": 4}
    net = chain()
    net.share(T)
    assert net.counts()["other_bytes"] == 4 * 7 * T.element_size()


# ---------------------------------------------------------------------- labels


def some(*index, weighted=False, size=None):
    """Labels whose probabilities tell the sample."""
    index = torch.tensor(index, dtype=torch.int64)
    p = torch.stack([index / 100, 1 - index / 100], 1)
    return Labels(index, p, index / 10 if weighted else None, size)


@pytest.mark.parametrize("which", [torch.tensor([True, False, False, True]), torch.tensor([0, 3])])
@pytest.mark.parametrize("weighted", [False, True])
def test_some_labels_keep_all_that_belongs_to_them_but_the_size(which, weighted):
    part = some(2, 3, 5, 8, weighted=weighted, size=99)[which]
    assert (part.index.tolist(), len(part)) == ([2, 8], 2)
    torch.testing.assert_close(part.probabilities, some(2, 8).probabilities)
    assert part.weights.tolist() == pytest.approx([0.2, 0.8]) if weighted else part.weights is None
    assert part.size is None


@pytest.mark.parametrize(
    ("new", "old", "both"),
    [((1, 4), (0, 1, 9), [0, 1, 4, 9]), ((), (3, 7), [3, 7]), ((3, 7), (), [3, 7]), ((5,), (5,), [5]), ((), (), [])],
)
def test_new_labels_lie_over_old_ones_of_other_samples(new, old, both):
    new, old = some(*new), some(*old)
    old.probabilities = old.probabilities.flip(1)
    merged = new.over(old)
    assert merged.index.tolist() == both
    assert merged.index.dtype == torch.int64
    expected = {i: p for m in (old, new) for i, p in zip(m.index.tolist(), m.probabilities.tolist(), strict=True)}
    assert merged.probabilities.tolist() == [expected[i] for i in both]
    assert (merged.weights, merged.size) == (None, None)
    assert merged.probabilities.shape == (len(both), 2)


def test_reports_are_not_counted():
    net, T = chain(), rows(3, 7)
    assert torch.equal(net.report(T), T)
    assert torch.equal(net.collect(T), T)
    assert torch.equal(net.collect_edges(rows(4, 7)), rows(4, 7))
    assert net.collect_objects(["a", "b", "c"]) == ["a", "b", "c"]
    net.report_distance(T, net.report_mean(T))
    assert net.counts() == KINDS


def test_counting_goes_on_from_restored_counts():
    net, resumed = chain(), chain()
    for _ in range(2):
        net.mix(rows(3, 7))
        net.exchange(labels(3))
    resumed.mix(rows(3, 7))
    resumed.exchange(labels(3))
    stored = resumed.counts()
    resumed = chain()
    resumed.restore(stored)
    assert resumed.counts() == stored
    resumed.mix(rows(3, 7))
    resumed.exchange(labels(3))
    assert resumed.counts() == net.counts()


@pytest.mark.parametrize(
    ("nodes", "world", "sizes"), [(5, 1, [5]), (5, 2, [3, 2]), (15, 4, [4, 4, 4, 3]), (3, 3, [1, 1, 1])]
)
def test_rows_are_spread_in_even_adjacent_blocks(nodes, world, sizes):
    blocks = assign_rows(nodes, world)
    assert [len(b) for b in blocks] == sizes
    assert [i for b in blocks for i in b] == list(range(nodes))


def reach(net):
    """The nodes held here and their neighbours."""
    return {*net.rows, *(j for i in net.rows for j in net.graph.mixing(0).neighbours(i))}


def everything(net):
    """All that a network does, for the rows held here; lists of one item a row or directed edge."""
    n, here = net.graph.nodes, slice(net.rows.start, net.rows.stop)
    T = rows(n, 1001, torch.float32)[here]
    done = {"mix": net.mix(T), "mean": net.all_reduce(T), "report": net.report(T)}
    received, weights = net.receive(T)
    done |= {"receive": received[:, :3], "weights": weights[:, :3]}
    if not net.graph.topology.directed and not any(group.fault.attack.omniscient for group in net.links.liars):
        of_mine = [int(j) in net.rows for j, _ in net.graph.mixing(0).edges]
        done["swap"] = net.swap(rows(len(of_mine), 11, torch.float32)[of_mine])
    done["exchange"] = [{j: (m.index, m.probabilities) for j, m in r.items()} for r in net.exchange(labels(n)[here])]
    done["share"] = {i: row.clone() for i, row in net.share(T, kind="other").items() if i in reach(net)}
    done["collect"] = net.collect(T)
    of_mine = [int(j) in net.rows for j, _ in net.graph.mixing(0).edges]
    done["edges"] = net.collect_edges(rows(len(of_mine), 3, torch.float32)[of_mine])
    done["objects"] = net.collect_objects([f"node {i}" for i in net.rows])
    for honest in (False, True):
        mean = net.report_mean(T, honest)
        done[f"mean row, {honest}"], done[f"distance, {honest}"] = mean, net.report_distance(T, mean, honest)
    done["counts"] = net.counts()
    net.restore(done["counts"])  # as on resume: process 0 carries the sum
    done["restored"] = net.counts()
    return done


def work(rank, folder):
    """Process ``rank`` of a group of two (unless it is the third) and then of three."""
    torch.set_num_threads(1)
    for world in (2, 3):
        if rank < world:
            dist.init_process_group("gloo", init_method=f"file://{folder}/{world}", rank=rank, world_size=world)
            done = {name: everything(network(name, rank, world)) for name in (*GRAPHS, *LYING)}
            torch.save(done, f"{folder}/{world}-{rank}.pt")
            dist.destroy_process_group()


@pytest.mark.slow
def test_two_and_three_processes_give_the_bits_and_counts_of_one(tmp_path):
    limit = time.monotonic() + 60
    processes = spawn(work, (str(tmp_path),), nprocs=3, join=False)
    try:
        while not processes.join(timeout=max(0, limit - time.monotonic())):  # returns whenever one of them ends
            assert time.monotonic() < limit, "the processes hang"
    finally:
        for process in processes.processes:
            process.kill()
    for world in (2, 3):
        parts = [torch.load(tmp_path / f"{world}-{rank}.pt", weights_only=False) for rank in range(world)]
        for name in (*GRAPHS, *LYING):
            alone = everything(network(name))
            for what in ("mix", "mean", "receive", "weights", "swap"):
                if what in alone:
                    assert torch.equal(torch.cat([p[name][what] for p in parts]), alone[what]), (world, name, what)
            spread = [received for p in parts for received in p[name]["exchange"]]
            for got, expected in zip(spread, alone["exchange"], strict=True):
                assert list(got) == list(expected)
                for sender, message in expected.items():
                    assert all(torch.equal(a, b) for a, b in zip(got[sender], message, strict=True))
            for p in parts:
                for i, row in p[name]["share"].items():
                    assert torch.equal(row, alone["share"][i])
                assert torch.equal(p[name]["report"], alone["report"])
                for honest in (False, True):
                    assert torch.equal(p[name][f"mean row, {honest}"], alone[f"mean row, {honest}"])
                    assert p[name][f"distance, {honest}"] == alone[f"distance, {honest}"]
                assert p[name]["counts"] == p[name]["restored"] == alone["counts"], (world, name)
            for what in ("collect", "edges", "objects"):
                first, *others = [p[name][what] for p in parts]
                assert others == [None] * (world - 1)
                assert first == alone[what] if what == "objects" else torch.equal(first, alone[what])


@pytest.mark.parametrize("name", GRAPHS)
def test_what_a_node_receives_averages_to_what_mixing_gives(name):
    net = network(name)
    T, W = rows(net.graph.nodes, 7), net.graph.mixing(0).W
    V, w = net.receive(T)
    assert torch.equal(V[:, 0], T)
    np.testing.assert_allclose((V * w[..., None]).sum(1), W @ T.numpy(), rtol=0, atol=1e-12)
    for i, row in enumerate(V):
        senders = [j for j in range(len(T)) if W[i, j] and j != i]
        assert torch.equal(row[1 : len(senders) + 1], T[senders]), "received rows by ascending sender"
        assert torch.equal(row[len(senders) + 1 :], T[i].expand(len(row) - len(senders) - 1, -1)), "filled by its own"
    edges = len(net.graph.mixing(0).edges)
    assert net.counts() == KINDS | {"parameter_bytes": edges * 7 * 8, "messages": edges}
