"""The engines: how a function of every node is run, and how its gradients get into ``G``.

``loop`` runs one node after the other.
``parallel`` is the loop with the nodes split over worker threads, as many as torch has threads, one core each.
``vmap`` runs up to ``nodes_per_call`` nodes in one batched call, with all threads.
``graph`` is ``vmap`` recorded once as a CUDA graph: its Python code does not run again.
``compile`` is the loop over a program that ``torch.compile`` makes of a node.
``auto`` stands for the fastest of those that :meth:`Engines.engines` lists, as :meth:`Engines.choose` times them.
"""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import nullcontext
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_idkd import randomness
from lightning_idkd.errors import UserError
from lightning_idkd.nodes.layout import locate_tensors, use_tensors
from lightning_idkd.nodes.node import NodeModule
from lightning_idkd.nodes.rows import Rows

S, T = TypeVar("S"), TypeVar("T")
Engine = Literal["loop", "parallel", "vmap", "graph", "compile", "auto"]
BATCHED = ("vmap", "graph")
"""Engines that run many nodes in one call."""
TRIAL_SECONDS = 0.3  # time of the step on which `choose` compares engines
WARM_UP_CALLS = 2  # calls before a recording: they load the libraries that it needs


class Engines(Rows):
    """Rows, and the engines that run a function of every node on them.

    A function gets a node and its part of the batch, and returns a tensor of the same shape for every node. If the
    result requires gradients, those of its sum replace the node's row of ``G``.

    Args:
        make, nodes, seed, device, dtype: as in :class:`~lightning_idkd.nodes.rows.Rows`.
        engine: see the top of this file; set it to one of the engines, or let :meth:`choose` set it.
        nodes_per_call: the largest number of nodes that ``vmap`` runs in one call; None for all.
        autocast: run training steps in bfloat16 where torch's autocast considers that safe.
    """

    def __init__(self, make: Callable[[], NodeModule], nodes: Sequence[int], seed: int = 0,
                 device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, engine: Engine = "loop",
                 nodes_per_call: int | None = None, autocast: bool = False):  # fmt: skip
        super().__init__(make, nodes, seed, device, dtype)
        self.engine, self.nodes_per_call, self.autocast = engine, nodes_per_call or self.n, autocast
        first = self.modules[0]
        self._places = locate_tensors(first)
        self._workers: ThreadPoolExecutor | None = None
        self._recordings: dict[tuple, int | Recording] = {}  # by function and batch shape; at first the number of calls
        self._keys = [
            self.buffers[f"{path}.key"] for path, m in first.named_modules() if isinstance(m, randomness.Dropout)
        ]
        self._dropouts = [[m for m in module.modules() if isinstance(m, randomness.Dropout)] for module in self.modules]
        self._draws: bool | None = None  # whether a step draws from the global generator; known after the first step

    def run(self, function: Callable[..., Tensor], step: int, *batch: Tensor, rows: range | None = None) -> Tensor:
        """Run ``function(node, *batch[i])`` for every node i, or for some ``rows``; returns the results [n, ...].

        Where gradients are enabled they land in ``G``. ``step`` enters the randomness of dropout and of networks that
        draw from the global generator.
        """
        self._begin_dropout(step)
        rows = range(self.n) if rows is None else rows
        enabled = torch.is_grad_enabled()

        def work(part: range) -> Tensor:
            inputs = [t[part.start : part.stop] for t in batch]
            # both settings belong to a thread, so every worker needs them again
            cast = torch.autocast(self.device.type, torch.bfloat16, self.autocast, cache_enabled=False)
            with torch.set_grad_enabled(enabled), cast:
                if self.engine == "graph":
                    return self._run_graph(function, part, *inputs)
                if self.engine == "vmap":
                    return self._run_vmap(function, part, *inputs)
                return self._run_loop(function, part, step, *inputs)

        # vmap would run the fused attentions node by node
        with sdpa_kernel(SDPBackend.MATH) if self.engine in BATCHED else nullcontext():
            parts = self._split_rows(rows)
            if self.splits and self.engine == "parallel":
                results = self._run_in_workers(work, parts)
            else:
                results = [work(part) for part in parts]
        return torch.cat(results)

    def each(self, work: Callable[[int], T]) -> list[T]:
        """Run ``work(i)``, which reads a node and changes nothing, for every row i, in the workers if there are any."""
        if not self.splits:
            return [work(i) for i in range(self.n)]
        if self._draws is False or self.engine == "vmap":
            return self._run_in_workers(work, range(self.n))
        # the network may draw random numbers, so the nodes run in order, in one worker
        return self._run_in_workers(lambda rows: [work(i) for i in rows], [range(self.n)])[0]

    def _begin_dropout(self, step: int) -> None:
        """Set every dropout layer's key for this step, and its number of calls to 0."""
        if self._keys:
            key = randomness.bits(self.seed, "dropout", torch.tensor(self.nodes), step).to(self.device)
            for k in self._keys:
                k.copy_(key)
            for layer in itertools.chain(*self._dropouts):
                layer.calls = 0

    # ------------------------------------------------------------------ workers

    @property
    def splits(self) -> bool:
        """Whether nodes are split over workers."""
        return self.engine in ("parallel", "vmap") and self.device.type == "cpu" and torch.get_num_threads() > 1

    def _split_rows(self, rows: range) -> list[range]:
        """Split ``rows`` into the parts that one call each runs.

        A part has all rows, those of a worker, or at most ``nodes_per_call``.

        Workers start after the first step, since only that step shows whether the network draws from the global
        generator, which workers would share.
        """
        count = 1
        if self.engine in BATCHED:
            count = math.ceil(len(rows) / self.nodes_per_call)
        elif self.splits and self._draws is False:
            count = min(torch.get_num_threads(), len(rows))
        ends = [rows.start + len(rows) * k // count for k in range(count + 1)]
        return [range(*pair) for pair in itertools.pairwise(ends)]

    def _run_in_workers(self, work: Callable[[S], T], parts: Iterable[S]) -> list[T]:
        """Run ``work`` for every part; an error is raised only after all parts have ended."""
        pool = self._worker_pool()
        futures = [pool.submit(work, part) for part in parts]
        wait(futures)
        return [future.result() for future in futures]

    def _worker_pool(self) -> ThreadPoolExecutor:
        """As many workers as torch has threads; each computes with a single thread."""
        count = torch.get_num_threads()
        if self._workers is None or self._workers._max_workers != count:
            self._workers = ThreadPoolExecutor(count, initializer=_use_one_thread)
            for _ in self._workers.map(time.sleep, [0.01] * count):  # starts all workers now
                pass
            torch.set_num_threads(count)  # the number that a worker sets also counts for threads started later
        return self._workers

    # ------------------------------------------------------------------ loop, parallel and compile

    def _run_loop(self, function: Callable[..., Tensor], rows: range, step: int, *batch: Tensor) -> Tensor:
        """Run one node after the other.

        While it is unknown whether the network draws from the global generators, and if it does, they are seeded for
        every node and step. Once they turn out to be unused, they return to their state before.
        """
        self.G[rows.start : rows.stop].zero_()
        call = self._call_compiled if self.engine == "compile" else self._call_eager
        results = []
        for k, i in enumerate(rows):
            if self._draws is None:
                before = self._generator_states()
            if self._draws is not False:
                torch.manual_seed(randomness.derive_seed(self.seed, "node", self.nodes[i], step))
                seeded = self._generator_states()
            results.append(call(function, i, *(t[k] for t in batch)))
            if self._draws is None:
                self._draws = not all(map(torch.equal, self._generator_states(), seeded))
                if not self._draws:
                    torch.set_rng_state(before[0])
                    for state in before[1:]:
                        torch.cuda.set_rng_state(state, self.device)
        return torch.stack(results)

    def _generator_states(self) -> list[Tensor]:
        """States of the global generators that a network may draw from."""
        return [torch.get_rng_state(), *([torch.cuda.get_rng_state(self.device)] if self.device.type == "cuda" else [])]

    def _call_eager(self, function: Callable[..., Tensor], i: int, *batch: Tensor) -> Tensor:
        out = function(self.modules[i], *batch)
        if _has_gradients(function, out):
            out.backward()
        return out.detach()

    def _call_compiled(self, function: Callable[..., Tensor], i: int, *batch: Tensor) -> Tensor:
        parameters = [slot.view(self.X[i]).detach().requires_grad_() for slot in self.layout]
        for layer in self._dropouts[0]:  # the program is compiled from the first node
            layer.calls = 0
        try:
            out = self._program(function, parameters, [b[i] for b in self.buffers.values()], *batch)
        except RuntimeError as e:
            if not type(e).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise
            raise UserError(
                f"run.engine: torch.compile fails for this network or machine ({str(e).splitlines()[0]})"
            ) from e
        if _has_gradients(function, out):
            self._store_gradients(i, parameters, out)
        return out.detach()

    @functools.cached_property
    def _program(self) -> Callable[..., Tensor]:
        """``function(node, *batch)`` with parameters and buffers as arguments, compiled once for all nodes."""
        node = _NodeFunction(self.modules[0])

        def run(
            function: Callable[..., Tensor], parameters: list[Tensor], buffers: list[Tensor], *batch: Tensor
        ) -> Tensor:
            names = itertools.chain((slot.name for slot in self.layout), self.buffers)
            tensors = {f"node.{name}": t for name, t in zip(names, parameters + buffers, strict=True)}
            return torch.func.functional_call(node, tensors, (function, *batch))

        return torch.compile(run, dynamic=False, options={"fallback_random": True})

    # ------------------------------------------------------------------ vmap and graph

    def _run_vmap(self, function: Callable[..., Tensor], rows: range, x: Tensor, *more: Tensor) -> Tensor:
        """Run all ``rows`` in one batched call."""
        block, module, dim = slice(rows.start, rows.stop), self.modules[rows.start], 0
        if self.device.type == "cpu" and x.dim() == 5:
            # the channels of all nodes lie side by side, channels-last, as in the grouped convolution that vmap calls
            dim = 1
            x = x.movedim(0, 1).flatten(1, 2).contiguous(memory_format=torch.channels_last)
            x = x.unflatten(1, (len(rows), -1))
        parameters = [
            (slot.copy if dim else slot.view)(self.X[block]).detach().requires_grad_() for slot in self.layout
        ]

        def forward(parameters: list[Tensor], buffers: list[Tensor], *batch: Tensor) -> Tensor:
            with use_tensors(module, self._places, parameters + buffers):
                return function(module, *batch)

        # no warning for operations that vmap runs node by node: they are slow, and `choose` measures that
        torch._C._functorch._set_vmap_fallback_warning_enabled(False)
        try:
            run = torch.vmap(forward, in_dims=(0, 0, dim, *(0 for _ in more)), randomness="error")
            results = run(parameters, [b[block] for b in self.buffers.values()], x, *more)
        except RuntimeError as e:
            if "random" not in str(e):
                raise
            raise UserError("run.engine: vmap cannot run a network that draws from the global generator; "
                            "use torch.nn.Dropout (which it can) or run.engine: loop") from e  # fmt: skip
        if _has_gradients(function, results):
            # a node's result depends on its own row alone, so the gradient of the sum holds every node's gradient
            self._store_gradients(block, parameters, results.sum())
        elif torch.is_grad_enabled():
            self.G[block] = 0
        return results.detach()

    def _run_graph(self, function: Callable[..., Tensor], rows: range, *batch: Tensor) -> Tensor:
        """Run ``vmap`` as a CUDA graph, which the third call with a batch of this shape records."""
        key = function, rows, self.autocast, torch.is_grad_enabled(), *((t.shape, t.dtype) for t in batch)
        recording = self._recordings.setdefault(key, 0)
        if recording == WARM_UP_CALLS:
            try:
                recording = Recording(functools.partial(self._run_vmap, function, rows), batch)
            except RuntimeError as e:
                cause = str(e).splitlines()[0]
                raise UserError(f"run.engine: graph cannot record this network ({cause}); use vmap or loop") from e
        if isinstance(recording, int):
            self._recordings[key] = recording + 1
            return self._run_vmap(function, rows, *batch)
        self._recordings[key] = recording
        return recording(*batch)

    def _store_gradients(self, block: int | slice, parameters: list[Tensor], out: Tensor) -> None:
        """Write the gradients of ``out`` to a row or rows of ``G``; 0 for parameters that ``out`` does not use."""
        gradients = torch.autograd.grad(out, parameters, materialize_grads=True)
        torch.cat([slot.flatten(g) for slot, g in zip(self.layout, gradients, strict=True)], -1, out=self.G[block])

    # ------------------------------------------------------------------ the choice

    def engines(self) -> list[Engine]:
        """The engines among which ``auto`` chooses.

        ``vmap`` is left out for a single node, for which it is a slower loop, and ``graph`` for the user's own network
        or loss, which may run Python code that a recording would leave out.
        """
        if self.device.type == "cpu":
            return ["loop", "parallel", *(["vmap"] if self.nodes_per_call > 1 else [])]
        node = self.modules[0]
        built_in = type(node) is NodeModule and type(node.network).__module__.startswith("lightning_idkd.")
        return ["loop", "vmap", *(["graph"] if built_in else [])]

    def choose(
        self, x: Tensor, y: Tensor, engines: Sequence[str], threads: Sequence[int], *more: Tensor,
        casts: Sequence[bool] | None = None
    ) -> tuple[str, int, bool]:  # fmt: skip
        """Set the engine, the thread count and ``autocast`` that take the least time for a step on x, y and more, and
        return them; ``casts`` are the values of ``autocast`` to time, None for that which is set.

        Rows, gradients and buffers stay as they are. With many nodes, only as many are timed as one thread runs in a
        third of a second.

        Raises:
            UserError, RuntimeError: none of them can run this network; the error is that of the first.
        """
        kept_recordings, self._recordings = self._recordings, {}
        casts = [self.autocast] if casts is None else casts
        candidates = [(engine, count, cast) for count in threads for engine in engines for cast in casts]
        if len(engines) > 1:
            candidates = [c for c in candidates if c[:2] != ("parallel", 1)]  # which is a slower loop
        seconds: dict[tuple[str, int, bool], float] = {}
        failure: Exception | None = None
        with self.preserve_state():
            torch.set_num_threads(1)
            self.engine = "loop"
            one = min(self._time_step(range(1), x, y, *more) for _ in range(2))
            rows = range(min(self.n, max(2 * max(threads), math.ceil(TRIAL_SECONDS / one))))
            for self.engine, count, self.autocast in candidates:
                torch.set_num_threads(count)
                try:
                    for _ in range(WARM_UP_CALLS if self.engine == "graph" else 1):
                        self._time_step(rows, x, y, *more)
                    fastest = min(self._time_step(rows, x, y, *more) for _ in range(2))
                    seconds[self.engine, count, self.autocast] = fastest
                except (UserError, RuntimeError) as e:
                    # this engine cannot run the network, which draws random numbers or whose control flow depends on
                    # data; or one of its layers does not take bfloat16
                    failure = failure if seconds or failure else e
        self._recordings = kept_recordings
        if not seconds:
            raise failure
        self.engine, count, self.autocast = min(seconds, key=seconds.get)
        torch.set_num_threads(count)
        return self.engine, count, self.autocast

    def _time_step(self, rows: range, *batch: Tensor) -> float:
        """Seconds that a training step of these rows takes."""
        start = time.perf_counter()
        self.run(training_loss, 0, *(t[: len(rows)] for t in batch), rows=rows)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start


class Recording:
    """A CUDA graph of ``run`` on batches of one shape; a call copies its batch in and replays the graph."""

    def __init__(self, run: Callable[..., Tensor], batch: Sequence[Tensor]):
        self.batch, self.graph = [t.clone() for t in batch], torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.result = run(*self.batch)

    def __call__(self, *batch: Tensor) -> Tensor:
        for input, t in zip(self.batch, batch, strict=True):
            input.copy_(t)
        self.graph.replay()
        return self.result.clone()


class _NodeFunction(nn.Module):
    """A function of a node as a forward pass, the form that ``functional_call`` needs."""

    def __init__(self, node: NodeModule):
        super().__init__()
        self.node = node

    def forward(self, function: Callable[..., Tensor], *batch: Tensor) -> Tensor:
        return function(self.node, *batch)


def training_loss(node: NodeModule, *batch: Tensor) -> Tensor:
    """The node's loss on its batch: the function of a training step."""
    return node.training_step(batch, 0)


def _has_gradients(function: Callable[..., Tensor], out: Tensor) -> bool:
    """Whether ``out`` requires gradients; not if they are disabled, or if features use frozen parameters alone."""
    if function is training_loss and torch.is_grad_enabled() and not out.requires_grad:
        raise UserError("node.module: the loss depends on no trained parameter; allowed: one that does")
    return out.requires_grad


def _use_one_thread() -> None:
    """Limit this thread to itself, whatever number of threads is set for others."""
    torch.get_num_threads()  # a thread's first query adopts the global number, so it comes before the next line
    torch.set_num_threads(1)
