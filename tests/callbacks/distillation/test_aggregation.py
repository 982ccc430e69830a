"""How several labels of a sample become one."""

import numpy as np
import pytest
import torch
from four_nodes import K, as_dict, chain_of_four, labels, softmax

from lightning_idkd.callbacks import ERA, ClassCount, ConfidenceMean, Liars, LogitMean, Mean, SignFlip, Vote
from lightning_idkd.graph import Graph
from lightning_idkd.labels import Labels
from lightning_idkd.links import Links
from lightning_idkd.network import Network
from lightning_idkd.topologies import Chain


def three(rows):
    """Labels of three classes from {index: probabilities}."""
    return Labels(torch.tensor(list(rows)), torch.tensor(list(rows.values())))


class TestClassCount:
    """Three nodes with 5, 2, 0 samples of class 0 and 1, 9, 9 of class 1."""

    def rule(self):
        rule = ClassCount()
        rule.histograms = {0: torch.tensor([5, 1]), 1: torch.tensor([2, 9]), 2: torch.tensor([0, 9])}
        return rule

    def test_the_label_of_the_node_with_most_samples_of_the_class_it_predicts_is_taken(self):
        # of nodes with 5, 2 and 9 samples
        received = {0: labels({4: [0.6, 0.4]}), 1: labels({4: [0.9, 0.1]}), 2: labels({4: [0.3, 0.7]})}
        assert as_dict(self.rule()(received)) == {4: pytest.approx([0.3, 0.7])}

    def test_the_first_of_equals_is_taken(self):
        received = {1: labels({4: [0.2, 0.8]}), 2: labels({4: [0.3, 0.7]})}
        assert as_dict(self.rule()(received)) == {4: pytest.approx([0.2, 0.8])}

    def test_a_node_that_did_not_keep_a_sample_has_no_say(self):
        """In the authors' code node 0 would win sample 7 with a label of zeros: class 0, of which it has most."""
        received = {0: labels({4: [0.6, 0.4]}), 1: labels({7: [0.9, 0.1]}), 2: labels({})}
        assert as_dict(self.rule()(received)) == {4: pytest.approx([0.6, 0.4]), 7: pytest.approx([0.9, 0.1])}

    def test_histograms_go_to_neighbours_and_are_counted(self):
        run = chain_of_four()
        run.store.counts = lambda: torch.arange(12, dtype=torch.int32).reshape(4, 3)
        rule = ClassCount()
        rule.prepare(run, run.step)
        assert rule.histograms[2].tolist() == [6, 7, 8]
        assert run.network.counts() == {"parameter_bytes": 0, "label_bytes": 0, "other_bytes": 6 * 3 * 4, "messages": 6}

    def test_a_liar_combines_labels_by_the_histogram_that_it_sends(self):
        """Nodes 0 and 1 have 5 and 9 samples of the classes they predict, but node 1 says that it has -9."""
        run, graph = chain_of_four(), Graph(Chain(), 4)
        run.network = Network(graph, links=Links(graph, [Liars([1], SignFlip(1.0))]))
        rule = ClassCount()
        rule.prepare(run, run.step)
        assert rule.histograms[0].tolist() == [5, 0, 1]
        assert rule.histograms[1].tolist() == [0, -9, -2]
        received = {0: three({4: [0.6, 0.3, 0.1]}), 1: three({4: [0.1, 0.8, 0.1]})}  # of node 0 and of node 1 alike
        assert as_dict(rule(received)) == {4: pytest.approx([0.6, 0.3, 0.1])}


def test_a_label_is_the_mean_over_those_that_kept_the_sample():
    received = {
        1: labels({0: [1.0, 0.0], 2: [0.5, 0.5]}),
        4: labels({5: [0.2, 0.8], 0: [0.4, 0.6]}),  # in an order of its own
        6: labels({2: [0.0, 1.0], 0: [0.1, 0.9]}),
    }
    mean = Mean()(received)
    assert mean.index.tolist() == [0, 2, 5]
    assert mean.index.dtype == torch.int64
    expected = torch.tensor([[0.5, 0.5], [0.25, 0.75], [0.2, 0.8]])
    torch.testing.assert_close(mean.probabilities, expected)


