"""What the messages of a finished run reveal to an attacker about the private data of the node that sent them.

The attacker is a neighbour that follows the protocol, and with which all others share what they know: a single
neighbour knows less. It attacks one node, its target, and has

- the target's messages at the end of training: the labels of one exchange, the parameters of one gossip step (the first
  after the last training step), or both. Nodes send many more, from which an attacker may learn more;
- the same messages of all other nodes, their label distributions and which samples they train on;
- what all nodes know: the network, the scaling, the public set; and besides the distribution of all private labels, and
  labelled samples of the same kind, which are those of the test set;
- not the seed, from which the noise of private labels follows, and not the target's norm buffers, which nodes do not
  send: it uses its own.

The target's label distribution is inferred by :func:`infer_distributions`, and whether a sample with a known label is
one that the target trains on by two scores of the sample (:func:`compute_scores`). With labels alone, these are scores
of a student: the last layer of the attacker's own network, fitted to the target's labels of public samples
(:func:`fit_head`). Other attacks may find more; a result near that of an attacker who sees nothing is no proof.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_idkd import randomness
from lightning_idkd.labels import Labels, Outputs
from lightning_idkd.nodes.stack import run_network

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lightning_idkd.nodes.node import NodeModule
    from lightning_idkd.training.orchestrator import Orchestrator

AUXILIARY = 1000
"""Test samples that the attacker has at most."""
POWERS = torch.cat([torch.zeros(1), torch.logspace(-1, 2, 25)]).double()
"""Exponents that :func:`infer_distributions` tries."""
FLOOR = 1e-3
"""Share of the distribution of all labels in every inferred one, so that no class is ruled out."""
ATTACKS = ("loss", "lira")
"""The scores of :func:`compute_scores`."""
DRAWS = 500
"""Draws of the bootstrap."""
SMALL_RATE = 0.01
"""False-positive rate of the true-positive rate that is reported."""


# ---------------------------------------------------------------------- label distributions


def infer_distributions(evidence: Sequence[Tensor], known: Tensor, overall: Tensor) -> Tensor:
    """Infer every node's label distribution [n, k] from what it sends, given those of all other nodes.

    A message gives ``evidence`` [n, k], the mean probability that a node's labels (or its network, for samples that all
    know) give to every class. The estimate is ``overall`` [k], the distribution of all labels, times a power of the
    ratio of the node's evidence to the geometric mean of the others', for each kind of message. The exponents, of
    :data:`POWERS`, are those that estimate the ``known`` distributions [n, k] of the other nodes best (smallest mean
    KL). With exponents 0, the estimate is ``overall``.
    """
    n = len(known)
    logs = [(mass.double() + FLOOR / mass.shape[1]).log() for mass in evidence]
    ratios = torch.stack([log - (log.sum(0) - log) / (n - 1) for log in logs])  # [kinds, n, k]
    best, estimate = torch.full((n,), torch.inf, dtype=torch.float64), overall.expand(n, -1).double().clone()
    powers = torch.cartesian_prod(*[POWERS] * len(evidence)).view(-1, len(evidence))
    for some in powers.split(len(POWERS)):
        inferred = (overall.double().log() + torch.einsum("gs,snk->gnk", some, ratios)).softmax(2)
        inferred = (1 - FLOOR) * inferred + FLOOR * overall
        error = divergence(known, inferred)  # [powers, n]
        of_others, which = (error.sum(1, keepdim=True) - error).min(0)
        better = of_others < best - 1e-12
        best = of_others.where(better, best)
        estimate = inferred[which, torch.arange(n)].where(better[:, None], estimate)
    return estimate


def divergence(true: Tensor, inferred: Tensor) -> Tensor:
    """Kullback-Leibler divergence [..., n] of the ``inferred`` [..., n, k] from the ``true`` distributions [n, k], in
    nats."""
    true = true.double()
    return (torch.xlogy(true, true) - torch.xlogy(true, inferred.double())).sum(-1)


def total_variation(true: Tensor, inferred: Tensor) -> Tensor:
    """Total variation [n] between two distributions [n, k] each, 0 to 1."""
    return (true.double() - inferred.double()).abs().sum(1) / 2


# ---------------------------------------------------------------------- membership


def log_odds(logits: Tensor, labels: Tensor) -> Tensor:
    """log p / (1 - p) [N] of the probability p that ``logits`` [N, k] give to the ``labels`` [N]: the confidence whose
    distribution over networks is nearly normal (Carlini et al., S&P 2022)."""
    logits = logits.double()
    own = logits.gather(1, labels[:, None])[:, 0]
    return own - logits.scatter(1, labels[:, None], -torch.inf).logsumexp(1)


def compute_scores(confidence: Tensor, target: int) -> dict[str, Tensor]:
    """Scores [N] of samples, larger = more probably members of the target's training set, by attack.

    ``loss`` is minus the cross-entropy of the target's network (Yeom et al., CSF 2018). ``lira`` compares its
    confidence with that of networks which have not seen the sample (the offline attack of Carlini et al., S&P 2022):
    z = (confidence - mean of the shadows) / sd. The shadows are the networks of all other nodes, none of which trains
    on the target's samples, although gossip has mixed their parameters with its own. As there are few, one sd holds for
    all samples, as in that paper.

    Args:
        confidence: Log-odds of the label [n, N] by every node's network, see :func:`log_odds`.
        target: The row of the target.
    """
    shadows = torch.cat([confidence[:target], confidence[target + 1 :]])
    spread = shadows.var(0, correction=0).mean().sqrt().clamp_min(1e-12)
    return {"loss": F.logsigmoid(confidence[target]), "lira": (confidence[target] - shadows.mean(0)) / spread}


def combine(scores: Tensor) -> Tensor:
    """Combine s scores [s, N] of the same samples into one [N]: their sum, each divided by its standard deviation."""
    return (scores / scores.std(1, keepdim=True).clamp_min(1e-12)).sum(0)


def fit_head(features: Tensor, labels: Labels) -> Tensor:
    """A linear layer, weights and at last a bias [F + 1, k], fitted to soft ``labels`` of samples with ``features``
    [m, F].

    It is the ridge regression of log (p + 0.0001), centred over the classes, with a penalty of 0.001 per sample on the
    weights. Such logarithms are the logits of the labels' network, which are linear in its own features.
    """
    x = with_one(features[labels.index])
    logits = (labels.probabilities.double() + 1e-4).log()
    penalty = 1e-3 * max(len(x), 1) * torch.ones(x.shape[1], dtype=torch.float64)
    penalty[-1] = 1e-9
    return torch.linalg.solve(x.T @ x + penalty.diag(), x.T @ (logits - logits.mean(1, keepdim=True)))


def with_one(features: Tensor) -> Tensor:
    """The features [N, F] and a last column of ones, float64."""
    return torch.cat([features.double(), torch.ones(len(features), 1, dtype=torch.float64)], 1)


# ---------------------------------------------------------------------- rates and their intervals


def measure_rates(scores: Tensor, members: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """AUROC [d] of ``scores`` [N], and the largest true-positive rate [d] of a threshold whose false-positive rate is
    :data:`SMALL_RATE` or less.

    ``members`` is bool [N]. Sample j counts ``counts`` [d, j] times in draw d.
    """
    order = scores.argsort(descending=True)
    scores, members, counts = scores[order], members[order], counts[:, order].double()
    last = torch.ones_like(members)
    last[:-1] = scores[1:] != scores[:-1]  # equal scores share a threshold

    def rates(which: Tensor) -> Tensor:
        total = (counts * which).cumsum(1)
        return F.pad(total[:, last] / total[:, -1:], (1, 0))

    tpr, fpr = rates(members), rates(~members)
    return torch.trapezoid(tpr, fpr), tpr.where(fpr <= SMALL_RATE, 0).amax(1)


def resample(strata: Tensor, purpose: str) -> Tensor:
    """How often every sample comes in a draw of the bootstrap, int64 [1 + DRAWS, N]; the first row has each once.

    A draw takes from every stratum as many samples as it has, with replacement; ``strata`` [N] are their numbers.
    """
    counts = torch.ones(1 + DRAWS, len(strata), dtype=torch.int64)
    draw = torch.arange(DRAWS)[:, None]
    for number, stratum in enumerate(strata.unique().tolist()):
        places = (strata == stratum).nonzero()[:, 0]
        chosen = randomness.randint(len(places), 0, purpose, number, draw, torch.arange(len(places)))
        drawn = torch.zeros(DRAWS, len(places), dtype=torch.int64)
        counts[1:, places] = drawn.scatter_add(1, chosen, torch.ones_like(chosen))
    return counts


def with_interval(draws: Tensor) -> dict[str, float]:
    """The value, which is the first entry of ``draws`` [d], and the 95 % interval of the others."""
    low, high = draws[1:].double().quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {"value": draws[0].item(), "low": low, "high": high}


# ---------------------------------------------------------------------- the attacked run


@dataclass
class Candidates:
    """Samples of one node, half of which it trains on."""

    index: Tensor
    """int64 [2 c], places in the private set."""
    labels: Tensor
    """int64 [2 c]."""
    members: Tensor
    """bool [2 c], whether the node trains on the sample."""


class Attacker:
    """Attacks the nodes of a run, as the module describes.

    Args:
        run: The run at the end of its training.
        nodes: Numbers of the nodes to attack.
        samples: Number of members, and of non-members, of each node at most.
    """

    def __init__(self, run: Orchestrator, nodes: list[int], samples: int):
        self.run, self.nodes = run, nodes
        self.candidates = [self.draw_candidates(node, samples) for node in nodes]
        sizes = torch.tensor([len(c.index) for c in self.candidates])
        self.targets = torch.arange(len(nodes)).repeat_interleave(sizes)
        self.members = torch.cat([c.members for c in self.candidates])
        self.draws = resample(2 * self.targets + self.members, "bootstrap of samples")
        self.node_draws = resample(torch.zeros(len(nodes)), "bootstrap of nodes")
        counts = torch.stack([run.store.labels[own].bincount(minlength=run.store.k) for own in run.store.own]).double()
        self.distributions = (counts / counts.sum(1, keepdim=True))[nodes]
        self.overall = (counts.sum(0) + 1) / (counts.sum() + run.store.k)
        batches, _labels = run.store.evaluation_set("test", AUXILIARY)
        self.networks = [self.list_networks(attacker) for attacker in (0, 1)]
        self.confidence = []  # of every target: [nodes, its candidates]
        for target, candidates in enumerate(self.candidates):
            networks = self.networks[self.attacker_of(target)]
            logits = [run_network(network, self.batches(candidates)).logits for network in networks]
            self.confidence.append(torch.stack([log_odds(z, candidates.labels) for z in logits]))
        networks = [self.networks[self.attacker_of(target)][target] for target in range(len(nodes))]
        answers = [run_network(network, batches()).logits.log_softmax(1) for network in networks]
        self.mass = torch.stack([log_p.mean(0).softmax(0) for log_p in answers])  # [nodes, k], geometric means

    @staticmethod
    def attacker_of(target: int) -> int:
        """The row of the node whose network the attacker of a target has as its own."""
        return 0 if target else 1

    def draw_candidates(self, node: int, samples: int) -> Candidates:
        """As many samples that the node trains on as held-out ones, drawn by the hash."""
        store, seed = self.run.store, self.run.seed
        train, held_out = torch.from_numpy(store.split.train[node]), store.held_out(node)
        count = min(len(train), len(held_out), samples)
        parts = [
            part[randomness.permutation(len(part), seed, f"audit {name}", node)[:count]]
            for name, part in (("members", train), ("non-members", held_out))
        ]
        order = randomness.permutation(2 * count, seed, "audit order", node)  # some networks use statistics of a batch
        index = torch.cat(parts)[order]
        return Candidates(index, store.labels[index], order < count)

    def batches(self, candidates: Candidates) -> Iterator[Tensor]:
        """Batches of the candidates, as networks take them."""
        return self.run.store.private_batches(candidates.index)

    def list_networks(self, attacker: int) -> list[NodeModule]:
        """The networks of all nodes with the norm buffers of an attacker."""
        stack = self.run.stack
        buffers = {name: b[self.nodes[attacker]].clone() for name, b in stack.buffers.items()}
        return [stack.model(stack.X[node].clone(), buffers) for node in self.nodes]

    # ------------------------------------------------------------------ students

    @functools.cached_property
    def own_features(self) -> dict[int, tuple[Tensor, list[Tensor]]]:
        """By attacker: its features of the public samples [m, F], and of the candidates of each of its targets."""
        found = {}
        for attacker in (0, 1):
            module = self.networks[attacker][attacker]
            public = self.run.store.restore_order(run_network(module, self.run.store.public_batches()))
            mean, sd = take_features(public).mean(0), take_features(public).std(0).clamp_min(1e-6)
            mine = [c for t, c in enumerate(self.candidates) if self.attacker_of(t) == attacker]
            of_candidates = [take_features(run_network(module, self.batches(c))) for c in mine]
            found[attacker] = (take_features(public) - mean) / sd, [(x - mean) / sd for x in of_candidates]
        return found

    def confidence_of_students(self, sent: list[Labels]) -> list[Tensor]:
        """Log-odds [nodes, its candidates] by the students of all nodes' labels, of every target."""
        confidence: dict[int, Tensor] = {}
        for attacker, (public, of_candidates) in self.own_features.items():
            heads = [fit_head(public, sent[node]) for node in self.nodes]
            targets = [t for t in range(len(self.nodes)) if self.attacker_of(t) == attacker]
            for target, x in zip(targets, of_candidates, strict=True):
                labels = self.candidates[target].labels
                confidence[target] = torch.stack([log_odds(with_one(x) @ head, labels) for head in heads])
        return [confidence[target] for target in range(len(self.nodes))]

    # ------------------------------------------------------------------ results

    def scores(self, confidence: list[Tensor]) -> dict[str, Tensor]:
        """The scores [N] of all targets' candidates, by attack."""
        return self.gather([compute_scores(of_target, target) for target, of_target in enumerate(confidence)])

    @staticmethod
    def gather(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The scores of all targets' candidates, from those of every target."""
        return {attack: torch.cat([part[attack] for part in parts]) for attack in ATTACKS}

    def report(self, evidence: list[Tensor], scores: list[dict[str, Tensor]]) -> dict:
        """What the attacker finds from the evidence and the scores of one or several kinds of messages."""
        guess = self.overall.expand(len(self.nodes), -1)
        inferred = infer_distributions(evidence, self.distributions, self.overall) if evidence else guess
        result: dict = {"distribution": self.report_distribution(inferred), "membership": {}}
        for attack in ATTACKS:
            several = torch.stack([of_kind[attack] for of_kind in scores])
            score = several[0] if len(scores) == 1 else combine(several)
            auroc, tpr = measure_rates(score, self.members, self.draws)
            result["membership"][attack] = {"auroc": with_interval(auroc), "tpr": with_interval(tpr)}
        return result

    def report_distribution(self, inferred: Tensor) -> dict:
        """KL and total variation between the true distributions and the inferred ones [nodes, k], as means over
        nodes."""
        draws = self.node_draws.double() / len(self.nodes)
        errors = {"kl": divergence, "tv": total_variation}
        return {name: with_interval(draws @ error(self.distributions, inferred)) for name, error in errors.items()}

    def report_nothing(self) -> dict:
        """What the attacker finds with its own network alone, which gossip has mixed with the target's."""
        parts = []
        for target, of_target in enumerate(self.confidence):
            attacker = self.attacker_of(target)
            others = [node for node in range(len(self.nodes)) if node not in (target, attacker)]
            parts.append(compute_scores(of_target[[attacker, *others]], 0))
        return self.report([], [self.gather(parts)])


def take_features(outputs: Outputs) -> Tensor:
    """Features [N, F] of a network; its logits, if it has no features."""
    return outputs.logits if outputs.features is None else outputs.features
