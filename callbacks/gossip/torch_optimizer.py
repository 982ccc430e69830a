"""An optimiser of torch as the local step."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from types import SimpleNamespace
from typing import ClassVar

from lightning_idkd.callback import Context, Gossip
from lightning_idkd.errors import UserError, did_you_mean
from lightning_idkd.graph import Graph

TYPE_CHECKING = False  # by a name of ours: jsonargparse runs the block of typing's, which would load torch
if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer


class LocalOptimizer(Gossip):
    """Adapts with an optimiser of torch, then combines: X <- W step(X). The optimiser's state stays at the nodes.

    Args:
        optimizer: Import path of an elementwise optimiser, which updates every parameter by itself and by the same
            rule: torch.optim.SGD, Adam, RMSprop, ...
        arguments: The optimiser's arguments except the learning rate, which is train.lr.
    """

    assumes: ClassVar = ("everyone",)  # the optimiser counts steps for all nodes at once

    def __init__(self, optimizer: str = "torch.optim.AdamW", arguments: dict | None = None):
        self.optimizer, self.arguments = optimizer, arguments or {}
        if "lr" in self.arguments:
            raise UserError("gossip.arguments: lr is given; the learning rate is train.lr, with train.schedule")

    def check(self, graph: Graph) -> None:
        super().check(graph)
        self._state  # noqa: B018 (computing it checks the optimiser)

    @property
    def buffers(self) -> dict[str, int | None]:  # ty: ignore[incompatible-property-override]  (nothing assigns it)
        return {"steps": 1} | {k: 1 if v.ndim == 0 else None for k, v in self._state.items()}

    def update(self, X: Tensor, G: Tensor, state: SimpleNamespace, ctx: Context) -> Tensor:
        import torch

        optimizer = self._make(X, ctx.lr)
        (p,) = optimizer.param_groups[0]["params"]
        p.grad = G
        if state.steps[0, 0]:  # before the first step the optimiser creates its own state
            for k, v in self._state.items():
                stored = getattr(state, k)
                optimizer.state[p][k] = stored[0, 0].to(v) if v.ndim == 0 else stored.clone()
        optimizer.step()
        for k in self._state:
            setattr(state, k, torch.as_tensor(optimizer.state[p][k]).to(X).expand_as(getattr(state, k)))
        state.steps = state.steps + 1
        return self.combine(p.data, state, ctx)

    def _make(self, X: Tensor, lr: float) -> Optimizer:
        import torch

        cls = self._class
        try:
            return cls([torch.nn.Parameter(X.clone())], lr=lr, **self.arguments)
        except (TypeError, ValueError) as e:
            raise UserError(f"gossip.arguments: {self.optimizer} does not take {self.arguments} ({e})") from e

    @cached_property
    def _class(self) -> type:
        from importlib import import_module

        import torch

        module, _, name = self.optimizer.rpartition(".")
        try:
            members = vars(import_module(module))
        except (ImportError, ValueError) as e:
            hint = "give a path such as torch.optim.AdamW"
            raise UserError(f"gossip.optimizer: cannot import '{module}' ({e}); {hint}") from e
        if not (isinstance(members.get(name), type) and issubclass(members[name], torch.optim.Optimizer)):
            names = [k for k, v in members.items() if isinstance(v, type) and issubclass(v, torch.optim.Optimizer)]
            hint = did_you_mean(name, names)
            raise UserError(f"gossip.optimizer: '{self.optimizer}' is not an optimiser of torch.{hint}")
        return members[name]

    @cached_property
    def _state(self) -> dict:
        """The optimiser's state tensors by name, from a trial on a small matrix.

        The trial refuses an optimiser that moves a matrix differently from its single numbers.
        """
        import torch

        def run_steps(T: Tensor, gradients: Iterable[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            optimizer = self._make(T, 0.1)
            (p,) = optimizer.param_groups[0]["params"]
            for gradient in gradients:
                p.grad = gradient
                optimizer.step()
            return p.data, {k: torch.as_tensor(v) for k, v in optimizer.state[p].items() if v is not None}

        start, gradients, why = torch.linspace(-1, 1, 6).view(2, 3), torch.linspace(2, -1, 18).view(3, 2, 3), ""
        self._make(start, 0.1)  # reports wrong arguments by a message of its own
        try:
            whole, state = run_steps(start, gradients)
            numbers = zip(start.view(6, 1), gradients.view(3, 6, 1).unbind(1), strict=True)
            single = [run_steps(number, its_gradients)[0] for number, its_gradients in numbers]
            elementwise = torch.allclose(whole.flatten(), torch.cat(single), rtol=1e-4, atol=1e-6)
            elementwise &= all(v.ndim == 0 or v.shape == start.shape for v in state.values())
        except (TypeError, ValueError, RuntimeError) as e:
            elementwise, why = False, f" ({e})"
        if not elementwise:
            raise UserError(
                f"gossip.optimizer: {self.optimizer} does not update every parameter by itself and by the same "
                f"rule{why}; take an elementwise optimiser, such as torch.optim.SGD, Adam, AdamW or RMSprop"
            )
        return state
