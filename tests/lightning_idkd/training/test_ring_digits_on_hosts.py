"""The whole ring_digits on one to four hosts, here processes: every rule gives the bits of one process."""

import json

import pytest
from forked import Hosts
from short_runs import checkpoint, latest, lines, same

BRIEF = ["--logger", "null", "--train.epochs", "6", "--train.evaluate_every", "2", "--distillation.start", "3",
         "--distillation.every", "2", "--run.engine", "loop", "--run.threads", "1", "--run.pictures", "false",
         "--run.dir", "runs"]  # fmt: skip
ROBUST = "{class_path: Robust, init_args: {rule: {class_path: DSGD}, aggregator: {class_path: SCClip}}}"
CHOCO = "{class_path: ChocoSGD, init_args: {compression: {class_path: TopK, init_args: {ratio: 0.1}}, gamma: 0.3}}"
FAULTS = "[{class_path: MessageLoss, init_args: {p: 0.2}}, {class_path: Churn, init_args: {leave: 0.1, rejoin: 0.3}}]"
CASES = {
    "QG-DSGDm-N": [],
    "DSGDm": ["--gossip", "DSGD", "--gossip.momentum", "0.9"],
    "CombineThenAdapt": ["--gossip", "CombineThenAdapt"],
    "gradient tracking": ["--gossip", "GradientTracking"],
    "SGP": ["--gossip", "SGP"],
    "RelaySGD": ["--gossip", "RelaySGD", "--graph.topology", "Chain"],
    "NGC": ["--gossip", "NGC"],
    "ChocoSGD": ["--gossip", CHOCO],
    "self-centred clipping": ["--gossip", ROBUST],
    "all-reduce": ["--gossip", "AllReduce"],
    "a graph that changes": ["--graph.topology", "OnePeerExponential"],
    "lost messages and absent nodes": ["--faults", FAULTS],
}
SUMMARY = ("accuracy", "consensus_distance", "homogeneity", "ood", "communication", "per_node", "exchanges")


@pytest.mark.soak
@pytest.mark.parametrize("name", CASES)
def test_any_number_of_hosts_gives_the_bits_of_one(name, configs, tmp_path):
    command = ["fit", "--config", str(configs / "ring_digits.yaml"), *BRIEF, *CASES[name]]
    runs = []
    for count in range(1, 5):
        hosts = Hosts(tmp_path / str(count), count)
        try:
            hosts.start(command)
            status, _, err = hosts.wait(seconds=900)
            assert status == [0] * count, err
        finally:
            hosts.end()
        runs.append(latest(hosts.folders[0] / "runs"))
    alone, *others = runs
    assert len(json.loads((alone / "summary.json").read_text())["exchanges"]) == 2
    for run in others:
        assert same(checkpoint(alone), checkpoint(run)) is None
        assert lines(alone) == lines(run)
        summaries = [json.loads((place / "summary.json").read_text()) for place in (alone, run)]
        assert {key: summaries[0][key] for key in SUMMARY} == {key: summaries[1][key] for key in SUMMARY}
