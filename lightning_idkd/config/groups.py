"""Config groups, and the table of them: the fields of :class:`Config`.

Every field's docstring is its help text; a sweep reaches each by a dotted key such as ``train.lr``. To add a group,
write its dataclass and give :class:`Config` a field with an :class:`Entry`: the command line, the page of keys,
comparisons of runs, forks and ``idkd evaluate`` read what they need from there."""
# ruff: noqa: RUF009 (`entry` makes a dataclass field)

import math
from dataclasses import MISSING, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from lightning_idkd.callback import Asynchronous, Calibration, Callback, Distillation, Fault, Gossip, Loss
from lightning_idkd.clock import Clock, Fixed, Times
from lightning_idkd.data.partition import IID, Dirichlet, Partition, QGMDirichlet, check_share
from lightning_idkd.data.source import Source
from lightning_idkd.errors import UserError, require
from lightning_idkd.graph import Graph
from lightning_idkd.losses import CrossEntropy
from lightning_idkd.machine import count_cores
from lightning_idkd.mixing import Weights
from lightning_idkd.models import CNN, Architecture
from lightning_idkd.schedule import Schedule, Step
from lightning_idkd.topologies import Ring, Topology

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["IID", "ClockConfig", "Config", "DataConfig", "Dirichlet", "GraphConfig", "LoggerConfig", "NodeConfig",
           "QGMDirichlet", "RunConfig", "TrainConfig"]  # fmt: skip

MOST_NODES = 10_000


class Entry(NamedTuple):
    """What the table says about a group or a single key, besides its type, default and help text."""

    fork: Literal["same", "labels", "free"] | None = None
    """Whether a key enters the result of a run, and what a fork (``run.from``) shares with the run that it starts from.
    ``same``: it acts from the first step, and every fork shares it. ``labels``: it acts from the first exchange, and a
    fork that goes on with the labels of its source shares it. ``free``: a fork may change it. None: it does not enter
    the result, or its keys say so one by one."""
    label: Literal["setting", "method"] | None = None
    """Which part of a row's label names it in a comparison of runs."""
    evaluate: bool = False
    """Whether ``idkd evaluate`` takes another value than the run's."""
    start: Any = MISSING
    """Value from which the command line starts, if not the field's default; a class of the project by its name."""
    older: Any = MISSING
    """Value in runs that are older than the key."""


def entry(default: Any = MISSING, **what: Any) -> Any:
    """A dataclass field with an :class:`Entry`; a ``default`` that can be called makes the default."""
    default = {"default_factory" if callable(default) else "default": default}
    return field(**default, metadata={"entry": Entry(**what)})


@dataclass
class GraphConfig:
    """Who talks to whom."""

    nodes: int = 16
    """Number n of nodes."""
    topology: Topology = field(default_factory=Ring)
    """Ring, Torus, Hypercube, Exponential, BaseGraph, RandomMatchings, ... (configs/README.md lists all), or your own
    class."""
    weights: Weights = "metropolis"
    """Mixing weights: metropolis (Metropolis-Hastings, unless the topology defines its own; uniform on other directed
    graphs), uniform (1/(d+1), on regular graphs), max_degree (1/(d_max+1)), lazy ((I + W) / 2 of metropolis), push_sum
    (columns sum to 1), average (rows sum to 1)."""

    def __post_init__(self):
        require(
            1 <= self.nodes <= MOST_NODES, "graph.nodes", self.nodes, f"1 to {MOST_NODES} (mixing matrices are dense)"
        )

    def build(self, seed: int) -> Graph:
        return Graph(self.topology, self.nodes, self.weights, seed)


@dataclass
class DataConfig:
    """Private, public and test data."""

    private: Source
    """The set that is divided among the nodes; its test part is for evaluation alone."""
    public: Source | None = entry(None, fork="labels")
    """The set that all nodes have, and that distillation labels; its own labels are never read. null: none."""
    partition: Partition = field(default_factory=IID)
    """How the private set is divided among the nodes: IID, Dirichlet, QGMDirichlet, Shards, ClassesPerNode,
    QuantitySkew, FeatureSkew, Regions, FromFile, or your own class."""
    validation: float = 0.2
    """Share of a node's samples that it holds out for calibration and tuning. A node with 32 samples or more holds out
    at least 16, unless the share is 0."""
    image_size: int | None = None
    """Side in pixels to which all images are resized. null: the stored size; vectors need null."""
    channels: Literal[1, 3] | None = entry(None, older=None)
    """1 makes all images grey; 3 gives grey images three channels, as torchvision's networks take them. null: 1 if all
    images are grey, else 3; vectors need null."""
    augment: Literal["none", "crop", "crop_flip"] = "none"
    """Augmentation of private samples: random crop (padded by an eighth), and flip."""
    augment_public: bool = entry(False, fork="labels")
    """Augment distilled samples too."""

    def __post_init__(self):
        check_share(self.validation)
        size = self.image_size
        require(size is None or size >= 1, "data.image_size", size, "1 or more, or null for the stored size")


