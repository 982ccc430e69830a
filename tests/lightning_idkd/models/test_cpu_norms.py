"""The C library of the norms against their formulas in double precision, bfloat16 images, and what happens without a
compiler."""

import copy
import os
import shutil
import stat
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_idkd.checksum import is_sealed
from lightning_idkd.models import cpu_norms
from lightning_idkd.models.formulas import evonorm_s0
from lightning_idkd.models.norms import EvoNormQGM, EvoNormS0, GroupNorm

SHAPES = [(3, 16, 9, 7, 8), (2, 32, 4, 4, 8), (5, 64, 1, 1, 8), (2, 64, 3, 3, 1), (2, 48, 5, 5, 3), (1, 512, 2, 2, 128)]
"""B, C, H, W, groups: groups of 2, 4, 8, 64, 16 and 4 channels."""
FORMATS = [torch.channels_last, torch.contiguous_format]

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler here")


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def drawn(*shape, mean=0.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + shape[0])) + mean


def test_a_compiler_is_used_where_there_is_one():
    assert cpu_norms.load_library() is not None
    assert cpu_norms.supports(torch.zeros(1, 16, 2, 2), 8)
    assert not cpu_norms.supports(torch.zeros(1, 16, 2, 2, dtype=torch.float64), 8)
    assert not cpu_norms.supports(torch.zeros(1, 24, 2, 2), 8)


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_evonorm_equals_its_formula_forwards_and_backwards(shape, form):
    *image, groups = shape
    C, x = image[1], drawn(*image, mean=3).contiguous(memory_format=form)
    g, parameters = drawn(*image).contiguous(memory_format=form), [drawn(C, mean=1), drawn(C), drawn(C)]
    y, mean, rstd = cpu_norms.evonorm_forward(x, *parameters, groups, 1e-5)
    exact = [t.double().requires_grad_() for t in (x, *parameters)]
    expected = evonorm_s0(*exact, groups, 1e-5)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    found = cpu_norms.evonorm_backward(g, x, *parameters[:2], mean, rstd, groups)
    for gradient, of in zip(found, torch.autograd.grad(expected, exact, g.double()), strict=True):
        torch.testing.assert_close(gradient.double(), of, rtol=1e-4, atol=2e-5 * of.abs().max().item())


@pytest.mark.parametrize("shortcut", [False, True])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_group_norm_with_what_follows_equals_torchs_forwards_and_backwards(shape, relu, shortcut):
    *image, groups = shape
    C, x, g = image[1], drawn(*image, mean=3), drawn(*image)
    tensors = [x, drawn(C, mean=1), drawn(C), *([drawn(*image, mean=0.1)] if shortcut else [])]
    y, mean, rstd = cpu_norms.group_norm_forward(*tensors[:3], tensors[3] if shortcut else None, groups, relu, 1e-5)
    exact = [t.double().requires_grad_() for t in tensors]
    expected = F.group_norm(exact[0], groups, exact[1], exact[2], 1e-5) + (exact[3] if shortcut else 0)
    expected = expected.relu() if relu else expected
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    *found, through = cpu_norms.group_norm_backward(g, x, y if relu else None, tensors[1], mean, rstd, groups)
    for gradient, of in zip([*found, through], torch.autograd.grad(expected, exact, g.double()), strict=False):
        torch.testing.assert_close(gradient.double(), of, rtol=1e-4, atol=2e-5 * of.abs().max().item())


