"""Configs on disk: a key given twice is an error, and what a run writes reads back equal."""

from __future__ import annotations

import json
import math

import pytest
import yaml

from lightning_idkd.cli import main
from lightning_idkd.config import yaml_file
from lightning_idkd.config.parse import configure
from lightning_idkd.errors import UserError
from lightning_idkd.records.run_folder import RunFolder

TEXTS = [
    "12e3", "1234e56", "0.1e5", "1e-3", ".5", ".5e3", "-1e3", "+1", "1", "1.5", "1.", "0x1F", "0b1", "0o14", "014",
    "1_000", "1_0.5", "1:30", "1:30:00.5", "2024-01-01", "2024-01-01 10:00:00", "2024-13-99", "null", "Null", "~",
    "yes", "no", "on", "off", "y", "true", "True", "nan", ".nan", ".inf", "-.inf", "inf", "", " ", " lead", "trail ",
    "\t", "a\tb", "a\nb", "a\n", "a: b", "a:", ": a", "a #b", "#1", "&x", "*x", "!x", "%x", "@x", "`x", "-", "- x",
    "?", "? x", "|", ">", "=", "<<", "[1]", "[", "{a: 1}", "{}", "{a, b}", "a,b", "'q'", '"q"', "it's", "\\", "é",
    "名前", "😀", "\u00a0", "\u2028", "None", "Ring", "/a/b", "x" * 200, "a " * 100,
]  # fmt: skip


def put(tmp_path, text: str, name: str = "a.yaml") -> list[str]:
    (tmp_path / name).write_text(text, encoding="utf-8")
    return ["--config", str(tmp_path / name)]


@pytest.mark.parametrize("text", TEXTS)
def test_every_text_reads_back_equal_by_ours_and_by_any_other_reader(text):
    values = {"a": text, text: [text], "b": {"c": text}}
    written = yaml_file.write(values)
    assert yaml_file.read(written) == values
    assert yaml.safe_load(written) == values


@pytest.mark.parametrize("number", [0, 1, -7, 10**20, 0.1, 1e-5, 1e16, 1.5e300, -2.5e-310, math.inf, True, False, None])
def test_every_number_reads_back_equal(number):
    for read in (yaml_file.read, yaml.safe_load):
        (value,) = read(yaml_file.write([number]))
        assert value == number
        assert type(value) is type(number)


def test_every_config_that_a_run_writes_reads_back_equal(tmp_path):
    for text in ("12e3", "0.1e5", "1_000", "014", "0o14", "2024-01-01", "yes", "~", "a: b", " lead", "#1", "😀", ""):
        name = text if text.strip() and not text.startswith("/") else f"x{text}"
        given = {
            "data": {
                "private": {"class_path": "Digits"},
                "public": {
                    "class_path": "HuggingFace",
                    "init_args": {"path": text, "image": text, "classes": [text, f"{text}2"]},
                },
            },
            "node": {
                "network": {
                    "class_path": "TorchModule",
                    "init_args": {"path": "a.b", "arguments": {"x": text, "y": 0.5}},
                }
            },
            "logger": {"project": text, "group": text},
            "run": {"name": name, "dir": text},
        }
        folder = RunFolder(tmp_path)
        written = configure(put(tmp_path, yaml_file.write(given))).resolved
        assert written["run"]["name"] == name
        assert written["data"]["public"]["init_args"]["path"] == text
        assert written["data"]["public"]["init_args"]["classes"] == [text, f"{text}2"]
        folder.yaml("config.yaml", written)
        assert folder.config() == written, text
        again = configure(["--config", str(folder.file("config.yaml"))]).resolved
        assert {**again, "config": None} == {**written, "config": None}, text


@pytest.mark.parametrize("name", ["12e3", "1234e56", "0.1e5", "2024-01-01", "yes", "#1", "1_000"])
def test_names_on_the_command_line_are_texts_and_read_back(name, tmp_path):
    written = configure(["--data.private", "Digits", "--run.name", name, "--logger.group", name]).resolved
    assert (written["run"]["name"], written["logger"]["group"]) == (name, name)
    again = configure(put(tmp_path, yaml_file.write(written))).resolved
    assert again["run"] == written["run"]
    assert again["logger"] == written["logger"]


