"""Scores of the features before the classifier; all learn from a node's own training samples first."""

from __future__ import annotations

from lightning_idkd.callback import OodScore
from lightning_idkd.errors import require

CHUNK = 4096  # samples compared with all own ones at once


def chunked(of, samples):
    """``of`` applied to blocks of ``samples`` [N, F], so that a matrix of all pairs never exists."""
    import torch

    return torch.cat([of(block) for block in samples.split(CHUNK)])


class KNN(OodScore):
    """Minus the distance to the k-th nearest own sample, features normalised to length 1 (Sun et al., ICML 2022).

    Args:
        neighbours: k; at most the number of own samples counts.
    """

    unit = "minus a distance"

    def __init__(self, neighbours: int = 50):
        require(neighbours >= 1, "calibration.score.neighbours", neighbours, "1 or more")
        self.neighbours = neighbours

    @staticmethod
    def _normal(features):
        return features / features.norm(dim=1, keepdim=True).clamp_min(1e-12)

    def fit(self, outputs, labels):
        self.own = self._normal(self.features(outputs).double())

    def __call__(self, outputs):
        import torch

        k = min(self.neighbours, len(self.own))
        samples = self._normal(self.features(outputs).double())  # in float32 cdist would lose distances below 1e-3
        return chunked(lambda x: -torch.cdist(x, self.own).kthvalue(k, dim=1).values, samples).float()


def ledoit_wolf(centred) -> float:
    """Ledoit and Wolf's share of the identity in the covariance of ``centred`` [N, F]; 1 where nothing varies."""
    from sklearn.covariance import ledoit_wolf_shrinkage

    if not centred.any():
        return 1.0
    return float(ledoit_wolf_shrinkage(centred.cpu().numpy(), assume_centered=True))


def gaussian(centred, shrinkage: float):
    """Inverse covariance [F, F] of ``centred`` [N, F], shrunk towards a multiple of the identity, in float64.

    The identity where nothing varies, as with one sample a class.
    """
    import torch

    identity = torch.eye(centred.shape[1], dtype=centred.dtype, device=centred.device)
    if not centred.any():
        return identity
    covariance = centred.T @ centred / len(centred)
    mean = covariance.diagonal().mean().clamp_min(1e-12)
    return torch.linalg.pinv((1 - shrinkage) * covariance + shrinkage * mean * identity, hermitian=True)


def squared(x, mean, inverse):
    """Squared Mahalanobis distance [N] of ``x`` [N, F] from ``mean``."""
    x = x - mean
    return ((x @ inverse) * x).sum(1)


class Mahalanobis(OodScore):
    """Minus the least squared Mahalanobis distance to the mean of a class, one covariance for all (Lee et al., NeurIPS 2018).

    Only the classes that a node holds count.

    Args:
        shrinkage: Share of the identity in the covariance, 0 to 1; null for Ledoit and Wolf's.
    """

    unit = "minus a squared distance"

    def __init__(self, shrinkage: float | None = None):
        require(shrinkage is None or 0 <= shrinkage <= 1, "calibration.score.shrinkage", shrinkage, "0 to 1, or null")
        self.shrinkage = shrinkage

    def fit(self, outputs, labels):
        import torch

        x, labels = self.features(outputs).double(), labels.to(outputs.logits.device)
        held, at = labels.unique(return_inverse=True)
        self.means = torch.stack([x[at == c].mean(0) for c in range(len(held))])
        centred = x - self.means[at]
        self.shrunk = ledoit_wolf(centred) if self.shrinkage is None else self.shrinkage
        self.inverse = gaussian(centred, self.shrunk)

    def distances(self, x):
        """[N, classes held] of features ``x`` [N, F] in float64."""
        import torch

        return torch.stack([squared(x, mean, self.inverse) for mean in self.means], dim=1)

    def __call__(self, outputs):
        return -self.distances(self.features(outputs).double()).amin(1).float()