@dataclass
class NodeConfig:
    """What a node is."""

    network: Architecture = field(default_factory=CNN)
    """Network of a node: ResNet, CNN, MLP, LeNet, VGG, MobileNetV2, ViT, TorchModule, or your own class."""
    loss: Loss = entry(
        CrossEntropy,
        fork="free",
        label="method",
        older={"class_path": "lightning_idkd.losses.CrossEntropy", "init_args": {}},
    )
    """Loss of private samples: CrossEntropy, BalancedSoftmax, CalibratedLogits, RestrictedSoftmax, LabelSmoothing,
    Focal, or a class of yours."""
    module: str = "lightning_idkd.node.NodeModule"
    """Import path of the NodeModule class; a subclass brings another training step."""


@dataclass
class TrainConfig:
    """How long and how fast."""

    epochs: int = 60
    """Number of epochs; an epoch has ceil(N / (n batch_size)) steps, N being the number of private training samples."""
    batch_size: int = 32
    """Samples per node in each step."""
    lr: float = 0.1
    """Learning rate before the schedule."""
    schedule: Schedule = field(default_factory=Step)
    """Step, Cosine or Constant, each with warm-up."""
    final_gossip: int = 1
    """Mixing steps after the last training step."""
    final_merge: bool = False
    """After the final gossip, set every node to the exact mean (counted as an all-reduce)."""
    evaluate_every: int = 5
    """Epochs between evaluations."""
    evaluate_samples: int = 512
    """Number of test samples in an evaluation before the last, which uses all, and of validation samples in every
    evaluation."""

    def __post_init__(self):
        require(self.epochs >= 1, "train.epochs", self.epochs, "1 or more")
        require(self.batch_size >= 1, "train.batch_size", self.batch_size, "1 or more")
        require(self.evaluate_every >= 1, "train.evaluate_every", self.evaluate_every, "1 or more")
        require(self.evaluate_samples >= 1, "train.evaluate_samples", self.evaluate_samples, "1 or more")
        require(self.final_gossip >= 0, "train.final_gossip", self.final_gossip, "0 or more")
        require(0 < self.lr < math.inf, "train.lr", self.lr, "above 0 (rules divide by the learning rate)")

    def lr_at(self, epoch: float) -> float:
        """The learning rate at a fractional epoch, from 0 to below ``epochs``."""
        return self.lr * self.schedule.factor(epoch, self.epochs)


@dataclass
class ClockConfig:
    """How long a run would take on a network of given speed; training itself stays the same."""

    compute: Times = field(default_factory=lambda: Fixed(1.0))
    """Seconds that a node computes in a step: Fixed, LogNormal, PerNode, TraceTimes, or a class of yours. All
    gradients of a rule count as one computation. The default is one second, so that simulated time counts steps."""
    latency: Times = field(default_factory=lambda: Fixed(0.0))
    """Seconds from the sending of a message to the arrival of its first byte, by edge and step; PerNode and TraceTimes
    go by the sender."""
    bandwidth: float | None = None
    """Bytes that each directed edge carries per second. null: no limit."""
    slow: dict[int, float] = field(default_factory=dict)
    """Factors of the compute times of single nodes: {0: 10} makes node 0 ten times slower."""

    def __post_init__(self):
        bytes_per_second = "bytes per second, above 0, or null for no limit"
        require(self.bandwidth is None or self.bandwidth > 0, "clock.bandwidth", self.bandwidth, bytes_per_second)
        for node, factor in self.slow.items():
            require(0 < factor < math.inf, f"clock.slow, node {node}", factor, "a factor above 0")

    def check(self, nodes: int) -> None:
        for node in self.slow:
            require(0 <= node < nodes, "clock.slow", f"node {node}", f"0 to {nodes - 1} (graph.nodes is {nodes})")
        self.compute.check("clock.compute", nodes)
        self.latency.check("clock.latency", nodes)

    def build(self, graph: Graph, seed: int) -> Clock:
        return Clock(graph, self.compute, self.latency, self.bandwidth, self.slow, seed)


