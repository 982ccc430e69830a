"""n nodes as the rows of one matrix.

``X`` [n, P] holds the parameters and ``G`` [n, P] the gradients of the nodes that live in this process; every node's
``NodeModule`` is a set of views into its row, so a rule may rewrite ``X`` in place and the networks follow. Norm buffers
lie stacked the same way. Views are cut silently by ``.to()``, ``.double()`` and the like: never call these on a node.

Parameters that are frozen (``requires_grad = False`` when the nodes are made) lie outside the rows, one copy for all nodes. So no
rule moves them, and no message carries them.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_idkd import randomness
from lightning_idkd.errors import UserError
from lightning_idkd.labels import Outputs
from lightning_idkd.models.norms import GroupNorm
from lightning_idkd.models.vmap_layers import BatchNorm2d, Conv2d, MaxPool2d
from lightning_idkd.nodes.layout import Slot, begin_training, evaluating, holding, places, trained
from lightning_idkd.nodes.node import NodeModule

S, T = TypeVar("S"), TypeVar("T")
Engine = Literal["loop", "parallel", "vmap", "graph", "compile", "auto"]
BATCHED = ("vmap", "graph")
"""Engines that take many nodes in one call."""
ABREAST = {nn.Conv2d: Conv2d, nn.MaxPool2d: MaxPool2d, nn.GroupNorm: GroupNorm, nn.BatchNorm2d: BatchNorm2d}
"""Layers of torch, and the same with what ``vmap`` needs to be fast."""
TRIAL = 0.3  # seconds of a step that engines are chosen by
TOGETHER = 64  # nodes that a CUDA device asks at once
WARM = 2  # calls before one is recorded: they load what it needs


class _Form(nn.Module):
    """Any function of a node as a forward pass, which is what ``functional_call`` can call."""

    def __init__(self, node: NodeModule):
        super().__init__()
        self.node = node

    def forward(self, of: Callable[..., Tensor], *batch: Tensor) -> Tensor:
        return of(self.node, *batch)


def _loss(node: NodeModule, *batch: Tensor) -> Tensor:
    return node.training_step(batch, 0)


def _features(node: NodeModule, x: Tensor) -> Tensor:
    return node.network.features(x)


def _along(node: NodeModule, x: Tensor, V: Tensor) -> Tensor:
    return (V * node.network.features(x)).sum()


def _descends(of: Callable[..., Tensor], out: Tensor) -> bool:
    """Whether ``out`` has gradients to take: not where they are disabled, or features come from frozen parameters alone."""
    if of is _loss and torch.is_grad_enabled() and not out.requires_grad:
        raise UserError("node.module: the loss depends on no trained parameter; allowed: one that does")
    return out.requires_grad


def _compute_alone() -> None:
    """Let this thread compute without others, whatever is set for later ones."""
    torch.get_num_threads()  # the first question takes over what is set for all
    torch.set_num_threads(1)


class Recording:
    """What ``run`` does on a CUDA device with a batch of this shape, to be done again without its Python code."""

    def __init__(self, run: Callable[..., Tensor], batch: Sequence[Tensor]):
        self.batch, self.graph = [t.clone() for t in batch], torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.found = run(*self.batch)

    def __call__(self, *batch: Tensor) -> Tensor:
        for mine, t in zip(self.batch, batch, strict=True):
            mine.copy_(t)
        self.graph.replay()
        return self.found.clone()


class NodeStack:
    """The nodes of one process as rows.

    Args:
        make: builds one node; called once, inside a generator fork seeded from ``seed``, so all nodes start equal.
        nodes: their numbers in the graph, ascending.
        dtype: float32 or float64, of everything that floats.
        engine: ``loop`` runs a node after the other; ``parallel`` the same, the nodes split over as many workers as torch has
            threads, a core each; ``vmap`` up to ``abreast`` nodes in one batched call, with all threads; ``graph`` the same,
            recorded once as a CUDA graph: its Python code is not run again; ``compile`` the loop over what ``torch.compile``
            makes of a node. ``auto``: see :meth:`choose`.
        abreast: None for all.
        autocast: training steps of the networks in bfloat16, where torch holds that to be sound.
    """

    X: Tensor
    """Trained parameters [n, P]."""
    G: Tensor
    """Gradients [n, P] of the last :meth:`step`."""
    frozen: dict[str, Tensor]
    """Frozen parameters by name, the same for all nodes."""

    def __init__(self, make: Callable[[], NodeModule], nodes: Sequence[int], seed: int = 0,
                 device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, engine: Engine = "loop",
                 abreast: int | None = None, autocast: bool = False):  # fmt: skip
        self.nodes, self.seed, self.device, self.engine = list(nodes), seed, torch.device(device), engine
        with randomness.forked(seed, "initialisation"):
            first = randomness.replace_dropout(make()).to(self.device, dtype)
        for layer in first.modules():
            layer.__class__ = ABREAST.get(type(layer), type(layer))
        begin_training(first)
        self.layout, offset = [], 0
        for name, p in trained(first).items():
            self.layout.append(Slot(name, tuple(p.shape), offset))
            offset += p.numel()
        if not offset:
            count = sum(p.numel() for p in first.parameters())
            raise UserError(f"node.network: all {count:,} parameters are frozen (requires_grad is False); leave some to train")
        row = torch.empty(offset, dtype=dtype, device=self.device)
        for slot, p in zip(self.layout, trained(first).values(), strict=True):
            slot.view(row).copy_(p.detach())
        still = {k: p for k, p in first.named_parameters() if not p.requires_grad}
        for p in still.values():  # as rows have them
            p.data = p.data.contiguous(memory_format=torch.channels_last) if p.dim() == 4 else p.data
        self.frozen = {k: p.detach() for k, p in still.items()}
        self.X = row.expand(len(self.nodes), -1).clone()
        self.G = torch.zeros_like(self.X)
        self.buffers = {k: torch.stack([b] * len(self.nodes)) for k, b in first.named_buffers()}
        shared = ({id(p): nn.Parameter(p.detach(), requires_grad=False) for p in still.values()} for _ in self.nodes[1:])
        self.modules = [first, *(copy.deepcopy(first, memo) for memo in shared)]
        for i, module in enumerate(self.modules):
            self._bind(module, self.X[i], {k: b[i] for k, b in self.buffers.items()}, self.G[i])
        self.abreast, self.autocast = abreast or len(self.nodes), autocast
        self._places = places(first)
        self._workers: ThreadPoolExecutor | None = None
        self._recordings: dict[tuple, int | Recording] = {}  # by what was called on what; so far only how often
        self._keys = [self.buffers[f"{k}.key"] for k, m in first.named_modules() if isinstance(m, randomness.Dropout)]
        self._dropouts = [[m for m in module.modules() if isinstance(m, randomness.Dropout)] for module in self.modules]
        self._draws: bool | None = None  # does a training step draw from the global generator? known after the first

    @property
    def n(self) -> int:
        """Rows held here."""
        return len(self.nodes)

    @property
    def parameters(self) -> int:
        """P, trained parameters a node."""
        return self.X.shape[1]

    @property
    def frozen_parameters(self) -> int:
        """Frozen parameters a node."""
        return sum(t.numel() for t in self.frozen.values())

    def describe(self) -> list[dict]:
        """The row layout (name, shape, offset) for the checkpoint."""
        return [asdict(slot) | {"shape": list(slot.shape)} for slot in self.layout]

    def restore(self, state: dict, rows: slice = slice(None)) -> None:
        """Take rows, norm buffers and frozen parameters from a checkpoint, of which these nodes are the ``rows``.

        Raises:
            UserError: it is of another network.
        """
        frozen = state.get("frozen", {})
        shapes = [{k: t.shape for k, t in values.items()} for values in (frozen, self.frozen)]
        if state["layout"] != self.describe() or shapes[0] != shapes[1]:
            raise UserError("the checkpoint holds another network: parameters have other names or shapes, or others are frozen")
        self.X.copy_(state["X"][rows])
        for k, buffer in self.buffers.items():
            buffer.copy_(state["buffers"][k][rows])
        for k, t in self.frozen.items():
            t.copy_(frozen[k])

    def _bind(self, module: NodeModule, row: Tensor, buffers: dict[str, Tensor], grad: Tensor | None = None) -> NodeModule:
        for slot in self.layout:
            p = module.get_parameter(slot.name)
            p.data = slot.view(row)
            p.grad = None if grad is None else slot.view(grad)
        for name, b in buffers.items():
            owner, _, leaf = name.rpartition(".")
            module.get_submodule(owner)._buffers[leaf] = b
        return module

    def views_intact(self) -> bool:
        """Whether every parameter and buffer of every node still lies in its row, and frozen ones in their one copy."""
        return all(
            p.data_ptr() == t.data_ptr() and p.stride() == t.stride()
            for i, module in enumerate(self.modules)
            for p, t in [
                *((module.get_parameter(slot.name), slot.view(self.X[i])) for slot in self.layout),
                *((module.get_parameter(name), t) for name, t in self.frozen.items()),
            ]
        ) and all(
            b.data_ptr() == self.buffers[k][i].data_ptr()
            for i, module in enumerate(self.modules)
            for k, b in module.named_buffers()
        )

    # ------------------------------------------------------------------ training

    def step(self, x: Tensor, y: Tensor, step: int, *more: Tensor) -> Tensor:
        """Every node's loss [n] on its batch ``x`` [n, b, C, H, W], ``y`` [n, b, k] and whatever ``more`` [n, b] its loss takes;
        gradients land in ``G``."""
        return self._run(_loss, step, x, y, *more)

    def _run(self, of: Callable[..., Tensor], step: int, *batch: Tensor, rows: range | None = None) -> Tensor:
        """``of(node, *batch)`` of every node [n, ...], or of some rows; its gradients land in ``G`` where these are enabled."""
        if self._keys:
            key = randomness.bits(self.seed, "dropout", torch.tensor(self.nodes), step).to(self.device)
            for k in self._keys:
                k.copy_(key)
            for layer in itertools.chain(*self._dropouts):
                layer.calls = 0
        rows = range(self.n) if rows is None else rows
        enabled = torch.is_grad_enabled()

        def work(here: range) -> Tensor:
            cast = torch.autocast(self.device.type, torch.bfloat16, self.autocast, cache_enabled=False)
            with torch.set_grad_enabled(enabled), cast:  # which are a thread's own
                parts = [part[here.start : here.stop] for part in batch]
                if self.engine == "graph":
                    return self._recorded(of, here, *parts)
                return self._vmap(of, here, *parts) if self.engine == "vmap" else self._loop(of, here, step, *parts)

        # the fused attentions would run node by node
        with sdpa_kernel(SDPBackend.MATH) if self.engine in BATCHED else nullcontext():
            parts = self._split(rows)
            found = self._by_workers(work, parts) if self.splits and self.engine == "parallel" else [work(part) for part in parts]
        return torch.cat(found)

    @property
    def splits(self) -> bool:
        """Whether nodes are split over workers."""
        return self.engine in ("parallel", "vmap") and self.device.type == "cpu" and torch.get_num_threads() > 1

    def each(self, work: Callable[[int], T]) -> list[T]:
        """``work(i)`` of every row i, by the workers where there are some; for what reads a node and changes nothing."""
        if not self.splits:
            return [work(i) for i in range(self.n)]
        if self._draws is False or self.engine == "vmap":
            return self._by_workers(work, range(self.n))
        return self._by_workers(lambda rows: [work(i) for i in rows], [range(self.n)])[0]  # it may draw, so one after the other

    def _by_workers(self, work: Callable[[S], T], parts: Iterable[S]) -> list[T]:
        """``work`` of every part; where it fails for one, all have come to their end."""
        pool = self._pool()
        futures = [pool.submit(work, part) for part in parts]
        wait(futures)
        return [future.result() for future in futures]

    def _split(self, rows: range) -> list[range]:
        """The rows of every call: all of them, those of a worker, or as many as ``vmap`` shall take at once.

        Only a first step shows whether the network draws from the global generator, which workers would share.
        """
        count = 1
        if self.engine in BATCHED:
            count = math.ceil(len(rows) / self.abreast)
        elif self.splits and self._draws is False:
            count = min(torch.get_num_threads(), len(rows))
        ends = [rows.start + len(rows) * k // count for k in range(count + 1)]
        return [range(*pair) for pair in itertools.pairwise(ends)]

    def _pool(self) -> ThreadPoolExecutor:
        """As many workers as torch has threads, each of which computes in one."""
        count = torch.get_num_threads()
        if self._workers is None or self._workers._max_workers != count:
            self._workers = ThreadPoolExecutor(count, initializer=_compute_alone)
            for _ in self._workers.map(time.sleep, [0.01] * count):  # all start now
                pass
            torch.set_num_threads(count)  # what a worker sets counts for threads to come
        return self._workers

    def _loop(self, of: Callable[..., Tensor], rows: range, step: int, *batch: Tensor) -> Tensor:
        self.G[rows.start : rows.stop].zero_()
        call = self._compiled if self.engine == "compile" else self._eager
        found = []
        for at, i in enumerate(rows):
            if self._draws is None:
                before = self._generators()
            if self._draws is not False:
                torch.manual_seed(randomness.seed_of(self.seed, "node", self.nodes[i], step))
                seeded = self._generators()
            found.append(call(of, i, *(part[at] for part in batch)))
            if self._draws is None:
                self._draws = not all(map(torch.equal, self._generators(), seeded))
                if not self._draws:
                    torch.set_rng_state(before[0])
                    for state in before[1:]:
                        torch.cuda.set_rng_state(state, self.device)
        return torch.stack(found)

    def _generators(self) -> list[Tensor]:
        """States of the global generators that a network may draw from."""
        return [torch.get_rng_state(), *([torch.cuda.get_rng_state(self.device)] if self.device.type == "cuda" else [])]

    def _eager(self, of: Callable[..., Tensor], i: int, *batch: Tensor) -> Tensor:
        out = of(self.modules[i], *batch)
        if _descends(of, out):
            out.backward()
        return out.detach()

    def _compiled(self, of: Callable[..., Tensor], i: int, *batch: Tensor) -> Tensor:
        leaves = [slot.view(self.X[i]).detach().requires_grad_() for slot in self.layout]
        for layer in self._dropouts[0]:  # the program is the first node's
            layer.calls = 0
        try:
            out = self._program(of, leaves, [b[i] for b in self.buffers.values()], *batch)
        except RuntimeError as e:
            if not type(e).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise
            raise UserError(f"run.engine: torch.compile fails for this network or machine ({str(e).splitlines()[0]})") from e
        if _descends(of, out):
            self._take(i, leaves, out)
        return out.detach()

    @functools.cached_property
    def _program(self) -> Callable[..., Tensor]:
        """``of(node, *batch)`` of parameters and buffers, compiled once for all nodes."""
        form = _Form(self.modules[0])

        def run(of: Callable[..., Tensor], leaves: list[Tensor], buffers: list[Tensor], *batch: Tensor) -> Tensor:
            names = itertools.chain((slot.name for slot in self.layout), self.buffers)
            held = {f"node.{name}": t for name, t in zip(names, leaves + buffers, strict=True)}
            return torch.func.functional_call(form, held, (of, *batch))

        return torch.compile(run, dynamic=False, options={"fallback_random": True})

    def _take(self, here: int | slice, leaves: list[Tensor], out: Tensor) -> None:
        """The gradients of ``out`` to their places in ``G``; features leave out the head."""
        gradients = torch.autograd.grad(out, leaves, materialize_grads=True)
        torch.cat([slot.flat(g) for slot, g in zip(self.layout, gradients, strict=True)], -1, out=self.G[here])

    def _vmap(self, of: Callable[..., Tensor], rows: range, x: Tensor, *more: Tensor) -> Tensor:
        here, module, at = slice(rows.start, rows.stop), self.modules[rows.start], 0
        if self.device.type == "cpu":  # the nodes' channels side by side, channels-last, as a grouped convolution has them
            at, x = 1, x.movedim(0, 1).flatten(1, 2).contiguous(memory_format=torch.channels_last).unflatten(1, (len(rows), -1))
        leaves = [(slot.copy if at else slot.view)(self.X[here]).detach().requires_grad_() for slot in self.layout]

        def forward(leaves: list[Tensor], buffers: list[Tensor], *batch: Tensor) -> Tensor:
            with holding(module, self._places, leaves + buffers):
                return of(module, *batch)

        torch._C._functorch._set_vmap_fallback_warning_enabled(False)  # what it runs node by node is slow, as `choose` finds out
        try:
            run = torch.vmap(forward, in_dims=(0, 0, at, *(0 for _ in more)), randomness="error")
            found = run(leaves, [b[here] for b in self.buffers.values()], x, *more)
        except RuntimeError as e:
            if "random" not in str(e):
                raise
            raise UserError("run.engine: vmap cannot run a network that draws from the global generator; "
                            "use torch.nn.Dropout (which it can) or run.engine: loop") from e  # fmt: skip
        if _descends(of, found):
            self._take(here, leaves, found.sum())  # rows do not meet in the loss: the gradient of the sum is every node's own
        elif torch.is_grad_enabled():
            self.G[here] = 0
        return found.detach()

    def _recorded(self, of: Callable[..., Tensor], rows: range, *batch: Tensor) -> Tensor:
        """The same as a CUDA graph, recorded when this is asked for the third time for such a batch."""
        key = of, rows, self.autocast, torch.is_grad_enabled(), *((t.shape, t.dtype) for t in batch)
        known = self._recordings.setdefault(key, 0)
        if known == WARM:
            try:
                known = Recording(functools.partial(self._vmap, of, rows), batch)
            except RuntimeError as e:
                said = str(e).splitlines()[0]
                raise UserError(f"run.engine: graph cannot record this network ({said}); use vmap or loop") from e
        self._recordings[key] = known + 1 if isinstance(known, int) else known
        return self._vmap(of, rows, *batch) if isinstance(known, int) else known(*batch)

    @contextmanager
    def standing_on(self, X: Tensor) -> Iterator[None]:
        """Inside, the nodes' parameters are ``X`` [n, P]."""
        if X is self.X:
            yield
            return
        kept = self.X.clone()
        self.X.copy_(X)
        try:
            yield
        finally:
            self.X.copy_(kept)

    @contextmanager
    def trying(self, X: Tensor) -> Iterator[None]:
        """Inside, the nodes' parameters are ``X`` [n, P]; afterwards rows, ``G`` and norm buffers are as they were."""
        kept_G, kept = self.G.clone(), {k: b.clone() for k, b in self.buffers.items()}
        try:
            with self.standing_on(X):
                yield
        finally:  # also where :meth:`choose` tries an engine that fails half way
            self.G.copy_(kept_G)
            for k, b in self.buffers.items():
                b.copy_(kept[k])

    def gradient(self, X: Tensor, x: Tensor, y: Tensor, step: int, *more: Tensor) -> Tensor:
        """Gradients [n, P] at other parameters ``X`` on the same batch; rows, ``G`` and norm buffers stay as they are."""
        with self.trying(X):
            self.step(x, y, step, *more)
            return self.G.clone()

    def features(self, X: Tensor, x: Tensor, step: int) -> Tensor:
        """Features [n, b, F] of ``x`` at parameters ``X``, in training mode; rows, ``G`` and norm buffers stay as they are."""
        with self.trying(X), torch.no_grad():
            return self._run(_features, step, x)

    def pull_back(self, X: Tensor, V: Tensor, x: Tensor, step: int) -> Tensor:
        """Gradients [n, P] at ``X`` of the sum of ``V`` [n, b, F] times those features: a loss whose derivative by them is
        ``V``; rows, ``G`` and norm buffers stay as they are."""
        with self.trying(X):
            self._run(_along, step, x, V)
            return self.G.clone()

    def engines(self) -> list[Engine]:
        """Those among which ``auto`` chooses: ``vmap`` of one node is a slower loop, and a network or loss of the user's may run
        code that a recording would leave out."""
        if self.device.type == "cpu":
            return ["loop", "parallel", *(["vmap"] if self.abreast > 1 else [])]
        node = self.modules[0]
        ours = type(node) is NodeModule and type(node.network).__module__.startswith("lightning_idkd.")
        return ["loop", "vmap", *(["graph"] if ours else [])]

    def choose(self, x: Tensor, y: Tensor, engines: Sequence[str], threads: Sequence[int]) -> tuple[str, int]:
        """The engine and thread count that take least time for a step on this batch; rows, gradients and buffers stay.

        Of many nodes as many are tried as one thread runs in a third of a second.
        """
        kept, self._recordings = self._recordings, {}
        tried = [(e, count) for count in threads for e in engines if (e, count) != ("parallel", 1) or len(engines) == 1]
        seconds: dict[tuple[str, int], float] = {}
        with self.trying(self.X):
            torch.set_num_threads(1)
            self.engine = "loop"
            one = min(self._seconds(range(1), x, y) for _ in range(2))
            rows = range(min(self.n, max(2 * max(threads), math.ceil(TRIAL / one))))
            for self.engine, count in tried:
                torch.set_num_threads(count)
                try:
                    for _ in range(WARM if self.engine == "graph" else 1):
                        self._seconds(rows, x, y)
                    seconds[self.engine, count] = min(self._seconds(rows, x, y) for _ in range(2))
                except (UserError, RuntimeError):
                    if len(engines) == 1:  # the one engine asked for cannot: it says why
                        raise
                    # this network cannot be batched (random draws, data-dependent control flow)
        self._recordings = kept
        self.engine, count = min(seconds, key=seconds.get)
        torch.set_num_threads(count)
        return self.engine, count

    def _seconds(self, rows: range, x: Tensor, y: Tensor) -> float:
        """What a step of these rows takes."""
        start = time.perf_counter()
        self._run(_loss, 0, x[: len(rows)], y[: len(rows)], rows=rows)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    # ------------------------------------------------------------------ prediction

    @property
    def passes(self) -> int:
        """Times that :meth:`answers` goes through the batches."""
        return self.n if self.device.type == "cpu" or self.engine not in BATCHED else math.ceil(self.n / TOGETHER)

    def answers(self, batches: Callable[[], Iterable[Tensor]], use: Callable[[Outputs], T]) -> list[T]:
        """``use`` of every node's outputs in evaluation mode over the same ``batches``, concatenated in order."""
        if self.device.type == "cpu" or self.engine not in BATCHED:
            return self.each(lambda i: use(run_network(self.modules[i], batches())))
        parts = [range(start, min(start + TOGETHER, self.n)) for start in range(0, self.n, TOGETHER)]
        return [use(outputs) for part in parts for outputs in self._outputs(part, batches())]

    @torch.no_grad()
    def _outputs(self, rows: range, batches: Iterable[Tensor]) -> Iterator[Outputs]:
        """Those of some nodes, which see every batch in one call."""
        here, module, heads = slice(rows.start, rows.stop), self.modules[rows.start], []

        def forward(parameters: list[Tensor], buffers: list[Tensor], x: Tensor) -> list[Tensor]:
            with holding(module, self._places, parameters + buffers):
                found = module.outputs(x)
            heads[:] = [name for name, part in module.named_modules() if part is found.head]
            return [found.logits] if found.features is None else [found.logits, found.features]

        held = [slot.view(self.X[here]) for slot in self.layout], [b[here] for b in self.buffers.values()]
        with evaluating(module), sdpa_kernel(SDPBackend.MATH):
            found = [torch.vmap(forward)(*held, x.expand(len(rows), *x.shape)) for x in batches]
        whole = [torch.cat(parts, 1) for parts in zip(*found, strict=True)]
        for at, i in enumerate(rows):
            features = whole[1][at] if len(whole) > 1 else None
            yield Outputs(whole[0][at], features, self.modules[i].get_submodule(heads[0]) if heads else None)

    def model(self, row: Tensor, buffers: dict[str, Tensor]) -> NodeModule:
        """A separate node that stands on ``row`` [P] and ``buffers``, e.g. the consensus model."""
        return self._bind(copy.deepcopy(self.modules[0]), row, buffers).eval()


@torch.no_grad()
def run_network(module: NodeModule, batches: Iterable[Tensor]) -> Outputs:
    """Outputs of one node in evaluation mode over ``batches`` [B, C, H, W], concatenated in order."""
    with evaluating(module):
        return Outputs.cat([module.outputs(x) for x in batches])


def mean_buffers(stacked: dict[str, Tensor]) -> dict[str, Tensor]:
    """Buffers of the consensus model: floating ones averaged over the nodes, counters taken from the first."""
    return {k: b.mean(0) if b.is_floating_point() else b[0].clone() for k, b in stacked.items()}
