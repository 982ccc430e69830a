"""torch's optimisers as local steps."""

import numpy as np
import pytest
import torch
from quadratics import GRAPHS, LOCAL, LR, Quadratics, driver, same_in_blocks, trajectory

from lightning_idkd.callbacks import DSGD, LocalOptimizer
from lightning_idkd.errors import UserError
from lightning_idkd.graph import Graph, Ring

ELEMENTWISE = [("SGD", {"momentum": 0.9, "dampening": 0.5}), ("Adam", {"weight_decay": 0.01}),
               ("AdamW", {"amsgrad": True}), ("RMSprop", {"momentum": 0.5, "centered": True}),
               ("NAdam", {}), ("RAdam", {}), ("Adagrad", {}), ("Adadelta", {}),
               ("Adamax", {}), ("ASGD", {}), ("Rprop", {})]  # fmt: skip


def alone(name, arguments, f, i, lrs):
    """torch's optimiser at node i, one parameter vector and its own state."""
    x = torch.nn.Parameter(torch.tensor(f.x0[i]))
    optimizer, seen = getattr(torch.optim, name)([x], lr=lrs[0], **arguments), [f.x0[i]]
    for lr in lrs:
        optimizer.param_groups[0]["lr"] = lr
        x.grad = torch.tensor(f.A[i] @ (x.detach().numpy() - f.c[i]))
        optimizer.step()
        seen.append(x.detach().numpy().copy())
    return seen


@pytest.mark.parametrize(("name", "arguments"), ELEMENTWISE)
def test_one_node_is_torchs_optimiser(name, arguments):
    rule = LocalOptimizer(f"torch.optim.{name}", arguments)
    expected = alone(name, arguments, Quadratics(1), 0, LR)
    np.testing.assert_allclose(trajectory(rule, Graph(Ring(), 1), Quadratics(1))[:, 0], expected, rtol=1e-9, atol=1e-9)


def test_nodes_have_a_state_of_their_own_and_mix_after_the_step():
    graph, f = GRAPHS["joined"], Quadratics()
    first = np.array([alone("Adam", {}, f, i, LR[:1])[1] for i in range(8)])
    seen = trajectory(LocalOptimizer("torch.optim.Adam"), graph, Quadratics())
    np.testing.assert_allclose(seen[1], graph.mixing(0).W @ first, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
@pytest.mark.parametrize("options", LOCAL)
def test_sgd_is_dsgd(options, weight_decay):
    options = options | {"weight_decay": weight_decay}
    got = trajectory(LocalOptimizer("torch.optim.SGD", options), GRAPHS["joined"], Quadratics())
    np.testing.assert_allclose(got, trajectory(DSGD(**options), GRAPHS["joined"], Quadratics()), rtol=0, atol=1e-12)


def test_all_of_its_state_lies_in_buffers():
    """A run that goes on from the rows and buffers of another is that other."""
    rule = LocalOptimizer("torch.optim.NAdam")
    whole = trajectory(rule, GRAPHS["ring"], Quadratics())
    stack = Quadratics()
    run = driver(rule, GRAPHS["ring"], stack)
    for step, lr in enumerate(LR):
        if step == 7:
            kept = {k: b.clone() for k, b in run.buffers.items()}
            run = driver(LocalOptimizer("torch.optim.NAdam"), GRAPHS["ring"], stack)
            for k, b in run.buffers.items():
                b.copy_(kept[k])
        stack.G.copy_(stack.gradient(stack.X))
        run.update(lr, (None, None))
    assert np.array_equal(stack.X.numpy(), whole[-1])


def test_blocks_of_columns_are_the_whole(monkeypatch):
    same_in_blocks(LocalOptimizer("torch.optim.Adam"), monkeypatch)


@pytest.mark.parametrize(("optimizer", "arguments", "message"), [
    ("torch.optim.LBFGS", {}, r"gossip.optimizer: torch.optim.LBFGS does not update every parameter .*closure.*AdamW"),
    ("torch.optim.Adafactor", {}, r"gossip.optimizer: torch.optim.Adafactor does not update .* by the same rule;"),
    ("torch.optim.SparseAdam", {}, r"gossip.optimizer: torch.optim.SparseAdam .*dense"),
    ("torch.optim.Adamm", {}, r"'torch.optim.Adamm' is not an optimiser of torch. Did you mean 'Adam'\?"),
    ("torch.nn.Linear", {}, r"'torch.nn.Linear' is not an optimiser of torch"),
    ("no.where.Adam", {}, r"gossip.optimizer: cannot import 'no.where'"),
    ("Adam", {}, r"gossip.optimizer: cannot import ''.* give a path such as torch.optim.AdamW"),
    ("torch.optim.Adam", {"eps": -1},
     r"gossip.arguments: torch.optim.Adam does not take \{'eps': -1\} \(Invalid epsilon"),
    ("torch.optim.Adam", {"momentum": 0.9}, r"gossip.arguments: torch.optim.Adam does not take .*momentum"),
])  # fmt: skip
def test_what_cannot_be_a_local_step_is_refused(optimizer, arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        LocalOptimizer(optimizer, arguments).check(GRAPHS["ring"])
    assert "\n" not in str(caught.value)


def test_muon_is_refused():
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has none")
    with pytest.raises(UserError, match="Muon does not update every parameter by itself"):
        LocalOptimizer("torch.optim.Muon").check(GRAPHS["ring"])


def test_a_learning_rate_of_its_own_is_refused():
    with pytest.raises(UserError, match=r"gossip.arguments: lr is given; the learning rate is train.lr"):
        LocalOptimizer("torch.optim.Adam", {"lr": 0.1})