@dataclass
class LoggerConfig:
    """Where metrics go besides the run folder."""

    kind: Literal["wandb", "tensorboard", "csv"] = "wandb"
    """Weights & Biases, TensorBoard (pip install tensorboard), or a CSV file; numbers go to all, pictures and tables to
    W&B."""
    project: str = "lightning-idkd"
    """W&B project; WANDB_PROJECT replaces the default."""
    group: str | None = None
    """W&B group within the project."""
    offline: bool | None = None
    """Keep W&B's files in the run folder only. null: offline if there is no W&B login, or if WANDB_MODE says so.
    WANDB_MODE=disabled turns W&B off."""


@dataclass
class RunConfig:
    """How a run executes. Engine and threads change only the last bits of a result, which training then amplifies."""

    name: str = "idkd"
    """Name of the run, which is stored in DIR/NAME/ID."""
    dir: str = "runs"
    """Folder of all runs."""
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    """Device that computes; auto: a CUDA device if there is one."""
    hosts: int = entry(1, older=1)
    """Machines that share the rows; torchrun, srun or mpirun starts the command on each."""
    devices: int = 1
    """Processes (and devices) on each host that share the rows."""
    threads: int | None = None
    """Threads per process. null: 1 or cores / devices, whichever is faster; a machine times this once."""
    engine: Literal["auto", "loop", "parallel", "vmap", "graph", "compile"] = "auto"
    """loop: one node after the other, each on all threads; parallel: nodes split over the threads; vmap: as many nodes
    in a batched call as suit the caches, on all threads; graph: vmap recorded once as a CUDA graph, so that later steps
    do not run the network's Python code; auto: the fastest of these, which a machine times once for each shape of
    networks and batches; compile: loop, with each node compiled by torch.compile, which takes half a minute before the
    first step."""
    precision: Literal[32, 64] = entry(32, fork="same")
    """Bits of parameters and arithmetic."""
    autocast: bool | Literal["auto"] = entry(False, fork="same", older=False)
    """Training steps of the networks in bfloat16 (torch.autocast), for CUDA devices and for CPUs with instructions for
    it; parameters, rule and evaluation keep the precision above. auto: if that is faster, which a machine times once;
    a resumed run and a fork keep the choice, which summary.json has as autocast."""
    checkpoint_every: int = 1
    """Epochs between checkpoints."""
    pictures: bool = True
    """Draw plots/ at the end."""
    keep: list[int] = field(default_factory=list)
    """Epochs whose checkpoint is kept as checkpoints/epoch_N.ckpt, so that forks can start from it."""
    control: bool = False
    """After a run with distillation, train the same without it from the first exchange on, in DIR/NAME_control, and
    print both results."""
    until: int | None = None
    """Stop after this epoch with a checkpoint, which can be resumed or forked. null: train to the end."""
    resume: str | None = None
    """auto: continue the newest unfinished run of this name with the same config, or start one if there is none. A run
    folder: continue that run."""
    from_: str | None = None
    """Run folder or checkpoint from which to start, with another calibration, distillation, callbacks or epochs."""

    def __post_init__(self):
        folders = self.name.split("/")
        right = self.name.isprintable() and all(f.strip() and f not in (".", "..", "latest") for f in folders)
        allowed = "a name, for a folder in run.dir: printable characters, and not '.', '..' or 'latest'"
        require(right, "run.name", repr(self.name), allowed)
        if self.until is not None:
            require(self.until >= 1, "run.until", self.until, "1 or more, or null")
        require(self.hosts >= 1, "run.hosts", self.hosts, "1 or more")
        require(self.devices >= 1, "run.devices", self.devices, "1 or more")
        require(self.checkpoint_every >= 1, "run.checkpoint_every", self.checkpoint_every, "1 or more")
        if self.threads is not None:
            require(self.threads >= 1, "run.threads", self.threads, "1 or more")
        if self.autocast and self.precision == 64:
            given = "auto" if self.autocast == "auto" else "true"
            raise UserError(f"run.autocast: {given} changes nothing of 64 bits; allowed with run.precision 64: false")
        if self.resume and self.resume != "auto" and self.from_:
            raise UserError(
                "run.resume: a folder and run.from exclude each other; allowed beside run.from: auto, or null"
            )


