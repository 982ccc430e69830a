"""Nodes that lie: who they are, what they send over mixings, means, swaps and exchanges, and what is refused."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from callbacks import (
    ALIE,
    DSGD,
    IPM,
    NGC,
    Churn,
    Dissensus,
    Liars,
    Noise,
    QGDSGDm,
    RelaySGD,
    SignFlip,
    Stragglers,
    WrongLabels,
)
from lightning_idkd.callback import Attack, Fault, LabelAttack, check_faults
from lightning_idkd.errors import UserError
from lightning_idkd.graph import Graph
from lightning_idkd.labels import Labels, Outputs
from lightning_idkd.links import Links, Moment
from lightning_idkd.network import Network
from lightning_idkd.topologies import Chain, Complete, ErdosRenyi, Exponential, Ring, Social15
from lightning_idkd.training import gossip_step

GRAPHS = {
    "ring": (Ring, 6, "metropolis"), "social": (Social15, 15, "metropolis"),
    "dense": (lambda: ErdosRenyi(0.7), 20, "max_degree"),
    "push": (Exponential, 8, "push_sum"), "row": (Exponential, 8, "average"),
}  # fmt: skip
LIARS = [1, 2, 4]
ATTACKS = {"sign": SignFlip(3.0), "ipm": IPM(0.5), "alie": ALIE(1.5), "alie null": ALIE(), "dissensus": Dissensus(0.7)}


def network(name, *faults, seed=0):
    topology, nodes, weights = GRAPHS[name]
    graph = Graph(topology(), nodes, weights)
    return Network(graph, links=Links(graph, faults, seed, ("doubly", "column", "row")))


def rows(n, columns=5):
    return torch.randn(n, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(n))


def quantile(share):
    """The standard normal's, by bisection of the error function."""
    low, high = -10.0, 10.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if 0.5 * (1 + math.erf(middle / math.sqrt(2))) < share else (low, middle)
    return low


def expected_lie(attack, i, b, T, W, liars):
    """What liar ``b`` sends to node ``i``, with plain loops."""
    near = [j for j in range(len(T)) if W[i, j] > 0 and j != i]
    seen = [T[i]] + [T[j] for j in near if j not in liars]
    mean = sum(seen) / len(seen)
    if attack is ATTACKS["sign"]:
        return -3.0 * T[b]
    if attack is ATTACKS["ipm"]:
        return -0.5 * mean
    if attack is ATTACKS["dissensus"]:
        pull = sum((W[i, j] * (T[j] - T[i]) for j in near if j not in liars), np.zeros(T.shape[1]))
        return T[i] - 0.7 * pull / sum(W[i, j] for j in near if j in liars)
    z, n, m = 1.5, len(T), len(liars)
    if attack is ATTACKS["alie null"]:
        z = quantile((n - m - (math.floor(n / 2 + 1) - m)) / (n - m))
    deviation = np.sqrt(sum((x - mean) ** 2 for x in seen) / max(len(seen) - 1, 1))
    return mean - z * deviation


