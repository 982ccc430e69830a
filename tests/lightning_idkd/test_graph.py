import pickle
from itertools import pairwise

import networkx as nx
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from lightning_idkd import graph as graph_module
from lightning_idkd.errors import UserError
from lightning_idkd.graph import Chain, Complete, Graph, Ring, Social15, Social32, Topology, Torus
from lightning_idkd.network import Network
from lightning_idkd.topologies import BinaryTree, Hypercube, OnePeerExponential, Petersen10, Star

BUILT_IN = [
    (Ring(), 1),
    (Ring(), 2),
    (Ring(), 16),
    (Chain(), 5),
    (Complete(), 6),
    (Torus(3, 5), 15),
    (Social15(), 15),
    (Social32(), 32),
]


class Pairs(Topology):
    """Random perfect matchings, never repeating."""

    period = None

    def graph(self, nodes, step, seed):
        order = np.random.default_rng([seed, step]).permutation(nodes).tolist()
        graph = nx.empty_graph(nodes)
        graph.add_edges_from(zip(order[::2], order[1::2], strict=True))
        return graph


class Fixed(Topology):
    """A given graph; the flags may lie about it."""

    def __init__(self, *graphs, directed=False):
        self.graphs, self.directed, self.period = graphs, directed, len(graphs)

    def graph(self, nodes, step, seed):
        return self.graphs[step]


@pytest.mark.parametrize(("topology", "nodes"), BUILT_IN)
def test_metropolis_weights_are_symmetric_and_doubly_stochastic_on_the_edges(topology, nodes):
    mixing = Graph(topology, nodes).mixing(0)
    W = mixing.W
    assert W.shape == (nodes, nodes)
    assert W.dtype == np.float64
    assert np.array_equal(W, W.T)
    np.testing.assert_allclose(W.sum(0), 1, atol=1e-15 * nodes)
    assert (W.diagonal() > 0).all()
    off_diagonal = W - np.diag(W.diagonal())
    assert np.array_equal(np.argwhere(off_diagonal > 0), mixing.edges)


def test_metropolis_weights_follow_the_larger_degree():
    W = Graph(Chain(), 3).mixing(0).W
    np.testing.assert_allclose(W, np.array([[2, 1, 0], [1, 1, 1], [0, 1, 2]]) / 3, atol=1e-15)


@pytest.mark.parametrize("weights", ["metropolis", "uniform"])
def test_ring_has_the_spectrum_of_a_circulant_matrix(weights):
    n = 16
    graph = Graph(Ring(), n, weights)
    expected = 1 / 3 + 2 / 3 * np.cos(2 * np.pi * np.arange(n) / n)
    np.testing.assert_allclose(np.linalg.eigvalsh(graph.mixing(0).W), np.sort(expected), atol=1e-12)
    assert graph.spectral_gap() == pytest.approx(2 / 3 * (1 - np.cos(2 * np.pi / n)))
    assert graph.smallest_eigenvalue() == pytest.approx(-1 / 3)
    assert graph.diameter == n // 2


@pytest.mark.parametrize(
    ("weights", "expected", "kind"),
    [
        ("max_degree", [[3, 1, 0, 0], [1, 1, 1, 1], [0, 1, 3, 0], [0, 1, 0, 3]], "doubly"),  # over 4
        ("lazy", [[7, 1, 0, 0], [1, 5, 1, 1], [0, 1, 7, 0], [0, 1, 0, 7]], "doubly"),  # over 8
        (
            "push_sum",
            [[1 / 2, 1 / 4, 0, 0], [1 / 2, 1 / 4, 1 / 2, 1 / 2], [0, 1 / 4, 1 / 2, 0], [0, 1 / 4, 0, 1 / 2]],
            "column",
        ),
        ("average", [[1 / 2, 1 / 2, 0, 0], [1 / 4] * 4, [0, 1 / 2, 1 / 2, 0], [0, 1 / 2, 0, 1 / 2]], "row"),
    ],
)
def test_weights_of_a_star_of_four(weights, expected, kind):
    graph = Graph(Fixed(nx.Graph([(1, 0), (1, 2), (1, 3)])), 4, weights)
    expected = np.array(expected) / {"max_degree": 4, "lazy": 8}.get(weights, 1)
    np.testing.assert_allclose(graph.mixing(0).W, expected, atol=1e-15)
    assert graph.kind == graph.mixing(0).kind == kind
    assert np.allclose(expected.sum(0), 1) == (kind != "row")
    assert np.allclose(expected.sum(1), 1) == (kind != "column")


