"""Scores of the features before the classifier; all of them learn from the node's training samples first."""

from __future__ import annotations

from collections.abc import Callable

from lightning_idkd.callback import OodScore
from lightning_idkd.errors import require
from lightning_idkd.labels import Outputs

TYPE_CHECKING = False  # by a name of ours: jsonargparse runs the block of typing's, which would load torch
if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 4096  # number of samples that are compared with all training samples at once


def map_blocks(function: Callable[[Tensor], Tensor], samples: Tensor) -> Tensor:
    """Applies ``function`` to blocks of ``samples`` [N, F], so that a matrix of all pairs never exists."""
    import torch

    return torch.cat([function(block) for block in samples.split(BLOCK)])


class KNN(OodScore):
    """Minus the distance to the k-th nearest training sample, with features normalised to length 1 (Sun et al., ICML
    2022).

    Args:
        neighbours: k; if a node has fewer training samples, it uses their number.
    """

    unit = "minus a distance"

    def __init__(self, neighbours: int = 50):
        require(neighbours >= 1, "calibration.score.neighbours", neighbours, "1 or more")
        self.neighbours = neighbours

    @staticmethod
    def _normalise(features: Tensor) -> Tensor:
        return features / features.norm(dim=1, keepdim=True).clamp_min(1e-12)

    def fit(self, outputs: Outputs, labels: Tensor) -> None:
        self.own = self._normalise(self.features(outputs).double())

    def __call__(self, outputs: Outputs) -> Tensor:
        import torch

        k = min(self.neighbours, len(self.own))
        samples = self._normalise(self.features(outputs).double())  # in float32 cdist would lose distances below 1e-3
        return map_blocks(lambda x: -torch.cdist(x, self.own).kthvalue(k, dim=1).values, samples).float()


def ledoit_wolf(centred: Tensor) -> float:
    """Returns Ledoit and Wolf's weight of the identity in the covariance of ``centred`` [N, F]; 1 if all of it is 0."""
    from sklearn.covariance import ledoit_wolf_shrinkage

    if not centred.any():
        return 1.0
    return float(ledoit_wolf_shrinkage(centred.cpu().numpy(), assume_centered=True))


def invert_covariance(centred: Tensor, shrinkage: float) -> Tensor:
    """Returns the inverse covariance [F, F], float64, of ``centred`` [N, F], shrunk towards a multiple of the identity.

    If all of ``centred`` is 0, as with one sample per class, it is the identity.
    """
    import torch

    identity = torch.eye(centred.shape[1], dtype=centred.dtype, device=centred.device)
    if not centred.any():
        return identity
    covariance = centred.T @ centred / len(centred)
    mean = covariance.diagonal().mean().clamp_min(1e-12)
    return torch.linalg.pinv((1 - shrinkage) * covariance + shrinkage * mean * identity, hermitian=True)


def squared_distance(x: Tensor, mean: Tensor, inverse: Tensor) -> Tensor:
    """Returns the squared Mahalanobis distance [N] of ``x`` [N, F] from ``mean`` [F]."""
    x = x - mean
    return ((x @ inverse) * x).sum(1)


class Mahalanobis(OodScore):
    """Minus the squared Mahalanobis distance to the nearest class mean, with one covariance for all classes (Lee et
    al., NeurIPS 2018).

    Only classes of which the node has training samples count.

    Args:
        shrinkage: Weight of the identity in the covariance, 0 to 1; null for that of Ledoit and Wolf.
    """

    unit = "minus a squared distance"

    def __init__(self, shrinkage: float | None = None):
        require(shrinkage is None or 0 <= shrinkage <= 1, "calibration.score.shrinkage", shrinkage, "0 to 1, or null")
        self.shrinkage = shrinkage

    def fit(self, outputs: Outputs, labels: Tensor) -> None:
        import torch

        x, labels = self.features(outputs).double(), labels.to(outputs.logits.device)
        classes, index = labels.unique(return_inverse=True)
        self.means = torch.stack([x[index == c].mean(0) for c in range(len(classes))])
        centred = x - self.means[index]
        self.shrunk_by = ledoit_wolf(centred) if self.shrinkage is None else self.shrinkage
        self.inverse = invert_covariance(centred, self.shrunk_by)

    def distances(self, x: Tensor) -> Tensor:
        """Returns the squared distances [N, classes of the node] of features ``x`` [N, F], float64."""
        import torch

        return torch.stack([squared_distance(x, mean, self.inverse) for mean in self.means], dim=1)

    def __call__(self, outputs: Outputs) -> Tensor:
        return -self.distances(self.features(outputs).double()).amin(1).float()


