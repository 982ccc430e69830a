"""Mistakes of users, and the sentences that explain them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
import torch
from short_runs import SHORT, checkpoint, command_of, extra, latest

from lightning_idkd import Callback, Gossip, NodeModule, OodScore
from lightning_idkd.cli import main
from lightning_idkd.config.kinds import base_of
from lightning_idkd.config.mistakes import explain
from lightning_idkd.config.parse import parser
from lightning_idkd.data import Digits, Images
from lightning_idkd.errors import UserError

if TYPE_CHECKING:
    from lightning_idkd import Calibration


class TestDigits(Digits):
    """The test images as a public set: what must not be."""

    __test__ = False

    def load(self, split, *arguments, **options):
        return super().load("test", *arguments, **options)


class Untested(Digits):
    """Digits of which the test part lacks two classes."""

    def load(self, split, *arguments, **options):
        images = super().load(split, *arguments, **options)
        return (
            images[((images.labels != 3) & (images.labels != 7)).nonzero()[:, 0].numpy()] if split == "test" else images
        )


class NoScore:
    """A class that is not a score."""


class Unread(Digits):
    """Digits that must not be read: a mistake is seen before."""

    def read(self, split, size, key):
        raise AssertionError("data are read")

    def identity(self, split, size, key):
        return None


UNREAD = ("--data.private", f"{__name__}.Unread")


class Renamed(Digits):
    """Digits whose test part calls a class by another name."""

    def load(self, split, *arguments, **options):
        images = super().load(split, *arguments, **options)
        return Images(
            images.pixels, images.labels, ("zero", *images.classes[1:]) if split == "test" else images.classes
        )


class Scored(Callback):
    """An own callback that takes a score."""

    def __init__(self, score: OodScore):
        self.score = score


class Penalty:
    """A class of the user that is a base and may be used itself."""


class LargePenalty(Penalty):
    """Another of its kind."""

    def __init__(self, weight: float = 1.0):
        self.weight = weight


@dataclass
class Limits:
    """A group of keys of the user."""

    large: int = 1


class Watch(Callback):
    """A user's own callback whose annotations are texts, of names that only a type checker imports."""

    def __init__(
        self,
        score: OodScore | None = None,
        scores: list[OodScore] = (),
        rule: Gossip | None = None,
        calibration: Calibration | None = None,
        size: int = 1,
        sizes: list[int | None] = (),
        rank: int = None,  # noqa: RUF013 (a default of None allows null)
        penalty: Penalty | None = None,
        limits: Limits = Limits(),  # noqa: B008 (jsonargparse reads the default of a group)
    ):
        self.parts = (score, scores, rule, calibration, size, sizes, rank, penalty, limits)


class Fussy(Gossip):
    def __init__(self):
        try:
            int("x")
        except ValueError as e:
            raise UserError("gossip.taste: this is not to it") from e

    def update(self, X, G, state, ctx):
        return X


class Needy(NodeModule):
    """A node with an argument that no config gives."""

    def __init__(self, network, weight):
        super().__init__(network)


class Absent(Digits):
    """Digits that these processes cannot find."""

    def __init__(self, processes: list[int]):
        super().__init__()
        self.processes = processes

    def load(self, split, *arguments, **options):
        if int(os.environ.get("LOCAL_RANK", "0")) in self.processes:
            raise UserError("there are no digits here")
        return super().load(split, *arguments, **options)


class Explode(Callback):
    """Breaks node 2's parameters before an epoch."""

    def __init__(self, epoch: int):
        self.epoch = epoch

    def on_epoch_start(self, run, epoch):
        if epoch == self.epoch:
            run.stack.X[2].fill_(float("nan"))