def test_senders_that_kept_nothing_have_no_vote():
    mean = Mean()({0: labels({}), 1: labels({3: [0.3, 0.7]}), 2: labels({})})
    assert as_dict(mean) == {3: pytest.approx([0.3, 0.7])}


def test_nothing_comes_of_nothing():
    mean = Mean()({0: labels({}), 1: labels({})})
    assert mean.index.shape == (0,)
    assert mean.probabilities.shape == (0, 2)


def test_averaging_leaves_the_messages_as_they_are():
    message = labels({0: [1.0, 0.0], 1: [0.5, 0.5]})
    Mean()({0: message, 1: message, 2: labels({0: [0.0, 1.0]})})
    assert as_dict(message) == {0: [1.0, 0.0], 1: [0.5, 0.5]}


KEPT = {0: [0, 1, 2, 3], 2: [1, 2, 3, 4], 5: [2, 3, 5], 6: [3, 6]}  # one to four voters a sample
SAMPLES = 7
TEMPERATURE = 0.2  # of ERA


def answers(weighted, sharpness=2.0):
    """What four nodes say of seven samples: {node: {sample: (raw logits, weight)}}; node 2 sends no weights."""
    g = torch.Generator().manual_seed(4)
    said = {}
    for node, kept in KEPT.items():
        logits = (sharpness * torch.randn(SAMPLES, K, generator=g)).double().numpy()
        weights = torch.rand(SAMPLES, generator=g).double().numpy() + 0.05
        said[node] = {s: (logits[s], weights[s] if weighted and node != 2 else 1.0) for s in kept}
    return said


def message(said, weighted):
    index = torch.tensor(list(said))
    p = torch.from_numpy(np.stack([softmax(z) for z, _ in said.values()])).float()
    return Labels(index, p, torch.tensor([w for _, w in said.values()]).float() if weighted else None)


HISTOGRAMS = {0: [5, 1, 4], 2: [2, 9, 4], 5: [0, 9, 8], 6: [7, 7, 7]}


def by_hand(name, voters):
    """A label from [(node, logits, weight)] of those that kept the sample, a loop a formula."""
    p = [softmax(z) for _, z, _ in voters]
    w = [weight for *_, weight in voters]
    if name == "LogitMean":
        return softmax(sum(wi * z for wi, (_, z, _) in zip(w, voters, strict=True)) / sum(w))
    if name == "ClassCount":
        held = [HISTOGRAMS[node][int(np.argmax(q))] for q, (node, *_) in zip(p, voters, strict=True)]
        return p[held.index(max(held))]
    if name == "ConfidenceMean":
        w = [wi * (1 + sum(q * np.log(q)) / np.log(K)) for wi, q in zip(w, p, strict=True)]
    if name == "Vote":
        p = [np.eye(K)[np.argmax(q)] for q in p]
    mean = sum(wi * q for wi, q in zip(w, p, strict=True)) / sum(w)
    return np.exp(mean / TEMPERATURE) / np.exp(mean / TEMPERATURE).sum() if name == "ERA" else mean


def rule(name):
    rules = {"Mean": Mean(), "LogitMean": LogitMean(), "ConfidenceMean": ConfidenceMean(), "ERA": ERA(TEMPERATURE),
             "Vote": Vote(), "ClassCount": ClassCount()}  # fmt: skip
    rules["ClassCount"].histograms = {node: torch.tensor(held) for node, held in HISTOGRAMS.items()}
    return rules[name]


every_rule = pytest.mark.parametrize("name", ["Mean", "LogitMean", "ConfidenceMean", "ERA", "Vote", "ClassCount"])


