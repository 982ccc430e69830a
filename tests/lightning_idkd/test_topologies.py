"""Every family of graphs against closed forms: degrees, diameters, spectra, exact means after a period."""

import itertools
import json
import pickle
import warnings

import networkx as nx
import numpy as np
import pytest
import yaml
from scipy.optimize import minimize

from lightning_idkd import topologies
from lightning_idkd.cli import main
from lightning_idkd.config.parse import configure
from lightning_idkd.errors import UserError
from lightning_idkd.graph import Graph, Ring, Torus
from lightning_idkd.topologies import (
    BarabasiAlbert,
    BaseGraph,
    BinaryTree,
    Chain,
    Complete,
    Corona,
    DoubleBinaryTrees,
    Dyck32,
    EdgeList,
    EpidemicLocal,
    EpidemicOracle,
    ErdosRenyi,
    Exponential,
    Grid,
    Hypercube,
    HypercubeOnePeer,
    Karate34,
    Margulis,
    NetworkX,
    OnePeerExponential,
    Petersen10,
    RandomMatchings,
    RandomRegular,
    Social15,
    Social32,
    SpanningTree,
    Star,
    WattsStrogatz,
)
from lightning_idkd.topologies.varying import laplacian, matchings, probabilities, step_size

STATIC = [
    (Star(), 9),
    (Grid(3, 5), 15),
    (Hypercube(), 16),
    (Exponential(), 11),
    (Margulis(), 25),
    (BinaryTree(), 13),
    (Corona(5), 16),
    (DoubleBinaryTrees(), 13),
    (BinaryTree("relaysgd"), 13),
    (DoubleBinaryTrees("relaysgd"), 13),
    (SpanningTree(Margulis()), 16),
    (Karate34(), 34),
    (Petersen10(), 10),
    (Dyck32(), 32),
    (ErdosRenyi(0.25), 16),
    (WattsStrogatz(4, 0.3), 16),
    (BarabasiAlbert(2), 16),
    (RandomRegular(3), 16),
    (NetworkX("connected_caveman_graph", {"l": 4, "k": 4}), 16),
]
VARYING = [
    (OnePeerExponential(), 8),
    (OnePeerExponential(), 11),
    (HypercubeOnePeer(), 8),
    (BaseGraph(1), 7),
    (BaseGraph(2), 14),
    (RandomMatchings(Karate34(), 0.4), 34),
    (RandomMatchings(), 8),
    (EpidemicLocal(2), 9),
    (EpidemicOracle(2), 9),
]


def family(graph):
    """Its graph at step 0, from the edges that carry weights."""
    made = nx.DiGraph() if graph.topology.directed else nx.Graph()
    made.add_nodes_from(range(graph.nodes))
    made.add_edges_from(graph.mixing(0).edges.tolist())
    return made


def spectrum(graph):
    """Eigenvalues of the adjacency matrix, ascending, as (value, multiplicity)."""
    values = np.round(np.linalg.eigvalsh(nx.to_numpy_array(family(graph))), 9)
    return [(v, int((values == v).sum())) for v in np.unique(values)]


def product(graph):
    """W of a whole period."""
    P = np.eye(graph.nodes)
    for step in range(graph.period):
        P = graph.mixing(step).W @ P
    return P


@pytest.mark.parametrize(("topology", "nodes"), STATIC + VARYING, ids=lambda v: str(v)[:40])
def test_weights_are_not_negative_and_sum_to_one(topology, nodes):
    graph = Graph(topology, nodes, seed=1)
    for step in range(8):
        mixing = graph.mixing(step)
        W = mixing.W
        assert (W >= 0).all()
        np.testing.assert_allclose(W.sum(1), 1, atol=1e-12)
        if mixing.kind == "doubly":
            np.testing.assert_allclose(W.sum(0), 1, atol=1e-12)  # so the mean stays
        if not topology.directed:
            assert np.array_equal(W, W.T)
        sender, receiver = np.nonzero(W.T)
        assert {(a, b) for a, b in zip(sender, receiver, strict=True) if a != b} == set(
            map(tuple, mixing.edges.tolist())
        )


@pytest.mark.parametrize(("topology", "nodes"), STATIC, ids=lambda v: str(v)[:40])
def test_static_graphs_are_connected_and_mix(topology, nodes):
    graph = Graph(topology, nodes, seed=2)
    assert graph.period == 1
    assert 0 < graph.spectral_gap() <= 1
    assert graph.diameter >= 1