class TestBfloat16:
    """The library reads and writes bfloat16 images and computes in float32: its results are the rounded ones of float32
    images with the same values."""

    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_evonorm_rounds_its_results_alone(self, shape):
        *image, groups = shape
        C, x, g = image[1], drawn(*image, mean=3).bfloat16(), drawn(*image).bfloat16()
        parameters = [drawn(C, mean=1), drawn(C), drawn(C)]
        y, *moments = cpu_norms.evonorm_forward(x, *parameters, groups, 1e-5)
        exact, *expected = cpu_norms.evonorm_forward(x.float(), *parameters, groups, 1e-5)
        assert torch.equal(y, exact.bfloat16())
        assert all(map(torch.equal, moments, expected))
        dx, *sums = cpu_norms.evonorm_backward(g, x, *parameters[:2], *moments, groups)
        exact, *expected = cpu_norms.evonorm_backward(g.float(), x.float(), *parameters[:2], *moments, groups)
        assert dx.dtype == torch.bfloat16
        torch.testing.assert_close(dx.float(), exact, rtol=2**-8, atol=2**-8 * exact.abs().max().item())
        assert all(map(torch.equal, sums, expected))

    @pytest.mark.parametrize("shortcut", [False, True])
    @pytest.mark.parametrize("relu", [False, True])
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_group_norm_rounds_its_results_alone(self, shape, relu, shortcut):
        *image, groups = shape
        C, x, g = image[1], drawn(*image, mean=3).bfloat16(), drawn(*image).bfloat16()
        gamma, beta, add = drawn(C, mean=1), drawn(C), drawn(*image, mean=0.1).bfloat16() if shortcut else None
        y, *moments = cpu_norms.group_norm_forward(x, gamma, beta, add, groups, relu, 1e-5)
        wide = add if add is None else add.float()
        exact, *expected = cpu_norms.group_norm_forward(x.float(), gamma, beta, wide, groups, relu, 1e-5)
        assert torch.equal(y, exact.bfloat16())
        assert all(map(torch.equal, moments, expected))
        dx, *others = cpu_norms.group_norm_backward(g, x, y if relu else None, gamma, *moments, groups)
        after = y.float() if relu else None
        exact, *expected = cpu_norms.group_norm_backward(g.float(), x.float(), after, gamma, *moments, groups)
        assert torch.equal(dx, exact.bfloat16())
        assert all(torch.equal(a.float(), b) for a, b in zip(others, expected, strict=True))

    def test_values_are_rounded_to_the_nearest_with_ties_to_even_and_nan_stays(self):
        """With one value in a group and eps 1, EvoNorm of v = 0 is half its input, times gamma 2: the input itself plus
        beta."""
        odd, even = 1 + 2**-7, 1.0  # neighbours in bfloat16
        for beta, expected in ((2**-8, [1.0, 1 + 2**-6]), (2**-8 + 2**-20, [1 + 2**-7, 1 + 2**-6])):
            x = torch.tensor([even, odd, torch.nan, -torch.nan] * 4).view(1, 16, 1, 1).bfloat16()
            y, *_ = cpu_norms.evonorm_forward(
                x, torch.zeros(16), torch.full((16,), 2.0), torch.full((16,), beta), 16, 1.0
            )
            assert y.flatten()[:2].tolist() == expected
            assert y.flatten()[2:4].isnan().all()

    def test_it_needs_a_shortcut_of_the_same_type_and_parameters_of_float32(self):
        x, parameter = torch.zeros(1, 16, 2, 2).bfloat16(), torch.ones(16)
        assert cpu_norms.supports(x, 8, parameter, shortcut=x)
        assert not cpu_norms.supports(x, 8, parameter, shortcut=x.float())
        assert not cpu_norms.supports(x, 8, parameter.bfloat16())

    @pytest.mark.parametrize("layer", [EvoNormS0(32), EvoNormQGM(32), GroupNorm.over(32, relu=True)],
                             ids=lambda of: of._get_name())  # fmt: skip
    def test_the_layers_keep_the_type_of_their_images(self, layer):
        x = drawn(40, 32, 12, 12).bfloat16().requires_grad_()
        y = layer(x)
        y.float().square().sum().backward()
        assert y.dtype == x.grad.dtype == torch.bfloat16
        assert layer.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("shortcut", [False, True])
@pytest.mark.parametrize("relu", [False, True])
def test_the_layer_group_norm_trains_by_the_library(relu, shortcut, monkeypatch):
    used, forward = [], cpu_norms.group_norm_forward
    monkeypatch.setattr(cpu_norms, "group_norm_forward", lambda *given: used.append(given) or forward(*given))
    layer = GroupNorm.over(32, relu=relu)
    tensors = [drawn(8, 32, 32, 16, mean=3), *([drawn(8, 32, 32, 16, mean=0.1)] if shortcut else [])]
    with torch.no_grad():
        layer.weight.copy_(drawn(32, mean=1))
        layer.bias.copy_(drawn(32))
    inputs = [t.clone().requires_grad_() for t in tensors]
    y, g = layer(*inputs), drawn(8, 32, 32, 16)
    exact = [t.detach().double().requires_grad_() for t in (*inputs, layer.weight, layer.bias)]
    expected = F.group_norm(exact[0], 8, *exact[-2:], 1e-5) + (exact[1] if shortcut else 0)
    expected = expected.relu() if relu else expected
    assert used
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    found = torch.autograd.grad(y, [*inputs, layer.weight, layer.bias], g)
    for gradient, of in zip(found, torch.autograd.grad(expected, exact, g.double()), strict=True):
        torch.testing.assert_close(gradient.double(), of, rtol=1e-4, atol=2e-5 * of.abs().max().item())


