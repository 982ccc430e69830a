"""torch's own optimisers as the local step."""

from __future__ import annotations

from functools import cached_property

from lightning_idkd.callback import Gossip
from lightning_idkd.errors import UserError, did_you_mean


class LocalOptimizer(Gossip):
    """Adapt with an optimiser of torch, then combine: X <- W step(X). Its state stays at the nodes.

    Args:
        optimizer: Import path of an optimiser that treats every parameter alike and alone: torch.optim.SGD, Adam, RMSprop, ...
        arguments: Its arguments besides the learning rate, which is train.lr.
    """

    def __init__(self, optimizer: str = "torch.optim.AdamW", arguments: dict | None = None):
        self.optimizer, self.arguments = optimizer, arguments or {}
        if "lr" in self.arguments:
            raise UserError("gossip.arguments: lr is given here; the learning rate is train.lr, with train.schedule")

    def check(self, graph) -> None:
        super().check(graph)
        self._state  # noqa: B018 (looks at the optimiser, or refuses it)

    @property
    def buffers(self) -> dict[str, int | None]:
        return {"steps": 1} | {k: 1 if v.ndim == 0 else None for k, v in self._state.items()}

    def update(self, X, G, state, ctx):
        import torch

        optimizer = self._make(X, ctx.lr)
        (p,) = optimizer.param_groups[0]["params"]
        p.grad = G
        if state.steps[0, 0]:  # else it starts from what it makes itself
            held = {k: getattr(state, k) for k in self._state}
            optimizer.state[p] = {k: held[k][0, 0].to(v) if v.ndim == 0 else held[k].clone() for k, v in self._state.items()}
        optimizer.step()
        for k in self._state:
            setattr(state, k, torch.as_tensor(optimizer.state[p][k]).to(X).expand_as(getattr(state, k)))
        state.steps = state.steps + 1
        return self.combine(p.data, state, ctx)

    def _make(self, X, lr):
        import torch

        make = self._class
        try:
            return make([torch.nn.Parameter(X.clone())], lr=lr, **self.arguments)
        except (TypeError, ValueError) as e:
            raise UserError(f"gossip.arguments: {self.optimizer} does not take {self.arguments} ({e})") from e

    @cached_property
    def _class(self) -> type:
        from importlib import import_module

        import torch

        module, _, name = self.optimizer.rpartition(".")
        try:
            there = vars(import_module(module))
        except (ImportError, ValueError) as e:
            raise UserError(f"gossip.optimizer: cannot import '{module}' ({e}); give a path such as torch.optim.AdamW") from e
        if not (isinstance(there.get(name), type) and issubclass(there[name], torch.optim.Optimizer)):
            names = [k for k, v in there.items() if isinstance(v, type) and issubclass(v, torch.optim.Optimizer)]
            raise UserError(f"gossip.optimizer: '{self.optimizer}' is no torch optimiser.{did_you_mean(name, names)}")
        return there[name]

    @cached_property
    def _state(self) -> dict:
        """Its state tensors by name, of a matrix that it moved as it moves single numbers."""
        import torch

        def tried(T, slopes):
            optimizer = self._make(T, 0.1)
            (p,) = optimizer.param_groups[0]["params"]
            for slope in slopes:
                p.grad = slope
                optimizer.step()
            return p.data, {k: torch.as_tensor(v) for k, v in optimizer.state[p].items() if v is not None}

        start, slopes, why = torch.linspace(-1, 1, 6).view(2, 3), torch.linspace(2, -1, 18).view(3, 2, 3), ""
        self._make(start, 0.1)  # refuses wrong arguments in words of their own
        try:
            whole, state = tried(start, slopes)
            alone = [tried(start[i, j : j + 1], slopes[:, i, j : j + 1])[0] for i in range(2) for j in range(3)]
            same = torch.allclose(whole.flatten(), torch.cat(alone), rtol=1e-4, atol=1e-6)
            same &= all(v.ndim == 0 or v.shape == start.shape for v in state.values())
        except (TypeError, ValueError, RuntimeError) as e:
            same, why = False, f" ({e})"
        if not same:
            raise UserError(
                f"gossip.optimizer: {self.optimizer} does not treat every parameter alike and alone{why}; take an elementwise "
                "one, such as torch.optim.SGD, Adam, AdamW or RMSprop"
            )
        return state