def test_push_sum_weights_divide_what_a_node_sends():
    graph = Graph(Fixed(nx.DiGraph([(0, 1), (0, 2), (1, 0), (2, 0), (2, 1)]), directed=True), 3, "push_sum")
    np.testing.assert_allclose(graph.mixing(0).W, [[1 / 3, 1 / 2, 1 / 3], [1 / 3, 1 / 2, 1 / 3], [1 / 3, 0, 1 / 3]])


class Weighted(Topology):
    """A triangle with a weight on its edges."""

    own_weights = "edges"

    def __init__(self, weight):
        self.weight = weight

    def graph(self, nodes, step, seed):
        graph = nx.complete_graph(nodes)
        nx.set_edge_attributes(graph, self.weight, "weight")
        return graph


def test_a_topology_may_bring_its_own_weights():
    np.testing.assert_allclose(Graph(Weighted(0.4), 3).mixing(0).W, [[0.2, 0.4, 0.4], [0.4, 0.2, 0.4], [0.4, 0.4, 0.2]])
    for attribute in (0.4, "thick", None):  # which only weights of edges read
        np.testing.assert_allclose(Graph(Weighted(attribute), 3, "uniform").mixing(0).W, 1 / 3)
    for wrong in (0.6, -0.1):
        with pytest.raises(UserError, match="edge weights of Weighted at a node sum to more than 1, or are negative"):
            Graph(Weighted(wrong), 3)


def test_torus_has_the_spectrum_of_a_product_of_rings():
    graph = Graph(Torus(4, 4), 16)
    assert graph.smallest_eigenvalue() == pytest.approx(-0.6)  # (1 - 2 - 2) / 5
    assert graph.spectral_gap() == pytest.approx(0.4)  # 1 - (1 + 2 + 0) / 5
    assert graph.diameter == 4
    assert Graph(Torus(3, 5), 15).mixing(0).neighbours(0) == [1, 4, 5, 10]


def test_spectral_gap_counts_negative_eigenvalues():
    bipartite = Fixed(nx.complete_bipartite_graph(4, 4))
    graph = Graph(bipartite, 8)  # W = (I + A) / 5, A has eigenvalues 4, 0, -4
    assert graph.smallest_eigenvalue() == pytest.approx(-0.6)
    assert graph.spectral_gap() == pytest.approx(0.4)


def test_complete_graph_averages_in_one_step():
    graph = Graph(Complete(), 8)
    np.testing.assert_allclose(graph.mixing(0).W, 1 / 8)
    assert graph.spectral_gap() == pytest.approx(1)


def test_one_and_two_nodes():
    single = Graph(Ring(), 1)
    assert single.mixing(0).W.tolist() == [[1.0]]
    assert single.mixing(0).edges.shape == (0, 2)
    assert (single.spectral_gap(), single.diameter) == (1.0, 0)
    pair = Graph(Ring(), 2).mixing(0)
    assert pair.edges.tolist() == [[0, 1], [1, 0]]
    assert pair.W.tolist() == [[0.5, 0.5], [0.5, 0.5]]


@pytest.mark.parametrize(("topology", "nodes"), BUILT_IN)
def test_edges_are_sorted_and_go_both_ways(topology, nodes):
    mixing = Graph(topology, nodes).mixing(0)
    edges = [tuple(e) for e in mixing.edges.tolist()]
    assert edges == sorted(set(edges))
    assert {(b, a) for a, b in edges} == set(edges)
    assert mixing.edges.dtype == np.int64
    assert all(mixing.neighbours(i) == [s for s, r in edges if r == i] for i in range(nodes))


def test_social_graphs_have_their_documented_order():
    families = Graph(Social15(), 15).mixing(0)
    assert families.neighbours(9) == [12]  # Pazzi: Salviati
    assert families.neighbours(8) == [0, 1, 2, 11, 12, 14]  # Medici
    events = Graph(Social32(), 32).mixing(0)
    assert events.neighbours(0) == [18, 19, 20, 21, 22, 23, 25, 26]  # Evelyn came to events 1-6, 8, 9
    assert [len(events.neighbours(i)) for i in (25, 31)] == [14, 3]  # events 8 and 14
    assert len(events.edges) == 2 * 89


