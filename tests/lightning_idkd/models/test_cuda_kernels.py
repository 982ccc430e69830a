"""The kernels of CUDA devices, in an interpreter where there is none."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from kernel_cases import CONVOLUTIONS, NORMS

pytest.importorskip("triton", reason="no Triton on this system")


@pytest.fixture(scope="module")
def errors():
    """Relative errors of result and gradients by case, from a program of its own."""
    command = [sys.executable, str(Path(__file__).parent / "kernel_cases.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", [*CONVOLUTIONS, *NORMS])
def test_results_and_gradients_are_those_of_torch(errors, case):
    assert all(e < 2e-6 for e in errors[case]), errors[case]
    assert all(e < 2e-5 for e in errors[f"{case}, twice"]), errors[f"{case}, twice"]


def test_nan_stays_nan(errors):
    assert errors["nan"] == [True, True]


def test_norms_take_whole_groups_that_fit(errors):
    """Groups of 3 channels and images of 1,024 x 1,024 are torch's."""
    assert errors["slices"] == [0, 0, 16]


def test_a_step_of_all_nodes_is_that_of_one_after_the_other(errors):
    assert all(e < 1e-5 for e in errors["a node's step"]), errors["a node's step"]