@pytest.mark.parametrize(
    ("text", "key", "lines"),
    [
        ("train: {epochs: 2}\nseed: 1\ntrain: {lr: .5}\n", "train", (1, 3)),
        ("train:\n  lr: 1\n  epochs: 2\n  lr: 2\n", "lr", (2, 4)),
        ("train: {lr: 1,\n  lr: 1}\n", "lr", (1, 2)),
        ("train:\n  lr: 1\ntrain.lr: 2\n", "train.lr", (2, 3)),
        ("train.schedule: Step\ntrain:\n  epochs: 1\n  schedule: Cosine\n", "train.schedule", (1, 4)),
        ("gossip:\n  class_path: DSGD\n  init_args:\n    momentum: 0\n    momentum: 1\n", "momentum", (4, 5)),
        ("gossip: {class_path: DSGD, init_args: {momentum: 0}}\ngossip.momentum: 1\n", "gossip.momentum", (1, 2)),
        ("callbacks:\n- class_path: A\n  class_path: B\n", "class_path", (2, 3)),
        ('{"seed": 1,\n\t"seed": 2}', "seed", (1, 2)),
    ],
)
def test_a_key_given_twice_is_refused_with_file_and_both_lines(text, key, lines, tmp_path, capsys):
    assert main(["fit", *put(tmp_path, text)]) == 2
    said = capsys.readouterr().err
    first, second = lines
    expected = f"line {second}: '{key}' is given already in line {first}; allowed: once"
    assert said == f"error: --config: '{tmp_path}/a.yaml', {expected}\n"


def test_a_key_given_twice_in_a_sweep_or_an_option_is_refused(tmp_path, capsys):
    parameters = "parameters:\n  seed: {value: 1}\n  seed: {value: 2}\n"
    (tmp_path / "s.yaml").write_text(f"method: grid\n{parameters}command: [fit, '${{args}}']\n")
    assert main(["sweep", str(tmp_path / "s.yaml")]) == 2
    assert f"{tmp_path}/s.yaml, line 4: 'seed' is given already in line 3" in capsys.readouterr().err
    assert main(["fit", "--data.private", "Digits", "--gossip", "{class_path: DSGD, class_path: D2}"]) == 2
    assert "gossip: line 1: 'class_path' is given already in line 1" in capsys.readouterr().err


def test_a_merged_or_separate_key_does_not_count_as_repeated(tmp_path):
    text = """
base: &base {epochs: 2, lr: 0.5}
train: {<<: *base, lr: 0.25}
other: [{a: 1}, {a: 1}]
train.batch_size: 4
again: *base
"""
    values = yaml_file.read(text)
    assert values["train"] == {"epochs": 2, "lr": 0.25}
    assert values["train.batch_size"] == 4
    assert yaml_file.read('{"a":\t1}') == {"a": 1}
    assert yaml_file.read("") is None
    with pytest.raises(UserError, match="line 1: 'a' is given already"):
        yaml_file.read("{a: 1, 'a': 2}")


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"train.lr": 0.5, "train": {"epochs": 4}}, {"train": {"lr": 0.5, "epochs": 4}}),
        (
            {"gossip.momentum": 0.5, "gossip": "DSGD"},
            {"gossip": {"class_path": ".DSGD", "init_args": {"momentum": 0.5}}},
        ),
        (
            {"gossip.momentum": 0.5, "gossip": {"class_path": "DSGD", "init_args": {"nesterov": True}}},
            {"gossip": {"class_path": ".DSGD", "init_args": {"momentum": 0.5, "nesterov": True}}},
        ),
        (
            {"gossip.rule.momentum": 0.5, "gossip.rule": "DSGD", "gossip": "LocalSteps", "gossip.every": 3},
            {
                "gossip": {
                    "class_path": ".LocalSteps",
                    "init_args": {"every": 3, "rule": {"init_args": {"momentum": 0.5}}},
                }
            },
        ),
        ({"data": {"private.limit": 50, "private": "Digits"}}, {"data": {"private": {"init_args": {"limit": 50}}}}),
        ({"data": {"validation": 0.3}, "data.private.limit": 50}, {"data": {"private": {"init_args": {"limit": 50}}}}),
        ({"run.keep": [1], "run": {"threads": 1}}, {"run": {"keep": [1], "threads": 1}}),
        (
            {"train.schedule.gamma": 0.5, "train": {"schedule": "Step"}},
            {"train": {"schedule": {"init_args": {"gamma": 0.5}}}},
        ),
    ],
    ids=str,
)
def test_dotted_keys_beside_their_group_or_class_count_in_any_order(given, expected, turned, tmp_path):
    """As files of W&B's agents have them, whose keys are in alphabetical order."""

    def within(part, whole):
        for k, v in part.items():
            if isinstance(v, dict):
                within(v, whole[k])
            else:
                assert whole[k] == v or (k == "class_path" and whole[k].endswith(v))

    keys = dict(reversed(given.items())) if turned else given
    config = configure(["--data.private", "Digits", *put(tmp_path, json.dumps(keys))])
    within(expected, config.resolved)


def test_a_key_below_null_is_refused(tmp_path, capsys):
    """Else the null cells of a sweep would distil after all."""
    assert main(["fit", *put(tmp_path, "{distillation: null, distillation.start: 3}")]) == 2
    assert "distillation.start: given beside distillation: null" in capsys.readouterr().err


def test_dotted_keys_of_a_users_own_mapping_stay():
    value = {"layer1": {"a": 1}, "layer1.weight": 2}
    assert yaml_file.nest_dotted_keys(value, ("seed", "train")) == value
