"""The table of tests/benchmarks/peers/run.py, which needs no peer."""

import importlib.util
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def peers():
    spec = importlib.util.spec_from_file_location("peers_run", Path(__file__).parent / "peers" / "run.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_counts_lines_that_a_user_writes(peers):
    text = '"""What it\ndoes."""\n\nimport time\n# why\n# --- measuring\nstart = time.time()\n# ---\ntrain()\n'
    assert peers.count_lines(text) == 2  # import time, train()


def test_orders_by_speed_and_gives_ratios_to_own_runs(peers):
    own, other, broken = (case for case in peers.CASES if case.task == "fedavg")
    results = [
        peers.Result(
            other, version="1.0", rates=[50.0, 100.0, 300.0], seconds=[60.0], memory=[2**30], accuracies=[0.5]
        ),
        peers.Result(own, version="0.1", rates=[400.0], seconds=[20], memory=[2**29], accuracies=[0.75]),
        peers.Result(broken, failure="not installed"),
    ]
    table = peers.format_table(results).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:4]]
    assert cells[0][:6] == ["lightning-idkd 0.1", "400", "400 to 400", "1.0", "20 s", "1.0"]
    assert cells[1][:6] == ["flwr 1.0", "100", "50 to 300", "4.0", "60 s", "3.0"]
    assert [cells[0][6], cells[1][6]] == ["0.50 GiB", "1.00 GiB"]
    assert [cells[0][8], cells[1][8]] == ["75.0 %", "50.0 %"]
    assert table[-1] == "blazefl: not installed"


def test_keeps_the_faster_number_of_threads(peers):
    case = next(case for case in peers.CASES if case.name == "gossipy")
    slow, fast = (peers.Result(case, threads=threads, rates=[rate]) for threads, rate in ((2, 5.0), (1, 7.0)))
    assert peers.keep_fastest([slow, fast]) == [fast]
