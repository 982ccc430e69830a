"""Gossip learning on a ring with fluke: every round, each node sends its parameters to one random neighbour, and those
that have received some average them with their own and train on one batch."""

import time

import networkx
from fluke import DDict, FlukeENV
from fluke.algorithms.decentralized import GossipDFL, Topology
from fluke.data import DataContainer, DataSplitter
from fluke.utils import ClientObserver
from task import BATCH, LR, NODES, STEPS, accuracy, load, network, report

images, labels, test_images, test_labels = load()
one_batch = BATCH / (len(images) // NODES)
splitter = DataSplitter(DataContainer(images, labels, test_images, test_labels, 10), sampling_perc=one_batch)
FlukeENV().set_eval_cfg(pre_fit=False, post_fit=False, locals=False, server=False)
client = {
    "batch_size": BATCH,
    "local_epochs": 1,
    "loss": "CrossEntropyLoss",
    "optimizer": {"name": "SGD", "lr": LR},
    "scheduler": {"name": "StepLR", "step_size": 10 * STEPS, "gamma": 1},
    "policy": "aggregate",
    "eta": 0.5,
}
federation = GossipDFL(
    NODES, splitter, DDict(model=network(), client=client), topology=Topology(networkx.cycle_graph(NODES))
)


# --- measuring
class Samples(ClientObserver):
    count = 0

    def end_fit(self, round, client_id, model, loss, **kwargs):
        Samples.count += federation.clients[client_id].train_set.size


federation.set_callbacks(Samples())
started = time.perf_counter()
# ---
federation.run(STEPS)
# --- measuring
report(Samples.count, time.perf_counter() - started, [accuracy(client.model) for client in federation.clients])
# ---
