"""D-PSGD on a ring with decentralizepy: one process a node, TCP."""

import json
import logging
import tempfile
import time
from pathlib import Path

import torch
from decentralizepy.datasets.Dataset import Dataset
from decentralizepy.graphs.Ring import Ring
from decentralizepy.mappings.Linear import Linear
from decentralizepy.models.Model import Model
from decentralizepy.node.DPSGDNode import DPSGDNode
from task import BATCH, LR, NODES, STEPS, accuracy, network, report, share
from torch.multiprocessing import Process
from torch.utils.data import DataLoader, TensorDataset


class Net(Model):
    def __init__(self):
        super().__init__()
        self.layers = network()

    def forward(self, x):
        return self.layers(x)


class Digits(Dataset):
    def __init__(self, rank, machine_id, mapping, folder):
        super().__init__(rank, machine_id, mapping, test_dir=folder)
        self.samples = TensorDataset(*share(rank, NODES))
        # --- measuring
        self.times = []
        # ---

    def get_trainset(self, batch_size, shuffle):
        # --- measuring
        self.times.append(time.time())
        # ---
        return DataLoader(self.samples, batch_size, shuffle=shuffle)

    def get_testset(self):
        return None

    def test(self, model, loss):
        # --- measuring
        first, last = self.times[STEPS // 10], time.time()
        # ---
        result = accuracy(model)
        # --- measuring
        Path(self.test_dir, f"{self.rank}.json").write_text(json.dumps([first, last, result]))
        # ---
        return result, 0.0


if __name__ == "__main__":
    folder = Path(tempfile.mkdtemp())
    addresses = folder / "addresses.json"
    addresses.write_text('{"0": "127.0.0.1"}')
    config = {
        "DATASET": {
            "dataset_package": "ring_decentralizepy",
            "dataset_class": "Digits",
            "model_class": "Net",
            "folder": str(folder),
        },
        "OPTIMIZER_PARAMS": {"optimizer_package": "torch.optim", "optimizer_class": "SGD", "lr": LR},
        "TRAIN_PARAMS": {
            "training_package": "decentralizepy.training.Training",
            "training_class": "Training",
            "rounds": 1,
            "full_epochs": False,
            "batch_size": BATCH,
            "shuffle": True,
            "loss_package": "torch.nn",
            "loss_class": "CrossEntropyLoss",
        },
        "COMMUNICATION": {
            "comm_package": "decentralizepy.communication.TCP",
            "comm_class": "TCP",
            "addresses_filepath": str(addresses),
        },
        "SHARING": {"sharing_package": "decentralizepy.sharing.Sharing", "sharing_class": "Sharing"},
    }
    torch.set_num_threads(1)
    mapping, ring = Linear(1, NODES), Ring(NODES)
    never = 10 * STEPS
    nodes = [
        Process(
            target=DPSGDNode,
            args=(i, 0, mapping, ring, config, STEPS, str(folder), str(folder), logging.WARNING, STEPS, never, 0),
        )
        for i in range(NODES)
    ]
    for node in nodes:
        node.start()
    for node in nodes:
        node.join()
    # --- measuring
    results = [json.loads((folder / f"{i}.json").read_text()) for i in range(NODES)]
    firsts, lasts, accuracies = zip(*results, strict=True)
    report((STEPS - STEPS // 10) * BATCH * NODES, max(lasts) - min(firsts), accuracies)
    # ---
