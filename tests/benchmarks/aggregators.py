"""Times robust aggregators beside those of byzpy and byzfl, in turns in one process, for one node and 64 messages.

Both are installed into a folder of their own, since neither is needed for anything else::

    pip install --target /tmp/peers --no-deps byzpy==0.1.4 byzfl==0.0.11
    python tests/benchmarks/aggregators.py /tmp/peers [THREADS]
"""

from __future__ import annotations

import statistics
import sys
import time
import types
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor

from callbacks.gossip.aggregators import RFA, CoordinateMedian, CoordinateTrimmedMean, MultiKrum, SCClip

MESSAGES, PARAMETERS, LIARS, ROUNDS = 64, 65_536, 8, 21
RADIUS = 350.0
"""Of clipping: some distances are above it, and some below."""


def load_peers(folder: str) -> tuple:
    """The aggregators of byzpy and byzfl; those of byzfl without its package, which needs its whole stack."""
    sys.path.append(folder)
    for name in ("byzfl", "byzfl.utils"):
        package = types.ModuleType(name)
        package.__path__ = [f"{folder}/{name.replace('.', '/')}"]
        sys.modules[name] = package
    import byzpy.aggregators.coordinate_wise as columns
    import byzpy.aggregators.geometric_wise as rows
    import byzpy.aggregators.norm_wise as norms
    from byzfl.aggregators import aggregators

    return columns, rows, norms, aggregators


def build_cases(messages: Tensor, folder: str) -> dict[str, dict[str, Callable[[], Tensor]]]:
    """Per aggregator, what computes it, by project."""
    columns, rows, norms, byzfl = load_peers(folder)
    V, w, context = messages[None], torch.full((1, MESSAGES), 1 / MESSAGES), SimpleNamespace(targets=None)
    apart = list(messages.unbind(0))

    def clip() -> Tensor:
        clipping = byzfl.CenteredClipping(None, 1, RADIUS)
        clipping.m = messages[0]
        return clipping(messages)

    return {
        "trimmed mean, 8 a side": {
            "ours": lambda: CoordinateTrimmedMean(LIARS)(V, w, context),
            "byzpy": lambda: columns.CoordinateWiseTrimmedMean(LIARS).aggregate(apart),
            "byzfl": lambda: byzfl.TrMean(LIARS)(messages),
        },
        "median": {
            "ours": lambda: CoordinateMedian()(V, w, context),
            "byzpy": lambda: columns.CoordinateWiseMedian().aggregate(apart),
            "byzfl": lambda: byzfl.Median()(messages),
        },
        "multi-Krum, 8 liars": {
            "ours": lambda: MultiKrum(LIARS)(V, w, context),
            "byzpy": lambda: rows.MultiKrum(LIARS, MESSAGES - LIARS).aggregate(apart),
            "byzfl": lambda: byzfl.MultiKrum(LIARS)(messages),
        },
        "geometric median, 8 iterations": {
            "ours": lambda: RFA(8, 0.1)(V, w, context),
            "byzpy": lambda: rows.GeometricMedian(tol=1e-30, max_iter=8, eps=0.1, init="mean").aggregate(apart),
            "byzfl": lambda: byzfl.GeometricMedian(0.1, 8)(messages),
        },
        "clipping, 1 iteration": {
            "ours": lambda: SCClip(RADIUS)(V, w, context),
            "byzpy": lambda: norms.CenteredClipping(c_tau=RADIUS, M=1, init="zero").aggregate(apart),
            "byzfl": clip,
        },
    }


def main(folder: str, threads: str = "1") -> None:
    torch.set_num_threads(int(threads))
    messages = torch.randn(MESSAGES, PARAMETERS, generator=torch.Generator().manual_seed(0))
    about = f"{MESSAGES} messages of {PARAMETERS:,} values, torch {torch.__version__}"
    print(f"{threads} thread(s), {about}, ms, medians of {ROUNDS} turns\n")
    print("| aggregator | ours | byzpy | byzfl | ratio to the faster | least to most |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, forms in build_cases(messages, folder).items():
        seconds: dict[str, list[float]] = {form: [] for form in forms}
        for turn in range(ROUNDS + 1):  # the first warms up
            for form, compute in forms.items():
                start = time.perf_counter()
                compute()
                if turn:
                    seconds[form].append(1e3 * (time.perf_counter() - start))
        median = {form: statistics.median(times) for form, times in seconds.items()}
        faster = min(("byzpy", "byzfl"), key=median.__getitem__)
        ratios = sorted(theirs / ours for ours, theirs in zip(seconds["ours"], seconds[faster], strict=True))
        columns = " | ".join(f"{median[form]:.2f}" for form in ("ours", "byzpy", "byzfl"))
        spread = f"{statistics.median(ratios):.1f} | {ratios[0]:.1f} to {ratios[-1]:.1f}"
        print(f"| {name} | {columns} | {spread} |", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
