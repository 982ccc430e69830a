"""Where label skew acts: own against lacking classes, last layer against features."""

from __future__ import annotations

from lightning_idkd.callback import Callback, Run
from lightning_idkd.errors import UserError, require

TYPE_CHECKING = False  # by a name of ours: jsonargparse runs the block of typing's, which would load torch
if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from lightning_idkd.labels import Outputs

PANELS = (
    ("accuracy (%)", (("accuracy_own", "classes that a node has"), ("accuracy_lacking", "classes that it lacks"))),
    ("relative distance to the mean node", (("distance_head", "last layer"), ("distance_features", "features"))),
    (
        "gradient of a class vector",
        (("gradient_own", "classes that a node has"), ("gradient_lacking", "classes that it lacks")),
    ),
    ("norm of a class vector", (("norm_own", "classes that a node has"), ("norm_lacking", "classes that it lacks"))),
)
"""Title of each panel of the picture, and the measures that it shows with their legends."""
MEASURES = tuple(name for _title, curves in PANELS for name, _legend in curves)


class SkewProbe(Callback):
    """Measures at every evaluation where label skew acts, and draws it as ``plots/skew.png``. Nodes send nothing more.

    A node lacks a class if less than 1/k of its private samples have it. Values are means over a node's classes or
    samples, then over the honest nodes.
    Metrics (below ``skew/``): ``accuracy_own`` and ``accuracy_lacking`` on held-out samples of all nodes;
    ``distance_head`` and ``distance_features``, root mean square distance of the nodes' last layers, and of their
    features of the same samples, to the mean over nodes, divided by the norm of the mean; ``norm_own``,
    ``norm_lacking``, ``gradient_own`` and ``gradient_lacking``, norms of the rows of the last layer and of their
    gradients in the last batch of an epoch. ``summary.json`` gets ``skew/tensors``: for each parameter tensor its
    ``distance``, and the ``accuracy`` that nodes would have on the held-out samples if this tensor alone were the mean
    over nodes, which takes one evaluation for each tensor. The picture is drawn even if ``run.pictures`` is false.

    Args:
        samples: Number of held-out samples, of all nodes together.
    """

    def __init__(self, samples: int = 1024):
        require(samples >= 1, "callbacks.samples", samples, "1 or more")
        self.samples = samples
        self.gradients: Tensor | None = None
        """Norms of the gradients of the last layer's rows, of all nodes [n, k], at the end of the last epoch."""

    def state_dict(self) -> dict:
        return {"gradients": self.gradients}

    def load_state_dict(self, state: dict) -> None:
        self.gradients = state["gradients"]

    def on_check(self, run: Run) -> None:
        node = run.stack.modules[0]
        if not node.has_features or not node.network.head.weight.requires_grad:
            raise UserError(
                "callbacks: SkewProbe needs features(x) [B, F] and a trained head, which this network has not"
            )
        if not sum(map(len, run.store.split.validation)):
            raise UserError(
                "callbacks: SkewProbe needs held-out samples, and no node has any; set data.validation above 0"
            )

    def on_epoch_end(self, run: Run) -> None:
        import torch

        norms = [module.network.head.weight.grad.double().norm(dim=1) for module in run.stack.modules]
        self.gradients = run.network.report(torch.stack(norms)).cpu()

    def on_evaluation_end(self, run: Run, metrics: dict) -> None:
        batches, labels = run.store.evaluation_set("validation", self.samples)
        outputs = run.stack.answers(batches, lambda outputs: outputs)
        metrics |= {f"skew/{name}": value for name, value in self.measure(run, outputs, labels).items()}
        if metrics["phase"] == "final":
            run.draw("skew", draw_measures([*run.lines[:-1], metrics]))

    def on_fit_end(self, run: Run, summary: dict) -> None:
        summary["skew/tensors"] = self.try_mean_tensors(run)

    def try_mean_tensors(self, run: Run) -> dict[str, dict[str, float]]:
        """The distance of every parameter tensor, and the accuracy with the mean over nodes in its place."""
        import torch

        batches, labels = run.store.evaluation_set("validation", self.samples)
        tried = {}
        for name in [slot.name for slot in run.stack.layout]:  # without frozen ones, which all nodes share
            tensors = [module.get_parameter(name) for module in run.stack.modules]
            kept = torch.stack([tensor.detach() for tensor in tensors])
            mean, rows = run.network.report_mean(kept.flatten(1), honest=True), kept.flatten(1).double()
            with torch.no_grad():
                for tensor in tensors:
                    tensor.copy_(mean.view_as(tensor))
                right = run.stack.answers(batches, lambda given: (given.logits.argmax(1) == labels).double().mean())
                for tensor, own in zip(tensors, kept, strict=True):
                    tensor.copy_(own)
            accuracy = run.network.honest(run.network.report(torch.stack(right)[:, None])).mean().item()
            distance = measure_distance(run, rows)
            tried[name] = {"distance": distance, "accuracy": accuracy}
        return tried

    def measure(self, run: Run, outputs: list[Outputs], labels: Tensor) -> dict[str, float | None]:
        """Values of :data:`MEASURES`, from the nodes' outputs on samples with these ``labels``; None for no value."""
        import torch

        from lightning_idkd import metrics

        own = ~metrics.lacks(run.store.counts().to(labels.device))  # [rows, k]
        heads = [module.network.head for module in run.stack.modules]
        weight = torch.stack([head.weight.detach() for head in heads])
        right = torch.stack([given.logits.argmax(1) == labels for given in outputs])
        rows = {
            "accuracy": masked_means(right.double(), own[:, labels]),
            "norm": masked_means(weight.double().norm(dim=2), own),
        }
        values: dict[str, float | None] = {}
        means = {name: mean_over_nodes(run, run.network.report(torch.stack(pair, 1))) for name, pair in rows.items()}
        means["gradient"] = torch.full((2,), torch.nan)
        if self.gradients is not None:
            pair = masked_means(self.gradients.to(own.device), run.network.report(own.double()) > 0)
            means["gradient"] = mean_over_nodes(run, torch.stack(pair, 1))
        for name, mean in means.items():
            for suffix, value in zip(("own", "lacking"), mean.tolist(), strict=True):
                values[f"{name}_{suffix}"] = value if value == value else None
        features = [given.features for given in outputs if given.features is not None]
        for name, rows_of in (("head", weight), ("features", torch.stack(features))):
            values[f"distance_{name}"] = measure_distance(run, rows_of.flatten(1).double())
        return {name: values[name] for name in MEASURES}