def test_a_static_graph_returns_the_same_object_and_a_periodic_one_repeats():
    ring = Graph(Ring(), 4)
    assert ring.mixing(0) is ring.mixing(7)
    exponential = Graph(OnePeerExponential(), 8)
    assert exponential.mixing(1) is exponential.mixing(4)
    assert exponential.mixing(1) is not exponential.mixing(2)


def test_directed_edges_carry_weights_to_the_receiver():
    graph = Graph(OnePeerExponential(), 8)
    mixing = graph.mixing(0)
    assert mixing.W[1, 0] == mixing.W[1, 1] == 0.5  # 0 sends to 1
    assert mixing.W[0, 1] == 0
    assert mixing.neighbours(1) == [0]
    product = graph.mixing(2).W @ graph.mixing(1).W @ mixing.W
    np.testing.assert_allclose(product, 1 / 8)
    assert graph.diameter == 3
    assert graph.spectral_gap() == 1


def test_a_graph_that_never_repeats_depends_on_seed_and_step_alone_and_remembers_little():
    graph = Graph(Pairs(), 10, seed=3)
    first = graph.mixing(0)
    for step in range(200):
        assert len(graph.mixing(step).edges) == 10
    assert len(graph._cache) == 64
    assert graph.mixing(0) is not first
    np.testing.assert_array_equal(graph.mixing(0).W, first.W)
    assert not np.array_equal(Graph(Pairs(), 10, seed=4).mixing(0).W, first.W)
    assert 0 < graph.spectral_gap() < 1
    assert graph.diameter is None


def test_random_pairs_come_nearer_by_the_known_share_a_step():
    """A perfect matching leaves (n - 2) / (2 (n - 1)) of the squared distance in the mean."""
    assert Graph(Pairs(), 100).spectral_gap() == pytest.approx(1 - np.sqrt(98 / 198), abs=0.05)


def test_consensus_takes_the_steps_that_the_spectrum_says():
    n = 16
    eigenvalues = 1 / 3 + 2 / 3 * np.cos(2 * np.pi * np.arange(1, n) / n)
    expected = next(t for t in range(1000) if np.sqrt((eigenvalues ** (2 * t)).mean()) <= 1e-3)
    assert Graph(Ring(), n).consensus_steps(1000) == pytest.approx(expected, abs=3)
    assert Graph(Ring(), n).consensus_steps(20) is None
    assert Graph(Complete(), n).consensus_steps(5, 1e-12) == 1
    assert Graph(OnePeerExponential(), n).consensus_steps(9, 1e-12) == 4
    assert Graph(OnePeerExponential(), n, "push_sum").consensus_steps(9, 1e-12) == 4
    # the columns' fixed vector is not the mean, the mass corrects it
    star = Graph(Fixed(nx.star_graph(4)), 5, "push_sum")
    assert star.consensus_steps(100) < 30


def test_the_step_last_used_is_remembered():
    graph = Graph(Pairs(), 4)
    kept = graph.mixing(0)
    for step in range(1, 100):
        graph.mixing(step)
        assert graph.mixing(0) is kept


def test_a_graph_can_be_sent_to_another_process():
    graph = Graph(Torus(3, 3), 9)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(graph)).mixing(0).W, graph.mixing(0).W)


