"""Callbacks' values in metrics, summary, checkpoints: numbers of torch and numpy count, others are refused by name."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
import torch
from short_runs import checkpoint, extra, latest

from lightning_idkd import Callback
from lightning_idkd.errors import UserError
from lightning_idkd.files import to_json
from lightning_idkd.training.checkpoint import to_storable

NUMBERS = [
    (torch.tensor(1.5), 1.5), (torch.tensor(3), 3), (torch.tensor(True), True), (np.float32(0.5), 0.5),
    (np.int64(7), 7), (np.bool_(False), False), (np.array(2.0), 2.0),
    (torch.tensor(2.0, requires_grad=True), 2.0), (4, 4), ("a", "a"), (None, None),
]  # fmt: skip


@pytest.mark.parametrize(("value", "expected"), NUMBERS)
def test_a_single_number_is_stored_as_python_has_it(value, expected):
    for found in (to_json(value, "x"), to_json({"a": [value]}, "x")["a"][0]):
        assert found == expected
        assert type(found) is type(expected)
    if not isinstance(value, torch.Tensor):
        assert to_storable({"a": (value,)}, "x") == {"a": (expected,)}


@pytest.mark.parametrize("value", [math.nan, math.inf, torch.tensor(math.nan), np.float64("inf")])
def test_what_json_has_no_number_for_is_null(value):
    assert to_json([value], "x") == [None]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (torch.ones(2, 3), "x['a'][0] is a Tensor of shape [2, 3]; allowed: a number"),
        (torch.ones(1), "x['a'][0] is a Tensor of shape [1]"),
        (np.ones(4), "x['a'][0] is a ndarray of shape [4]"),
        ({1, 2}, "x['a'][0] is a set"),
        ({(1, 2): 3}, "x['a'][0] has the key (1, 2), of type tuple; allowed: text"),
    ],
)
def test_anything_else_is_refused_with_its_place(value, said):
    with pytest.raises(UserError) as e:
        to_json({"a": [value]}, "x")
    assert said in str(e.value)


@pytest.mark.parametrize("value", [np.ones(4), {1, 2}, object(), np.ones(2, dtype=object)])
def test_a_state_that_a_checkpoint_cannot_hold_is_refused_with_its_place(value):
    with pytest.raises(UserError, match=r"x\['a'\]\[0\] is an? \w+.*; allowed: tensors"):
        to_storable({"a": [value]}, "x")
    kept = {"rows": [torch.ones(2), 1], "t": (torch.zeros(1), math.inf)}
    assert to_storable(kept, "x") == kept


class Numbers(Callback):
    def on_evaluation_end(self, run, metrics):
        metrics["mine/norm"] = run.stack.X.norm()
        metrics["mine/rows"] = np.int64(run.stack.n)

    def on_fit_end(self, summary):
        summary["largest"] = torch.tensor(0.25)

    def state_dict(self):
        return {"seen": np.float64(3), "kept": torch.ones(2)}


class Matrix(Callback):
    """Puts a matrix where the argument says."""

    def __init__(self, where: str):
        self.where = where

    def on_evaluation_end(self, run, metrics):
        if self.where == "metrics":
            metrics["rows"] = run.stack.X

    def on_fit_end(self, run, summary):
        if self.where == "summary":
            summary["rows"] = np.ones((2, 2))

    def state_dict(self):
        return {"rows": np.ones(3)} if self.where == "state_dict()" else {}


def test_numbers_of_a_callback_arrive_in_all_files(fit):
    assert fit(*extra(Numbers), "--train.epochs", "1", "--distillation", "null", "--graph.nodes", "2") == 0
    line = json.loads((latest(fit.runs) / "metrics.jsonl").read_text().splitlines()[-1])
    summary = json.loads((latest(fit.runs) / "summary.json").read_text())
    assert line["mine/rows"] == 2
    assert line["mine/norm"] > 1
    assert summary["mine"] == {"norm": line["mine/norm"], "rows": 2}
    assert summary["largest"] == 0.25
    state = dict(checkpoint(latest(fit.runs))["callbacks"])["Numbers"]
    assert (state["seen"], state["kept"].tolist()) == (3.0, [1.0, 1.0])


@pytest.mark.parametrize(
    ("where", "shape"),
    [
        ("metrics", r"Tensor of shape \[2, \d+\]"),
        ("summary", r"ndarray of shape \[2, 2\]"),
        ("state_dict()", r"ndarray of shape \[3\]"),
    ],
)
def test_a_matrix_of_a_callback_is_refused_with_callback_and_key(where, shape, fit, capsys):
    assert fit(*extra(Matrix, where=where), "--train.epochs", "1", "--distillation", "null", "--graph.nodes", "2") == 2
    said = capsys.readouterr().err
    assert re.match(rf"error: callbacks: Matrix: {re.escape(where)}\['rows'\] is a {shape}; allowed: ", said)
    assert said.count("\n") == 1