@pytest.mark.parametrize(("topology", "nodes"), STATIC + VARYING, ids=lambda v: str(v)[:40])
def test_graphs_depend_on_seed_and_step_alone(topology, nodes):
    one, other = Graph(topology, nodes, seed=3), Graph(pickle.loads(pickle.dumps(topology)), nodes, seed=3)
    backwards = {step: other.mixing(step).W for step in range(6, -1, -1)}
    np.random.seed(0)
    for step in range(7):
        assert np.array_equal(one.mixing(step).W, backwards[step])


@pytest.mark.parametrize(
    "topology",
    [
        ErdosRenyi(0.25),
        WattsStrogatz(4, 0.3),
        BarabasiAlbert(2),
        RandomRegular(3),
        NetworkX("gnp_random_graph", {"p": 0.3}),
    ],
)
def test_random_graphs_differ_by_seed(topology):
    assert not np.array_equal(Graph(topology, 16, seed=0).mixing(0).W, Graph(topology, 16, seed=1).mixing(0).W)


@pytest.mark.parametrize("topology", [RandomMatchings(Torus(4, 4)), EpidemicLocal(2), EpidemicOracle(2)])
def test_graphs_that_never_repeat_differ_by_step_and_seed(topology):
    graph = Graph(topology, 16, seed=0)
    assert graph.period is None
    assert not np.array_equal(graph.mixing(0).W, graph.mixing(1).W)
    assert not np.array_equal(graph.mixing(0).W, Graph(topology, 16, seed=1).mixing(0).W)


# ------------------------------------------------------------------ static families


def test_a_star_has_one_hub():
    graph = Graph(Star(), 9)
    assert [d for _, d in family(graph).degree] == [8] + [1] * 8
    assert graph.diameter == 2
    assert graph.spectral_gap() == pytest.approx(1 / 9)  # W = I - L / 9, L has eigenvalues 0, 1, 9


def test_a_grid_is_a_product_of_chains():
    graph = Graph(Grid(3, 5), 15)
    assert graph.diameter == 2 + 4
    assert sorted(d for _, d in family(graph).degree) == [2] * 4 + [3] * 8 + [4] * 3
    a, b = (2 * np.cos(np.pi * np.arange(1, m + 1) / (m + 1)) for m in (3, 5))
    expected = np.sort(np.add.outer(a, b).ravel())
    np.testing.assert_allclose(np.linalg.eigvalsh(nx.to_numpy_array(family(graph))), expected, atol=1e-9)


def test_a_hypercube_has_binomial_eigenvalues():
    graph = Graph(Hypercube(), 16)
    assert spectrum(graph) == [(-4, 1), (-2, 4), (0, 6), (2, 4), (4, 1)]
    assert graph.mixing(0).neighbours(5) == [1, 4, 7, 13]
    assert graph.diameter == 4
    assert graph.spectral_gap() == pytest.approx(2 / 5)


@pytest.mark.parametrize(("nodes", "gap"), [(8, 2 / 4), (16, 2 / 5), (64, 2 / 7)])
def test_an_exponential_graph_has_the_spectral_gap_of_its_paper(nodes, gap):
    """Ying et al., NeurIPS 2021: 2 / (1 + ceil(log2 n)), with equality for even n."""
    graph = Graph(Exponential(), nodes)
    assert graph.spectral_gap() == pytest.approx(gap)
    assert {d for _, d in family(graph).out_degree} == {np.log2(nodes)}
    assert graph.mixing(0).neighbours(0) == sorted(nodes - 2**k for k in range(int(np.log2(nodes))))


def test_margulis_graphs_keep_a_spectral_gap_of_the_bound():
    """Second eigenvalue of the multigraph at most 5 sqrt 2 of 8; ours has no loops and double edges."""
    for m in (3, 6, 12):
        graph = Graph(Margulis(), m * m)
        assert max(d for _, d in family(graph).degree) <= 8
        assert graph.spectral_gap() > (8 - 5 * np.sqrt(2)) / 9