class RMD(Mahalanobis):
    """Relative Mahalanobis distance (Ren et al., 2021): the squared distance to the mean of all training samples, minus
    the squared distance to the nearest class mean.

    Both covariances have the same shrinkage; otherwise the difference would measure the shrinkage.

    Args:
        shrinkage: Weight of the identity in both covariances, 0 to 1; null for that of Ledoit and Wolf for the classes'
            covariance.
    """

    unit = "difference of squared distances"

    def fit(self, outputs: Outputs, labels: Tensor) -> None:
        super().fit(outputs, labels)
        x = self.features(outputs).double()
        self.centre = x.mean(0)
        self.background = invert_covariance(x - self.centre, self.shrunk_by)

    def __call__(self, outputs: Outputs) -> Tensor:
        x = self.features(outputs).double()
        return (squared_distance(x, self.centre, self.background) - self.distances(x).amin(1)).float()


class ViM(OodScore):
    """Energy minus a virtual logit, which is the scaled norm of the features' component outside the principal subspace
    (Wang et al., CVPR 2022).

    Args:
        dimension: Dimension of the principal subspace; null for half the number of features.
    """

    unit = "a logit"

    def __init__(self, dimension: int | None = None):
        require(dimension is None or dimension >= 1, "calibration.score.dimension", dimension, "1 or more, or null")
        self.dimension = dimension

    def fit(self, outputs: Outputs, labels: Tensor) -> None:
        import torch

        x, head = self.features(outputs).double(), self.head(outputs)
        weight, bias = head.weight.detach().double(), head.bias
        bias = weight.new_zeros(len(weight)) if bias is None else bias.detach().double()
        self.origin = -torch.linalg.pinv(weight) @ bias
        x = x - self.origin
        dimension, F = self.dimension or x.shape[1] // 2, x.shape[1]
        require(dimension < F, "calibration.score.dimension", dimension, f"below the {F} features")
        self.rest = torch.linalg.eigh(x.T @ x / len(x)).eigenvectors[:, : F - dimension]  # smallest eigenvalues first
        norm = (x @ self.rest).norm(dim=1).mean().clamp_min(1e-12)
        self.alpha = outputs.logits.double().amax(1).mean() / norm

    def __call__(self, outputs: Outputs) -> Tensor:
        virtual = self.alpha * ((self.features(outputs).double() - self.origin) @ self.rest).norm(dim=1)
        return (outputs.logits.double().logsumexp(1) - virtual).float()


class DensityRatio(OodScore):
    """Ratio of the density of the node's features to a uniform density, estimated by KuLSIF (Kanamori et al., 2012), as
    in Selective-FD (Shao et al., Nature Communications 2024).

    The kernel is Gaussian, and its width is the median distance. The uniform samples fill the smallest box around the
    node's features.

    Args:
        samples: Largest number of training samples used, and number of uniform samples.
        penalty: The regularisation lambda, above 0.
    """

    unit = "ratio of densities"

    def __init__(self, samples: int = 500, penalty: float = 0.1):
        require(samples >= 2, "calibration.score.samples", samples, "2 or more")
        require(penalty > 0, "calibration.score.penalty", penalty, "above 0")
        self.samples, self.penalty = samples, penalty

    def _kernel(self, a: Tensor, b: Tensor) -> Tensor:
        import torch

        return torch.exp(-torch.cdist(a, b).square() / (2 * self.width**2))

    def fit(self, outputs: Outputs, labels: Tensor) -> None:
        import torch

        x = self.features(outputs).double()
        draws = torch.Generator().manual_seed(0)
        self.own = own = x[torch.randperm(len(x), generator=draws)[: self.samples].to(x.device)]
        low, high = x.amin(0), x.amax(0)
        uniform = torch.rand(self.samples, x.shape[1], generator=draws, dtype=x.dtype).to(x.device)
        self.uniform = low + (high - low) * uniform
        self.width = torch.pdist(own).median().clamp_min(1e-12) if len(own) > 1 else x.new_ones(())
        n, m = len(self.uniform), len(own)
        identity = torch.eye(n, dtype=x.dtype, device=x.device)
        system = self._kernel(self.uniform, self.uniform) / n + self.penalty * identity
        pull = self._kernel(self.uniform, own).sum(1) / (n * m * self.penalty)
        self.weights = -torch.linalg.solve(system, pull)

    def ratio(self, x: Tensor) -> Tensor:
        """Returns the estimated ratio [N], which may be negative, at features ``x`` [N, F]."""
        return self._kernel(x, self.uniform) @ self.weights + self._kernel(x, self.own).mean(1) / self.penalty

    def __call__(self, outputs: Outputs) -> Tensor:
        return map_blocks(self.ratio, self.features(outputs).double()).float()