def test_periodic_graphs_may_be_disconnected_at_a_step_but_not_over_a_period():
    even, odd = (nx.Graph(pairwise(p)) for p in ([0, 1], [2, 1]))
    for graph in (even, odd):
        graph.add_nodes_from(range(3))
    assert Graph(Fixed(even, odd), 3).diameter == 2
    with pytest.raises(UserError, match=r"^graph\.topology: Fixed on 3 nodes is not connected$"):
        Graph(Fixed(even), 3)
    with pytest.raises(UserError, match="not connected, even over all 2 steps"):
        Graph(Fixed(even, even), 3)
    one_way = nx.DiGraph([(0, 1), (2, 3)])
    with pytest.raises(UserError, match=r"graph\.weights: uniform .* degrees 0, 1"):
        Graph(Fixed(one_way, directed=True), 4)
    with pytest.raises(UserError, match="not connected"):
        Graph(Fixed(nx.DiGraph([(0, 1), (1, 0), (2, 3), (3, 2)]), directed=True), 4)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: Graph(Torus(3, 5), 16),
            "graph.topology: a torus of 3 x 5 has 15 nodes, but graph.nodes is 16; allowed: 4 x 4",
        ),
        (
            lambda: Graph(Torus(4, 4), 36),
            "graph.topology: a torus of 4 x 4 has 16 nodes, but graph.nodes is 36; allowed: 3 x 12, 4 x 9, 6 x 6",
        ),
        (
            lambda: Graph(Torus(3, 3), 14),
            "graph.topology: a torus of 3 x 3 has 9 nodes, but graph.nodes is 14; "
            "allowed: none, 14 is not a product of two numbers of at least 3",
        ),
        (
            lambda: Torus(2, 8),
            "graph.topology.rows: the sides of a torus must be at least 3, given rows 2 and cols 8 "
            "(with a side of 1 it is a Ring, with a side of 2 edges coincide)",
        ),
        (
            lambda: Graph(Social15(), 16),
            "graph.topology: Social15 has 15 nodes, but graph.nodes is 16; allowed: 15",
        ),
        (
            lambda: Graph(Social32(), 16),
            "graph.topology: Social32 has 32 nodes, but graph.nodes is 16; allowed: 32",
        ),
        (
            lambda: Graph(Chain(), 5, "uniform"),
            "graph.weights: uniform weights 1/(d+1) are symmetric on regular graphs only, "
            "and this graph has degrees 1, 2; use metropolis (undirected graphs), push_sum or average",
        ),
        (
            lambda: Graph(Ring(), 4, "metropols"),
            "graph.weights: 'metropols' given; allowed: metropolis, uniform, max_degree, lazy, push_sum, average. "
            "Did you mean 'metropolis'?",
        ),
        (lambda: Graph(Ring(), 0), "graph.nodes: 0 given; allowed: 1 or more"),
        (lambda: Graph(Fixed(), 2), "graph.topology: period 0 given; allowed: 1 or more, or None"),
        (
            lambda: Graph(Fixed(nx.path_graph(3)), 4),
            "graph.topology: Fixed must label its nodes 0 to 3, graph.nodes - 1",
        ),
        (
            lambda: Graph(Fixed(nx.Graph([(0, 1), (1, 1)])), 2),
            "graph.topology: Fixed must return undirected graphs without self-loops or double edges",
        ),
        (
            lambda: Graph(Fixed(nx.path_graph(2), directed=True), 2),
            "graph.topology: Fixed must return directed graphs without self-loops or double edges",
        ),
        (
            lambda: Graph(Fixed(nx.MultiGraph([(0, 1), (0, 1)])), 2),
            "graph.topology: Fixed must return undirected graphs without self-loops or double edges",
        ),
    ],
)
def test_a_mistake_is_named_with_its_key_and_what_is_allowed(build, message):
    with pytest.raises(UserError) as error:
        build()
    assert str(error.value) == message


@pytest.mark.parametrize("topology", [Torus(3, 4), Fixed(nx.path_graph(12)), Complete()])
def test_a_drawing_is_the_same_each_time(topology, tmp_path):
    graph = Graph(topology, 12)
    before = np.random.get_state()[1].tolist(), np.random.get_state()[2]
    for name in ("a.png", "b.png"):
        graph.draw(tmp_path / name, values=range(12), labels=[f"n{i}" for i in range(12)])
    assert (np.random.get_state()[1].tolist(), np.random.get_state()[2]) == before  # the global generator rests
    first = (tmp_path / "a.png").read_bytes()
    assert first == (tmp_path / "b.png").read_bytes()
    graph.draw(str(tmp_path / "c.png"))
    assert first != (tmp_path / "c.png").read_bytes()


def test_a_drawing_outlines_the_nodes_that_it_is_told_to():
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    Graph(Ring(), 4).draw(axes, [0.1, 0.2, 0.3, 0.4], outlined=[False, True, False, False])
    (drawn,) = (c for c in axes.collections if len(c.get_offsets()) == 4)
    widths = drawn.get_linewidths()
    assert max(widths) == widths[1] > 2 * max(widths[0], *widths[2:])
    with pytest.raises(UserError, match="outlined"):
        Graph(Ring(), 4).draw(axes, outlined=[True])


def test_a_drawing_goes_onto_a_given_axes_with_node_numbers():
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    Graph(OnePeerExponential(), 8).draw(axes, values=range(8))
    assert [t.get_text() for t in axes.texts] == [str(i) for i in range(8)]
    (nodes,) = (c for c in axes.collections if len(c.get_offsets()) == 8)
    assert nodes.get_array().tolist() == list(range(8))


