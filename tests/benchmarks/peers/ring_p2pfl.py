"""p2pfl on a ring: nodes train 5 local epochs a round on two Ray actors, and average over all nodes by its gossip.

p2pfl has no exchange between neighbours alone, nor one after every step.
"""

import time

import lightning
import torch
from datasets import Dataset, DatasetDict
from p2pfl.communication.protocols.protobuff.memory import MemoryCommunicationProtocol
from p2pfl.learning.dataset.p2pfl_dataset import P2PFLDataset
from p2pfl.learning.frameworks.pytorch.lightning_model import LightningModel
from p2pfl.node import Node
from p2pfl.settings import Settings
from p2pfl.utils.topologies import TopologyFactory, TopologyType
from p2pfl.utils.utils import set_standalone_settings, wait_convergence, wait_to_finish
from task import BATCH, EPOCHS, LR, NODES, SAMPLES, STEPS, accuracy, load, network, report, share


class Net(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.layers = network()

    def forward(self, x):
        return self.layers(x)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), LR)

    def training_step(self, batch, index):
        return torch.nn.functional.cross_entropy(self(batch["image"]), batch["label"])

    def test_step(self, batch, index):
        self.log("test_loss", torch.nn.functional.cross_entropy(self(batch["image"]), batch["label"]))


def build(images, labels):
    return Dataset.from_dict({"image": images.numpy(), "label": labels.numpy()})


if __name__ == "__main__":
    set_standalone_settings()
    Settings.training.RAY_ACTOR_POOL_SIZE = 2
    Settings.gossip.PERIOD = 0.05  # 0, the setting for one machine, keeps 16 threads busy, and heartbeats come too late
    Settings.gossip.TTL = NODES
    Settings.heartbeat.TIMEOUT = 60
    test = build(*load()[2:])
    nodes = []
    for i in range(NODES):
        data = DatasetDict({"train": build(*share(i, NODES)), "test": test}).with_format("torch")
        dataset = P2PFLDataset(data, batch_size=BATCH)
        nodes.append(Node(LightningModel(Net()), dataset, f"node-{i}", protocol=MemoryCommunicationProtocol()))
        nodes[-1].start()
    TopologyFactory.connect_nodes(TopologyFactory.generate_matrix(TopologyType.RING, NODES), nodes)
    wait_convergence(nodes, NODES - 1, only_direct=False, wait=60)
    rounds = STEPS // (EPOCHS * 6)  # an epoch has 6 batches
    nodes[0].set_start_learning(rounds=rounds, epochs=EPOCHS, trainset_size=NODES)
    # --- measuring
    while min(node.state.round or 0 for node in nodes) < 1:
        time.sleep(0.05)
    started = time.perf_counter()
    # ---
    wait_to_finish(nodes)
    # --- measuring
    seconds = time.perf_counter() - started
    samples = (rounds - 1) * EPOCHS * SAMPLES  # the first round starts the actors
    report(samples, seconds, [accuracy(node.learner.get_model().get_model()) for node in nodes])
    # ---
    for node in nodes:
        node.stop()
