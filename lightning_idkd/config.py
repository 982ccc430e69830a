"""Config groups. Every field's docstring is its help text; a sweep reaches each by a dotted key such as ``train.lr``."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from lightning_idkd.callback import Calibration, Callback, Distillation, Gossip
from lightning_idkd.data.partition import IID, Dirichlet, Partition, QGMDirichlet
from lightning_idkd.data.source import Source
from lightning_idkd.errors import UserError
from lightning_idkd.graph import Graph, Ring, Topology
from lightning_idkd.models import CNN, Architecture
from lightning_idkd.schedule import Schedule, Step

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["IID", "Config", "DataConfig", "Dirichlet", "GraphConfig", "LoggerConfig", "NodeConfig", "QGMDirichlet",
           "RunConfig", "TrainConfig"]  # fmt: skip

MOST_NODES = 10_000


def positive(key: str, value: float, least: float = 1) -> None:
    """Refuse ``value`` below ``least``."""
    if value < least:
        raise UserError(f"{key}: {value} is too small; allowed: {least} or more")


@dataclass
class GraphConfig:
    """Who talks to whom."""

    nodes: int = 16
    """Number of nodes n."""
    topology: Topology = field(default_factory=Ring)
    """Ring, Chain, Torus, Complete, Social15, Social32, or a class of yours."""
    weights: Literal["metropolis", "uniform"] = "metropolis"
    """Mixing weights: Metropolis-Hastings, or 1/(d+1) on regular graphs."""

    def build(self, seed: int) -> Graph:
        return Graph(self.topology, self.nodes, self.weights, seed)


@dataclass
class DataConfig:
    """Private, public and test data."""

    private: Source
    """The set that is divided among the nodes; its test part is for evaluation alone."""
    public: Source | None = None
    """The common set that distillation labels; its own labels are never read. null: none."""
    partition: Partition = field(default_factory=IID)
    """How the private set is divided: IID, Dirichlet, QGMDirichlet."""
    validation: float = 0.2
    """Share of a node's samples held out for calibration and tuning (at least 16 where it has 32 or more)."""
    image_size: int | None = None
    """Side in pixels to which all images are brought; null: as stored."""
    augment: Literal["none", "crop", "crop_flip"] = "none"
    """Augmentation of private samples: random crop (padded by an eighth), and flip."""
    augment_public: bool = False
    """Augment distilled samples too."""


@dataclass
class NodeConfig:
    """What a node is."""

    network: Architecture = field(default_factory=CNN)
    """Its network: ResNet, CNN, TorchModule, or a class of yours."""
    module: str = "lightning_idkd.node.NodeModule"
    """Import path of the NodeModule class; a subclass brings another loss."""


@dataclass
class TrainConfig:
    """How long and how fast."""

    epochs: int = 60
    """Epochs of ceil(N / (n batch)) steps."""
    batch_size: int = 32
    """Samples a node and step."""
    lr: float = 0.1
    """Learning rate before the schedule."""
    schedule: Schedule = field(default_factory=Step)
    """Step, Cosine or Constant, each with warm-up."""
    final_gossip: int = 1
    """Mixing steps after the last training step."""
    evaluate_every: int = 5
    """Epochs between evaluations."""
    evaluate_samples: int = 512
    """Test (and validation) samples at an evaluation on the way; the last one takes all."""

    def __post_init__(self):
        positive("train.epochs", self.epochs)
        positive("train.batch_size", self.batch_size)
        positive("train.evaluate_every", self.evaluate_every)
        positive("train.evaluate_samples", self.evaluate_samples)
        positive("train.final_gossip", self.final_gossip, 0)
        if not self.lr > 0:
            raise UserError(f"train.lr: {self.lr} is not above 0 (rules divide by the learning rate)")


@dataclass
class LoggerConfig:
    """Where metrics go besides the run folder."""

    kind: Literal["wandb"] = "wandb"
    """Weights & Biases."""
    project: str = "lightning-idkd"
    """Project."""
    group: str | None = None
    """Group within the project."""
    offline: bool | None = None
    """Keep files in the run folder only; null: where there is no login."""


@dataclass
class RunConfig:
    """How a run executes; none of this changes its result."""

    name: str = "idkd"
    """Name; runs go to DIR/NAME/ID."""
    dir: str = "runs"
    """Folder of all runs."""
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    """Where it computes."""
    devices: int = 1
    """Processes (and devices) that share the rows."""
    threads: int | None = None
    """Threads a process; null: cores / devices."""
    engine: Literal["auto", "loop", "vmap"] = "auto"
    """loop: one node after the other; vmap: all batched; auto: the faster of the two, timed once."""
    precision: Literal[32, 64] = 32
    """Bits of parameters and arithmetic."""
    checkpoint_every: int = 1
    """Epochs between checkpoints."""
    keep: list[int] = field(default_factory=list)
    """Epochs whose checkpoint stays as checkpoints/epoch_N.ckpt, to fork from."""
    resume: str | None = None
    """auto: continue the newest unfinished run of this name with the same config, else start one; or a run folder."""
    from_: str | None = None
    """Run folder or checkpoint to start from with other calibration, distillation, callbacks or epochs."""

    def __post_init__(self):
        positive("run.devices", self.devices)
        positive("run.checkpoint_every", self.checkpoint_every)
        if self.threads is not None:
            positive("run.threads", self.threads)
        if self.resume and self.from_:
            raise UserError("run.resume and run.from exclude each other: continue a run, or fork one")


@dataclass
class Config:
    """An experiment. ``resolved`` is the same as plain values, as it goes to ``config.yaml``."""

    data: DataConfig
    gossip: Gossip
    graph: GraphConfig = field(default_factory=GraphConfig)
    node: NodeConfig = field(default_factory=NodeConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    calibration: Calibration | None = None
    distillation: Distillation | None = None
    callbacks: list[Callback] = field(default_factory=list)
    logger: LoggerConfig | None = None
    run: RunConfig = field(default_factory=RunConfig)
    seed: int = 0
    resolved: dict[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """Refuse what can be seen to be wrong before any work."""
        from lightning_idkd.schedule import epoch_of

        if self.graph.nodes > MOST_NODES:
            raise UserError(f"graph.nodes: {self.graph.nodes} is more than {MOST_NODES}; mixing matrices are dense")
        if self.run.devices > self.graph.nodes:
            raise UserError(
                f"run.devices: {self.run.devices} processes have no rows to share; allowed: 1 to graph.nodes, {self.graph.nodes}"
            )
        self.train.schedule.factor(0.0, self.train.epochs)
        if self.distillation is not None:
            epoch_of(self.distillation.start, self.train.epochs, "distillation.start")
            if self.data.public is None:
                raise UserError("data.public: distillation needs a public set; name one, or set distillation to null")
        for epoch in self.run.keep:
            if not 1 <= epoch <= self.train.epochs:
                raise UserError(f"run.keep: {epoch} is no epoch; allowed: 1 to {self.train.epochs}")

    def folder(self) -> "Path":
        """The folder of all runs of this name."""
        from pathlib import Path

        return Path(self.run.dir) / self.run.name
