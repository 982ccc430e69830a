"""Lost messages and absent nodes: what is drawn, the weights rebuilt from it, and what rules make of it."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from callbacks import (
    CCL,
    D2,
    DSGD,
    EDM,
    GUT,
    NGC,
    SGP,
    AdaGossip,
    AllReduce,
    ChocoSGD,
    Churn,
    DecentLaM,
    Gossiped,
    GradientTracking,
    LinkOutage,
    LocalOptimizer,
    LocalSteps,
    MessageLoss,
    MomentumTracking,
    MovingAverage,
    QGDSGDm,
    RelaySGD,
    Stragglers,
    Trace,
)  # fmt: skip
from callbacks.faults.chain import TwoStates
from lightning_idkd.callback import Fault, check_faults
from lightning_idkd.errors import UserError
from lightning_idkd.graph import Graph
from lightning_idkd.links import Links, Moment
from lightning_idkd.network import Network
from lightning_idkd.topologies import (
    Chain,
    Complete,
    ErdosRenyi,
    Exponential,
    Ring,
    Social15,
    SpanningTree,
    Star,
    Torus,
)
from lightning_idkd.training.gossip_step import GossipStep

GRAPHS = {
    "ring": (Ring, 6, "metropolis"), "social": (Social15, 15, "metropolis"),
    "torus": (lambda: Torus(4, 4), 16, "uniform"),
    "star": (Star, 7, "lazy"), "random": (lambda: ErdosRenyi(0.5), 12, "max_degree"),
    "push": (Exponential, 8, "push_sum"), "row": (Exponential, 8, "average"), "arrows": (Exponential, 8, "uniform"),
    "pushed ring": (Ring, 6, "push_sum"),
}  # fmt: skip


class Given(Fault):
    """Loses the messages, and takes away the nodes, that a test names."""

    def __init__(self, lost=(), absent=(), told=True, forget=False, until=10**9):
        self.pairs, self.away, self.told, self.forget, self.until = set(lost), list(absent), told, forget, until

    def lost(self, moment, edges):
        return np.array([moment.step < self.until and (i, j) in self.pairs for i, j in edges.tolist()], dtype=bool)

    def absent(self, moment):
        away = np.zeros(moment.nodes, bool)
        away[self.away] = moment.step < self.until
        return away


def network(name, *faults, takes=("doubly", "column", "row"), seed=0):
    topology, nodes, weights = GRAPHS[name]
    graph = Graph(topology(), nodes, weights)
    return Network(graph, links=Links(graph, faults, seed, takes))


def rows(n, columns=3):
    return torch.randn(n, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(n))


def moment(step=0, nodes=6, fault=0, seed=0, epoch=0.0):
    return Moment(step, epoch, float("nan"), nodes, seed, fault)


def edges_of(name):
    return network(name).graph.mixing(0).edges


# ---------------------------------------------------------------------- what is drawn


@pytest.mark.parametrize(("enter", "leave"), [(0.05, 0.3), (0.4, 0.6), (0.01, 0.02), (0.0, 0.5)])
def test_a_chain_has_the_state_to_which_its_draws_lead_from_either_start(enter, leave):
    chains, first = np.arange(5), -1000
    draws = moment().uniform("x", chains, step=np.arange(first, 300)[:, None])
    states = [np.zeros(5, bool), np.ones(5, bool)]
    for number, u in enumerate(draws, first):
        states = [np.where(state, u < 1 - leave, u < enter) for state in states]
        if number >= 0 and number % 7 == 0:
            assert np.array_equal(*states)
            assert np.array_equal(TwoStates(enter, leave).at(moment(number), "x", chains), states[0]), number


def test_bursts_have_their_mean_length_and_lose_their_share():
    fault, edges = MessageLoss(0.2, burst=5), np.array([[i, i + 1] for i in range(400)])
    lost = np.array([fault.lost(moment(step), edges) for step in range(300)])
    assert abs(lost.mean() - 0.2) < 4 * np.sqrt(0.16 * (2 * 4 + 1) / lost.size)  # 2 * 4 + 1: of correlated steps
    begins = (~lost[:-1] & lost[1:]).sum()
    assert abs(lost[1:].sum() / begins - 5) < 0.3
    independent = np.array([MessageLoss(0.2).lost(moment(step), edges) for step in range(100)])
    assert abs(independent.mean() - 0.2) < 4 * np.sqrt(0.16 / independent.size)


def test_two_faults_of_a_class_draw_different_numbers():
    edges = edges_of("torus")
    first, second = (MessageLoss(0.5).lost(moment(3, fault=place), edges) for place in (0, 1))
    assert not np.array_equal(first, second)
    assert np.array_equal(first, MessageLoss(0.5).lost(moment(3), edges))
    assert not np.array_equal(first, MessageLoss(0.5).lost(moment(3, seed=1), edges))


@pytest.mark.parametrize(("p", "share"), [(0, 0.0), (1, 1.0)])
def test_none_or_all_messages_are_lost_at_the_ends_of_the_range(p, share):
    assert MessageLoss(p).lost(moment(), edges_of("torus")).mean() == share


def test_a_link_is_out_in_both_directions_for_whole_stretches():
    edges, fault = edges_of("torus"), LinkOutage(0.4, steps=10)
    out = np.array([fault.lost(moment(step), edges) for step in range(40)])
    assert (out.reshape(4, 10, -1) == out[::10, None]).all()
    assert len(np.unique(out[::10], axis=0)) == 4
    assert 0.2 < out.mean() < 0.6
    index = {edge: k for k, edge in enumerate(map(tuple, edges.tolist()))}
    assert all(np.array_equal(out[:, k], out[:, index[j, i]]) for (i, j), k in index.items())


def test_churn_leaves_nodes_out_for_their_share_of_the_steps():
    fault = Churn(leave=0.1, rejoin=0.3)
    away = np.array([fault.absent(moment(step, nodes=500)) for step in range(100)])
    assert abs(away.mean() - 0.25) < 0.02
    assert abs(away[0].mean() - 0.25) < 0.08, "the first step is like the others"


# ---------------------------------------------------------------------- W without what did not arrive


def expected_weights(net, step, takes):
    """W(t) by loops over single edges."""
    base, condition = net.graph.mixing(step), net.links.at(step)
    W, kind = base.W.copy(), net.graph.kind
    both_ways = not net.graph.topology.directed
    arrives = {tuple(e): ok for e, ok in zip(base.edges.tolist(), condition.arrived, strict=True)}
    sends = {tuple(e): ok for e, ok in zip(base.edges.tolist(), condition.sent, strict=True)}
    silent = [e for e in arrives if not sends[e]]
    if both_ways:
        assert all((j, i) in silent for i, j in silent), "an undirected edge is out in both directions"
    for j, i in silent:
        if kind == "doubly" and both_ways:
            W[i, i] += W[i, j]
        W[i, j] = 0
    if kind == "column" or (kind == "doubly" and not both_ways and "column" in takes):
        W = np.stack([W[:, j] / W[:, j].sum() for j in range(len(W))], 1)
    elif not (kind == "doubly" and both_ways):
        W = np.stack([row / row.sum() for row in W])
    for j, i in arrives:
        if sends[j, i] and not arrives[j, i]:
            if "column" not in takes:
                W[i, i] += W[i, j]
            W[i, j] = 0
    return W


@pytest.mark.parametrize("takes", [("doubly", "row"), ("doubly", "column")], ids=["row", "column"])
@pytest.mark.parametrize("name", GRAPHS)
def test_the_weights_keep_their_kind_under_every_fault(name, takes):
    faults = {"told": [MessageLoss(0.3)], "bursts": [MessageLoss(0.3, burst=4)], "churn": [Churn(0.2, 0.4)],
              "outage": [LinkOutage(0.5, 3)], "all": [MessageLoss(0.2), Churn(0.1, 0.5), LinkOutage(0.2, 2)],
              "untold": [MessageLoss(0.3, told=False)],
              "mixed": [MessageLoss(0.3, told=False), Churn(0.2, 0.4)]}  # fmt: skip
    for which, several in faults.items():
        net, changed = network(name, *several, takes=takes), 0
        for step in range(12):
            mixing, condition = net.mixing(step), net.links.at(step)
            assert mixing.W.min() >= 0
            if condition.arrived is None:
                assert mixing is net.graph.mixing(step)
                continue
            changed += 1
            np.testing.assert_allclose(mixing.W, expected_weights(net, step, takes), rtol=0, atol=1e-12)
            told = which not in ("untold", "mixed")
            kind = net.graph.kind
            if kind == "doubly" and net.graph.topology.directed:
                kind = "column" if "column" in takes else "row"
            if told and kind in ("doubly", "column"):
                np.testing.assert_allclose(mixing.W.sum(0), 1, rtol=0, atol=1e-12)
            if (told and kind != "column") or (not told and "column" not in takes and kind != "column"):
                np.testing.assert_allclose(mixing.W.sum(1), 1, rtol=0, atol=1e-12)
            absent = np.flatnonzero(~condition.present) if condition.present is not None else []
            assert all(mixing.W[i, i] == pytest.approx(1) and (mixing.W[i] > 0).sum() == 1 for i in absent)
        assert changed, which


@pytest.mark.parametrize("name", ["ring", "social", "torus", "star"])
def test_the_mean_of_the_rows_is_kept_where_both_ends_know(name):
    net = network(name, MessageLoss(0.4), Churn(0.2, 0.4))
    T = rows(net.graph.nodes)
    for step in range(10):
        mixed = net.mix(T, step)
        np.testing.assert_allclose(mixed.mean(0), T.mean(0), rtol=0, atol=1e-12)
    assert not torch.allclose(mixed, network(name).mix(T))


def test_a_receiver_that_does_not_know_of_a_loss_puts_its_own_row_in_its_place():
    net, T = network("ring", Given([(1, 0)], told=False), takes=("doubly",)), rows(6)
    expected = network("ring").mix(T)
    expected[0] = (T[5] + 2 * T[0]) / 3
    torch.testing.assert_close(net.mix(T), expected, rtol=0, atol=1e-12)


def test_push_sum_loses_mass_from_rows_and_weights_together():
    net, T = network("push", Given([(0, 1), (4, 6)], told=False), takes=("doubly", "column")), rows(8)
    W = net.graph.mixing(0).W.copy()
    W[1, 0] = W[6, 4] = 0
    mixed = net.mix(torch.cat([T, T.new_ones(8, 1)], 1))
    np.testing.assert_allclose(mixed[:, :3], W @ T.numpy(), rtol=0, atol=1e-12)
    np.testing.assert_allclose(mixed[:, 3], W.sum(1), rtol=0, atol=1e-12)
    assert mixed[:, 3].sum() < 8


def test_bytes_count_what_was_sent():
    told, untold = network("ring", Given([(1, 0)])), network("ring", Given([(1, 0)], told=False))
    for net, messages in ((told, 10), (untold, 12)):
        net.mix(rows(6))
        assert net.counts() == {"parameter_bytes": messages * 24, "label_bytes": 0, "other_bytes": 0,
                                "messages": messages}  # fmt: skip
    told.swap(rows(12), instead=rows(12))
    assert told.counts()["messages"] == 20


# ---------------------------------------------------------------------- rules under faults


def rule_on(rule, net, X, width=None):
    stack = SimpleNamespace(X=X.clone(), G=torch.zeros_like(X), parameters=X.shape[1],
                            modules=[SimpleNamespace(has_features=True)])  # fmt: skip
    return GossipStep(rule, stack, net), stack


def test_relay_keeps_the_last_sum_of_an_edge_that_lost_its_message():
    """Node by node: every sum is a dictionary of the models in it."""
    tree, n = SpanningTree(Ring()), 6
    graph = Graph(tree, n)
    net = Network(graph, links=Links(graph, [MessageLoss(0.4, told=False)]))
    X = rows(n)
    step, stack = rule_on(RelaySGD(), net, X)
    near = [graph.mixing(0).neighbours(i) for i in range(n)]
    x, R, C = X.numpy().copy(), {}, {}
    lost_any = 0
    for t in range(25):
        arrived = net.links.at(t).arrived
        ok = {tuple(e): arrived is None or bool(arrived[k]) for k, e in enumerate(graph.mixing(0).edges.tolist())}
        gradient = np.random.default_rng(t).standard_normal(x.shape)
        half = x - 0.1 * gradient
        sent = {}
        for i in range(n):
            for j in near[i]:
                others = [k for k in near[i] if k != j]
                total = half[i] + sum(R.get((k, i), np.zeros(3)) for k in others)
                sent[i, j] = total, 1 + sum(C.get((k, i), 0) for k in others)
        for edge, (total, models) in sent.items():
            if ok[edge]:
                R[edge], C[edge] = total, models
            else:
                lost_any += 1
        x = np.stack(
            [
                (half[i] + sum(R.get((k, i), np.zeros(3)) for k in near[i]))
                / (1 + sum(C.get((k, i), 0) for k in near[i]))
                for i in range(n)
            ]
        )
        stack.G.copy_(torch.tensor(gradient))
        step.update(t, 0.1, (None, None))
        np.testing.assert_allclose(stack.X, x, rtol=0, atol=1e-10)
    assert lost_any > 20
    assert torch.equal(step.edge_buffers["C"].round(), step.edge_buffers["C"]), "counts are whole numbers"


@pytest.mark.parametrize("told", [True, False])
def test_a_swap_returns_the_substitute_where_nothing_arrived(told):
    net = network("ring", Given([(2, 1)], told=told))
    edges = net.edges().tolist()
    M = torch.arange(12.0, dtype=torch.float64)[:, None]
    received, expected = net.swap(M, instead=-1 - M), network("ring").swap(M)
    fails = [edges.index([1, 2])] + ([edges.index([2, 1])] if told else [])
    expected[fails] = -1 - M[fails]
    assert torch.equal(received, expected)


def test_neighbourhood_rules_put_their_own_models_in_the_place_of_lost_ones():
    """NGC at alpha 0 without a gradient mixes, so it must equal W(t) X."""
    net, X = network("ring", MessageLoss(0.5)), rows(6)
    step, stack = rule_on(NGC(alpha=0.0), net, X)
    stack.gradient = lambda X, *batch: torch.zeros_like(X)
    for t in range(4):
        expected = torch.tensor(net.mixing(t).W) @ stack.X
        step.update(t, 0.1, (torch.zeros(1), torch.zeros(1)))
        torch.testing.assert_close(stack.X, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rule", [QGDSGDm(), GradientTracking(0.9), SGP(0.9), AllReduce(0.9)])
def test_rows_and_buffers_of_absent_nodes_stand_still(rule):
    net = network("ring", Given(absent=[0, 3], until=1))
    step, stack = rule_on(rule, net, rows(6))
    stack.G.copy_(rows(6) + 1)
    step.update(5, 0.1, (None, None))  # all buffers are different from zero
    before = {"X": stack.X.clone()} | {k: b.clone() for k, b in step.buffers.items()}
    step.update(0, 0.1, (None, None))
    for name, matrix in ({"X": stack.X} | step.buffers).items():
        assert torch.equal(matrix[[0, 3]], before[name][[0, 3]]), name
    assert not torch.equal(stack.X[[1, 2, 4, 5]], before["X"][[1, 2, 4, 5]])


def test_an_all_reduce_is_the_mean_of_the_nodes_that_are_present():
    net, T = network("ring", Given(absent=[0, 3])), rows(6)
    here = [1, 2, 4, 5]
    torch.testing.assert_close(net.all_reduce(T, 0), T[here].mean(0).expand(6, 3), rtol=0, atol=1e-12)
    assert net.counts() == {"parameter_bytes": 2 * 3 * 24, "label_bytes": 0, "other_bytes": 0, "messages": 24}
    torch.testing.assert_close(net.all_reduce(T), T.mean(0).expand(6, 3), rtol=0, atol=1e-12)


def test_a_node_that_forgets_returns_with_the_mean_of_its_neighbours_and_new_buffers():
    net = network("social", Given(absent=[2, 5], until=3, forget=True))
    step, stack = rule_on(DSGD(0.9), net, rows(15))
    step.buffers["M"].fill_(1)
    X = stack.X.clone()
    step.welcome(2)
    assert torch.equal(stack.X, X), "they are away"
    step.welcome(3)
    for i in (2, 5):
        near = [j for j in net.graph.mixing(0).neighbours(i) if j not in (2, 5)]
        torch.testing.assert_close(stack.X[i], X[near].mean(0), rtol=0, atol=1e-12)
        assert not step.buffers["M"][i].any()
    others = [i for i in range(15) if i not in (2, 5)]
    assert torch.equal(stack.X[others], X[others])
    assert step.buffers["M"][others].all()
    received = sum(j not in (2, 5) for i in (2, 5) for j in net.graph.mixing(0).neighbours(i))
    assert net.counts()["parameter_bytes"] == received * 24
    after = stack.X.clone()
    step.welcome(4)
    assert torch.equal(stack.X, after), "they return once"


@pytest.mark.parametrize("rule", [D2(), EDM(), GUT(), DecentLaM(), ChocoSGD(), AdaGossip()])
def test_rules_that_rely_on_the_same_weights_are_refused(rule):
    name = type(rule).__name__
    with pytest.raises(UserError, match=f"MessageLoss is given, but gossip {name} relies on the same weights in every"):
        check_faults([MessageLoss()], rule, Graph(Ring(), 6))


def test_rules_are_refused_where_a_fault_breaks_what_they_rely_on():
    graph = Graph(Ring(), 6)
    with pytest.raises(UserError, match="Churn is given, but gossip LocalOptimizer relies on every node taking"):
        check_faults([Churn()], LocalOptimizer(), graph)
    with pytest.raises(UserError, match="relies on every node taking"):
        check_faults([Churn()], LocalSteps(LocalOptimizer()), graph)
    with pytest.raises(UserError, match="Churn is given, but gossip MomentumTracking relies on sums over all nodes"):
        check_faults([Churn(forget=True)], MomentumTracking(), graph)
    for rule in (DSGD(), QGDSGDm(), GradientTracking(), MomentumTracking(), SGP(), AllReduce(), NGC(), CCL()):
        check_faults([MessageLoss(), MessageLoss(told=False), Churn()], rule, graph)


def test_doubly_stochastic_arrows_need_a_rule_that_takes_what_is_left():
    graph = Graph(Exponential(), 8, "uniform")
    with pytest.raises(UserError, match="rows and columns of the weights of directed edges cannot both sum to 1"):
        check_faults([MessageLoss()], QGDSGDm(), graph)
    check_faults([MessageLoss()], SGP(), graph)
    check_faults([MessageLoss()], DSGD(), graph)


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MessageLoss(1.5), "faults.p: 1.5 given; allowed: 0 to 1"),
        (lambda: MessageLoss(float("nan")), "faults.p: nan given"),
        (lambda: MessageLoss(0.5, burst=1), r"faults.burst: 1 given; allowed: 2 steps or more"),
        (lambda: MessageLoss(1.0, burst=9), "faults.p: 1.0 given; allowed: 0 to below 1 with bursts"),
        (lambda: LinkOutage(-0.1), "faults.p: -0.1 given"),
        (lambda: LinkOutage(0.1, 0), "faults.steps: 0 given; allowed: 1 or more"),
        (lambda: Churn(leave=1.0), "faults.leave: 1.0 given"),
        (lambda: Churn(leave=0.3, rejoin=0.8), "faults.rejoin: 0.8 given; allowed: above 0 to 1 - leave, 0.7"),
    ],
)
def test_numbers_out_of_range_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("node,from,to\n1,0,2\n1,1.5,3\n", "lines 2 and 3: node 1 leaves at 1.5 before it is back at 2"),
        ("node,from,to\n1,3,2\n", "line 2: to: 2 given; allowed: a time after from, 3"),
        ("node,from,to\n9,0,2\n", "line 2: node 9 given; allowed: 0 to 5"),
        ("node,from,to\n-1,0,2\n", "line 2: node: -1 given; allowed: 0 or more"),
        ("node,from,to\n1,nan,2\n", "line 2: from: nan given; allowed: 0 or more"),
        ("node,from,to\n1,early,2\n", "line 2: 1, early, 2 given; allowed: the number of a node and two times"),
        ("node,from\n1,0\n", "has no column to; it begins with node, from"),
        ("", "has no column node; it begins with nothing"),
        ("node,from,to\n", "has no row, so no node is ever absent"),
        ("node,from,to\n" + "".join(f"{i},{i},9\n" for i in range(6)), "has all 6 nodes absent at 5 epochs"),
    ],
)
def test_traces_with_mistakes_are_refused(tmp_path, text, message):
    file = tmp_path / "trace.csv"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        Trace(str(file)).check(Graph(Ring(), 6))


def test_a_trace_that_is_missing_is_named():
    with pytest.raises(UserError, match=r"faults.file: 'gone.csv' cannot be read \(No such file"):
        Trace("gone.csv").check(Graph(Ring(), 6))


def test_a_trace_takes_nodes_out_from_its_first_time_to_before_its_last(tmp_path):
    file = tmp_path / "trace.csv"
    file.write_text("node,from,to\n1,0,2\n3,1.5,4\n1,2,2.5\n")
    fault = Trace(str(file))
    away = {epoch: np.flatnonzero(fault.absent(moment(epoch=epoch))).tolist() for epoch in (0, 1.5, 1.9, 2, 2.5, 4)}
    assert away == {0: [1], 1.5: [1, 3], 1.9: [1, 3], 2: [1, 3], 2.5: [3], 4: []}


def test_a_fault_of_the_wrong_shape_is_named():
    class Wrong(Fault):
        def absent(self, moment):
            return np.zeros(3)

    with pytest.raises(UserError, match=r"faults: Wrong.absent returns float64 \[3\]; allowed: a bool array of shape"):
        network("ring", Wrong()).mix(rows(6))


def test_without_a_loss_the_graphs_own_weights_stay():
    net = network("ring", MessageLoss(0.0), Churn(0.0, 0.5))
    assert net.mixing(3) is net.graph.mixing(3)
    assert net.present(3) is None


def test_a_complete_graph_with_all_messages_lost_is_isolated():
    graph = Graph(Complete(), 4)
    net, T = Network(graph, links=Links(graph, [MessageLoss(1.0)])), rows(4)
    torch.testing.assert_close(net.mix(T), T, rtol=0, atol=1e-12)
    assert net.counts()["messages"] == 0


def test_the_graph_of_a_chain_is_as_before():
    graph = Graph(Chain(), 3)
    assert Network(graph).mixing(0) is graph.mixing(0)


def test_a_chain_goes_on_from_the_last_step_as_if_it_had_looked_back():
    chain, fresh, nodes = TwoStates(0.02, 0.05), TwoStates(0.02, 0.05), np.arange(30)
    for step in (*range(5, 40), 12, 13, 80):
        fresh._last = None
        assert np.array_equal(chain.at(moment(step), "x", nodes), fresh.at(moment(step), "x", nodes)), step
    assert not np.array_equal(chain.at(moment(81), "x", nodes), chain.at(moment(82, seed=1), "x", nodes))
    assert chain.at(moment(83), "x", nodes[:7]).shape == (7,)


def test_chains_that_never_change_need_no_draw_and_too_rare_ones_are_refused():
    assert not TwoStates(0.0, 1e-6).at(moment(9), "x", np.arange(5)).any()
    for make in (lambda: Churn(0.0, 1e-8), lambda: MessageLoss(0.1, burst=1e8)):
        with pytest.raises(UserError, match=r"faults: a change with probability 1\S+ a step is given; allowed: 0"):
            make()


@pytest.mark.parametrize("name", ["pushed ring", "arrows"])
def test_a_gossiped_teacher_divides_by_the_mass_that_faults_change(name):
    net = network(name, MessageLoss(0.3, told=name == "arrows"), takes=("doubly", "column"))
    X = torch.ones(net.graph.nodes, 4, dtype=torch.float64)
    run = SimpleNamespace(stack=SimpleNamespace(X=X), network=net, step=0)
    torch.testing.assert_close(Gossiped(8).rows(run), X, rtol=0, atol=1e-12)


def test_a_moving_average_stands_still_while_its_node_is_absent():
    net = network("ring", Given(absent=[2], until=1))
    run, teacher = SimpleNamespace(stack=SimpleNamespace(X=rows(6)), network=net, step=5), MovingAverage(0.5)
    teacher.on_step_end(run)
    run.stack.X, run.step, before = rows(6) + 1, 1, teacher.mean.clone()  # of step 0, in which node 2 is absent
    teacher.on_step_end(run)
    assert torch.equal(teacher.mean[2], before[2])
    torch.testing.assert_close(teacher.mean[[0, 1]], before[[0, 1]] + 0.5, rtol=0, atol=1e-12)


def test_late_rows_do_not_go_with_rules_that_push():
    with pytest.raises(UserError, match="Stragglers takes rules that mix in every step and do no more"):
        check_faults([Stragglers()], SGP(), Graph(Ring(), 6))


def test_spreadsheets_write_traces_that_are_read(tmp_path):
    file = tmp_path / "trace.csv"
    file.write_bytes("\ufeffnode, from, to\r\n1, 0, 2\r\n".encode())
    assert [absence[:3] for absence in Trace(str(file)).absences] == [(1, 0.0, 2.0)]
