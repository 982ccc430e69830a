"""Gossip learning on a ring with gossipy: every step, each node sends its parameters to one random neighbour."""

import time

import networkx
import torch
from gossipy.core import AntiEntropyProtocol, StaticP2PNetwork
from gossipy.data import DataDispatcher
from gossipy.data.handler import ClassificationDataHandler
from gossipy.model import TorchModel
from gossipy.model.handler import TorchModelHandler
from gossipy.node import GossipNode
from gossipy.simul import GossipSimulator
from task import BATCH, LR, NODES, STEPS, accuracy, load, network, report


class Net(TorchModel):
    def __init__(self):
        super().__init__()
        self.layers = network()

    def init_weights(self):
        self.layers = self.layers  # all nodes start from the same parameters

    def forward(self, x):
        return self.layers(x)


class Handler(TorchModelHandler):
    # --- measuring
    samples = 0

    def _local_step(self, x, y):
        Handler.samples += len(x)
        super()._local_step(x, y)

    # ---


images, labels, _, _ = load()
dispatcher = DataDispatcher(ClassificationDataHandler(images, labels, test_size=0), n=NODES, eval_on_user=False)
ring = StaticP2PNetwork(NODES, topology=networkx.to_numpy_array(networkx.cycle_graph(NODES)))
handler = Handler(Net(), torch.optim.SGD, {"lr": LR}, torch.nn.CrossEntropyLoss(), local_epochs=0, batch_size=BATCH)
nodes = GossipNode.generate(dispatcher, ring, handler, round_len=1, sync=True)
simulator = GossipSimulator(nodes, dispatcher, delta=STEPS, protocol=AntiEntropyProtocol.PUSH)
simulator.init_nodes()
# --- measuring
Handler.samples, started = 0, time.perf_counter()
# ---
simulator.start(n_rounds=1)
# --- measuring
seconds = time.perf_counter() - started
report(Handler.samples, seconds, [accuracy(node.model_handler.model) for node in nodes.values()])
# ---