def mean_over_nodes(run: Run, values: Tensor) -> Tensor:
    """The mean over the honest nodes of ``values`` [n, C] that are not nan."""
    return run.network.honest(values).nanmean(0)


def measure_distance(run: Run, rows: Tensor) -> float:
    """The distance of the honest nodes' ``rows`` [rows, C] to their mean, divided by the norm of the mean."""
    return run.network.report_distance(rows, run.network.report_mean(rows, honest=True), honest=True)


def masked_means(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Means of the rows of ``values`` [rows, N] where the ``mask`` holds and where it does not; nan for none."""
    parts = []
    for chosen in (mask, ~mask):
        parts.append((values * chosen).sum(1) / chosen.sum(1))
    return parts[0], parts[1]


def draw_measures(lines: list[dict]) -> Figure:
    """Draw the measures over epochs, from the lines of ``metrics.jsonl``."""
    from lightning_idkd import colours
    from lightning_idkd.records.pictures import make_figure

    figure = make_figure(9, 6)
    measured = [line for line in lines if f"skew/{MEASURES[0]}" in line]
    for axes, (title, curves) in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        for (name, legend), colour in zip(curves, (colours.BLUE, colours.ORANGE), strict=True):
            factor = 100 if name.startswith("accuracy") else 1
            values = [line[f"skew/{name}"] for line in measured]
            heights = [float("nan") if value is None else factor * value for value in values]
            axes.plot([line["epoch"] for line in measured], heights, color=colour, marker=".", label=legend)
        axes.set(title=title, xlabel="epoch")
        axes.set_ylim(bottom=0)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
    return figure
