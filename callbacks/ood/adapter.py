"""The detectors of pytorch-ood, if that package is installed (``pip install lightning-idkd[ood]``)."""

from __future__ import annotations

import inspect
from collections.abc import Generator
from contextlib import contextmanager

from lightning_idkd.callback import OodScore
from lightning_idkd.errors import UserError, did_you_mean, require
from lightning_idkd.labels import Outputs

TYPE_CHECKING = False  # by a name of ours: jsonargparse runs the block of typing's, which would load torch
if TYPE_CHECKING:
    from torch import Tensor


class PytorchOOD(OodScore):
    """A detector of pytorch-ood 0.4 that uses logits or features. The sign of its score is reversed, since larger means
    further out of distribution in that package.

    Args:
        detector: Name of the detector's class in pytorch_ood.detector, such as KNN.
        arguments: The detector's other arguments, such as {k: 20}; a detector that takes the network's head receives
            it.
    """

    def __init__(self, detector: str, arguments: dict | None = None):
        try:
            import pytorch_ood.detector as detectors
            from pytorch_ood.api import FeaturesDetector, LogitsDetector
        except ModuleNotFoundError as error:
            why = f"needs a package that is not installed ({error.name})"
            raise UserError(f"calibration.score: PytorchOOD {why}: pip install pytorch-ood") from error
        classes = {name: value for name, value in vars(detectors).items() if isinstance(value, type)}
        supported = {name: cls for name, cls in classes.items() if issubclass(cls, (LogitsDetector, FeaturesDetector))}
        if detector not in supported:
            exists = detector in classes
            why = "needs the network itself, not its outputs" if exists else "is not a detector of pytorch-ood"
            hint = "" if exists else did_you_mean(detector, supported)
            allowed = ", ".join(sorted(supported))
            raise UserError(f"calibration.score.detector: {detector} {why}.{hint} Allowed: {allowed}")
        self.kind, self.arguments = supported[detector], arguments or {}
        self.of_features = issubclass(self.kind, FeaturesDetector)
        parameters = dict(inspect.signature(self.kind.__init__).parameters)
        self.head_arguments = [name for name in ("head", "w", "b") if name in parameters]
        for name in ("self", "model", "encoder", *self.head_arguments):
            parameters.pop(name, None)
        known = [name for name, p in parameters.items() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        for name, value in self.arguments.items():
            allowed = f"{', '.join(known) or 'none'}.{did_you_mean(name, known)}"
            require(name in known, f"calibration.score.arguments: {detector} has no '{name}'", value, allowed)
        required = [name for name in known if parameters[name].default is inspect.Parameter.empty]
        missing = [name for name in required if name not in self.arguments]
        if missing:
            raise UserError(f"calibration.score.arguments: {detector} needs {', '.join(missing)}")

    @property
    def title(self) -> str:
        return f"pytorch-ood's {self.kind.__name__}, sign reversed"

    fitted = True  # fit creates a new detector for every node, since it may contain the node's head

    def fit(self, outputs: Outputs, labels: Tensor) -> None:
        import torch

        classes = labels.unique()
        if self.kind.__name__ in ("Mahalanobis", "RMD"):
            labels = torch.searchsorted(classes, labels)  # these need classes 0, 1, ...; their order does not matter
        elif self.kind.__name__ == "SHE" and len(classes) < outputs.logits.shape[1]:
            raise UserError(
                "calibration.score.detector: SHE needs training samples of every class, but a node has only those of "
                f"classes {classes.tolist()}"
            )
        arguments = {"encoder" if self.of_features else "model": None}
        if self.head_arguments:
            head = self.head(outputs)
            bias = head.weight.new_zeros(len(head.weight)) if head.bias is None else head.bias
            values = {"head": head, "w": head.weight, "b": bias}
            arguments |= {name: values[name] for name in self.head_arguments}
        arguments |= {k: torch.tensor(v) if isinstance(v, list) else v for k, v in self.arguments.items()}
        samples = self._input(outputs)
        with self._explain_failures(len(labels)):
            self.detector = self.kind(**arguments)
            if self.detector.requires_fit:
                with torch.enable_grad():  # temperature scaling is optimised
                    (self.detector.fit_features if self.of_features else self.detector.fit_logits)(samples, labels)

    @contextmanager
    def _explain_failures(self, samples: int) -> Generator[None]:
        """Raises any exception of the detector as a UserError, since many have no clear message."""
        try:
            yield
        except Exception as error:
            why = (str(error) or type(error).__name__).splitlines()[0]
            name = self.kind.__name__
            raise UserError(f"calibration.score: {name} fails on a node's {samples} samples ({why})") from error

    def _input(self, outputs: Outputs) -> Tensor:
        return self.features(outputs) if self.of_features else outputs.logits

    def __call__(self, outputs: Outputs) -> Tensor:
        import torch

        predict = self.detector.predict_features if self.of_features else self.detector.predict_logits
        samples = self._input(outputs)
        with torch.no_grad(), self._explain_failures(len(outputs)):
            return -predict(samples).float()
