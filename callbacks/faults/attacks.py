"""Attacks of lying nodes on rows and on labels."""

from __future__ import annotations

import dataclasses
import math
from abc import abstractmethod
from statistics import NormalDist
from typing import Literal

import numpy as np

from lightning_idkd.callback import Attack, LabelAttack, Run
from lightning_idkd.errors import require
from lightning_idkd.labels import Labels

TYPE_CHECKING = False  # by a name of ours: jsonargparse runs the block of typing's, which would load torch
if TYPE_CHECKING:
    from torch import Tensor

    from lightning_idkd.lies import Sight, Target


class SignFlip(Attack):
    """Sends minus the true row, times ``scale`` (bit flipping in He, Karimireddy and Jaggi, 2022, with scale 1).

    Args:
        scale: Factor, above 0.
    """

    def __init__(self, scale: float = 1.0):
        require(0 < scale < math.inf, "faults.attack.scale", scale, "above 0")
        self.scale = scale

    def __call__(self, T: Tensor, sight: Sight) -> Tensor:
        return -self.scale * T


class Noise(Attack):
    """Adds independent normal numbers to the true row: new ones to each message, the same ones for all its receivers.

    Args:
        sigma: Standard deviation, above 0.
    """

    def __init__(self, sigma: float = 1.0):
        require(0 < sigma < math.inf, "faults.attack.sigma", sigma, "above 0")
        self.sigma = sigma

    def __call__(self, T: Tensor, sight: Sight) -> Tensor:
        u, v = (sight.uniform(f"noise {part}", T.shape[1], T.device).to(T) for part in ("radius", "angle"))
        normal = (-2 * (1 - u).log()).sqrt() * (2 * math.pi * v).cos()  # Box and Muller, 1958
        return T + self.sigma * normal


class Omniscient(Attack):
    """Base of attacks that know the rows of all nodes, and send every receiver a row that is made for it."""

    omniscient = True

    @abstractmethod
    def aim(self, target: Target, honest: np.ndarray) -> Tensor:
        """Returns what all liars send to one receiver, [C]; ``honest`` is bool [n]."""

    def __call__(self, T: Tensor, sight: Sight) -> Tensor:
        lies = {receiver: self.aim(target, sight.honest) for receiver, target in sight.targets.items()}
        sent = T.clone()
        for e, receiver in enumerate(sight.receivers.tolist()):
            sent[e] = lies[receiver]
        return sent


class IPM(Omniscient):
    """Inner product manipulation (Xie, Koyejo and Gupta, UAI 2020): minus ``epsilon`` times the mean of the rows of the
    receiver and its honest in-neighbours, as He, Karimireddy and Jaggi (2022) adapt it to graphs.

    Args:
        epsilon: Factor, above 0; their code has 0.1.
    """

    def __init__(self, epsilon: float = 0.1):
        require(0 < epsilon < math.inf, "faults.attack.epsilon", epsilon, "above 0")
        self.epsilon = epsilon

    def aim(self, target: Target, honest: np.ndarray) -> Tensor:
        return -self.epsilon * target.rows.mean(0)


class ALIE(Omniscient):
    """A little is enough (Baruch, Baruch and Goldberg, NeurIPS 2019): mean minus ``z`` standard deviations, by column,
    of the rows of the receiver and its honest in-neighbours, as He, Karimireddy and Jaggi (2022) adapt it to graphs.

    Args:
        z: Number of standard deviations. null: the quantile of a standard normal at (n - m - s) / (n - m), for n nodes,
            m liars and s = floor(n / 2 + 1) - m (the paper's Algorithm 3); it needs the liars to be a minority.
    """

    def __init__(self, z: float | None = None):
        require(z is None or math.isfinite(z), "faults.attack.z", z, "a number or null")
        self.z = z

    def check(self, honest: np.ndarray) -> None:
        n, m = len(honest), int((~honest).sum())
        fits = self.z is not None or 0 < self.share(honest) < 1
        require(fits, "faults.attack.z", "null", f"a number where {m} of {n} nodes lie")

    @staticmethod
    def share(honest: np.ndarray) -> float:
        """Returns (n - m - s) / (n - m)."""
        n, good = len(honest), int(honest.sum())
        supporters = n // 2 + 1 - (n - good)
        return (good - supporters) / good

    def aim(self, target: Target, honest: np.ndarray) -> Tensor:
        z = NormalDist().inv_cdf(self.share(honest)) if self.z is None else self.z
        mean = target.rows.mean(0)
        deviation = (target.rows - mean).square().sum(0) / max(len(target.rows) - 1, 1)
        return mean - z * deviation.sqrt()


class Dissensus(Omniscient):
    """Dissensus (He, Karimireddy and Jaggi, arXiv 2202.01545): node i, with honest in-neighbours j and lying ones b,
    gets x_i - ``epsilon`` sum_j W_ij (x_j - x_i) / sum_b W_ib. With ``epsilon`` 1, plain mixing leaves i where it is. A
    message that goes to all nodes at once is the mean of the honest rows.

    In the authors' code, a liar has a single target, and weights are 1 / (degree + 1) under aggregations other than
    gossip. Here, a liar aims at each of its receivers, also at lying ones, with the weights of W(t).

    Args:
        epsilon: Factor, above 0.
    """

    def __init__(self, epsilon: float = 1.0):
        require(0 < epsilon < math.inf, "faults.attack.epsilon", epsilon, "above 0")
        self.epsilon = epsilon

    def aim(self, target: Target, honest: np.ndarray) -> Tensor:
        pull = target.weights @ (target.rows - target.own)
        return target.own - self.epsilon * pull / target.lying


class WrongLabels(LabelAttack):
    """Sends false one-hot labels of public samples.

    Args:
        kind: ``wrong``: the class after the most probable one (after the last class, the first); ``confident``: the
            most probable one, with certainty; ``random``: a random class for every sample.
        everything: Whether a liar labels all public samples, instead of those that it kept. The additional labels are
            made from its own answers, and the message is counted as unencoded.
    """

    def __init__(self, kind: Literal["wrong", "confident", "random"] = "wrong", everything: bool = False):
        self.kind, self.everything = kind, everything

    def on_check(self, run: Run) -> None:
        self.run = run

    def __call__(self, labels: Labels, sight: Sight) -> Labels:
        import torch.nn.functional as F

        if self.everything and len(labels) < self.run.store.public:
            labels = labels.over(self.answer(labels, int(sight.senders[0])))
        p, k = labels.probabilities, labels.probabilities.shape[1]
        classes = p.argmax(1)
        if self.kind == "random":
            drawn = sight.uniform("labels", self.run.store.public, p.device)[0, labels.index]
            classes = (k * drawn).long().clamp(max=k - 1)
        elif self.kind == "wrong":
            classes = (classes + 1) % k
        return dataclasses.replace(labels, probabilities=F.one_hot(classes, k).to(p))

    def answer(self, labels: Labels, node: int) -> Labels:
        """Returns the answers of ``node`` to all public samples."""
        import torch

        logits = self.run.answers()[node - self.run.network.rows.start].logits
        weights = None if labels.weights is None else labels.weights.new_ones(len(logits))
        index = torch.arange(len(logits), device=labels.index.device)
        return Labels(index, logits.softmax(1).to(labels.probabilities), weights)
