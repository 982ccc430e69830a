"""Accuracies of an evaluation, against a plain loop over the samples of each split."""

import numpy as np
import pytest
import torch
from short_runs import run_of, train

from lightning_idkd.training.record import measure_nodes


def test_accuracies_of_both_splits_are_those_of_plain_loops(configs):
    run = run_of(configs)
    train(run, 20)
    store = run.store

    def count_right(module, pool, labels, indices):
        with torch.no_grad():
            x = store.inputs.scale(pool[torch.as_tensor(indices)])
            return np.mean([module.eval()(x[[i]]).argmax().item() == labels[k] for i, k in enumerate(indices)])

    held_out = np.concatenate(store.split.validation)
    sets = {
        "test": (store.test, store.test_labels, range(len(store.test))),
        "validation": (store.pool, store.labels, held_out),
    }
    right = {split: [count_right(m, *given) for m in run.stack.modules] for split, given in sets.items()}
    mean = run.stack.model(run.stack.X.mean(0), {})
    consensus = {split: count_right(mean, *given) for split, given in sets.items()}
    measured, nodes = measure_nodes(run.stack, run.network, store, None, None, lambda: False)
    assert nodes == pytest.approx(right["test"], abs=1e-12)
    assert measured["accuracy/node_mean"] == pytest.approx(np.mean(right["test"]), abs=1e-12)
    assert measured["accuracy/consensus"] == pytest.approx(consensus["test"], abs=1e-12)
    assert measured["validation/node_mean"] == pytest.approx(np.mean(right["validation"]), abs=1e-12)
    assert measured["validation/consensus"] == pytest.approx(consensus["validation"], abs=1e-12)
    assert abs(measured["validation/node_mean"] - measured["accuracy/node_mean"]) > 1e-3, "else they may be swapped"