@every_rule
@pytest.mark.parametrize("weighted", [False, True])
def test_every_rule_is_its_formula_over_those_that_kept_the_sample(name, weighted):
    said = answers(weighted)
    sent = {node: message(of, weighted and node != 2) for node, of in said.items()}
    found = rule(name)(sent)
    assert found.index.tolist() == list(range(SAMPLES))
    assert (found.weights, found.size) == (None, None)
    voters = [[(node, *of[s]) for node, of in said.items() if s in of] for s in range(SAMPLES)]
    assert [len(v) for v in voters] == [1, 2, 3, 4, 1, 1, 1]
    np.testing.assert_allclose(found.probabilities, [by_hand(name, v) for v in voters], rtol=0, atol=2e-6)
    np.testing.assert_allclose(found.probabilities.sum(1), 1, rtol=0, atol=1e-6)


@every_rule
def test_who_did_not_keep_a_sample_does_not_matter_whatever_it_is_taken_for(name):
    """``combine`` gets something in its place, with a vote of 0."""
    probabilities = torch.rand(3, 5, K, generator=torch.Generator().manual_seed(1)).softmax(2)
    votes = torch.tensor([[1.0, 0, 1, 0, 0.3], [0, 1, 1, 1, 0], [0, 0, 1, 1, 0.7]])
    found = rule(name).combine(probabilities, votes, [0, 2, 5])
    for garbage in (torch.zeros(K), torch.full((K,), 1 / K), torch.tensor([0.0, 1, 0])):
        other = probabilities.where(votes[..., None] > 0, garbage)
        torch.testing.assert_close(rule(name).combine(other, votes, [0, 2, 5]), found, rtol=0, atol=0)


@every_rule
def test_scaling_all_weights_changes_nothing(name):
    sent = {node: message(of, True) for node, of in answers(True).items()}
    half = {node: Labels(m.index, m.probabilities, m.weights / 2) for node, m in sent.items()}
    torch.testing.assert_close(rule(name)(half).probabilities, rule(name)(sent).probabilities)


def test_logit_means_stand_margins_of_sixty():
    z = torch.tensor([[[40.0, 0, -20]], [[-57.0, 3, 0]]])
    found = LogitMean().combine(z.softmax(2), torch.ones(2, 1), [0, 1])
    np.testing.assert_allclose(found, softmax(z.double().mean(0).numpy()), rtol=1e-4)


def test_logit_means_of_hard_labels_are_the_majority():
    hard = torch.eye(K)[torch.tensor([[0, 0], [1, 0], [1, 0]])]
    found = LogitMean().combine(hard, torch.ones(3, 2), [0, 1, 2])
    torch.testing.assert_close(found, torch.eye(K)[[1, 0]])


def test_sharpening_goes_from_the_uniform_to_the_most_probable_class():
    said = {0: labels({0: [0.6, 0.4], 1: [0.1, 0.9]}), 1: labels({0: [0.5, 0.5]})}
    soft, sharp = (ERA(t)(said).probabilities for t in (1e6, 1e-3))
    torch.testing.assert_close(soft, torch.full((2, 2), 0.5))
    torch.testing.assert_close(sharp, torch.tensor([[1.0, 0], [0, 1]]))
    mean = Mean()(said).probabilities
    entropies = [torch.special.entr(ERA(t)(said).probabilities).sum(1) for t in (0.1, 0.3, 1.0)]
    assert (entropies[0] < entropies[1]).all()
    assert (entropies[1] < entropies[2]).all()
    assert (ERA()(said).probabilities.argmax(1) == mean.argmax(1)).all()


def test_a_sure_label_outweighs_those_at_random():
    said = {0: labels({3: [1.0, 0]}), 1: labels({3: [0.5, 0.5], 4: [0.5, 0.5]}), 2: labels({4: [0.5, 0.5]})}
    assert as_dict(ConfidenceMean()(said)) == {3: pytest.approx([1, 0], abs=1e-5), 4: [0.5, 0.5]}


def test_votes_are_counted():
    said = {v: labels({8: p}) for v, p in enumerate([[0.51, 0.49], [0.9, 0.1], [0.0, 1.0], [0.8, 0.2]])}
    assert as_dict(Vote()(said)) == {8: [0.75, 0.25]}
