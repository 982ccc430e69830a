"""What all methods have in common: mistakes in a sentence, and runs that resume bit-equal."""

import json
import math

import pytest
import torch
from interrupts import InterruptAt
from torch import Tensor

from lightning_idkd.callbacks import ERA, IDKD, MutualKD, VanillaKD
from lightning_idkd.cli import main
from lightning_idkd.errors import UserError

# ---------------------------------------------------------------------- mistakes


@pytest.mark.parametrize("cls", [IDKD, VanillaKD])
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"temperature": 0}, r"distillation\.temperature: 0 given; allowed: above 0"),
        ({"temperature": -1.0}, r"distillation\.temperature: -1\.0 given"),
        ({"temperature": math.inf}, r"distillation\.temperature: inf given"),
        ({"temperature": math.nan}, r"distillation\.temperature: nan given"),
        ({"prior": -0.5}, r"distillation\.prior: -0\.5 given; allowed: 0 or more"),
        ({"prior": math.inf}, r"distillation\.prior: inf given"),
        ({"hops": 0}, r"distillation\.hops: 0 given; allowed: 1 or more"),
        ({"min_confidence": 1.1}, r"distillation\.min_confidence: 1\.1 given; allowed: 0 to 1"),
        ({"min_confidence": -0.1}, r"distillation\.min_confidence: -0\.1 given"),
        ({"min_confidence": math.nan}, r"distillation\.min_confidence: nan given"),
        ({"every": 0}, r"distillation\.every: 0 "),
        ({"steps": "equl"}, r"distillation\.steps: 'equl'.*equal nor grow.*'equal'"),
    ],
)
def test_mistakes_are_refused_with_their_key(cls, options, said):
    with pytest.raises(UserError, match=said):
        cls(**options)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: ERA(0), r"distillation\.aggregation\.temperature: 0 given; allowed: above 0"),
        (lambda: ERA(math.inf), r"distillation\.aggregation\.temperature: inf given"),
        (lambda: MutualKD(temperature=0.0), r"distillation\.temperature: 0\.0 given; allowed: above 0"),
        (lambda: MutualKD(weight=1.5), r"distillation\.weight: 1\.5 given; allowed: 0 to 1"),
        (lambda: MutualKD(weight=-0.5), r"distillation\.weight: -0\.5 given"),
        (lambda: MutualKD(every=0), r"distillation\.every: 0 "),
    ],
)
def test_mistakes_in_the_parts_are_refused_with_their_key(make, said):
    with pytest.raises(UserError, match=said):
        make()


def test_a_start_beyond_the_last_epoch_is_refused_with_its_key():
    with pytest.raises(UserError, match=r"distillation\.start: 40 .*40 epochs"):
        IDKD(start=40).due(0, 40)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--distillation.labels", "relaid"], ["distillation.labels", "relaid", "'relayed'", "fresh"]),
        (["--distillation.aggregation", "Meen"], ["distillation.aggregation", "'Mean'"]),
        (["--distillation.aggregation", "ERA", "--distillation.aggregation.temperature", "0"],
         ["distillation.aggregation.temperature", "above 0"]),
        (["--distillation.teacher", "Gosiped"], ["distillation.teacher", "'Gossiped'"]),
        (["--distillation.teacher", "Gossiped", "--distillation.teacher.steps", "0"],
         ["distillation.teacher.steps", "1 or more"]),
        (["--distillation.encoding", "Packed", "--distillation.encoding.values", "int4"],
         ["distillation.encoding.values", "int4", "uint8"]),
        (["--distillation.encoding", "Packed", "--distillation.encoding.top", "0"],
         ["distillation.encoding.top", "1 or more"]),
        (["--distillation.tuning.balance", "caps"], ["distillation.tuning.balance", "'cap'"]),
        (["--distillation.tuning.private_share", "1"], ["distillation.tuning.private_share", "between 0 and 1"]),
        (["--distillation.weighted", "2"], ["distillation.weighted", "2", "true or false"]),
        (["--distillation", "MutualKD", "--distillation.hops", "2"], ["distillation.hops", "IDKD", "VanillaKD"]),
    ],
)  # fmt: skip
def test_mistakes_on_the_command_line_are_reported_before_any_work(configs, tmp_path, capsys, arguments, words):
    assert main(["fit", "--config", str(configs / "ring_digits.yaml"), "--run.dir", str(tmp_path), *arguments]) == 2
    said = capsys.readouterr().err
    assert len(said.strip().splitlines()) <= 2
    assert "Traceback" not in said
    assert not [w for w in words if w not in said], said
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------- resuming


VARIANTS = {
    "moving average": ["IDKD", "--distillation.teacher", "MovingAverage", "--distillation.teacher.decay", "0.8"],
    "cap": ["VanillaKD", "--distillation.tuning.balance", "cap", "--distillation.labels", "accumulated"],
    "draw": ["IDKD", "--distillation.tuning.balance", "draw", "--distillation.weighted", "true"],
    "private share": ["VanillaKD", "--distillation.tuning.private_share", "0.4",
                      "--distillation.tuning.confidence", "true", "--distillation.tuning.temperature", "2",
                      "--distillation.encoding", "Packed", "--distillation.labels", "relayed"],
    "mutual": ["MutualKD"],
}  # fmt: skip


def differences(a, b, path=""):
    """Where two checkpoints differ, times apart."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        return [d for k in a if k not in ("seconds", "train_seconds") for d in differences(a[k], b[k], f"{path}.{k}")]
    if isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f"{path}[{i}]")]
    equal = torch.equal(a, b) if isinstance(a, Tensor) else a == b or (a != a and b != b)
    return [] if equal else [path]


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_interrupted_run_ends_bit_equal(configs, tmp_path, capsys, variant):
    """Stopped within an epoch, between two exchanges; an epoch has 5 steps."""

    def fit(folder, stops):
        callback = f"[{{class_path: {InterruptAt.__module__}.{InterruptAt.__name__}, init_args: {{steps: {stops}}}}}]"
        return main(["fit", "--config", str(configs / "ring_digits.yaml"), "--logger", "null", "--graph.nodes", "4",
                     "--train.epochs", "4", "--train.batch_size", "64", "--train.evaluate_every", "4",
                     "--train.evaluate_samples", "50", "--data.public.samples", "70", "--run.engine", "loop",
                     "--run.threads", "1", "--run.pictures", "false", "--distillation", *VARIANTS[variant],
                     "--distillation.start", "1", "--distillation.every", "2", "--run.dir", str(tmp_path / folder),
                     "--callbacks", callback, "--run.resume", "auto"])  # fmt: skip

    assert fit("whole", []) == 0
    declared = [line.split(maxsplit=1)[1] for line in capsys.readouterr().out.splitlines() if line.startswith("shares")]
    assert declared == (["ranks of the kept samples' scores"] if variant == "draw" else [])
    assert [fit("cut", [12]) for _ in range(2)] == [130, 0]
    whole, cut = (tmp_path / f / "ring_digits" / "latest" for f in ("whole", "cut"))
    kept = [torch.load(f / "checkpoints" / "last.ckpt", weights_only=True) for f in (whole, cut)]
    assert kept[0]["step"] == 20
    assert differences(*kept) == []
    found = [json.loads((f / "summary.json").read_text()) for f in (whole, cut)]
    for part in ("accuracy", "communication", "homogeneity", "ood"):
        assert found[0][part] == found[1][part]
