"""Kills short runs at random moments until they end all the same, and compares each with a run that nobody killed.

    python tests/benchmarks/soak.py FOLDER [--minutes 60] [--kills 200]

Runs of six rules, with an exchange of labels and lost messages, in one process, in two that the command starts itself,
and in two that torchrun starts. A kill (SIGKILL) hits one process of a run, or all of them. The same command continues
the soak; FOLDER/soak.json holds what has been done. The status is 1 if any run ended unlike its reference.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "lightning_idkd")]
from ports import free_ports  # noqa: E402
from short_runs import SHORT, checkpoint, latest, lines, same  # noqa: E402

FAULTS = ["--faults", "[{class_path: MessageLoss, init_args: {p: 0.2, told: false}}]"]
RULES = {
    "QG-DSGDm-N": ["--gossip", "QGDSGDm", *FAULTS],
    "DSGDm-N": ["--gossip", "DSGD", "--gossip.momentum", "0.9", *FAULTS],
    "gradient tracking": ["--gossip", "GradientTracking"],
    "RelaySGD": ["--gossip", "RelaySGD", "--graph.topology", "Chain"],
    "SGP": ["--gossip", "SGP", "--graph.topology", "OnePeerExponential"],
    "NGC": ["--gossip", "NGC"],
}
START = 5.0  # seconds before a run begins
LAUNCHERS = ("one process", "two processes", "torchrun")
LONG = [
    "--train.epochs",
    "60",
    "--train.evaluate_every",
    "5",
    "--distillation.start",
    "20",
    "--distillation.every",
    "10",
]


def build_command(launcher: str, rule: str, folder: Path) -> list[str]:
    """The command of a run in ``folder``; it continues what is there."""
    program = [sys.executable, "-m", "lightning_idkd"]
    options = ["--run.resume", "auto", "--run.dir", str(folder)]
    if launcher == "torchrun":
        [port] = free_ports(1)
        program = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
                   "--master-port", str(port), "-m", "lightning_idkd"]  # fmt: skip
    if launcher != "one process":
        options += ["--run.devices", "2"]
    config = ["--config", str(ROOT / "configs" / "ring_digits.yaml")]
    return [*program, "fit", *config, *SHORT, *LONG, *RULES[rule], *options]


def find_processes(run: Path) -> list[int]:
    """The processes of a run, oldest first; its launchers are not among them."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_text().split("\0")
        except OSError:
            continue
        if str(run) in command and "torch.distributed.run" not in command:
            found.append(int(folder.name))
    return sorted(found)


def run_until_killed(
    command: list[str], run: Path, after: float | None, one: bool, draw: random.Random
) -> tuple[int | None, bool]:
    """Start the command of a run and kill it ``after`` seconds (None: never); its exit status, None if processes were
    left, and whether it was killed."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, env=env, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    try:
        process.communicate(timeout=after)
        return process.returncode, False
    except subprocess.TimeoutExpired:
        pass
    alive = find_processes(run)
    for pid in [draw.choice(alive)] if one and alive else [process.pid, *alive]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    end = time.monotonic() + 90  # the processes that are left report the death, and end
    while (left := find_processes(run)) and time.monotonic() < end:
        time.sleep(0.3)
    for pid in [*left, *([process.pid] if process.poll() is None else [])] if left else []:
        os.kill(pid, signal.SIGKILL)
    process.communicate()
    return None if left else process.returncode, True


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--kills", type=int, default=200)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    file, end = given.folder / "soak.json", time.monotonic() + 60 * given.minutes
    done = json.loads(file.read_text()) if file.exists() else {"runs": [], "kills": 0, "orphans": 0}
    while done["kills"] < given.kills and time.monotonic() < end:
        number = len(done["runs"])
        rule, launcher = list(RULES)[number % len(RULES)], LAUNCHERS[number // len(RULES) % len(LAUNCHERS)]
        draw, reference = random.Random(number), given.folder / f"reference {rule}"
        if not (latest(reference) / "summary.json").exists():
            status, _ = run_until_killed(build_command("one process", rule, reference), reference, None, False, draw)
            assert status == 0, rule
        expected = json.loads((latest(reference) / "summary.json").read_text())
        seconds = expected["throughput"]["seconds"] + START
        run, kills = given.folder / f"run {number}", 0
        while not list(run.glob("*/*/summary.json")):
            after = draw.uniform(0.1, 1.5) * seconds if kills < 12 else None
            command = build_command(launcher, rule, run)
            status, killed = run_until_killed(command, run, after, draw.random() < 0.5, draw)
            kills += killed
            done["orphans"] += status is None
            assert killed or status == 0, (number, status)
        differs = same(checkpoint(latest(reference)), checkpoint(latest(run)))
        summary = json.loads((latest(run) / "summary.json").read_text())
        for key in ("accuracy", "consensus_distance", "homogeneity", "per_node", "exchanges"):
            if summary[key] != expected[key]:
                differs = differs or f"summary: {key}"
        if lines(latest(reference)) != lines(latest(run)):
            differs = differs or "metrics.jsonl"
        done["runs"].append({"rule": rule, "launcher": launcher, "kills": kills, "differs": differs})
        done["kills"] += kills
        file.write_text(json.dumps(done, indent=1))
        print(f"{number}: {rule}, {launcher}: {kills} kills, {differs or 'equal'}; {done['kills']} in all", flush=True)
    wrong = [run for run in done["runs"] if run["differs"]]
    print(f"{len(done['runs'])} runs, {done['kills']} kills, {len(wrong)} differ, {done['orphans']} orphans")
    return 1 if wrong or done["orphans"] else 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
