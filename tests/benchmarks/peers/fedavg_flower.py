"""FedAvg of 100 clients in Flower's simulation, with one Ray actor a core."""

import time

import torch
from flwr.app import ArrayRecord, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common import Message
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from task import BATCH, CLIENTS, EPOCHS, LR, ROUNDS, SAMPLES, accuracy, network, report, share
from torch.utils.data import DataLoader, TensorDataset

client, server = ClientApp(), ServerApp()


@client.train()
def train(message, context):
    model = network()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    optimizer = torch.optim.SGD(model.parameters(), LR)
    dataset = TensorDataset(*share(context.node_config["partition-id"], CLIENTS))
    batches = DataLoader(dataset, BATCH, shuffle=True)
    for _ in range(EPOCHS):
        for images, labels in batches:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
    metrics = MetricRecord({"num-examples": len(dataset)})
    return Message(RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}), reply_to=message)


@server.main()
def main(grid, context):
    model = network()
    strategy = FedAvg(fraction_evaluate=0, min_available_nodes=CLIENTS)
    # --- measuring
    ends = []
    aggregate = strategy.aggregate_train

    def timed(round, replies):
        result = aggregate(round, replies)
        ends.append(time.perf_counter())
        return result

    strategy.aggregate_train = timed
    # ---
    result = strategy.start(grid, ArrayRecord(model.state_dict()), num_rounds=ROUNDS)
    model.load_state_dict(result.arrays.to_torch_state_dict())
    # --- measuring
    samples = (ROUNDS - 1) * EPOCHS * SAMPLES  # the first round starts the actors
    report(samples, ends[-1] - ends[0], [accuracy(model)])
    # ---


run_simulation(server, client, CLIENTS, backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}})