def test_binary_trees_have_parents_at_half_the_number():
    tree = family(Graph(BinaryTree(), 13))
    assert nx.is_tree(tree)
    assert sorted(tree.edges) == sorted(((i - 1) // 2, i) for i in range(1, 13))


def test_a_corona_is_a_ring_whose_nodes_have_leaves():
    """The edges of the authors' malicious ring, written out: its leaves are the lying nodes."""
    ring, leaves = [(0, 1), (1, 2), (2, 3), (3, 4), (0, 4)], [(0, 5), (1, 6), (2, 7), (3, 8), (4, 9), (0, 10), (1, 11)]
    leaves += [(2, 12), (3, 13), (4, 14), (0, 15)]
    graph = Graph(Corona(5), 16)
    assert {frozenset(e) for e in graph.mixing(0).edges.tolist()} == {frozenset(e) for e in ring + leaves}
    places = np.round(graph.topology.positions(16), 6)
    assert len({tuple(place) for place in places}) == 16
    for core, nodes, message in ((2, 5, "core: 2 given; allowed: 3 or more"), (6, 5, "core: 6 given; allowed: 3 to")):
        with pytest.raises(UserError, match=message):
            Graph(Corona(core), nodes)


@pytest.mark.parametrize(("base", "nodes", "depth"), [(Social15(), 15, 3), (Torus(4, 4), 16, 4), (Complete(), 9, 1),
                                                      (Ring(), 1, 0)])  # fmt: skip
def test_a_spanning_tree_has_shortest_ways_from_the_centre_along_edges_of_its_base(base, nodes, depth):
    tree, whole = family(Graph(SpanningTree(base), nodes)), family(Graph(base, nodes))
    assert nx.is_tree(tree)
    assert set(tree) == set(range(nodes))
    assert all(whole.has_edge(*edge) for edge in tree.edges)
    ways = nx.single_source_shortest_path_length
    assert nx.radius(whole) == depth
    assert any(ways(tree, i) == ways(whole, i) for i in nx.center(whole))


def test_no_node_is_a_leaf_in_both_binary_trees():
    n = 14
    double = family(Graph(DoubleBinaryTrees(), n))
    tree = family(Graph(BinaryTree(), n))
    mirrored = nx.relabel_nodes(tree, {i: n - 1 - i for i in tree})
    assert set(double.edges) == {tuple(sorted(e)) for e in (*tree.edges, *mirrored.edges)}
    leaves = [{i for i in t if t.degree(i) == 1} for t in (tree, mirrored)]
    assert not leaves[0] & leaves[1]
    assert double.degree(0) <= 4


def test_trees_may_be_numbered_as_in_the_code_of_relaysgd():
    """There node i has parent i // 2 and children 2i and 2i + 1, node 0 the neighbour 1; reversed, n - 1 - i does."""
    n = 16
    near = {0: {1}} | {i: {i // 2} | {c for c in (2 * i, 2 * i + 1) if c < n} for i in range(1, n)}
    theirs = nx.Graph([(i, j) for i, there in near.items() for j in there])
    reverse = nx.relabel_nodes(theirs, {i: n - 1 - i for i in theirs})
    tree, double = BinaryTree("relaysgd"), DoubleBinaryTrees("relaysgd")
    assert nx.utils.edges_equal(family(Graph(tree, n)).edges, theirs.edges)
    assert nx.utils.edges_equal(family(Graph(double, n)).edges, nx.compose(theirs, reverse).edges)
    made = [tree, double, BinaryTree(), DoubleBinaryTrees()]
    assert [nx.diameter(topology.graph(n, 0, 0)) for topology in made] == [6, 4, 7, 4]
    assert len(set(map(tuple, tree.positions(n)))) == n
    assert [Graph(tree, count).diameter for count in (1, 2, 3)] == [0, 1, 2]
    with pytest.raises(UserError, match=r"graph\.topology\.numbering: 'relay' given; allowed: relaysgd, or null"):
        Graph(BinaryTree("relay"), n)


def test_named_graphs_have_their_spectra():
    assert spectrum(Graph(Petersen10(), 10)) == [(-2, 4), (1, 5), (3, 1)]
    five = round(float(np.sqrt(5)), 9)
    assert spectrum(Graph(Dyck32(), 32)) == [(-3, 1), (-five, 6), (-1, 9), (1, 9), (five, 6), (3, 1)]
    assert [Graph(t, n).diameter for t, n in ((Petersen10(), 10), (Dyck32(), 32), (Karate34(), 34))] == [2, 5, 5]
    assert family(Graph(Karate34(), 34)).number_of_edges() == 78
    # unweighted: Metropolis-Hastings of degree 16
    assert Graph(Karate34(), 34).mixing(0).W[0, 1] == pytest.approx(1 / 17)


def test_watts_strogatz_without_moved_edges_is_the_ring_of_nearest():
    graph = family(Graph(WattsStrogatz(4, 0), 10))
    assert sorted(graph.neighbors(0)) == [1, 2, 8, 9]
    assert family(Graph(WattsStrogatz(4, 1), 10)).number_of_edges() == 20


def test_random_families_have_their_numbers_of_edges():
    assert family(Graph(ErdosRenyi(1), 7)).number_of_edges() == 21
    assert family(Graph(BarabasiAlbert(3), 20)).number_of_edges() == 3 * 17
    assert {d for _, d in family(Graph(RandomRegular(5), 20)).degree} == {5}


def test_disconnected_draws_are_repeated():
    assert not all(nx.is_connected(nx.gnp_random_graph(30, 0.08, seed)) for seed in range(10))
    for seed in range(10):
        assert Graph(ErdosRenyi(0.08), 30, seed=seed).diameter is not None


def test_networkx_generators_are_made_simple():
    assert family(Graph(NetworkX("margulis_gabber_galil_graph", {"n": 5}), 25)).number_of_edges() == (
        family(Graph(Margulis(), 25)).number_of_edges()
    )
    assert family(Graph(NetworkX("karate_club_graph"), 34)).number_of_edges() == 78
    ladder = family(Graph(NetworkX("ladder_graph", {"n": 4}), 8))
    assert ladder.number_of_edges() == 10
    assert family(Graph(NetworkX("hypercube_graph", {"n": 3}), 8)).number_of_edges() == 12


def test_an_argument_that_is_not_the_number_of_nodes_is_not_filled_in():
    """16 would mean 65,536 nodes."""
    with pytest.raises(UserError, match=r"graph\.topology\.arguments: hypercube_graph refuses \{\}.*'n'"):
        Graph(NetworkX("hypercube_graph"), 16)


def test_random_graphs_that_agree_at_once_have_gap_one():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Graph(EpidemicOracle(3), 4).spectral_gap() == 1


def test_an_edge_list_is_read_from_a_file(tmp_path):
    (tmp_path / "edges.txt").write_text("# a ring\n0 1\n1 2\n\n2 3  # the last\n3 0\n1 0\n")
    graph = Graph(EdgeList(str(tmp_path / "edges.txt")), 4)
    np.testing.assert_array_equal(graph.mixing(0).W, Graph(Ring(), 4).mixing(0).W)
    one_way = EdgeList(str(tmp_path / "edges.txt"), directed=True)
    graph = Graph(one_way, 4, "average")
    assert graph.mixing(0).neighbours(0) == [1, 3]
    np.testing.assert_allclose(graph.mixing(0).W[0], [1 / 3, 1 / 3, 0, 1 / 3])
    with pytest.raises(UserError, match=r"degrees 1, 2; use metropolis .* push_sum or average"):
        Graph(one_way, 4)


# ------------------------------------------------------------------ exact means


@pytest.mark.parametrize(
    ("topology", "nodes"), [(HypercubeOnePeer(), 2), (HypercubeOnePeer(), 16), (OnePeerExponential(), 32)]
)
def test_one_peer_graphs_make_the_exact_mean_in_log_n_steps(topology, nodes):
    graph = Graph(topology, nodes)
    assert graph.period == np.log2(nodes)
    assert all(len(graph.mixing(step).edges) == nodes for step in range(graph.period))
    np.testing.assert_allclose(product(graph), 1 / nodes, atol=1e-12, rtol=0)
    assert graph.spectral_gap() == 1


def test_one_peer_exponential_is_not_exact_elsewhere_but_mixes():
    graph = Graph(OnePeerExponential(), 11)
    assert graph.period == 4
    assert 0 < graph.spectral_gap() < 1
    # eigenvalues of each step
    steps = [(1 + np.exp(-2j * np.pi * np.arange(1, 11) * hop / 11)) / 2 for hop in (1, 2, 4, 8)]
    assert graph.spectral_gap() == pytest.approx(1 - np.abs(np.prod(steps, axis=0)).max() ** (1 / 4))


@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize("nodes", [*range(5, 28), 49, 100])
def test_base_graphs_make_the_exact_mean_within_the_bounds_of_their_paper(nodes, k):
    """Takezawa et al., Theorem 1: at most k neighbours, 2 log_(k+1) n + 2 steps."""
    lengths = []
    for topology in (BaseGraph(k), BaseGraph(k, simple=True)):
        graph = Graph(topology, nodes)
        np.testing.assert_allclose(product(graph), 1 / nodes, atol=1e-12, rtol=0)
        for step in range(graph.period):
            W = graph.mixing(step).W
            assert ((W > 0).sum(1) - 1).max() <= k
            assert np.array_equal(W, W.T)
        assert graph.period <= 2 * np.log(nodes) / np.log(k + 1) + 2
        lengths.append(graph.period)
    assert lengths[0] <= lengths[1]


@pytest.mark.parametrize(
    ("nodes", "k", "base", "simple"),
    [(5, 1, 5, 5), (6, 1, 4, 5), (8, 1, 3, 3), (25, 4, 2, 2), (6, 2, 2, 2), (9, 8, 1, 1)],
)
def test_base_graphs_are_as_long_as_counted_by_hand(nodes, k, base, simple):
    """6 = 4 + 2: two steps in the four, a trade, two steps; as 3 x 2: three steps in the threes, one across."""
    assert [Graph(BaseGraph(k, s), nodes).period for s in (False, True)] == [base, simple]


def test_base_graphs_of_one_and_two_nodes():
    assert len(Graph(BaseGraph(), 1).mixing(0).edges) == 0
    np.testing.assert_array_equal(product(Graph(BaseGraph(), 2)), np.full((2, 2), 0.5))


# ------------------------------------------------------------------ random ones


@pytest.mark.parametrize("base", [Ring(), Torus(4, 4), Karate34(), Complete(), Chain()])
def test_matchings_share_out_all_edges_and_meet_nowhere(base):
    graph = base.graph(34 if isinstance(base, Karate34) else 16, 0, 0)
    edges = sorted(tuple(sorted(e)) for e in graph.edges)
    parts = matchings(edges)
    assert sorted(e for part in parts for e in part) == edges
    assert all(len({i for e in part for i in e}) == 2 * len(part) for part in parts)
    assert len(parts) <= max(d for _, d in graph.degree) + 1


def test_matchings_that_hold_the_graph_together_are_active_most():
    """Against all probabilities on a grid."""
    barbell = sorted(nx.barbell_graph(3, 0).edges)
    parts = matchings(barbell)
    laplacians = np.array([laplacian(6, part) for part in parts])
    found = probabilities(laplacians, 0.5)
    assert found.mean() == pytest.approx(0.5)
    grid = [p for p in itertools.product(np.linspace(0, 1, 21), repeat=len(parts)) if abs(np.mean(p) - 0.5) < 1e-9]
    assert connectivity(laplacians, found) >= 0.99 * max(connectivity(laplacians, p) for p in grid)
    assert connectivity(laplacians, found) > 1.05 * connectivity(laplacians, np.full(len(parts), 0.5))


def split(topology, nodes):
    """Laplacians of a graph's matchings."""
    edges = sorted(tuple(sorted(edge)) for edge in topology.graph(nodes, 0, 0).edges)
    return np.array([laplacian(nodes, part) for part in matchings(edges)])


def connectivity(laplacians, p):
    """lambda_2 of the expected graph."""
    return np.linalg.eigvalsh(np.tensordot(p, laplacians, 1))[1]


def ascended(laplacians, budget, sharpness):
    """The best lambda_2 of several ascents of its soft minimum, -log(sum of exp(-s lambda)) / s over all but the
    constant vector, by scipy's SLSQP."""
    count, nodes = laplacians.shape[:2]

    def falling(p):
        values, vectors = np.linalg.eigh(np.tensordot(p, laplacians, 1) + 1e3 * np.ones((nodes, nodes)) / nodes)
        weights = np.exp(-sharpness * (values - values[0]))
        slopes = np.einsum("ik,jil,lk->jk", vectors, laplacians, vectors, optimize=True)
        return np.log(weights.sum()) / sharpness - values[0], -slopes @ weights / weights.sum()

    sums = {"type": "eq", "fun": lambda p: p.mean() - budget, "jac": lambda p: np.full(count, 1 / count)}
    rng, found = np.random.default_rng(0), []
    for start in [np.full(count, budget), *rng.uniform(0, 1, (3, count))]:
        made = minimize(falling, start, jac=True, method="SLSQP", bounds=[(0, 1)] * count, constraints=sums)
        p = made.x.clip(0, 1)
        found.append(connectivity(laplacians, p * min(1, budget / p.mean())))
    return max(found)


@pytest.mark.parametrize("budget", [0.25, 0.5, 0.75])
@pytest.mark.parametrize(
    ("topology", "nodes"),
    [(Social15(), 15), (Social32(), 32), (Karate34(), 34), (SpanningTree(Social15()), 15), (Grid(3, 5), 15),
     (BinaryTree(), 15), (Petersen10(), 10), (ErdosRenyi(0.25), 16), (Star(), 9)],
    ids=lambda v: str(v)[:40],
)  # fmt: skip
def test_probabilities_of_matchings_are_within_one_percent_of_an_ascent(topology, nodes, budget):
    laplacians = split(topology, nodes)
    p = probabilities(laplacians, budget)
    assert p.mean() == pytest.approx(budget)
    assert ((p >= 0) & (p <= 1)).all()
    assert connectivity(laplacians, p) >= 0.99 * ascended(laplacians, budget, 400)


def test_probabilities_of_matchings_pass_over_those_that_leave_the_graph_in_parts():
    """Which some iterate does here; lambda_2 as reached by hand."""
    assert connectivity(split(Social15(), 15), probabilities(split(Social15(), 15), 0.75)) == pytest.approx(
        0.304, rel=0.01
    )


@pytest.mark.parametrize(("topology", "nodes", "second"), [
    (Ring(), 16, 2 - 2 * np.cos(2 * np.pi / 16)),
    (Chain(), 16, 2 - 2 * np.cos(np.pi / 16)),
    (Torus(4, 4), 16, 2),
    (Hypercube(), 16, 2),
    (Complete(), 16, 16),
    (Dyck32(), 32, 3 - np.sqrt(5)),
])  # fmt: skip
def test_matchings_of_graphs_that_are_alike_everywhere_are_equally_probable(topology, nodes, second):
    """lambda_2 of the whole graph, times the budget, which no choice exceeds there."""
    laplacians = split(topology, nodes)
    assert connectivity(laplacians, probabilities(laplacians, 0.5)) == pytest.approx(second / 2, rel=0.01)


def test_the_step_size_of_random_matchings_contracts_most_in_the_mean():
    """E[W'W] by going through all subsets of matchings, on a grid of step sizes."""
    edges = sorted(nx.cycle_graph(5).edges)
    laplacians = np.array([laplacian(5, part) for part in matchings(edges)])
    p = np.array([0.3, 0.4, 0.8])

    def norm(alpha):
        total = np.zeros((5, 5))
        for active in itertools.product([0, 1], repeat=3):
            W = np.eye(5) - alpha * np.tensordot(np.array(active), laplacians, 1)
            total += np.prod(np.where(active, p, 1 - p)) * W.T @ W
        return np.linalg.eigvalsh(total - 1 / 5)[-1]

    alpha = step_size(laplacians, p)
    assert norm(alpha) <= min(map(norm, np.linspace(0.01, 0.5, 50))) + 1e-6


def test_random_matchings_are_active_as_often_as_the_budget_says():
    topology = RandomMatchings(Torus(4, 4), 0.3)
    graph = Graph(topology, 16, seed=0)
    sent = [len(graph.mixing(step).edges) for step in range(400)]
    assert np.mean(sent) == pytest.approx(0.3 * 64, rel=0.1)  # 4 matchings of 8 edges: sd of the mean 0.04
    everything = Graph(RandomMatchings(Ring(), 1.0), 8)
    assert len(everything.mixing(3).edges) == 16


def test_epidemic_nodes_send_to_s_others_and_average_what_comes():
    graph = Graph(EpidemicLocal(3), 10, seed=5)
    counts = np.zeros((10, 10))
    for step in range(300):
        mixing = graph.mixing(step)
        assert np.bincount(mixing.edges[:, 0], minlength=10).tolist() == [3] * 10
        for i in range(10):
            got = mixing.neighbours(i)
            np.testing.assert_allclose(mixing.W[i, [i, *got]], 1 / (1 + len(got)))
        counts[mixing.edges[:, 0], mixing.edges[:, 1]] += 1
    np.testing.assert_allclose(counts[~np.eye(10, dtype=bool)] / 300, 1 / 3, atol=0.12)  # 4.5 standard errors
    assert graph.kind == "row"
    assert any(abs(graph.mixing(step).W.sum(0) - 1).max() > 0.1 for step in range(5))


def test_the_epidemic_oracle_draws_regular_graphs():
    graph = Graph(EpidemicOracle(4), 9)
    for step in range(5):
        assert {d for _, d in nx.Graph(graph.mixing(step).edges.tolist()).degree} == {4}
        assert set(np.unique(np.round(graph.mixing(step).W, 12))) == {0, 0.2}


# ------------------------------------------------------------------ from a config


GIVEN = {"Torus": {"rows": 3, "cols": 4}, "Grid": {"rows": 3, "cols": 4}, "ErdosRenyi": {"p": 0.5},
         "EdgeList": {"file": "x"}, "NetworkX": {"generator": "watts_strogatz_graph", "arguments": {"k": 4, "p": 0.1}},
         "RandomMatchings": {"base": {"class_path": "Torus", "init_args": {"rows": 3, "cols": 4}}}}  # fmt: skip


@pytest.mark.parametrize("name", sorted(set(topologies.__all__) - {"Topology"}))
def test_every_topology_can_be_named_in_a_file_and_on_the_command_line(name, tmp_path):
    given = GIVEN.get(name, {})
    topology = {"class_path": name, "init_args": given}
    (tmp_path / "graph.yaml").write_text(
        yaml.safe_dump({"graph": {"topology": topology}, "data": {"private": "Digits"}})
    )
    file = configure(["--config", str(tmp_path / "graph.yaml")]).graph.topology
    words = [f"--graph.topology.{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in given.items()]
    line = configure(["--data.private", "Digits", "--graph.topology", name, *words]).graph.topology
    assert type(file) is type(line) is getattr(topologies, name)
    assert file == line


def test_a_wrong_base_is_reported_with_the_nearest(capsys):
    assert main(["topology", "--graph.topology", "RandomMatchings", "--graph.topology.base", "Rign"]) == 2
    assert "graph.topology.base: there is no class 'Rign' of this kind. Did you mean 'Ring'?" in capsys.readouterr().err


# ------------------------------------------------------------------ mistakes


class Apart(topologies.Topology):
    def graph(self, nodes, step, seed):
        return nx.empty_graph(nodes)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Graph(BaseGraph(16), 16), "graph.topology.k: 16 given; allowed: 1 to 15, graph.nodes - 1"),
        (lambda: Graph(BaseGraph(0), 16), "graph.topology.k: 0 given; allowed: 1 to 15, graph.nodes - 1"),
        (
            lambda: Grid(1, 9),
            "graph.topology.rows: the sides of a grid must be at least 2, given rows 1 and cols 9 "
            "(with a side of 1 it is a Chain)",
        ),
        (
            lambda: Graph(Grid(3, 4), 10),
            "graph.topology: a grid of 3 x 4 has 12 nodes, but graph.nodes is 10; allowed: 2 x 5",
        ),
        (
            lambda: Graph(Hypercube(), 12),
            "graph.topology: the number of nodes of Hypercube is a power of two, but graph.nodes is 12; nearest: 8, 16",
        ),
        (
            lambda: Graph(HypercubeOnePeer(), 12),
            "graph.topology: the number of nodes of HypercubeOnePeer is a power of two, but graph.nodes is 12; "
            "nearest: 8, 16",
        ),
        (
            lambda: Graph(Margulis(), 12),
            "graph.topology: the number of nodes of Margulis is a square, but graph.nodes is 12; nearest: 9, 16",
        ),
        (
            lambda: Graph(Petersen10(), 16),
            "graph.topology: Petersen10 has 10 nodes, but graph.nodes is 16; allowed: 10",
        ),
        (lambda: Graph(Dyck32(), 16), "graph.topology: Dyck32 has 32 nodes, but graph.nodes is 16; allowed: 32"),
        (lambda: Graph(Karate34(), 16), "graph.topology: Karate34 has 34 nodes, but graph.nodes is 16; allowed: 34"),
        (lambda: ErdosRenyi(1.5), "graph.topology.p: 1.5 given; allowed: a probability, above 0 to 1"),
        (
            lambda: Graph(ErdosRenyi(0.01), 16),
            "graph.topology: ErdosRenyi(0.01) on 16 nodes is not connected in any of 100 draws; more edges would help",
        ),
        (lambda: WattsStrogatz(3, 0.1), "graph.topology.k: 3 given; allowed: an even number, half of it on each side"),
        (lambda: WattsStrogatz(4, -0.1), "graph.topology.p: -0.1 given; allowed: a probability, 0 to 1"),
        (
            lambda: Graph(WattsStrogatz(8, 0.1), 8),
            "graph.topology.k: 8 given; allowed: an even number up to 7, graph.nodes - 1",
        ),
        (lambda: Graph(BarabasiAlbert(8), 8), "graph.topology.m: 8 given; allowed: 1 to 7, graph.nodes - 1"),
        (lambda: Graph(RandomRegular(8), 8), "graph.topology.degree: 8 given; allowed: 1 to 7, graph.nodes - 1"),
        (
            lambda: Graph(RandomRegular(3), 9),
            "graph.topology.degree: 3 given; allowed: an even number, since graph.nodes, 9, is odd",
        ),
        (lambda: Graph(EpidemicLocal(8), 8), "graph.topology.s: 8 given; allowed: 1 to 7, graph.nodes - 1"),
        (
            lambda: Graph(EpidemicOracle(3), 9),
            "graph.topology.s: 3 given; allowed: an even number, since graph.nodes, 9, is odd",
        ),
        (lambda: RandomMatchings(Ring(), 0), "graph.topology.budget: 0 given; allowed: a share, above 0 to 1"),
        (
            lambda: RandomMatchings(OnePeerExponential()),
            "graph.topology.base: OnePeerExponential is not static and undirected, as Ring or Torus are",
        ),
        (
            lambda: SpanningTree(EpidemicLocal()),
            "graph.topology.base: EpidemicLocal is not static and undirected, as Ring or Torus are",
        ),
        (
            lambda: Graph(SpanningTree(Apart()), 8),
            "graph.topology.base: Apart on 8 nodes is not connected",
        ),
        (
            lambda: NetworkX("wats_strogatz_graph"),
            "graph.topology.generator: networkx has no generator 'wats_strogatz_graph'. "
            "Did you mean 'watts_strogatz_graph'?",
        ),
        (
            lambda: Graph(NetworkX("watts_strogatz_graph", {"k": 4}), 16),
            "graph.topology.arguments: watts_strogatz_graph refuses {'k': 4} "
            "(watts_strogatz_graph() missing 1 required positional argument: 'p')",
        ),
        (
            lambda: Graph(NetworkX("petersen_graph"), 16),
            "graph.topology.arguments: petersen_graph with {} makes a graph of 10 nodes, but graph.nodes is 16",
        ),
        (
            lambda: Graph(Exponential(), 8, "lazy"),
            "graph.weights: lazy needs an undirected graph, and Exponential is directed; "
            "allowed: uniform, push_sum, average",
        ),
        (
            lambda: Graph(EdgeList("none.txt"), 4),
            "graph.topology.file: cannot read 'none.txt' (No such file or directory)",
        ),
    ],
)
def test_a_mistake_is_named_with_its_key_and_what_is_allowed(build, message):
    with pytest.raises(UserError) as error:
        build()
    assert str(error.value) == message


@pytest.mark.parametrize("line", ["0 4", "0 -1", "0 x", "0", "0 1 2", "1 1", "1 01"])
def test_a_wrong_line_of_an_edge_list_is_shown(line, tmp_path):
    file = tmp_path / "edges.txt"
    file.write_text(f"0 1\n1 2\n{line}\n")
    with pytest.raises(UserError) as error:
        Graph(EdgeList(str(file)), 4)
    assert str(error.value) == (
        f"graph.topology.file: '{line}' in line 3 of '{file}'; "
        "allowed: two different nodes from 0 to 3, graph.nodes - 1"
    )


def test_an_edge_list_that_leaves_a_node_alone_is_refused(tmp_path):
    (tmp_path / "edges.txt").write_text("0 1\n1 2\n")
    with pytest.raises(UserError, match="EdgeList on 4 nodes is not connected"):
        Graph(EdgeList(str(tmp_path / "edges.txt")), 4)