# ---------------------------------------------------------------------- rows


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_lies_take_the_place_of_true_rows_where_they_are_received(attack, name):
    net = network(name, Liars(LIARS, attack))
    T, W = rows(net.graph.nodes), net.graph.mixing(0).W
    V, _w = net.receive(T)
    true, mixed = T.numpy(), np.zeros_like(T)
    for i in range(len(T)):
        senders = [j for j in range(len(T)) if W[i, j] > 0 and j != i]
        got = [expected_lie(attack, i, j, true, W, LIARS) if j in LIARS else true[j] for j in senders]
        for j, message, row in zip(senders, got, V[i, 1:], strict=False):
            np.testing.assert_allclose(row, message, rtol=0, atol=1e-12, err_msg=f"{j} to {i}")
        assert torch.equal(V[i, 0], T[i]), "a node knows its own row"
        assert (V[i, 1 + len(senders) :] == T[i]).all()
        mixed[i] = W[i, i] * true[i] + sum(W[i, j] * x for j, x in zip(senders, got, strict=True))
    np.testing.assert_allclose(net.mix(T), mixed, rtol=0, atol=1e-12)
    assert torch.equal(T, rows(net.graph.nodes)), "what is sent is not changed"


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_a_lie_to_all_is_one_to_a_node_that_hears_all(attack):
    net = network("social", Liars(LIARS, attack))
    T = rows(15)
    true = T.numpy()
    honest = true[[i for i in range(15) if i not in LIARS]]
    mean = honest.mean(0)
    z = 1.5 if attack is ATTACKS["alie"] else quantile((15 - 3 - (8 - 3)) / 12)
    lie = {SignFlip: -3.0 * true, IPM: -0.5 * mean, ALIE: mean - z * honest.std(0, ddof=1), Dissensus: mean}[
        type(attack)
    ]
    sent = np.where(np.isin(np.arange(15), LIARS)[:, None], lie, true)
    np.testing.assert_allclose(net.all_reduce(T, 0), np.tile(sent.mean(0), (15, 1)), rtol=0, atol=1e-12)
    np.testing.assert_allclose(net.all_reduce(T), np.tile(sent.mean(0), (15, 1)), rtol=0, atol=1e-12)
    np.testing.assert_allclose(net.all_reduce(T, true=True)[0], true.mean(0), rtol=0, atol=1e-12)
    shared = net.share(T)
    np.testing.assert_allclose(torch.stack([shared[i] for i in range(15)]), sent, rtol=0, atol=1e-12)


def test_noise_is_normal_and_new_in_every_message_but_one_for_all_receivers():
    net, T = network("dense", Liars([3], Noise(2.0))), rows(20, 20_000)
    receivers = [i for i in range(20) if net.graph.mixing(0).W[i, 3] > 0 and i != 3]

    def noise(step):
        V, _w = net.receive(T, step)
        senders, _weights = net.mixing(step).received
        got = [V[i, senders[i].tolist().index(3)] - T[3] for i in receivers]
        assert all(torch.equal(other, got[0]) for other in got)
        return got[0].numpy() / 2

    first, again, later = noise(0), noise(0), noise(1)
    for draw in (first, again, later):
        assert abs(draw.mean()) < 4 / np.sqrt(20_000)
        assert abs(draw.std() - 1) < 4 / np.sqrt(2 * 20_000)
        assert abs((abs(draw) < 1).mean() - 0.6827) < 4 * np.sqrt(0.22 / 20_000)
    for one, other in ((first, again), (first, later), (first[1:], first[:-1])):
        assert abs((one * other).mean()) < 4 / np.sqrt(20_000)
    fresh, other = network("dense", Liars([3], Noise(2.0))), network("dense", Liars([3], Noise(2.0)), seed=1)
    assert torch.equal(fresh.mix(T, 1), network("dense", Liars([3], Noise(2.0))).mix(T, 1))
    assert not torch.equal(fresh.mix(T, 2), other.mix(T, 2))


def test_two_liars_have_different_noise():
    net, T = network("ring", Liars([0, 2], Noise())), torch.zeros(6, 4)
    V, _w = net.receive(T)
    assert not torch.equal(V[1, 1], V[1, 2])


def test_a_lie_can_be_lost():
    class Cut(Fault):
        def lost(self, moment, edges):
            return (edges == [1, 0]).all(1) | (edges == [0, 1]).all(1)

    net, T = network("ring", Cut(), Liars([1], SignFlip())), rows(6)
    V, w = net.receive(T)
    assert (w[0] > 0).sum() == 2
    assert torch.equal(V[0, 1], T[5])
    assert torch.equal(V[2, 1], -T[1])


def test_an_omniscient_liar_reckons_with_the_weights_of_the_step():
    net, T = network("social", Churn(0.2, 0.4), Liars(LIARS, ATTACKS["dissensus"])), rows(15)
    changed = 0
    for step in range(6):
        W, mixed = net.mixing(step).W, np.zeros((15, 5))
        changed += net.links.at(step).present is not None
        for i in range(15):
            for j in np.flatnonzero(W[i]):
                lies = j in LIARS and j != i
                x = expected_lie(ATTACKS["dissensus"], i, j, T.numpy(), W, LIARS) if lies else T[j].numpy()
                mixed[i] += W[i, j] * x
        np.testing.assert_allclose(net.mix(T, step), mixed, rtol=0, atol=1e-12)
    assert changed