@pytest.mark.parametrize(
    ("topology", "nodes"), [*((Torus(r, c), r * c) for r, c in [(3, 3), (3, 8), (4, 4), (4, 8), (8, 8)]),
                            (Hypercube(), 8), (Hypercube(), 16), (BinaryTree(), 15), (Petersen10(), 10), (Star(), 16)]
)  # fmt: skip
def test_no_node_lies_on_an_edge_of_others(topology, nodes):
    at = topology.positions(nodes)
    for a, b in Graph(topology, nodes).mixing(0).edges:
        along = at[b] - at[a]
        t = np.clip((at - at[a]) @ along / (along @ along), 0, 1)
        distance = np.linalg.norm(at - at[a] - t[:, None] * along, axis=1)
        distance[[a, b]] = np.inf
        assert distance.min() > 0.012 * np.ptp(at, axis=0).max()


@pytest.mark.parametrize("nodes", [32, 64])
def test_nodes_of_a_large_hypercube_do_not_coincide(nodes):
    at = Hypercube().positions(nodes)
    distance = np.linalg.norm(at[:, None] - at, axis=2) + np.eye(nodes)
    assert distance.min() > 0.015 * np.ptp(at, axis=0).max()


class TestManyNodes:
    @pytest.fixture
    def large(self, monkeypatch):
        """Treats graphs of more than 10 nodes as large."""
        monkeypatch.setattr(graph_module, "LARGE", 10)

    @pytest.mark.usefixtures("large")
    @pytest.mark.parametrize("weights", ["metropolis", "lazy", "max_degree"])
    @pytest.mark.parametrize(
        ("topology", "nodes"), [(Ring(), 40), (Chain(), 24), (Torus(5, 8), 40), (Social32(), 32)], ids=str
    )
    def test_spectra_of_sparse_matrices_equal_those_of_whole_ones(self, topology, nodes, weights):
        graph = Graph(topology, nodes, weights)
        values = np.linalg.eigvalsh(graph.mixing(0).W)
        assert graph.spectral_gap() == pytest.approx(1 - np.sort(np.abs(values))[-2], rel=1e-4)
        assert graph.smallest_eigenvalue() == pytest.approx(values[0], abs=1e-4)

    def test_a_ring_of_ten_thousand_has_the_spectrum_of_its_closed_form(self):
        n = 10_000
        graph = Graph(Ring(), n)
        assert graph.spectral_gap() == pytest.approx(2 / 3 * (1 - np.cos(2 * np.pi / n)), rel=1e-4)
        assert graph.smallest_eigenvalue() == pytest.approx(-1 / 3, abs=1e-4)
        assert graph.diameter_bound == n // 2

    @pytest.mark.usefixtures("large")
    def test_an_exact_mean_and_a_directed_graph_are_measured(self):
        assert Graph(OnePeerExponential(), 16).spectral_gap() == 1
        directed = Graph(Fixed(nx.DiGraph([(i, (i + k) % 30) for i in range(30) for k in (1, 7)]), directed=True), 30)
        assert 0 < directed.spectral_gap() < 1
        assert np.isnan(directed.smallest_eigenvalue())

    def test_mixing_takes_memory_for_edges_alone(self):
        graph, n = Graph(Ring(), 10_000), 10_000
        network, T = Network(graph), torch.arange(n, dtype=torch.float64)[:, None]
        mixed = network.mix(T)
        assert mixed[1:-1].sub(T[1:-1]).abs().max() < 1e-9  # the mean of three that follow each other
        network.swap(T[network.edges()[:, 0]])
        assert network.receive(T)[0].shape == (n, 3, 1)
        arrays = [v for v in vars(graph.mixing(0)).values() if isinstance(v, np.ndarray)]
        assert sum(a.nbytes for a in arrays) < 100 * n

    def test_a_picture_of_many_nodes_has_no_numbers(self, tmp_path):
        Graph(Ring(), 2001).draw(tmp_path / "ring.png")
        axes = Figure().add_subplot()
        Graph(Torus(3, 667), 2001).draw(axes)
        assert not axes.texts


@pytest.mark.parametrize("weights", ["metropolis", "average", "push_sum"])
def test_entries_of_w_are_found_without_the_whole_matrix(weights):
    mixing = Graph(Chain(), 5, weights).mixing(0)
    receivers, senders = np.indices((5, 5)).reshape(2, -1)
    np.testing.assert_array_equal(mixing.entries(receivers, senders), mixing.W.flatten())
    assert Graph(Complete(), 1).mixing(0).entries(np.zeros(1, int), np.zeros(1, int)).tolist() == [1.0]
