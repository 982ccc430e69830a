"""FedAvg of 100 clients with BlazeFL's own FedAvg and its pool of threads, one a core, here its fastest mode."""

import os
import time

import torch
from blazefl.contrib.fedavg import (
    FedAvgBaseServerHandler,
    FedAvgPartitionedDataset,
    FedAvgThreadPoolClientTrainer,
)
from blazefl.core import ModelSelector
from task import BATCH, CLIENTS, EPOCHS, LR, ROUNDS, SAMPLES, accuracy, network, report, share
from torch.utils.data import DataLoader, TensorDataset


class Networks(ModelSelector):
    def select_model(self, model_name):
        return network()


class Digits(FedAvgPartitionedDataset):
    def __init__(self):
        self.samples = [TensorDataset(*share(client, CLIENTS)) for client in range(CLIENTS)]

    def get_dataset(self, type_, cid):
        return self.samples[cid]

    def set_dataset(self, type_, cid, dataset):
        self.samples[cid] = dataset

    def get_dataloader(self, type_, cid, batch_size, generator=None):
        return DataLoader(self.samples[cid], batch_size, shuffle=True, generator=generator)


if __name__ == "__main__":
    torch.set_num_threads(1)
    digits, networks = Digits(), Networks()
    server = FedAvgBaseServerHandler(networks, "cnn", digits, ROUNDS, CLIENTS, 1.0, "cpu", BATCH, seed=0)
    trainer = FedAvgThreadPoolClientTrainer(
        networks, "cnn", digits, "cpu", CLIENTS, EPOCHS, BATCH, LR, seed=0, num_parallels=os.cpu_count()
    )
    # --- measuring
    ends = []
    # ---
    while not server.if_stop():
        trainer.local_process(server.downlink_package(), server.sample_clients())
        for package in trainer.uplink_package():
            server.load(package)
        # --- measuring
        ends.append(time.perf_counter())
    report((ROUNDS - 1) * EPOCHS * SAMPLES, ends[-1] - ends[0], [accuracy(server.model)])
    # ---