def test_a_node_that_returns_is_greeted_by_lies():
    class Gone(Fault):
        forget = True

        def absent(self, moment):
            return np.arange(6) == (0 if moment.step == 0 else -1)

    net, T = network("ring", Gone(), Liars([1], SignFlip(2.0))), rows(6)
    np.testing.assert_allclose(net.welcome(T, 1)[0], (-2 * T[1] + T[5]) / 2, rtol=0, atol=1e-12)


def test_dissensus_of_strength_one_keeps_every_node_beside_a_liar_where_it_is():
    net, T = network("social", Liars(LIARS, Dissensus(1.0))), rows(15)
    W, mixed = net.graph.mixing(0).W, net.mix(T)
    beside = [i for i in range(15) if any(W[i, b] > 0 for b in LIARS if b != i)]
    assert 0 < len(beside) < 15
    np.testing.assert_allclose(mixed[beside], T[beside], rtol=0, atol=1e-12)


def test_alie_takes_the_quantile_of_its_paper():
    """Baruch et al. have 50 workers, 24 of them corrupted: z is the quantile at 24 / 26."""
    assert ALIE.share(np.arange(50) >= 24) == pytest.approx(24 / 26, abs=1e-15)
    assert quantile(24 / 26) == pytest.approx(1.426, abs=1e-3)


def test_two_groups_lie_in_their_own_ways():
    net, T = network("ring", Liars([1], SignFlip()), Liars([5], IPM(1.0))), rows(6)
    V, _w = net.receive(T)
    assert torch.equal(V[0, 1], -T[1])
    assert torch.equal(V[0, 2], -T[0])


def test_whole_numbers_stay_whole():
    net = network("ring", Liars([1], Noise(10.0)))
    shared = net.share(torch.full((6, 50), 100, dtype=torch.int32))
    assert shared[1].dtype == torch.int32
    assert len(shared[1].unique()) > 10
    assert (shared[0] == 100).all()


def test_liars_send_as_many_bytes_as_others():
    net, T = network("ring", Liars([1], IPM())), rows(6)
    net.mix(T)
    net.all_reduce(T, 0)
    assert net.counts()["parameter_bytes"] == 12 * 40 + 2 * 5 * 40


def test_honest_networks_do_no_more_work(monkeypatch):
    def refuse(self, T):
        raise AssertionError

    net, T = network("ring", Liars([1], labels=WrongLabels())), rows(6)
    monkeypatch.setattr(Network, "report", refuse)
    assert torch.equal(net.mix(T), network("ring").mix(T))
    assert torch.equal(net.swap(rows(12)), network("ring").swap(rows(12)))


# ---------------------------------------------------------------------- messages over single edges


def test_swapped_messages_of_a_liar_are_false():
    net, M = network("ring", Liars([1], SignFlip())), torch.arange(12.0)[:, None]
    edges = net.edges().tolist()
    received, honest = net.swap(M), network("ring").swap(M)
    for (i, j), got, true in zip(edges, received, honest, strict=True):
        assert torch.equal(got, -true if j == 1 else true), (i, j)
    assert torch.equal(M, torch.arange(12.0)[:, None])


@pytest.mark.parametrize("rule", [RelaySGD(), NGC()])
def test_omniscient_attacks_on_swaps_are_refused_with_what_works(rule):
    graph = Graph(Chain(), 6)
    net = Network(graph, links=Links(graph, [Liars([1], ALIE(1.0))]))
    with pytest.raises(UserError, match=r"ALIE compares.*different message over every edge; allowed: SignFlip, Noise"):
        net.swap(rows(10))


def test_a_rule_that_works_on_blocks_of_columns_gets_whole_rows(monkeypatch):
    """With a block of one column, noise by block would be the same in all columns."""
    moved = []
    for block in (2**20, 1):
        monkeypatch.setattr(gossip_step, "block_columns", lambda nodes, device, block=block: block)
        net, X = network("ring", Liars([1], Noise())), rows(6)
        stack = SimpleNamespace(X=X.clone(), G=torch.ones_like(X), parameters=5, modules=[])
        step = gossip_step.GossipStep(QGDSGDm(), stack, net)
        for t in range(3):
            step.update(t, 0.1, ())
        moved.append(stack.X)
    assert torch.equal(*moved)


