"""Builds the parts of a run from its config, in this process: samples and their split, graph, store, nodes."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from lightning_idkd import randomness
from lightning_idkd.config import Config
from lightning_idkd.data import identity
from lightning_idkd.data.partition import Split, partition
from lightning_idkd.data.store import Store
from lightning_idkd.errors import UserError, did_you_mean
from lightning_idkd.links import Links
from lightning_idkd.network import Network
from lightning_idkd.nodes.node import NodeModule
from lightning_idkd.nodes.stack import NodeStack
from lightning_idkd.training import memory
from lightning_idkd.training.launch import gather_from_all
from lightning_idkd.training.launchers import name_host

if TYPE_CHECKING:
    from collections.abc import Callable

    from lightning.fabric import Fabric

    from lightning_idkd.data.inputs import Inputs
    from lightning_idkd.data.samples import Samples
    from lightning_idkd.training.resume import EarlierRun


class Parts(NamedTuple):
    """The parts of a run in this process."""

    split: Split
    network: Network
    store: Store
    stack: NodeStack
    memory: int
    """Predicted bytes at the peak."""


def build_parts(config: Config, fabric: Fabric, earlier: EarlierRun | None = None) -> Parts:
    """Build all parts of an experiment.

    Raises:
        UserError: data that do not fit together or have changed since the ``earlier`` run, or too little memory.
    """
    private, test, public, split = load_samples(config, earlier)
    graph = config.graph.build(config.seed)
    links = Links(graph, config.faults, config.seed, config.gossip.takes)
    network = Network(graph, fabric.global_rank, fabric.world_size, links)
    dtype = torch.float64 if config.run.precision == 64 else torch.float32
    store = Store(
        private,
        test,
        public,
        split,
        network.rows,
        batch=config.train.batch_size,
        augment=config.data.augment,
        augment_public=config.data.augment_public,
        tuning=None if config.distillation is None else config.distillation.tuning,
        plain_loss=config.node.loss.plain,
        flipped=links.flipped(),
        seed=config.seed,
        device=fabric.device,
        dtype=dtype,
    )
    make = node_maker(config, store.inputs, store.k)
    with randomness.fork_generators(config.seed, "trial"):
        trial = make().to(fabric.device, dtype)
        activations = memory.measure_activations(trial, store, config.run.autocast is True)
    needs = memory.predict(config, trial, store, network.graph, activations, network.world)
    sharing = config.run.devices if fabric.device.type == "cpu" else 1
    memory.require_memory(needs, memory.read_free_memory(fabric.device), network.graph.nodes, sharing)
    nodes_per_call = memory.choose_nodes_per_call(activations, len(network.rows), fabric.device)
    engine_options = {"nodes_per_call": nodes_per_call, "autocast": config.run.autocast is True}
    stack = NodeStack(make, network.rows, config.seed, fabric.device, dtype, **engine_options)
    return Parts(split, network, store, stack, sum(needs.values()))


def check_same_data(fabric: Fabric, split: Split) -> None:
    """Refuse hosts that have read other samples than the first one.

    Raises:
        UserError: in all processes; the message names the first such host.
    """
    if fabric.world_size == 1:
        return
    (first, split_hash, data), *others = gather_from_all((name_host(), split.hash, split.data))
    for host, other_hash, other in others:
        for part in ("train", "test", "public"):
            if change := identity.describe_change(other[part], data[part]):
                key = "data.public" if part == "public" else "data.private"
                raise UserError(f"{key}: the {part} samples on host {host} are {change} as on host {first}")
        if other_hash != split_hash:
            raise UserError(f"data.partition: host {host} has drawn other samples for its nodes than host {first}")


def load_samples(config: Config, earlier: EarlierRun | None = None) -> tuple:
    """Private, test and public samples (in the private set's form), and the split.

    Raises:
        UserError: data that do not fit together, or have changed since the ``earlier`` run.
    """
    data, private = config.data, load_private(config, earlier)
    test = load_labelled(config, "test", private.inputs)
    test = identity.renumber(test, private.classes, "data.private: the test part")
    public = None
    if data.public is not None and config.distillation is not None and config.distillation.public:
        public = data.public.load_like("train", private.inputs, key="data.public")
        if len(public) < config.train.batch_size:
            batch = f"a batch, train.batch_size {config.train.batch_size}"
            raise UserError(f"data.public: {len(public)} {public.inputs.plural} are less than {batch}")
    identities = identity.record(private, test, public)
    if earlier:
        identity.check(identities, earlier.data, earlier.sets, earlier.folder)
    labels, k = private.labels.numpy(), len(private.classes)
    split = partition(data.partition, labels, config.graph.nodes, config.seed, data.validation, k)
    split.data = identities
    return data.partition.transform(private, split, config.seed), test, public, split


def load_private(config: Config, earlier: EarlierRun | None = None) -> Samples:
    """The private set's training part, with a label for every sample and the classes in the ``earlier`` run's order."""
    private = load_labelled(config, "train")
    if len(private.classes) < 2:
        raise UserError(
            f"data.private: this set has only one class, '{private.classes[0]}'; nodes need two classes or more"
        )
    if twice := {name for name in private.classes if private.classes.count(name) > 1}:
        raise UserError(
            f"data.private: several classes have the same name: {identity.abridge(sorted(twice))}; classes go by name"
        )
    if earlier and earlier.data:
        classes, differences = earlier.data["classes"], []
        if extra := [name for name in private.classes if name not in classes]:
            differences.append(f"has {identity.abridge(extra)}")
        if missing := [name for name in classes if name not in private.classes]:
            differences.append(f"lacks {identity.abridge(missing)}")
        if differences:
            given = f"this set {' and '.join(differences)}"
            raise UserError(f"data.private: the classes are not those of '{earlier.folder}': {given}")
        private = private.renumber(classes)
    config.data.partition.check(private)
    return private


def load_labelled(config: Config, split: str, inputs: Inputs | None = None) -> Samples:
    """The private set's samples of ``split``, in the form of ``inputs`` or else as the config says.

    Raises:
        UserError: a sample has no label.
    """
    key, data = "data.private", config.data
    if inputs is None:
        samples = data.private.load(split, data.image_size, data.channels, key=key)
    else:
        samples = data.private.load_like(split, inputs, key=key)
    unlabelled = int((samples.labels < 0).sum())
    if not unlabelled:
        return samples
    why = samples.unlabelled
    if not why and unlabelled == len(samples) and split == "train":
        why = ": this set has no labels"
    elif not why:
        why = f": {unlabelled:,} of {len(samples):,} {split} {samples.inputs.plural} have no label"
    advice = data.private.labelled_splits(split, data.image_size, key) if split == "test" else ""
    raise UserError(f"{key}{why}; {advice or 'only a public set does without labels'}")


def node_maker(config: Config, inputs: Inputs, classes: int) -> Callable[[], NodeModule]:
    """Make a function that builds one node for samples of this form."""
    Module = import_node_module(config.node.module)

    def make() -> NodeModule:
        network = config.node.network.build_for(inputs, classes)
        if not isinstance(network, nn.Module):
            name = type(config.node.network).__name__
            raise UserError(f"node.network: {name}.build returns {type(network).__name__}; allowed: a torch.nn.Module")
        try:
            node = Module(network)
        except TypeError as e:
            raise UserError(f"node.module: {config.node.module} cannot be made from a network alone ({e})") from e
        node.loss = None if config.node.loss.plain else config.node.loss
        return node

    return make


def import_node_module(path: str) -> type[NodeModule]:
    """The NodeModule class at an import path."""
    name, _, attribute = path.rpartition(".")
    if not name:
        raise UserError(f"node.module: '{path}' is not an import path; allowed: one such as package.module.Class")
    try:
        module = import_module(name)
    except (ImportError, ValueError) as e:
        raise UserError(f"node.module: cannot import '{name}' ({e})") from e
    cls = getattr(module, attribute, None)
    if not (isinstance(cls, type) and issubclass(cls, NodeModule)):
        allowed = [k for k, v in vars(module).items() if isinstance(v, type) and issubclass(v, NodeModule)]
        raise UserError(f"node.module: '{path}' is not a NodeModule class.{did_you_mean(attribute, allowed)}")
    return cls