class Overflow(Callback):
    """Breaks node 1's parameters right after a step."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, run, step):
        if step == self.step:
            run.stack.X[1].fill_(float("inf"))


class TestMistakes:
    """Each is reported in at most two lines with status 2, before any run folder exists."""

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["--train.lrr", "0.1"], ["train.lrr", "'lr'"]),
            (["--train.lr", "abc"], ["train.lr: 'abc' given; allowed: a number"]),
            (["--train.epoch", "3"], ["train.epoch:", "'epochs'"]),
            (["--data.validation", "1.5"], ["data.validation: 1.5 given; allowed: 0 (none held out) to below 1"]),
            (["--data.image_size", "0"], ["data.image_size: 0 given; allowed: 1 or more, or null"]),
            (["--data.public.limit", "0", *UNREAD], ["data.public.limit: 0 given; allowed: 1 or more"]),
            (["--data.public.samples", "0", *UNREAD], ["data.public.samples: 0 given; allowed: 1 or more"]),
            (["--data.public", "Concat", "--data.public.parts", "[]", *UNREAD], ["data.public.parts: [] given"]),
            ([*UNREAD, "--data.private.classes", "[a, a]"], ["data.private.classes: a, a: a class is named twice"]),
            (["--data.channels", "2"], ["data.channels", "1, 3"]),
            (
                ["--calibration.temperature", "2"],
                ["Did you mean 'calibration.score.temperature'?", "to be Energy or ODIN"],
            ),
            (["--calibration.temprature", "2"], ["Did you mean 'calibration.score.temperature'?"]),
            (["--distillation.private_share", "1"], ["Did you mean 'distillation.tuning.private_share'?"]),
            (
                ["--train.epochs", "1", "--distillation.start", "5"],
                ["distillation.start: 5 is not the only epoch (train.epochs is 1); allowed: a fraction from 0 to"],
            ),
            (
                extra(Scored, score="Energi"),
                ["callbacks.score: there is no class 'Energi'", "Did you mean 'Energy'? Allowed: "],
            ),
            (
                ["--calibration.score", f"{__name__}.NoScore"],
                ["there is no class 'test_mistakes.NoScore' of this", "MaxLogit"],
            ),
            (extra(Scored, score="DSGD"), ["callbacks.score: there is no class 'DSGD'", "MaxLogit"]),
            (["--data.public.sample", "3"], ["data.public.sample:", "'samples'"]),
            (["--train.lr", "0"], ["train.lr", "above 0"]),
            (["--gossip", "DGSD"], ["gossip", "'DSGD'"]),
            (["--gossip", "MSP"], ["gossip", "MSP", "QGDSGDm"]),
            (["--gossip.momentun", "0.3"], ["gossip.momentun", "'momentum'"]),
            (["--graph.topology", "Rign"], ["graph.topology", "'Ring'"]),
            (["--graph.weights", "metropolys"], ["graph.weights", "'metropolis'", "uniform"]),
            (["--calibration.score", "Enrgy"], ["calibration.score", "'Energy'"]),
            (["--calibration.score.temp", "2"], ["calibration.score.temp", "temperature"]),
            (["--distillation", "IDKDD"], ["distillation", "'IDKD'"]),
            (["--distillation.start", "abc"], ["distillation.start: 'abc' given; allowed: a whole number or a number"]),
            (["--distillation.labels", "frsh"], ["distillation.labels", "'fresh'", "relayed"]),
            (["--distillation.start", "6"], ["distillation.start", "6", "5"]),
            (["--distillation.temperature", "0"], ["distillation.temperature", "above 0"]),
            (["--data.partition.alpha", "0"], ["data.partition.alpha", "above 0"]),
            (["--data.partition.alpha", "-1"], ["data.partition.alpha", "-1", "above 0"]),
            (["--data.public", "null"], ["data.public"]),
            (["--data.private", "HuggingFace"], ["data.private.path", "required"]),
            (["--data.private.path", "x"], ["data.private.path", "HuggingFace"]),
            (
                ["--data.private", "HuggingFace", "--data.private.path", "nowhere/cifar"],
                ["data.private.path", "nowhere/cifar", "IDKD_DATA"],
            ),
            (["--graph.nodes", "1500"], ["graph.nodes", "1500", "1438"]),
            (["--graph.nodes", "100000"], ["graph.nodes", "10000"]),
            (
                [
                    "--graph.topology",
                    "Torus",
                    "--graph.topology.rows",
                    "3",
                    "--graph.topology.cols",
                    "5",
                    "--graph.nodes",
                    "16",
                ],
                ["graph.topology", "15", "16", "4 x 4"],
            ),
            (["--graph.topology", "Social15", "--graph.nodes", "16"], ["graph.topology", "15", "16"]),
            (["--gossip", "RelaySGD"], ["RelaySGD", "Chain", "Ring"]),
            (["--node.network", "ResNt"], ["node.network: there is no class 'ResNt'", "'ResNet'", "TorchModule"]),
            (["--node.network.widht", "3"], ["node.network.widht", "'width'"]),
            (["--node.network", "ResNet", "--node.network.depth", "21"], ["node.network.depth", "20", "26"]),
            (["--node.module", "lightning_idkd.nodes.node.NodeModul"], ["node.module", "NodeModule"]),
            (["--config", "nope.yaml"], ["--config", "nope.yaml"]),
            (["--config", "ring_digts"], ["--config", "ring_digts", "'ring_digits'"]),
            (["--gossip", "{class_path: DSGD, momentum: 0.9}"], ["gossip.momentum", "init_args: {momentum: 0.9}"]),
            (["--gossip", "{class_path: DSGD, init_arg: {}}"], ["gossip.init_arg", "'init_args'"]),
            (["--gossip", "{class_pth: DSGD}"], ["gossip.class_pth", "'class_path'"]),
            (["--run.engine", "vmapp"], ["run.engine", "'vmap'"]),
            (["--run.frm", "x"], ["run.frm", "'from'"]),
            (["--run.from", "nowhere"], ["run.from", "nowhere"]),
            (["--run.resume", "nowhere"], ["run.resume", "nowhere"]),
            (["--run.keep", "[99]"], ["run.keep: 99 is not an epoch; allowed: 1 to 6"]),
            (["--run.name", ""], ["run.name", "''", "run.dir"]),
            (["--run.name", "../x"], ["run.name", "../x", "run.dir"]),
            (["--run.name", "."], ["run.name: '.' given", "run.dir"]),
            (["--run.name", "x/"], ["run.name: 'x/' given"]),
            (["--run.name", "x//y"], ["run.name: 'x//y' given"]),
            (["--run.name", "x/latest"], ["run.name: 'x/latest' given", "not '.', '..' or 'latest'"]),
            (["--run.name", "a\nb"], [r"run.name: 'a\nb' given", "printable"]),
            (["--run.accelerator", "cuda"], ["run.accelerator", "cuda"]),
            (["--run.engine", "graph", "--run.accelerator", "cpu"], ["run.engine", "graph", "vmap"]),
            (["--run.autocast", "true", "--run.precision", "64"], ["run.autocast", "run.precision 64"]),
            (["--run.devices", "5"], ["run.devices", "5", "4"]),
            (["--train.batch_size", "0"], ["train.batch_size"]),
            (["stray"], ["'stray' is not a --key; a value needs its key before it"]),
            (["--trian.lr", "0.1"], ["trian.lr", "'train.lr'"]),
            (["--epochs", "3"], ["epochs", "'train.epochs'"]),
            (["--logger", "foo"], ["logger", "foo", "null"]),
            (["--gossip", "nope.Foo"], ["gossip", "nope.Foo", "no module 'nope'", "DSGD"]),
            (["--gossip", "callbacks.gossip.DSGDD"], ["gossip", "no class 'DSGDD'", "'DSGD'"]),
            (["--gossip", "lightning_idkd.callback.Gossip"], ["gossip", "base class", "DSGD"]),
            (["--gossip", "Gossip"], ["gossip: 'Gossip' is only the base class", "DSGD"]),
            (["--gossip.momentum", "1"], ["gossip.momentum", "1.0", "below 1"]),
            (
                ["--gossip", "LocalSteps", "--gossip.rule", "DSGD", "--gossip.rule.momentum", "1"],
                ["gossip.rule.momentum: 1.0"],
            ),
            (
                [
                    "--calibration.score",
                    "ReAct",
                    "--calibration.score.score",
                    "Energy",
                    "--calibration.score.score.temperature",
                    "0",
                ],
                ["calibration.score.score.temperature: 0.0"],
            ),
            (["--gossip.weight_decay", "-1"], ["gossip.weight_decay", "-1", "0 or more"]),
            (["--callbacks", "[QGDSGDm]"], ["callbacks", "QGDSGDm", "gossip"]),
            (["--callbacks", "[null]"], ["callbacks: null given", "import path"]),
            (["--gossip", "null"], ["gossip: null given", "DSGD"]),
            (["--gossip.momentum", "null"], ["gossip.momentum: null given", "a number"]),
            (["--gossip.nesterov", "null"], ["gossip.nesterov: null given", "true or false"]),
            (["--gossip", "LocalOptimizer", "--gossip.optimizer", "null"], ["gossip.optimizer: null given", "text"]),
            (["--distillation.start", "null"], ["distillation.start: null given", "a number"]),
            (["--distillation.labels", "null"], ["distillation.labels: null given", "fresh, relayed, accumulated"]),
            (["--logger", "{kind: null}"], ["logger.kind: null given", "wandb, tensorboard, csv"]),
            (
                ["--graph.topology", "RandomMatchings", "--graph.topology.base", "null"],
                ["graph.topology.base: null given", "Torus"],
            ),
            (["--graph", "3"], ["graph: 3 given", "graph.KEY"]),
            (["--train.lr="], ["train.lr: '' given; allowed: a number"]),
            (
                ["--train.schedule.milestones", "[a]"],
                ["train.schedule.milestones: 'a' given; allowed: a list, each item a whole number or a number"],
            ),
            (["--distillation.tuning.balanse", "cap"], ["distillation.tuning.balanse", "'balance'"]),
            (
                ["--calibration.score", "ReAct", "--calibration.score.percentil", "1"],
                ["'percentile'", "percentile, score."],
            ),
            (
                ["--gossip", "LocalSteps", "--gossip.rule", "LocalSteps", "--gossip.rule.rule", "DSDG"],
                ["gossip.rule.rule", "no class 'DSDG'", "'DSGD'"],
            ),
            (
                [
                    "--calibration.score",
                    "{class_path: RankEnsemble, init_args: {scores: [{class_path: ReAct, init_args: {score: MPS}}]}}",
                ],
                ["calibration.score.scores.score", "no class 'MPS'", "'MSP'"],
            ),
            (
                ["--graph.topology", "Torus", "--graph.topology.rows", "2", "--graph.topology.cols", "2"],
                ["graph.topology.rows"],
            ),
            (
                ["--data.public", "Torchvision", "--data.public.name", "cifar11"],
                ["data.public.name", "'cifar11'", "'cifar10'"],
            ),
            (["--callbacks", "[Nois]"], ["callbacks", "no class 'Nois'", "import path"]),
            (
                ["--data.public", "{class_path: Concat, init_args: {parts: [Nois]}}"],
                ["data.public.parts", "no class 'Nois'", "'Noise'"],
            ),
            (
                [
                    "--data.public",
                    "{class_path: Concat, init_args: {parts: [{class_path: Noise, init_args: {sample: 3}}]}}",
                ],
                ["data.public.parts.sample", "'samples'"],
            ),
            (
                ["--calibration.score", "{class_path: RankEnsemble, init_args: {scores: [MSP, Energi]}}"],
                ["calibration.score.scores", "no class 'Energi'", "'Energy'"],
            ),
            (["--calibration", "null"], ["calibration", "IDKD", "Youden"]),
            (
                ["--data.private", "FashionMNIST"],
                ["data.private", "FashionMNIST", "Torchvision, with name 'fashion_mnist'"],
            ),
            (["--gossip", "LocalSteps", "--gossip.momentum", "0.5"], ["LocalSteps", "'gossip.rule.momentum'", "DSGD"]),
            (["--callbacks", "mine"], ["callbacks: 'mine'", "allowed: a list, such as '[{class_path: "]),
            (["--callbacks", "[3]"], ["callbacks: 3 given", "import path"]),
            (["--gossip", "1.5"], ["gossip: 1.5 given", "DSGD"]),
            (["--gossip", "{class_path: 3}"], ["gossip: ", "DSGD"]),
            (["--run", "mine"], ["run: 'mine' given; allowed: single keys run.KEY"]),
            (["--train.lr.x", "1"], ["train.lr.x: there is no such key; train.lr takes a number"]),
            (["--logger.kin", "csv"], ["logger.kin", "'kind'", "group, kind, offline, project"]),
            (
                ["--distillation.teacher", "{class_path: MovingAverage, init_args: {decay: null}}"],
                ["distillation.teacher.decay: null given; allowed: a number"],
            ),
            (["--run.resume", "true"], ["run.resume: 'true'", "allowed: auto, null, a run folder"]),
            (["--calibration", "Fixed", "--calibration.threshold", ".nan"], ["calibration.threshold", "nan", "finite"]),
            (["--distillation.start", ".nan"], ["distillation.start", "nan"]),
            (
                ["--train.schedule.warmup", "2", "--train.schedule.milestones", "[9]"],
                ["train.schedule.milestones", "9", "5"],
            ),
            (["--train.schedule.warmup", "-3"], ["train.schedule.warmup", "-3"]),
            (["--train.lr", ".inf"], ["train.lr", "inf"]),
            (["--seed", "-1"], ["seed", "-1"]),
            (["--graph.nodes", "0"], ["graph.nodes", "0", "10000"]),
            (["--data.private", f"{__name__}.Renamed"], ["data.private", "zero and lacks 0", "0, 1, 2, 3, 4, ..."]),
            (["--data.image_size", "1"], ["data.image_size", "1", "2 or more"]),
            (["--gossip", f"{__name__}.Fussy"], ["gossip.taste: this is not to it"]),
            (["--node.module", "Needy"], ["node.module: 'Needy' is not an import path"]),
            (["--node.module", f"{__name__}.Needy"], ["node.module", "Needy", "weight"]),
        ],
    )
    def test_is_reported_with_the_key_and_what_is_allowed(self, fit, capsys, monkeypatch, arguments, words):
        if "cuda" in arguments and torch.cuda.is_available():
            pytest.skip("cuda is not a mistake on this machine")
        monkeypatch.delenv("IDKD_DATA", raising=False)
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        assert fit(*arguments) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ")
        assert said.count("\n") <= 2
        for word in words:
            assert word in said
        assert not fit.runs.exists()

    def test_a_name_that_looks_like_an_invalid_date_stays_a_name(self, fit):
        assert fit("--run.name", "2026-02-30", "--graph.nodes", "0") == 2

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            (b"run: {name: M\xfcller}", ["bad.yaml", "is not UTF-8 text", "0xfc"]),
            (b"seed: 1\n train: {lr: 3}", ["bad.yaml', line 2", "is not YAML: mapping values are not allowed here"]),
            (
                b"seed: 1\ngossip: {class_path: DSGD, init_args: {momentum: 0.9}\n",
                ["bad.yaml', line 3", "flow mapping"],
            ),
            (b"train:\n", ["bad.yaml' has nothing below train"]),
            (b"seed: 1\ngraph: 3\n", ["bad.yaml' has only '3' below graph"]),
            (b"- seed: 1\n", ["bad.yaml' holds a list"]),
            (b"callbacks: null\n", ["callbacks: null given; allowed: a list"]),
            (b"run: {name: }\n", ["run.name: null given; allowed: text"]),
            (b"data:\n  public: {class_path: ImageFolder, path: x}", ["data.public.path", "init_args: {path: x}"]),
            (
                b"calibration:\n  class_path: Youden\n  init_args: {score: {class_path: Energy, temperature: 2}}",
                ["calibration.score.temperature", "init_args: {temperature: 2}"],
            ),
        ],
    )
    def test_a_config_that_cannot_be_read(self, fit, tmp_path, capsys, content, words):
        (tmp_path / "good.yaml").write_text("seed: 1")
        (tmp_path / "bad.yaml").write_bytes(content)
        assert fit("--config", str(tmp_path / "bad.yaml"), f"--config={tmp_path / 'good.yaml'}") == 2
        said = capsys.readouterr().err
        assert said.count("\n") <= 2
        for word in words:
            assert word in said

    @pytest.mark.parametrize(
        ("code", "kind"),
        [
            ("import nothing_of_this_name", "ModuleNotFoundError: No module named 'nothing_of_this_name'"),
            ("1 / 0", "ZeroDivisionError: division by zero"),
            ("raise SystemExit(3)", "SystemExit: 3"),
            ("def f(:", "SyntaxError: invalid syntax"),
            ("class Mine(DSGD):\n    def __init__(self, a: int = 1):\n        self.a = a + undefined",
             "NameError: name 'undefined' is not defined"),
            ("class Mine(DSGD):\n    def __init__(self, a: int = 1):\n        super().__init__(a, nestrov=True)",
             "got an unexpected keyword argument 'nestrov'"),
            ("class Mine(MSP):\n    def __init__(self):\n        raise ValueError('not so')", "ValueError: not so"),
            ("def Mine() -> DSGD:\n    return DSGD(1 / 0)", "ZeroDivisionError: division by zero"),
        ],
    )  # fmt: skip
    @pytest.mark.parametrize("way", ["option", "config"])
    def test_a_class_whose_module_fails(self, fit, tmp_path, capsys, monkeypatch, request, code, kind, way):
        """Reports the file and line. Every test names its module differently, since a process imports a name once."""
        module = f"mine_{abs(hash(request.node.name))}"
        (tmp_path / f"{module}.py").write_text(f"from lightning_idkd.callbacks import DSGD, MSP\n{code}\n")
        monkeypatch.syspath_prepend(tmp_path)
        key = "calibration.score" if "MSP)" in code else "gossip"
        (tmp_path / "mine.yaml").write_text(f"{key}: {{class_path: {module}.Mine}}")
        option = {"option": [f"--{key}", f"{module}.Mine"], "config": ["--config", str(tmp_path / "mine.yaml")]}
        assert fit(*option[way]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"error: {key}: {module}.Mine fails with ")
        assert kind in said
        assert said.endswith(f"{tmp_path / module}.py, line {1 + len(code.splitlines())}\n")
        assert said.count("\n") == 2

    def test_short_names_are_not_hints_for_each_other(self, fit, capsys):
        for option, value in (("accelerator", "gpu"), ("precision", "16")):
            assert fit(f"--run.{option}", value) == 2
            said = capsys.readouterr().err
            assert "allowed" in said
            assert "Did you mean" not in said

    @pytest.mark.slow
    @pytest.mark.parametrize("processes", [[0, 1], [1]])
    def test_a_mistake_that_one_or_several_processes_see_is_reported_once(self, configs, tmp_path, processes):
        command = [*command_of(configs / "ring_digits.yaml"), *SHORT, "--run.devices", "2", "--run.dir", str(tmp_path)]
        command += ["--data.private", f"{{class_path: {__name__}.Absent, init_args: {{processes: {processes}}}}}"]
        here = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=here)
        assert done.returncode == 2
        assert done.stderr.count("error: there are no digits here") == 1
        assert "Traceback" not in done.stderr

    def test_a_misspelt_command(self, capsys):
        assert main(["fti"]) == 2
        assert "'fit'" in capsys.readouterr().err

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
    def test_an_unwritable_folder(self, fit, tmp_path, capsys):
        (tmp_path / "runs").mkdir(mode=0o500)
        assert fit() == 2
        assert "run.dir" in capsys.readouterr().err

    def test_a_file_where_the_run_folder_should_be(self, fit, tmp_path, capsys):
        (tmp_path / "runs").write_text("")
        assert fit() == 2
        assert "run.dir" in capsys.readouterr().err

    def test_a_full_disk_leaves_the_last_checkpoint_intact(self, fit, capsys, monkeypatch):
        save, calls = torch.save, []

        def full(state, path):
            calls.append(path)
            save(state, path)
            if len(calls) == 3:
                path.write_bytes(path.read_bytes()[:100])
                raise OSError(28, "No space left on device")

        monkeypatch.setattr(torch, "save", full)
        assert fit("--distillation", "null") == 2
        assert "No space left on device" in capsys.readouterr().err
        assert checkpoint(latest(fit.runs))["epoch"] == 2
        assert not list(fit.runs.rglob("*.part"))

    def test_a_public_set_smaller_than_a_batch(self, fit, capsys):
        assert fit("--data.public.samples", "10") == 2
        assert "data.public: 10 images are less than a batch, train.batch_size 16" in capsys.readouterr().err

    def test_a_private_set_of_one_class(self, fit, capsys):
        assert fit("--data.private.classes", "['3']") == 2
        assert "data.private: this set has only one class, '3'" in capsys.readouterr().err

    def test_a_disk_that_torch_reports_as_full_is_explained(self, tmp_path, monkeypatch):
        from lightning_idkd import errors
        from lightning_idkd.records import run_folder

        def save(part):
            raise RuntimeError(
                "[enforce fail at inline_container.cc:668] . PytorchStreamWriter failed writing file data/3"
            )

        for free, said in ((0, "No space left on device"), (2**30, "writing failed")):
            monkeypatch.setattr(errors.shutil, "disk_usage", lambda folder, free=free: SimpleNamespace(free=free))
            with pytest.raises(UserError) as e:
                run_folder.write(tmp_path / "last.ckpt", save)
            assert (
                str(e.value)
                == f"run.dir: cannot write '{tmp_path}/last.ckpt' ({said}); what was there before is intact"
            )

    def test_grey_images_for_a_network_of_three_channels_are_reported_with_the_key(self, fit, capsys):
        network = ("--node.network", "TorchModule", "--node.network.path", "torchvision.models.squeezenet1_1")
        assert fit(*network, "--data.image_size", "32") == 2
        assert (
            "These images are grey; if the network takes three channels, set data.channels to 3."
            in capsys.readouterr().err
        )

    def test_classes_without_test_images_are_reported(self, fit, capsys):
        assert fit("--data.private", f"{__name__}.Untested", "--train.epochs", "1", "--distillation", "null") == 0
        assert "note       data.private: no test images of 3, 7\n" in capsys.readouterr().out
        summary = json.loads((latest(fit.runs) / "summary.json").read_text())
        assert summary["notes"] == ["data.private: no test images of 3, 7"]

    def test_grey_images_get_the_channels_asked_for(self):
        from lightning_idkd.config.parse import configure
        from lightning_idkd.training.build import load_private

        grey, colour = (
            load_private(configure(["--data.private", "Digits", *more])) for more in ([], ["--data.channels", "3"])
        )
        assert (grey.channels, colour.channels) == (1, 3)
        assert torch.equal(colour.pixels, grey.pixels.expand(-1, 3, -1, -1))

    def test_a_public_set_with_test_images_is_reported(self, fit, capsys):
        class_path = f"{__name__}.TestDigits"
        assert fit("--data.public", class_path, "--train.epochs", "1", "--distillation.start", "0") == 0
        assert "359 public images are test images too" in capsys.readouterr().out

    def test_a_checkpoint_cut_short(self, fit, capsys):
        fit("--distillation", "null")
        last = latest(fit.runs).resolve() / "checkpoints" / "last.ckpt"
        last.write_bytes(last.read_bytes()[:1000])
        assert fit("--run.from", str(last)) == 2
        said = capsys.readouterr().err
        assert "last.ckpt" in said
        assert "1000 bytes" in said

    def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(self, fit, capsys):
        assert fit(*extra(Explode, epoch=2)) == 2
        said = capsys.readouterr().err
        assert "node 1" in said or "node 2" in said
        assert "step 36" in said
        saved = checkpoint(latest(fit.runs))
        assert saved["epoch"] == 2
        assert torch.isfinite(saved["X"]).all()

    @pytest.mark.parametrize("step", [3 * 18, 6 * 18])
    def test_parameters_that_overflow_in_the_last_step_of_an_epoch_are_not_kept(self, fit, capsys, step):
        assert fit(*extra(Overflow, step=step)) == 2
        assert f"node 1 or its parameters are not finite at step {step - 1}" in capsys.readouterr().err
        assert checkpoint(latest(fit.runs))["step"] == step - 18
        assert not (latest(fit.runs) / "summary.json").exists()

    @pytest.mark.slow
    def test_help_and_a_misspelt_key_load_nothing_heavy(self, configs):
        for arguments in (
            ["fit", "--help"],
            ["fit", "--config", str(configs / "ring_digits.yaml"), "--train.lrr", "1"],
        ):
            probe = (
                f"import sys; from lightning_idkd.cli import main; main({arguments!r}); print('torch' in sys.modules)"
            )
            said = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True).stdout
            assert said.splitlines()[-1] == "False"


class TestArgumentsOfAUsersOwnCallback:
    """They are known by their annotations alone."""

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ({"score": "Energi"}, ["callbacks.score: there is no class 'Energi'", "Did you mean 'Energy'? Allowed: "]),
            ({"scores": ["MSP", "Energi"]}, ["callbacks.scores: there is no class 'Energi'", "'Energy'"]),
            ({"scores": "MSP"}, ["callbacks.scores: 'MSP' given; allowed: a list, such as '[{class_path: "]),
            ({"rule": "DGSD"}, ["callbacks.rule: there is no class 'DGSD'", "'DSGD'"]),
            ({"rule": {"class_path": "DSGD", "init_args": {"momentun": 1}}}, ["callbacks.rule.momentun", "'momentum'"]),
            ({"calibration": "Youdn"}, ["callbacks.calibration", "'Youden'"]),
            ({"calibration": {"class_path": "Youden", "init_args": {"score": "Energi"}}},
             ["callbacks.calibration.score", "'Energy'"]),
            ({"size": None}, ["callbacks.size: null given; allowed: a whole number"]),
            ({"size": "a"}, ["callbacks.size: 'a' given; allowed: a whole number"]),
            ({"scre": "MSP"}, ["callbacks.scre", "'score'"]),
            ({"penalty": f"{__name__}.Penalt"}, ["no class 'Penalt'. Did you mean 'Penalty'? Allowed: Penalty, Large"]),
            ({"penalty": {"class_path": f"{__name__}.Penalty", "init_args": {"weight": 1}}},
             ["callbacks.penalty.weight: Penalty has no such argument. It needs callbacks.penalty to be LargePenalty"]),
            ({"limits": {"larg": 1}}, ["callbacks.limits.larg: there is no such key. Did you mean 'large'?"]),
            ({"sizes": [1, None], "rank": None, "limits": {"large": None}},
             ["callbacks.limits.large: null given; allowed: a whole number"]),
        ],
    )  # fmt: skip
    def test_are_explained_like_those_of_the_project(self, fit, capsys, arguments, words):
        spec = json.dumps([{"class_path": f"{__name__}.Watch", "init_args": arguments}])
        assert fit("--callbacks", spec) == 2
        said = capsys.readouterr().err
        for word in words:
            assert word in said

    def test_are_read_without_importing_what_is_only_for_types(self):
        assert base_of("callbacks.score") is OodScore
        assert base_of("callbacks.rule.rule") is Gossip
        assert base_of("callbacks.calibration.score") is OodScore
        assert base_of("callbacks.size") is None


class TestTextsOfJsonargparse:
    """Those of version 5 give the same sentences; here as its release candidate writes them."""

    @pytest.mark.parametrize(
        ("text", "sentence"),
        [
            (
                'Parser key "train.lr":\n  Expected type: float. Got value: abc',
                "train.lr: 'abc' given; allowed: a number",
            ),
            (
                'Parser key "graph.weights":\n'
                "  Expected type: Literal['metropolis', 'uniform']. Got value: metropolys",
                "graph.weights: 'metropolys' given. Did you mean 'metropolis'? Allowed: metropolis, uniform, ",
            ),
            (
                """Parser key "calibration":
  Expected type: Calibration | null
  Subtype errors:
    - Calibration: Problem with given class_path 'callbacks.Youden':
        Parser key "score":
          Expected type: OodScore | null. Got value: Enrgy
          Subtype errors:
            - OodScore: Expected a dot import path or the name of a known subclass of OodScore
              Known subclasses: callbacks.MSP""",
                "calibration.score: there is no class 'Enrgy' of this kind. Did you mean 'Energy'? Allowed: ",
            ),
            (
                'Parser key "run.until":\n  Expected type: int | null',
                "run.until: Expected type: int | null; allowed: a whole number or null",
            ),
            ("something new\n  in two lines\nor three", "something new in two lines"),
        ],
    )
    def test_are_understood(self, text, sentence):
        types = {action.dest: getattr(action, "_typehint", None) or action.type for action in parser()._actions}
        assert explain(text, types).startswith(sentence)


class TestDamagedRuns:
    """Runs whose files somebody cut or lost."""

    @pytest.mark.parametrize("option", ["--run.resume", "--run.from"])
    @pytest.mark.parametrize(
        ("name", "content"), [("config.yaml", "gossip: ["), ("config.yaml", ""), ("partition.json", "{")]
    )
    def test_the_file_is_named(self, fit, capsys, option, name, content):
        assert fit("--run.until", "1") == 0
        folder = latest(fit.runs)
        (folder / name).write_text(content)
        capsys.readouterr()
        assert fit(option, str(folder)) == 2
        said = capsys.readouterr().err
        assert f"{name}' is" in said
        assert "damaged" in said
        assert said.count("\n") == 1

    def test_one_of_them_does_not_keep_auto_from_finding_another(self, fit, capsys):
        assert fit("--run.until", "1") == 0
        good = latest(fit.runs).resolve()
        assert fit("--run.until", "1") == 0
        bad = latest(fit.runs).resolve()
        assert bad != good
        (bad / "config.yaml").write_text("gossip: [")
        assert fit("--run.resume", "auto") == 0
        assert checkpoint(good)["epoch"] > 1