# ---------------------------------------------------------------------- labels


def labels(n, k=4, public=30):
    g = torch.Generator().manual_seed(n)
    made = []
    for i in range(n):
        index = torch.randperm(public, generator=g)[: 10 + i].sort().values
        made.append(Labels(index, torch.rand(10 + i, k, generator=g, dtype=torch.float64).softmax(1)))
    return made


@pytest.mark.parametrize("kind", ["wrong", "confident", "random"])
def test_labels_of_a_liar_are_false_to_others_and_true_to_itself(kind):
    net, sent = network("ring", Liars([1], labels=WrongLabels(kind))), labels(6)
    net.links.faults[0].on_check(SimpleNamespace(store=SimpleNamespace(public=30)))
    received = net.exchange(sent)
    for i, of_node in enumerate(received):
        assert list(of_node) == sorted({i, (i - 1) % 6, (i + 1) % 6})
        for j, message in of_node.items():
            assert torch.equal(message.index, sent[j].index)
            if j != 1 or i == 1:
                assert torch.equal(message.probabilities, sent[j].probabilities)
                continue
            top = sent[1].probabilities.argmax(1).tolist()
            assert message.probabilities.sum(1).tolist() == [1.0] * len(message)
            said = message.probabilities.argmax(1).tolist()
            assert set(message.probabilities.unique().tolist()) == {0.0, 1.0}
            if kind == "wrong":
                assert said == [(c + 1) % 4 for c in top]
            elif kind == "confident":
                assert said == top
            else:
                assert said != top
                assert len(set(said)) > 1
    assert net.counts()["label_bytes"] == 2 * sum(m.nbytes for m in sent)
    if kind == "random":
        assert not torch.equal(net.exchange(sent, 1)[0][1].probabilities, received[0][1].probabilities)


@pytest.mark.parametrize("weighted", [False, True])
def test_a_liar_can_label_everything_from_its_own_answers(weighted):
    net, sent = network("ring", Liars([1], labels=WrongLabels("wrong", everything=True))), labels(6)
    if weighted:
        sent = [Labels(m.index, m.probabilities, torch.rand(len(m))) for m in sent]
    logits = torch.randn(30, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    answers = [Outputs(logits + i) if i == 1 else Outputs(logits.flip(1)) for i in range(6)]
    run = SimpleNamespace(store=SimpleNamespace(public=30), answers=lambda: answers, network=net)
    net.links.faults[0].on_check(run)
    received = net.exchange(sent)
    told = received[0][1]
    assert told.index.tolist() == list(range(30))
    expected = logits.argmax(1)
    expected[sent[1].index] = sent[1].probabilities.argmax(1)
    assert told.probabilities.argmax(1).tolist() == [(c + 1) % 4 for c in expected.tolist()]
    others = sum(m.nbytes for i, m in enumerate(sent) if i != 1)
    assert net.counts()["label_bytes"] == 2 * (others + 4 * 30 * (1 + 4 + weighted))
    assert len(received[1][1]) == len(sent[1])


def test_an_attack_on_labels_must_return_labels():
    class Smuggle(LabelAttack):
        def __call__(self, labels, sight):
            return labels.probabilities

    with pytest.raises(UserError, match=r"faults.labels: Smuggle returns Tensor; allowed: Labels"):
        network("ring", Liars([1], labels=Smuggle())).exchange(labels(6))


def test_an_attack_on_rows_must_return_a_row_for_every_message():
    class Short(Attack):
        def __call__(self, T, sight):
            return T[:, 1:]

    with pytest.raises(UserError, match=r"faults: Short returns \[2, 4\]; allowed: a tensor of shape \[2, 5\]"):
        network("ring", Liars([1], Short())).mix(rows(6))


# ---------------------------------------------------------------------- who lies


def test_a_number_of_liars_is_drawn_by_the_seed():
    def drawn(seed, count=4):
        moment = Moment(0, 0.0, math.nan, 20, seed)
        return tuple(np.flatnonzero(Liars(count, SignFlip()).lying(moment)).tolist())

    assert all(len(drawn(seed)) == 4 for seed in range(5))
    assert len({drawn(seed) for seed in range(5)}) > 3
    assert drawn(1) == drawn(1)
    assert set(drawn(1, 3)) < set(drawn(1))
    shares = np.bincount([i for seed in range(300) for i in drawn(seed)], minlength=20) / 300
    assert abs(shares - 0.2).max() < 4.5 * np.sqrt(0.16 / 300)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"nodes": [0, 6]}, "faults.nodes: node 6 given; allowed: 0 to 5"),
        ({"nodes": [-1]}, "faults.nodes: node -1 given; allowed: 0 to 5"),
        ({"nodes": 6}, "faults.nodes: 6 nodes given; allowed: 5 at most, so that one is honest"),
        ({"nodes": [0, 1, 2, 3, 4, 5]}, "faults.nodes: 6 nodes given; allowed: 5 at most"),
        ({"nodes": 0}, "faults.nodes: 0 given; allowed: the numbers of one node or more, or how many"),
        ({"nodes": []}, r"faults.nodes: \[\] given; allowed: the numbers of one node or more"),
        ({"nodes": [3, 1, 3]}, "faults.nodes: node 3 is given 2 times; allowed: once"),
        ({"nodes": [3], "attack": None}, "faults: Liars need an attack, labels, or flip: true"),
        ({"nodes": 3, "attack": ALIE()}, None),
        ({"nodes": 4, "attack": ALIE()}, "faults.attack.z: null given; allowed: a number where 4 of 6 nodes lie"),
        ({"nodes": 4, "attack": ALIE(0.5)}, None),
    ],
)
def test_liars_that_cannot_be_are_refused_in_a_sentence(given, message):
    def check():
        check_faults([Liars(**{"attack": SignFlip()} | given)], DSGD(), Graph(Ring(), 6))

    if message is None:
        check()
    else:
        with pytest.raises(UserError, match=message):
            check()


