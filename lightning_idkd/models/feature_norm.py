"""Norms of the features before the classifier, for any network."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class NormalisedFeatures(nn.Module):
    """A network whose ``features`` are normalised before its ``head``.

    Args:
        network: it has ``features(x) -> [B, F]`` and ``head``.
        kind: ``layer`` or ``sphere``, see ``Architecture.feature_norm``.
    """

    def __init__(self, network: nn.Module, kind: str) -> None:
        super().__init__()
        self.network, self.kind = network, kind

    @property
    def head(self) -> nn.Module:
        return self.network.head

    def features(self, x: Tensor) -> Tensor:
        features = self.network.features(x)
        if self.kind == "layer":
            return F.layer_norm(features, features.shape[1:])
        return F.normalize(features, dim=1) * features.shape[1] ** 0.5

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))
