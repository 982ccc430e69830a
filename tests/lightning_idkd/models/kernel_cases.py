"""The kernels beside torch's operations in float64: on a CUDA device where there is one, else in Triton's interpreter.

Run as a program, since the interpreter must be chosen before Triton is loaded; prints relative errors by case as JSON.
"""

import json
import os

import torch
import torch.nn.functional as F

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
CONVOLUTIONS = {  # nodes, images, channels, to, side, kernel, stride, padding
    "3x3": (2, 3, 16, 16, 8, 3, 1, 1),
    "stem": (2, 3, 3, 16, 8, 3, 1, 1),
    "stride 2": (2, 2, 16, 32, 8, 3, 2, 1),
    "stride 2, odd side": (1, 2, 16, 32, 7, 3, 2, 1),
    "1x1 stride 2": (2, 2, 16, 32, 8, 1, 2, 0),
    "many channels": (2, 2, 40, 72, 5, 3, 1, 1),
    "7x7": (2, 2, 3, 16, 9, 7, 2, 3),
    "stride over kernel": (2, 2, 16, 16, 9, 1, 3, 0),
}
NORMS = {  # nodes, images, channels, side, groups, ReLU, shortcut, EvoNorm
    "group norm, shortcut, relu": (2, 3, 16, 8, 8, True, True, False),
    "group norm, odd side": (2, 3, 16, 7, 8, False, False, False),
    "group norm, one group, relu": (2, 2, 16, 5, 1, True, False, False),
    "evonorm": (2, 3, 32, 4, 8, False, False, True),
    "evonorm, a channel a group": (2, 2, 8, 5, 8, False, False, True),
    "evonorm, a channel a group, all": (2, 2, 16, 5, 16, False, False, True),
    "evonorm, few of many channels": (1, 1, 64, 20, 8, False, False, True),
}


def main() -> None:
    if not CUDA:
        os.environ["TRITON_INTERPRET"] = "1"
    from lightning_idkd.models import cuda_kernels
    from lightning_idkd.models.formulas import evonorm_s0

    g = torch.Generator().manual_seed(0)
    found = {}

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(DEVICE).requires_grad_()

    def compare(name, ours, theirs, inputs):
        single = [t.detach().float().requires_grad_() for t in inputs]
        y, expected = ours(*single), theirs(*inputs)
        cotangent = torch.randn(expected.shape, generator=g, dtype=torch.float64).to(DEVICE)
        first = torch.autograd.grad(y, single, cotangent.float(), retain_graph=True)
        pairs = [
            (y, expected),
            *zip(first, torch.autograd.grad(expected, inputs, cotangent, retain_graph=True), strict=True),
        ]
        found[name] = [((a - b).norm() / b.norm()).item() for a, b in pairs]
        twice = [
            torch.autograd.grad(sum(t.square().sum() for t in torch.autograd.grad(y, of, g, create_graph=True)), of[:2])
            for y, of, g in ((y, single, cotangent.float()), (expected, inputs, cotangent))
        ]
        found[f"{name}, twice"] = [((a - b).norm() / b.norm()).item() for a, b in zip(*twice, strict=True)]

    for name, (n, b, channels, to, side, k, stride, padding) in CONVOLUTIONS.items():
        compare(
            name,
            lambda x, w, s=stride, p=padding: cuda_kernels.Convolution.apply(x, w, s, p),
            lambda x, w, s=stride, p=padding: torch.stack(
                [F.conv2d(x[i], w[i], stride=s, padding=p) for i in range(len(x))]
            ),
            [draw(n, b, channels, side, side), draw(n, to, channels, k, k)],
        )
    for name, (n, b, channels, side, groups, relu, add, evo) in NORMS.items():

        def ours(x, gamma, beta, *more, settings=(groups, relu, 1e-5), add=add, evo=evo):
            return cuda_kernels.Norm.apply(
                x, gamma, beta, more[0] if evo else None, more[-1] if add else None, *settings
            )

        def theirs(x, gamma, beta, *more, groups=groups, relu=relu, add=add, evo=evo):
            if evo:
                parts = [evonorm_s0(x[i], more[0][i], gamma[i], beta[i], groups, 1e-5) for i in range(len(x))]
            else:
                parts = [F.group_norm(x[i], groups, gamma[i], beta[i], 1e-5) for i in range(len(x))]
            y = torch.stack(parts)
            y = y + more[-1] if add else y
            return y.relu() if relu else y

        more = [draw(n, channels)] * evo + [draw(n, b, channels, side, side)] * add
        compare(name, ours, theirs, [draw(n, b, channels, side, side), draw(n, channels), draw(n, channels), *more])
    x = torch.zeros(1, 2, 16, 4, 4, device=DEVICE)
    x[0, 1, 5, 1, 1] = torch.nan
    one = torch.ones(1, 16, device=DEVICE)
    y = cuda_kernels.Norm.apply(x, one, one, None, None, 8, True, 1e-5)
    found["nan"] = [y[0, 1, 4:6].isnan().all().item(), y[0, 0].isfinite().all().item()]
    found["slices"] = [cuda_kernels.slice_of(64, 24, 3), cuda_kernels.slice_of(2**20, 16, 2),
                       cuda_kernels.slice_of(1024, 64, 8)]  # fmt: skip
    found["a node's step"] = step()
    print(json.dumps(found))


def step() -> list[float]:
    """Losses and gradients of two nodes in one call, against one after the other in float64."""
    from lightning_idkd.models import ResNet, cuda_kernels, norms, vmap_layers, vmap_ops
    from lightning_idkd.nodes.node import NodeModule
    from lightning_idkd.nodes.stack import NodeStack

    if not CUDA:
        used = []

        def find_kernels(x):
            used.append(vmap_ops.is_batched(x))
            return cuda_kernels if vmap_ops.is_batched(x) else None

        vmap_layers.find_kernels = norms.find_kernels = find_kernels
    g = torch.Generator().manual_seed(1)
    x = torch.randn(2, 2, 8, 8, 3, generator=g, dtype=torch.float64).movedim(-1, -3)
    y = torch.randn(2, 2, 5, generator=g, dtype=torch.float64).softmax(-1)
    errors = []
    for norm, frozen in (("group", ""), ("evonorm", "blocks.1"), ("evonorm_qgm", "")):

        def make(norm=norm, frozen=frozen):
            network = ResNet(8, width=8, norm=norm).build(3, 8, 5)
            if frozen:
                network.get_submodule(frozen).requires_grad_(False)
            return NodeModule(network)

        results = []
        for engine, dtype in (("vmap", torch.float32), ("loop", torch.float64)):
            s = NodeStack(make, range(2), 0, DEVICE, dtype, engine)
            if results:
                s.X.copy_(results[0][0])
            else:
                s.X.add_(0.05 * torch.randn(s.X.shape, generator=g).to(s.X))
            losses = s.step(x.to(s.X), y.to(s.X), 0)
            results.append((s.X.clone(), losses, s.G.clone()))
        for a, b in zip(results[0][1:], results[1][1:], strict=True):
            errors.append(((a - b).norm() / b.norm()).item())
    assert CUDA or any(used)
    return errors


if __name__ == "__main__":
    main()