def test_groups_must_leave_one_honest_node_and_not_overlap():
    first, second = Liars([0, 1], SignFlip()), Liars([2, 3], IPM())
    with pytest.raises(UserError, match="faults: all 4 nodes lie; allowed: 3 at most"):
        check_faults([first, second], DSGD(), Graph(Ring(), 4))
    with pytest.raises(UserError, match="faults: node 2 lies by two of them; allowed: one for each node"):
        check_faults([second, Liars([2], flip=True)], DSGD(), Graph(Ring(), 6))


def test_late_rows_and_lies_about_rows_do_not_go_together():
    with pytest.raises(UserError, match="faults: Stragglers does not go together with Liars"):
        check_faults([Stragglers(), Liars([1], SignFlip())], DSGD(), Graph(Ring(), 6))
    check_faults([Stragglers(), Liars([1], labels=WrongLabels())], DSGD(), Graph(Ring(), 6))


@pytest.mark.parametrize(
    ("attack", "values", "message"),
    [
        (SignFlip, {"scale": 0}, "faults.attack.scale: 0 given; allowed: above 0"),
        (Noise, {"sigma": math.nan}, "faults.attack.sigma: nan given; allowed: above 0"),
        (IPM, {"epsilon": -1}, "faults.attack.epsilon: -1 given; allowed: above 0"),
        (Dissensus, {"epsilon": math.inf}, "faults.attack.epsilon: inf given; allowed: above 0"),
        (ALIE, {"z": math.inf}, "faults.attack.z: inf given; allowed: a number or null"),
    ],
)
def test_values_out_of_range_are_refused(attack, values, message):
    with pytest.raises(UserError, match=message):
        attack(**values)


def test_complete_graphs_of_liars_leave_the_honest_node_its_own_row():
    graph = Graph(Complete(), 4)
    net = Network(graph, links=Links(graph, [Liars([0, 1, 2], IPM(1.0))]))
    T = rows(4)
    np.testing.assert_allclose(net.mix(T)[3], T[3] / 4 - 3 * T[3] / 4, rtol=0, atol=1e-12)