class RMD(Mahalanobis):
    """Relative Mahalanobis distance: that to the nearest class, less that to all own samples as one (Ren et al., 2021).

    Both covariances are shrunk alike, or their difference would measure the shrinkage.

    Args:
        shrinkage: Share of the identity in the covariances, 0 to 1; null for Ledoit and Wolf's of the classes' covariance.
    """

    unit = "difference of squared distances"

    def fit(self, outputs, labels):
        super().fit(outputs, labels)
        x = self.features(outputs).double()
        self.centre = x.mean(0)
        self.background = gaussian(x - self.centre, self.shrunk)

    def __call__(self, outputs):
        x = self.features(outputs).double()
        return (squared(x, self.centre, self.background) - self.distances(x).amin(1)).float()


class ViM(OodScore):
    """Energy less a virtual logit, the scaled norm of the features' part outside the principal subspace (Wang et al., CVPR 2022).

    Args:
        dimension: Dimensions of the principal subspace; null for half of the features'.
    """

    unit = "a logit"

    def __init__(self, dimension: int | None = None):
        require(dimension is None or dimension >= 1, "calibration.score.dimension", dimension, "1 or more, or null")
        self.dimension = dimension

    def fit(self, outputs, labels):
        import torch

        x, head = self.features(outputs).double(), self.head(outputs)
        weight, bias = head.weight.detach().double(), head.bias
        bias = weight.new_zeros(len(weight)) if bias is None else bias.detach().double()
        self.origin = -torch.linalg.pinv(weight) @ bias
        x = x - self.origin
        kept = self.dimension or x.shape[1] // 2
        require(kept < x.shape[1], "calibration.score.dimension", kept, f"below the {x.shape[1]} features")
        self.rest = torch.linalg.eigh(x.T @ x / len(x)).eigenvectors[:, : x.shape[1] - kept]  # smallest eigenvalues first
        norm = (x @ self.rest).norm(dim=1).mean().clamp_min(1e-12)
        self.alpha = outputs.logits.double().amax(1).mean() / norm

    def __call__(self, outputs):
        virtual = self.alpha * ((self.features(outputs).double() - self.origin) @ self.rest).norm(dim=1)
        return (outputs.logits.double().logsumexp(1) - virtual).float()


class DensityRatio(OodScore):
    """Ratio of the density of own features to a uniform one, by KuLSIF (Kanamori et al., 2012), which
    Selective-FD selects by (Shao et al., Nature Communications 2024).

    Gaussian kernel, its width the median distance; the uniform samples fill the box of the own features.

    Args:
        samples: Own samples used at most, and uniform samples.
        penalty: lambda, above 0.
    """

    unit = "ratio of densities"

    def __init__(self, samples: int = 500, penalty: float = 0.1):
        require(samples >= 2, "calibration.score.samples", samples, "2 or more")
        require(penalty > 0, "calibration.score.penalty", penalty, "above 0")
        self.samples, self.penalty = samples, penalty

    def _kernel(self, a, b):
        import torch

        return torch.exp(-torch.cdist(a, b).square() / (2 * self.width**2))

    def fit(self, outputs, labels):
        import torch

        x = self.features(outputs).double()
        draws = torch.Generator().manual_seed(0)
        self.own = own = x[torch.randperm(len(x), generator=draws)[: self.samples].to(x.device)]
        low, high = x.amin(0), x.amax(0)
        uniform = torch.rand(self.samples, x.shape[1], generator=draws, dtype=x.dtype).to(x.device)
        self.uniform = low + (high - low) * uniform
        self.width = torch.pdist(own).median().clamp_min(1e-12) if len(own) > 1 else x.new_ones(())
        n, m = len(self.uniform), len(own)
        system = self._kernel(self.uniform, self.uniform) / n + self.penalty * torch.eye(n, dtype=x.dtype, device=x.device)
        pull = self._kernel(self.uniform, own).sum(1) / (n * m * self.penalty)
        self.weights = -torch.linalg.solve(system, pull)

    def ratio(self, x):
        """The ratio [N] at features ``x`` [N, F]; the estimate may be negative."""
        return self._kernel(x, self.uniform) @ self.weights + self._kernel(x, self.own).mean(1) / self.penalty

    def __call__(self, outputs):
        return chunked(self.ratio, self.features(outputs).double()).float()
