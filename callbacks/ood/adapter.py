"""The detectors of pytorch-ood, where that package is installed (``pip install lightning-idkd[ood]``)."""

from __future__ import annotations

import inspect
from contextlib import contextmanager

from lightning_idkd.callback import OodScore
from lightning_idkd.errors import UserError, did_you_mean, require


class PytorchOOD(OodScore):
    """A logit or feature detector of pytorch-ood 0.4, sign reversed: there larger is further out.

    Args:
        detector: Its class in pytorch_ood.detector, such as KNN.
        arguments: Its further arguments, such as {k: 20}; the network's head is given where one asks for it.
    """

    def __init__(self, detector: str, arguments: dict | None = None):
        try:
            import pytorch_ood.detector as there
            from pytorch_ood.api import FeaturesDetector, LogitsDetector
        except ModuleNotFoundError as error:
            raise UserError(
                f"calibration.score: PytorchOOD needs a package that is not installed ({error.name}): pip install pytorch-ood"
            ) from error
        carried = {
            name: found for name in dir(there) if isinstance(found := getattr(there, name), type)
            and issubclass(found, (LogitsDetector, FeaturesDetector))
        }  # fmt: skip
        if detector not in carried:
            exists = isinstance(getattr(there, detector, None), type)  # its modules are not
            why = "needs the network itself, not its outputs" if exists else "is no detector of pytorch-ood"
            hint = "" if exists else did_you_mean(detector, carried)
            raise UserError(f"calibration.score.detector: {detector} {why}.{hint} Allowed: {', '.join(sorted(carried))}")
        self.kind, self.arguments = carried[detector], arguments or {}
        self.of_features = issubclass(self.kind, FeaturesDetector)
        takes = inspect.signature(self.kind.__init__).parameters
        self.given = [name for name in ("head", "w", "b") if name in takes]
        own = ("self", "model", "encoder", *self.given)
        known = [name for name, of in takes.items() if name not in own and of.kind is not inspect.Parameter.VAR_KEYWORD]
        for name in self.arguments:
            allowed = f"{', '.join(known) or 'none'}.{did_you_mean(name, known)}"
            require(name in known, f"calibration.score.arguments: {detector} has no '{name}'", self.arguments[name], allowed)
        missing = [n for n in known if takes[n].default is inspect.Parameter.empty and n not in self.arguments]
        if missing:
            raise UserError(f"calibration.score.arguments: {detector} needs {', '.join(missing)}")

    @property
    def title(self):
        return f"pytorch-ood's {self.kind.__name__}, sign reversed"

    fitted = True  # made anew for every node, whose head it may hold

    def fit(self, outputs, labels):
        import torch

        held = labels.unique()
        if self.kind.__name__ in ("Mahalanobis", "RMD"):
            labels = torch.searchsorted(held, labels)  # it wants the classes from 0 on; which is which does not matter
        elif self.kind.__name__ == "SHE" and len(held) < outputs.logits.shape[1]:
            raise UserError(f"calibration.score.detector: SHE needs own samples of every class, a node has {held.tolist()} only")
        first = {"encoder" if self.of_features else "model": None}
        given = {}
        if self.given:
            head = self.head(outputs)
            bias = head.weight.new_zeros(len(head.weight)) if head.bias is None else head.bias
            given = {"head": head, "w": head.weight, "b": bias}
        arguments = {k: torch.tensor(v) if isinstance(v, list) else v for k, v in self.arguments.items()}
        samples = self._input(outputs)
        with self._refusals(len(labels)):
            self.detector = self.kind(**first, **{k: given[k] for k in self.given}, **arguments)
            if self.detector.requires_fit:
                with torch.enable_grad():  # temperature scaling is optimised
                    (self.detector.fit_features if self.of_features else self.detector.fit_logits)(samples, labels)

    @contextmanager
    def _refusals(self, samples):
        """What the detector does not take, which it says in words of its own or none."""
        try:
            yield
        except Exception as error:
            why = (str(error) or type(error).__name__).splitlines()[0]
            raise UserError(f"calibration.score: {self.kind.__name__} fails on a node's {samples} samples ({why})") from error

    def _input(self, outputs):
        return self.features(outputs) if self.of_features else outputs.logits

    def __call__(self, outputs):
        import torch

        predict = self.detector.predict_features if self.of_features else self.detector.predict_logits
        samples = self._input(outputs)
        with torch.no_grad(), self._refusals(len(outputs)):
            return -predict(samples).float()
