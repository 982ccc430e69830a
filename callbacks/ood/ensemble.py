"""Combines several scores into one."""

from __future__ import annotations

from lightning_idkd.callback import OodScore
from lightning_idkd.errors import UserError, require
from lightning_idkd.labels import Outputs

TYPE_CHECKING = False  # by a name of ours: jsonargparse runs the block of typing's, which would load torch
if TYPE_CHECKING:
    from torch import Tensor


class RankEnsemble(OodScore):
    """Mean of the ranks, from 0 to 1, that several scores give to the samples of one call; equal scores share a rank.

    Args:
        scores: Two or more scores.
    """

    unit = "mean rank, 0 to 1"

    def __init__(self, scores: list[OodScore]):
        require(len(scores) >= 2, "calibration.score.scores", len(scores), "two scores or more")
        for score in scores:
            if type(score).perturb is not OodScore.perturb:
                name = type(score).__name__
                raise UserError(
                    f"calibration.score.scores: {name} changes the samples that the others see too; leave it out"
                )
        self.scores = scores

    @property
    def fitted(self) -> bool:
        return any(score.fitted for score in self.scores)

    def fit(self, outputs: Outputs, labels: Tensor) -> None:
        for score in self.scores:
            if score.fitted:
                score.fit(outputs, labels)

    def __call__(self, outputs: Outputs) -> Tensor:
        import torch

        from lightning_idkd.training.calibrate import compute_finite_scores

        ranks = []
        for score in self.scores:
            _, position, count = compute_finite_scores(score, outputs).unique(return_inverse=True, return_counts=True)
            rank = count.cumsum(0) - (count + 1) / 2  # mean rank of the samples with each score, from 0 to N - 1
            ranks.append(rank[position] / max(len(position) - 1, 1))
        return torch.stack(ranks).mean(0)