@pytest.mark.parametrize("channels", [16, 32, 64])
def test_the_evonorm_of_qg_dsgdms_code_trains_by_the_library(channels, monkeypatch):
    """Groups of 1, 1 and 2 channels."""
    used, forward = [], cpu_norms.evonorm_forward
    monkeypatch.setattr(cpu_norms, "evonorm_forward", lambda *given: used.append(given) or forward(*given))
    layer, x, g = EvoNormQGM(channels), drawn(8, channels, 6, 5), drawn(8, channels, 6, 5)
    with torch.no_grad():
        layer.weight.copy_(drawn(channels, mean=1))
        layer.bias.copy_(drawn(channels))
    exact, found = copy.deepcopy(layer).double(), []
    for here, dtype in ((layer, torch.float32), (exact, torch.float64)):
        leaf = x.to(dtype).requires_grad_()
        y = here(leaf)
        found.append([y, *torch.autograd.grad(y, [leaf, *here.parameters()], g.to(dtype))])
    assert len(used) == 1
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=2e-5 * b.abs().max().item())


@pytest.mark.parametrize(
    "layer", [EvoNormS0(32), EvoNormQGM(32), GroupNorm.over(32, relu=True)], ids=lambda of: of._get_name()
)
def test_gradients_can_be_differentiated_again(layer):
    """As a penalty on gradients in a loss does, whatever the batch."""
    x, found = drawn(40, 32, 12, 12), []
    for here in (layer, copy.deepcopy(layer).double()):
        leaf = x.to(here.weight.dtype).requires_grad_()
        [gradient] = torch.autograd.grad(here(leaf).square().sum(), leaf, create_graph=True)
        found.append(torch.autograd.grad(gradient.square().sum(), [leaf, *here.parameters()]))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-4 * b.abs().max().item())


