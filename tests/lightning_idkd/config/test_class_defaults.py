"""A class that is named starts from its own documented defaults; nothing is inherited that nobody combined."""

from __future__ import annotations

import inspect
from importlib import import_module

import pytest

from lightning_idkd.config.kinds import base_of, choices, parameters
from lightning_idkd.config.parse import PLUGINS, configure
from lightning_idkd.errors import UserError

for plugin in PLUGINS:
    import_module(plugin)
RULES = {
    name: cls
    for name, cls in choices(base_of("gossip")).items()
    if cls.__module__.startswith("lightning_idkd.callbacks.")
}
OWN = """
from lightning_idkd import Calibration, Callback


class Mean(Calibration):
    def threshold(self, private, others):
        return private.mean().item()


class First(Callback):
    def __init__(self, x: int = 1, y: int = 2):
        self.x, self.y = x, y


class Second(Callback):
    def __init__(self, x: int = 1):
        self.x = x
"""


@pytest.fixture
def parse(tmp_path):
    def parse(*arguments: str, key: str):
        """What ``key`` resolves to; arguments with a colon and a blank are configs."""
        words = ["--data.private", "Digits"]
        for i, argument in enumerate(arguments):
            if ": " in argument:
                file = tmp_path / f"{i}.yaml"
                file.write_text(argument)
                words += ["--config", str(file)]
            else:
                words += argument.split(" ")
        value = configure(words).resolved
        for part in key.split("."):
            value = value[part] if part in value else value["init_args"][part]
        return value

    return parse


def defaults(cls: type) -> dict:
    """Its documented defaults, read off the signature."""
    return {k: p.default for k, p in parameters(cls).items() if p.default is not inspect.Parameter.empty}


WRAPPED = (
    "gossip: {class_path: LocalSteps, init_args: {every: 7, rule: {class_path: DSGD, init_args: {momentum: 0.5}}}}"
)
BEFORE = "gossip: {class_path: QGDSGDm, init_args: {momentum: 0.7, nesterov: true, weight_decay: 0.3}}"


@pytest.mark.parametrize("before", ["", BEFORE])
@pytest.mark.parametrize(
    "name", sorted(n for n, c in RULES.items() if defaults(c).keys() == parameters(c).keys() and n != "QGDSGDm")
)
def test_each_rule_starts_from_the_defaults_of_its_signature(name, before, parse):
    configs = [before] if before else []
    expected = defaults(RULES[name])
    assert parse(*configs, f"gossip: {{class_path: {name}}}", key="gossip.init_args") == expected
    assert parse(*configs, f"--gossip {name}", key="gossip.init_args") == expected


def test_arguments_survive_where_the_same_class_is_named_again_or_none(parse):
    before = "gossip: {class_path: DSGD, init_args: {momentum: 0.7}}"
    for after in (
        "gossip: {class_path: DSGD}",
        "gossip: {class_path: callbacks.gossip.DSGD}",
        "--gossip DSGD",
        "gossip: {init_args: {nesterov: false}}",
        "--gossip.nesterov false",
    ):
        assert parse(before, after, key="gossip.momentum") == 0.7, after


@pytest.mark.parametrize(
    ("before", "after", "key", "expected"),
    [
        (
            "node: {network: {class_path: ResNet, init_args: {norm: group, width: 4}}}",
            "node: {network: {class_path: VGG}}",
            "node.network.norm",
            "none",
        ),
        (
            "node: {network: {class_path: ResNet, init_args: {norm: group, width: 4}}}",
            "--node.network CNN",
            "node.network.width",
            16,
        ),
        (
            "node: {network: {class_path: ResNet, init_args: {width: 4}}}",
            "--node.network ViT",
            "node.network.width",
            128,
        ),
        (
            "train: {schedule: {class_path: Step, init_args: {warmup: 5}}}",
            "--train.schedule Cosine",
            "train.schedule.warmup",
            0.0,
        ),
        (
            "data: {private: {class_path: HuggingFace, init_args: {path: a, limit: 5}}}",
            "--data.private ImageFolder --data.private.path b",
            "data.private.limit",
            None,
        ),
        (
            "data: {partition: {class_path: Dirichlet, init_args: {alpha: 0.1}}}",
            "--data.partition FeatureSkew",
            "data.partition.rotation",
            30.0,
        ),
        (
            "distillation: {class_path: IDKD, init_args: {start: 3, every: 4, tuning: {weight: 2}}}",
            "--distillation VanillaKD",
            "distillation.tuning",
            None,
        ),
        (
            "distillation: {class_path: IDKD, init_args: {start: 3}}",
            "distillation: {class_path: VanillaKD}",
            "distillation.start",
            0.6,
        ),
        (
            WRAPPED,
            "--gossip.rule CombineThenAdapt",
            "gossip.rule.momentum",
            0.0,
        ),
        (
            WRAPPED,
            "--gossip.rule CombineThenAdapt",
            "gossip.every",
            7,
        ),
        (
            "calibration: {class_path: Youden, init_args: {score: {class_path: Energy, init_args: {temperature: 3}}}}",
            "--calibration.score ODIN",
            "calibration.score.temperature",
            1000.0,
        ),
        (
            "calibration: {class_path: Youden, init_args: {score: {class_path: Energy}}}",
            "--calibration IdQuantile",
            "calibration.score.class_path",
            "lightning_idkd.callbacks.MSP",
        ),
        (
            "callbacks: [{class_path: own_defaults.First, init_args: {x: 5}}]",
            "callbacks: [{class_path: own_defaults.Second}]",
            "callbacks",
            [{"class_path": "own_defaults.Second", "init_args": {"x": 1}}],
        ),
    ],
)
def test_the_kind_at_every_depth(before, after, key, expected, parse, tmp_path, monkeypatch):
    (tmp_path / "own_defaults.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    assert parse(before, after, key=key) == expected


def test_the_example_of_the_readme(parse):
    arguments = parse("--config configs/ring_digits.yaml --gossip DSGD --gossip.momentum 0.9", key="gossip.init_args")
    assert arguments == {"momentum": 0.9, "nesterov": False, "weight_decay": 0.0}


def test_a_calibration_that_names_no_score_has_msp(parse, tmp_path, monkeypatch):
    (tmp_path / "own_mean.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("Youden", "IdQuantile", "TargetKept", "Mixture", "own_mean.Mean"):
        assert (
            parse("calibration: null", f"calibration: {{class_path: {name}}}", key="calibration.score.class_path")
            == "lightning_idkd.callbacks.MSP"
        )
    from lightning_idkd.callbacks.ood import Youden

    with pytest.raises(UserError, match=r"calibration\.score: none given; allowed: a score, such as MSP\(\)"):
        Youden()


def test_options_of_a_class_may_stand_before_it(parse):
    for words in (
        "--gossip.momentum 0.5 --gossip DSGD",
        "--gossip=DSGD --gossip.momentum=0.5",
        "--gossip.momentum=0.5 --gossip=DSGD",
    ):
        assert parse(words, key="gossip") == {
            "class_path": "lightning_idkd.callbacks.DSGD",
            "init_args": {"momentum": 0.5, "nesterov": False, "weight_decay": 0.0},
        }
    words = "--calibration.score.temperature 3 --calibration.score Energy --calibration IdQuantile"
    assert parse(words, key="calibration.score.temperature") == 3
    assert parse("--distillation IDKD --distillation.start 3 --distillation null", key="distillation") is None


def test_a_config_after_an_option_is_later(parse):
    assert parse("--gossip.momentum 0.5", "gossip: {class_path: DSGD}", key="gossip.momentum") == 0.0
