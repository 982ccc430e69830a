"""Nodes that lie: what they send is false, while they themselves train and mix like the others."""

from __future__ import annotations

import numpy as np

from lightning_idkd.callback import Attack, Fault, LabelAttack, Run
from lightning_idkd.errors import UserError, require
from lightning_idkd.graph import Graph
from lightning_idkd.links import Moment


class Liars(Fault):
    """Makes nodes lie. A liar's own row, buffers and training stay honest, unless its private labels are flipped.

    A lie has the size of the true message, can be lost like it, and counts as many bytes. Accuracy, loss, consensus and
    the other measures of a run are those of honest nodes; ``faults/liars_mean`` is the mean accuracy of the liars.

    Args:
        nodes: Numbers of the nodes that lie; or how many nodes lie, which are then drawn from the seed.
        attack: What liars send in place of rows (parameters, a rule's other messages, and statistics that nodes share):
            SignFlip, Noise, IPM, ALIE, Dissensus, or a class of yours; null for their true rows.
        labels: What they send in place of their labels of public samples: WrongLabels, or a class of yours; null for
            their true labels.
        flip: Whether they train on flipped labels, k - 1 - y in place of y. Their held-out samples keep their labels.
    """

    breaks = ()

    def __init__(self, nodes: int | list[int] = 1, attack: Attack | None = None, labels: LabelAttack | None = None,
                 flip: bool = False):  # fmt: skip
        numbers = nodes if isinstance(nodes, list) else list(range(nodes))
        require(len(numbers) >= 1, "faults.nodes", nodes, "the numbers of one node or more, or how many")
        if twice := sorted({node for node in numbers if numbers.count(node) > 1}):
            raise UserError(f"faults.nodes: node {twice[0]} is given {numbers.count(twice[0])} times; allowed: once")
        if attack is None and labels is None and not flip:
            raise UserError("faults: Liars need an attack, labels, or flip: true; all nodes are honest without")
        self.nodes, self.attack, self.labels, self.flip = nodes, attack, labels, flip

    def check(self, graph: Graph) -> None:
        most, count = graph.nodes - 1, self.nodes if isinstance(self.nodes, int) else len(self.nodes)
        for node in self.nodes if isinstance(self.nodes, list) else ():
            require(0 <= node <= most, "faults.nodes", f"node {node}", f"0 to {most}")
        require(count <= most, "faults.nodes", f"{count} nodes", f"{most} at most, so that one is honest")

    def lying(self, moment: Moment) -> np.ndarray:
        lies, chosen = np.zeros(moment.nodes, bool), self.nodes
        if isinstance(chosen, int):
            chosen = np.argsort(moment.uniform("liars", np.arange(moment.nodes)), kind="stable")[:chosen]
        lies[chosen] = True
        return lies

    def on_check(self, run: Run) -> None:
        if self.labels is not None:
            self.labels.on_check(run)