class TestWhatTheLibraryDoesNotTake:
    @pytest.mark.parametrize("layer", [EvoNormS0(16), GroupNorm(8, 16)], ids=["EvoNormS0", "GroupNorm"])
    def test_other_channels_than_those_of_the_parameters(self, layer):
        with pytest.raises(RuntimeError, match="size"):
            layer(drawn(16, 32, 16, 16))

    @pytest.mark.parametrize("shape", [(16, 32, 1, 1), (1, 32, 16, 16)], ids=str)
    def test_shortcuts_of_another_shape_are_spread(self, shape):
        layer, x, shortcut = GroupNorm.over(32), drawn(16, 32, 16, 16), drawn(*shape)
        torch.testing.assert_close(layer(x, shortcut), layer(x) + shortcut, rtol=1e-5, atol=1e-5)

    def test_parameters_of_another_type_are_promoted(self):
        x = drawn(16, 32, 16, 16)
        torch.testing.assert_close(EvoNormS0(32).double()(x), EvoNormS0(32)(x).double(), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("layer", [EvoNormS0(32), GroupNorm.over(32)], ids=["EvoNormS0", "GroupNorm"])
    def test_tensors_without_memory(self, layer):
        with FakeTensorMode(allow_non_fake_inputs=True):
            assert layer(torch.empty(16, 32, 16, 16)).shape == (16, 32, 16, 16)


@pytest.mark.parametrize("layer", [EvoNormS0(64), GroupNorm.over(64, relu=True)], ids=["EvoNormS0", "GroupNorm"])
def test_layers_keep_every_bit_whatever_the_number_of_threads_is(layer, threads):
    x, found = drawn(40, 64, 9, 9), []
    for count in (1, 2, 1):
        threads(count)
        here = x.clone().requires_grad_()
        layer.zero_grad()
        y = layer(here)
        y.square().sum().backward()
        found.append([y, here.grad, *(p.grad.clone() for p in layer.parameters())])
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_the_gate_is_sound_far_out():
    x = torch.tensor([-1e30, -200, -88, -87, -20, 0, 20, 87, 88, 200, 1e30, 1, 1, 1, 1, 1]).view(1, 16, 1, 1)
    one, zero = torch.ones(16), torch.zeros(16)
    y, mean, rstd = cpu_norms.evonorm_forward(x, one, one, zero, 16, 1.0)  # one value a group: its deviation is 1
    torch.testing.assert_close(y, x * x.sigmoid(), rtol=2e-6, atol=1e-7)
    assert cpu_norms.evonorm_backward(torch.ones_like(x), x, one, one, mean, rstd, 16)[0].isfinite().all()


@pytest.mark.parametrize("layer", [EvoNormS0(16), GroupNorm.over(16, relu=True)], ids=["EvoNormS0", "GroupNorm"])
def test_nan_stays_nan(layer):
    x = torch.zeros(32, 16, 16, 16)
    x[3, 5, 1, 1] = torch.nan
    group = slice(4, 6)
    y = layer(x)
    assert y[3, 5, 1, 1].isnan()
    assert y[:3].isfinite().all()
    assert y[3, group].isnan().all()


@pytest.mark.parametrize("compiler", ["false", "no-such-compiler"])
def test_without_a_compiler_torch_does_the_same(compiler, monkeypatch, tmp_path):
    x = drawn(40, 16, 16, 16)
    layers = EvoNormS0(16), GroupNorm.over(16, relu=True)
    fast = [layer(x) for layer in layers]
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setenv("IDKD_CACHE", str(tmp_path))
    assert cpu_norms.load_library.__wrapped__() is None
    assert not list(tmp_path.glob("*.so"))
    monkeypatch.setattr(cpu_norms, "load_library", lambda: None)
    for layer, expected in zip(layers, fast, strict=True):
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_a_compiler_may_have_arguments(monkeypatch, tmp_path):
    monkeypatch.setenv("CC", f"{shutil.which('cc')} -pthread")
    monkeypatch.setenv("IDKD_CACHE", str(tmp_path))
    assert cpu_norms.load_library.__wrapped__() is not None


class TestWhoMayWrite:
    """A stored library is loaded only if nobody but the user may write it; else this process builds a new one."""

    @pytest.fixture
    def stored(self, monkeypatch, tmp_path):
        built = cpu_norms.load_library()._name
        monkeypatch.setattr(cpu_norms, "_compile", lambda compiler, openmp, path: shutil.copy(built, path))
        monkeypatch.setenv("IDKD_CACHE", str(tmp_path))
        return self.load()

    def load(self):
        library = cpu_norms.load_library.__wrapped__()
        assert library is not None
        return Path(library._name)

    def test_a_private_one_is_loaded_again(self, stored, monkeypatch):
        monkeypatch.setattr(cpu_norms, "_compile", None)
        assert self.load() == stored

    def test_it_is_private_whatever_the_mask_of_new_files_is(self, monkeypatch, tmp_path):
        monkeypatch.setenv("IDKD_CACHE", str(tmp_path / "new"))
        before = os.umask(0)
        try:
            library = self.load()
        finally:
            os.umask(before)
        assert library.parent == tmp_path / "new" / "compiled"
        assert {stat.S_IMODE(path.stat().st_mode) for path in (library, library.parent)} == {0o700}

    @pytest.mark.parametrize("mode", [0o777, 0o720, 0o702])
    @pytest.mark.parametrize("which", ["file", "folder"])
    def test_one_that_others_may_write_is_not(self, which, mode, stored):
        (stored if which == "file" else stored.parent).chmod(mode)
        content = stored.read_bytes()
        assert not self.load().is_relative_to(stored.parents[1])
        assert stored.read_bytes() == content

    @pytest.mark.parametrize("which", ["file", "folder"])
    def test_one_of_another_user_is_not(self, which, stored):
        if os.geteuid() != 0:
            pytest.skip("only root may give a file away")
        os.chown(stored if which == "file" else stored.parent, 12345, -1)
        assert not self.load().is_relative_to(stored.parents[1])

    @pytest.mark.parametrize("which", ["file", "folder"])
    def test_one_behind_a_link_is_not(self, which, stored, tmp_path):
        linked = stored if which == "file" else stored.parent
        linked.rename(tmp_path / "elsewhere")
        linked.symlink_to(tmp_path / "elsewhere")
        assert not self.load().is_relative_to(tmp_path)

    def test_the_new_one_leaves_no_file(self, stored):
        stored.chmod(0o777)
        assert not self.load().exists()


@pytest.mark.parametrize(
    "failure", [RuntimeError("Could not determine home directory."), OSError("Read-only file system")]
)
def test_without_a_cache_torch_does_the_same(failure, monkeypatch):
    def no_folder():
        raise failure

    monkeypatch.setattr(cpu_norms, "cache_folder", no_folder)
    assert cpu_norms.load_library.__wrapped__() is None


def test_it_has_the_threads_of_torch():
    threads = cpu_norms._find_openmp()
    if threads is None:
        pytest.skip("torch has no OpenMP library of its own here")
    library = Path(threads).name.partition(".")[0].partition("-")[0]
    assert library.encode() in Path(cpu_norms.load_library()._name).read_bytes()


def test_a_library_that_cannot_be_loaded_is_made_anew(monkeypatch, tmp_path):
    name = Path(cpu_norms.load_library()._name).name
    file = tmp_path / "compiled" / name
    file.parent.mkdir(mode=0o700)
    file.touch(mode=0o600)
    file.write_bytes(b"nonsense")
    monkeypatch.setenv("IDKD_CACHE", str(tmp_path))
    assert Path(cpu_norms.load_library.__wrapped__()._name) == file
    assert file.read_bytes() != b"nonsense"


def test_a_damaged_library_is_never_called_but_made_anew(monkeypatch, tmp_path):
    whole = Path(cpu_norms.load_library()._name)
    content = bytearray(whole.read_bytes())
    content[len(content) // 2] ^= 1
    file = tmp_path / "compiled" / whole.name
    file.parent.mkdir(mode=0o700)
    file.touch(mode=0o600)
    file.write_bytes(content)
    monkeypatch.setenv("IDKD_CACHE", str(tmp_path))
    assert Path(cpu_norms.load_library.__wrapped__()._name) == file
    assert is_sealed(file)