@dataclass(kw_only=True)
class Config:
    """An experiment. ``resolved`` has the same as plain values, which ``config.yaml`` stores."""

    seed: int = entry(0, fork="same")
    """Seed of all randomness."""
    graph: GraphConfig = entry(GraphConfig, fork="same", label="setting")
    """Who talks to whom."""
    data: DataConfig = entry(fork="same", label="setting", evaluate=True)
    """Private, public and test data."""
    node: NodeConfig = entry(NodeConfig, fork="same", label="setting")
    """What a node is."""
    train: TrainConfig = entry(TrainConfig, fork="free", label="setting")
    """How long and how fast."""
    clock: ClockConfig | None = entry(None, fork="same", label="setting", older=None)
    """Simulated time, or null for none."""
    gossip: Gossip = entry(fork="same", label="method", start="QGDSGDm")
    """Decentralised optimiser: QGDSGDm, DSGD, AllReduce, Isolated, ..."""
    faults: list[Fault] = entry(list, fork="free", label="setting", older=[])
    """What goes wrong: MessageLoss, LinkOutage, Churn, Trace, ... or classes of yours; nothing by default."""
    calibration: Calibration | None = entry(None, fork="labels", label="method", evaluate=True, start="Youden")
    """How nodes fix the threshold of their OoD score."""
    distillation: Distillation | None = entry(None, fork="labels", label="method")
    """IDKD, VanillaKD, or null for none."""
    callbacks: list[Callback] = entry(list, fork="free", label="method", evaluate=True)
    """Further callbacks."""
    logger: LoggerConfig | None = entry(None, start=LoggerConfig)
    """Experiment logger, or null."""
    run: RunConfig = entry(RunConfig)
    """How a run executes."""
    resolved: dict[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """Refuse mistakes that can be seen before any work."""
        require(0 <= self.seed < 2**63, "seed", self.seed, "0 to 2^63 - 1")
        hosts, devices = self.run.hosts, self.run.devices
        if hosts * devices > self.graph.nodes:
            key = "run.devices" if hosts == 1 else f"run.hosts x run.devices, {hosts} x {devices}"
            few = f"allowed: 1 to graph.nodes, {self.graph.nodes}"
            raise UserError(f"{key}: {hosts * devices} processes have no rows to share; {few}")
        cores = count_cores()
        require(
            (self.run.threads or 1) <= cores, "run.threads", self.run.threads, f"1 to {cores}, the cores here, or null"
        )
        if self.clock is not None:
            self.clock.check(self.graph.nodes)
        for fault in self.faults:
            if fault.needs_clock and self.clock is None:
                raise UserError(f"clock: {type(fault).__name__} in faults acts in simulated time and needs one")
        if isinstance(self.gossip, Asynchronous):
            name = type(self.gossip).__name__
            if self.clock is None:
                example = "'{compute: {class_path: LogNormal, init_args: {median: 1, sigma: 0.5}}}'"
                raise UserError(f"clock: gossip {name} acts in simulated time and needs one, such as --clock {example}")
            require(devices == 1, "run.devices", devices, f"1 with gossip {name}")
            require(hosts == 1, "run.hosts", hosts, f"1 with gossip {name}")
        self.data.private.check("data.private")
        if self.data.public is not None:
            self.data.public.check("data.public")
        self.train.schedule.decay(0.0, self.train.epochs)
        for extra in self.callbacks:
            if isinstance(extra, (Gossip, Calibration, Distillation, Fault)):
                keys = "gossip, calibration, distillation or faults"
                raise UserError(f"callbacks: {type(extra).__name__} has a key of its own: {keys}")
        if self.distillation is not None:
            self.first_exchange()
            if self.data.public is None and self.distillation.public:
                raise UserError("data.public: distillation needs a public set; name one, or set distillation to null")
            if self.distillation.calibrated and self.calibration is None:
                name = type(self.distillation).__name__
                raise UserError(
                    f"calibration: {name} selects samples and needs a threshold, such as Youden; null given"
                )
        for epoch in self.run.keep:
            if not 1 <= epoch <= self.train.epochs:
                raise UserError(f"run.keep: {epoch} is not an epoch; allowed: 1 to {self.train.epochs}")

    @property
    def trains_control(self) -> bool:
        """Whether the same run without distillation is to be trained too."""
        return self.run.control and self.distillation is not None

    def first_exchange(self) -> int | None:
        """The epoch before which labels are exchanged first; None without distillation."""
        from lightning_idkd.schedule import epoch_of

        return (
            None
            if self.distillation is None
            else epoch_of(self.distillation.start, self.train.epochs, "distillation.start")
        )

    def folder(self) -> "Path":
        """The folder of all runs of this name."""
        from pathlib import Path

        return Path(self.run.dir) / self.run.name
