"""Reports of runs whose files are written by hand, so that every number in them is known."""

from __future__ import annotations

import base64
import copy
import functools
import itertools
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
from browser import visit
from markdown_it import MarkdownIt

from lightning_idkd.analysis import report
from lightning_idkd.cli import main
from lightning_idkd.config.parse import configure
from lightning_idkd.errors import UserError
from lightning_idkd.records import loggers
from lightning_idkd.records.run_folder import RunFolder
from lightning_idkd.records.run_page import build_run_page
from lightning_idkd.records.run_result import Confusion, Result, drop_shared

HOSTILE = "<script>alert(1)<|script>"
"""A run's name; with a bar instead of a slash, so that a folder may have it."""
CLASS = '"><img src=x onerror=alert(2)> & | `c`'
CONFIG = Path(__file__).parents[3] / "configs" / "ring_digits.yaml"
ACCURACIES = [0.9, 0.8, 0.85, 0.45]


def summary(accuracies=ACCURACIES, **changes):
    means = {
        "node_mean": float(np.mean(accuracies)), "node_std": float(np.std(accuracies)),
        "node_min": min(accuracies), "node_max": max(accuracies), "consensus": 0.77,
        "node_mean_before_final_gossip": 0.7,
    }  # fmt: skip
    return {
        "name": "x", "seed": 0, "nodes": len(accuracies), "steps": 60, "epochs": 12, "engine": "loop",
        "final_gossip": 1, "accuracy": means, "consensus_distance": 0.01, "parameters": 14458,
        "communication": {"parameter_bytes": 9_000_000, "label_bytes": 900_000, "other_bytes": 100_000,
                          "messages": 480, "overhead_at_equal_steps": 0.1, "overhead_at_equal_epochs": 0.1},
        "ood": {"auroc": 0.7, "threshold": 1.5, "kept_fraction": 0.4, "own_kept": 0.9, "noise_kept": 0.1,
                "score": "MSP, log-odds", "threshold_probability": 0.8},
        "homogeneity": {"before": 0.6, "after": 0.25},
        "throughput": {"samples_per_second": 1000.0, "seconds": 61.0},
        "peak_memory_bytes": 10**9, "predicted_memory_bytes": 10**9, "git_commit": "0" * 40, "from": None,
        "per_node": {"accuracy": accuracies, "auroc": [0.9, None, 0.4, 0.8], "threshold": [1.0, 1.5, 1.5, 2.0]},
        "exchanges": [{"epoch": 7, "distilled": [100, 90, 0, 80], "homogeneity": [0.6, 0.25],
                       "kept_fraction": [0.5, 0.3, None, 0.4]}],
        **changes,
    }  # fmt: skip


def metrics(accuracies):
    """Evaluations after 4, 8 and 12 epochs, which send a third of the bytes each."""
    lines = []
    for i, accuracy in enumerate(accuracies, start=1):
        values = dict.fromkeys(("node_mean", "node_min", "node_max", "consensus"), accuracy)
        lines.append({
            "epoch": 4 * i, "step": 20 * i, "phase": "final" if i == 3 else "train", "train/loss": 1 / i,
            "consensus_distance": 0.01, "communication/parameter_bytes": 3_000_000 * i,
            **{f"accuracy/{key}": value for key, value in values.items()},
        })  # fmt: skip
    return lines


@functools.cache
def resolve(*options):
    return configure(["--config", str(CONFIG), "--graph.nodes", "4", "--run.dir", "runs", *options]).resolved


def write_run(folder, lines=(0.3, 0.5, 0.75), options=(), **changes):
    """A finished run of four nodes in ``folder``."""
    folder.mkdir(parents=True)
    name = folder.parent.name
    config = copy.deepcopy(resolve(*options))
    config["run"]["name"] = name
    run = RunFolder(folder)
    run.yaml("config.yaml", config)
    run.json("summary.json", summary(**changes) | {"name": name})
    run.start_log(metrics(lines))
    histogram = [[5, 0], [0, 5], [3, 3], [1, 9]]
    data = {"classes": ["one", CLASS], "public": {"images": 300}}
    run.json("partition.json", {
        "hash": "abc", "data": data, "histogram": histogram,
        "sizes": {"train": [4, 4, 5, 8], "validation": [1, 1, 1, 2]},
    })  # fmt: skip
    ring = {"positions": [[0, 1], [1, 0], [0, -1], [-1, 0]], "edges": [[0, 1], [1, 2], [2, 3], [0, 3]],
            "steps": "", "spectral_gap": 0.5}  # fmt: skip
    shares = {"own": [0.5, 0.5], "public": [0.9, 0.1], "noise": [], "low": 0.0, "high": 2.0, "held_out": True}
    run.make_folder("plots")
    run.json("plots/report.json", {
        "classes": ["one", CLASS], "graph": ring, "liars": [], "environment": {"Python": "3.99", "device": "cpu"},
        "label_mass": {"before": histogram, "after": [[5, 5], [5, 5], [3, 3], [5, 9]]},
        "detector": {"score": f"MSP {CLASS}",
                     "histograms": [{"node": i, "threshold": 1.0, **shares} for i in range(4)],
                     "roc": {"nodes": [{"node": 0, "kept": [0, 0.8, 1], "at": [0.3, 0.6]}], "mean": [0, 0.8, 1]}},
    })  # fmt: skip
    return run


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / HOSTILE / "20260102-030405-s0")


class Page(HTMLParser):
    """The elements of a page with their attributes, in order, and its text."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.text = [], ""
        self.feed(text)
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += f" {data}"

    def all(self, *tags):
        return [attributes for tag, attributes in self.elements if tag in tags]


def read_page(run, control=None, confusion=None):
    return Page(build_run_page(Result.read(run, run.summary()), control, confusion))


# ---------------------------------------------------------------------- one file, safe and accessible


def test_a_report_runs_one_script_loads_nothing_and_shows_hostile_names_as_text(run):
    page = read_page(run, confusion=Confusion(np.eye(2, dtype=int), ["one", CLASS]))
    assert len(page.all("script")) == 1
    assert not page.all("iframe", "object", "embed", "base", "form")
    for attributes in page.all("script", "img", "image", "link", "a", "use", "source"):
        for key in ("src", "href", "srcset", "xlink:href"):
            assert attributes.get(key, "#").startswith(("#", "data:")), attributes
    assert not [key for _, attributes in page.elements for key in attributes if key.startswith("on")]
    assert HOSTILE in page.text
    assert CLASS in page.text
    assert f"MSP {CLASS}" in page.text
    policy = next(m["content"] for m in page.all("meta") if "http-equiv" in m)
    assert policy.startswith("default-src 'none'; img-src data:; ")


def test_pictures_have_texts_and_headings_come_in_order(run):
    page = read_page(run, confusion="no data here")
    assert page.all("html") == [{"lang": "en"}]
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    for attributes in page.all("svg"):
        assert attributes.get("aria-label") or attributes.get("aria-hidden") == "true"
    names = {attributes["href"][1:] for attributes in page.all("a")}
    assert names == {attributes["id"] for attributes in page.all("h2")}
    assert {"result", "curves", "labels", "detector", "nodes", "confusion", "communication", "config"} < names


# ---------------------------------------------------------------------- what it says


def test_a_report_says_what_was_run_and_its_result(run):
    page = read_page(run)
    assert (
        "4 nodes on a graph Ring train one CNN of 14,458 parameters each for 12 epochs (60 steps) by QGDSGDm. They "
        "share the 21 training samples of Digits (2 classes), divided by Dirichlet (alpha 0.05). By IDKD they exchange "
        "labels of 300 public samples (Glyphs) once, first after epoch 7."
    ) in page.text
    for text in ("node mean 75.0% sd 17.7%", "worst node 45.0% best 90.0%", "consensus model 77.0%",
                 "heterogeneity 0.25 0.60 before exchanges", "sent 10 MB +10.00% by exchanges"):  # fmt: skip
        assert text in page.text, text
    assert (
        "parameters 9 MB 90.00% 2.25 MB labels 900 kB 9.00% 225 kB other 100 kB 1.00% 25 kB in all 10 MB" in page.text
    )
    assert "git checkout " + "0" * 40 in page.text
    assert f"idkd fit --config 'runs/{HOSTILE}/20260102-030405-s0/config.yaml'" in page.text
    assert "Python 3.99" in page.text
    assert "started 2026-01-02 03:04" in page.text


def test_a_users_class_has_its_import_path_in_the_report(tmp_path):
    """A rule of the project's name, in the sentence and among the values that differ from the defaults."""
    run = write_run(tmp_path / "mine" / "20260102-030405-s0")
    config = run.config()
    config["gossip"]["class_path"] = "mine.QGDSGDm"
    run.yaml("config.yaml", config)
    text = read_page(run).text
    assert "(60 steps) by mine.QGDSGDm." in text
    assert "gossip mine.QGDSGDm QGDSGDm" in text


def test_to_repeat_a_fork_its_checkpoint_must_exist(tmp_path):
    run = write_run(tmp_path / "whole" / "20260102-030405-s0")
    assert "another run" not in read_page(run).text
    fork = write_run(tmp_path / "fork" / "20260102-030405-s0", options=("--run.from", "runs/a/latest/x.ckpt"))
    assert "begins at the checkpoint runs/a/latest/x.ckpt of another run, which must exist too" in read_page(fork).text


def test_points_to_note_follow_from_the_summary(run):
    page = read_page(run)
    for text in (
        "Before epoch 8, node 2 got no distilled samples.",
        "At node 2, the score ranks public samples above the node's own held-out ones (AUROC below 0.5).",
        "No AUROC is known at node 1: no samples are held out there.",
        "The worst node is 30.0 points below the mean.",
    ):
        assert text in page.text, text
    assert "-dirty" not in page.text
    run.json("summary.json", summary([0.75] * 4, exchanges=[], git_commit="1" * 40 + "-dirty", notes=["a remark"],
                                     faults={"lost": 0.2, "absent": 0.05, "liars": 1, "liars_mean": 0.1}))  # fmt: skip
    page = read_page(run)
    assert "Lying nodes: 1. They count in no mean; their own mean accuracy is 10.0%." in page.text
    assert "Faults took 20.0% of the messages, and nodes were absent in 5.0% of their steps." in page.text
    assert "The code differed from its commit (-dirty)" in page.text
    assert "A remark." in page.text
    assert "worst node is" not in page.text


def test_the_control_stands_beside_its_run(run):
    options = [
        "--distillation",
        "null",
        "--run.from",
        f"elsewhere/{HOSTILE}/20260102-030405-s0/checkpoints/epoch_7.ckpt",
    ]
    folder = run.path.parent.parent / f"{HOSTILE}_control"
    write_run(folder / "20260102-040000-s0", (0.3, 0.4, 0.6), options, accuracies=[0.6] * 4, exchanges=[])
    write_run(folder / "20260102-050000-s0", options=[*options, "--train.lr", "3"])  # newer, of another experiment
    found = report.find_control(Result.read(run, run.summary()))
    assert found.folder.path.name == "20260102-040000-s0"
    page = read_page(run, found)
    assert "15.0 points above the control" in page.text
    assert "15.0 points below the control" in page.text  # the worst node
    assert "difference +15.0 -15.0 +0.0" in page.text
    # both share the first evaluation, from which the control's curve begins
    drawn = [line["epoch"] for line in drop_shared(found.lines, run.metrics())]
    assert drawn == [4, 8, 12]
    same = [line["epoch"] for line in drop_shared(run.metrics(), run.metrics())]
    assert same == [12]
    (folder / "20260102-040000-s0" / "config.yaml").write_text("[")
    assert report.find_control(Result.read(run, run.summary())) is None


def test_the_table_of_nodes_sorts_by_all_digits_and_leaves_out_what_no_node_has(run):
    page = read_page(run)
    assert "node accuracy training samples classes held out distilled AUROC threshold 0 90.00%" in page.text
    values = [attributes.get("data-value") for attributes in page.all("td")]
    for accuracy in ACCURACIES:
        assert repr(accuracy) in values
    assert "" in values  # the unknown AUROC
    assert [attributes.get("scope") for attributes in page.all("th")].count("row") >= 4


def test_a_confusion_matrix_has_shares_of_its_rows_and_counts_to_read(run):
    counts = np.array([[3, 1], [0, 0]])
    page = read_page(run, confusion=Confusion(counts, ["one", CLASS]))
    assert "The consensus model on 4 test samples, 75.0% right." in page.text
    titles = [attributes["title"] for attributes in page.all("td") if "title" in attributes]
    assert titles[:2] == ["one taken for one: 3 of 4", f"one taken for {CLASS}: 1 of 4"]
    assert "one 75 25" in page.text
    assert "There is no confusion matrix: the set is missing" in read_page(run, confusion="the set is missing").text


def test_of_many_classes_the_most_frequent_mistakes_are_listed(run):
    counts = 10 * np.eye(30, dtype=int)
    counts[3, 7], counts[8, 2] = 40, 5
    page = read_page(run, confusion=Confusion(counts, [f"class {i}" for i in range(30)]))
    assert "class 3 class 7 80.0% 40 class 8 class 2 33.3% 5" in page.text
    assert len(page.all("image")) == 1


def test_a_run_without_stored_numbers_shows_its_pictures(run):
    run.file("plots/report.json").unlink()
    run.file("plots/roc.png").write_bytes(b"\x89PNG")
    page = read_page(run)
    assert [image["alt"] for image in page.all("img")] == ["ROC of the nodes' detectors"]
    assert "Scores: plots/scores.png was not drawn (run.pictures)." in page.text
    assert "The labels after the exchanges are not stored with this run." in page.text


def test_a_run_without_distillation_has_no_detector(tmp_path):
    none = {"ood": {"threshold": None, "auroc": None, "kept_fraction": None, "score": None}, "exchanges": []}
    run = write_run(tmp_path / "plain" / "20260102-030405-s0", options=["--distillation", "null"], **none)
    page = read_page(run)
    assert "They exchange no labels." in page.text
    assert "Detector" not in page.text


def test_a_report_of_a_thousand_nodes_and_a_hundred_classes_stays_below_four_megabytes(run):
    nodes, classes = 1100, 100
    accuracies = np.random.default_rng(0).random(nodes).tolist()
    per_node = dict.fromkeys(("accuracy", "auroc", "threshold", "kept_fraction", "own_kept", "noise_kept"), accuracies)
    exchanges = [{"epoch": e, "distilled": [e] * nodes, "homogeneity": [0.5, 0.4]} for e in range(500)]
    run.json("summary.json", summary(accuracies, per_node=per_node, exchanges=exchanges))
    run.start_log([line | {"epoch": e} for e in range(1000) for line in metrics([0.5])])
    data = json.loads(run.file("plots/report.json").read_text())
    mass = np.random.default_rng(1).random((nodes, classes)).round(3).tolist()
    edges = [[i, (i + j) % nodes] for i in range(nodes) for j in range(1, 5)]
    data |= {"classes": list(map(str, range(classes))), "label_mass": {"before": mass, "after": mass}}
    data["graph"] |= {"positions": np.random.default_rng(2).random((nodes, 2)).tolist(), "edges": edges}
    run.json("plots/report.json", data)
    text = build_run_page(Result.read(run, run.summary()), None, Confusion(np.ones((100, 100), int), ["c"] * classes))
    assert len(text) < 4_000_000
    assert "Shown are the 1,024 nodes of the lowest accuracy, of 1,100." in Page(text).text


# ---------------------------------------------------------------------- a folder of runs


def test_the_report_of_a_folder_compares_its_methods_and_lists_its_runs(tmp_path):
    for method, accuracy in (("IDKD", 0.8), ("null", 0.7)):
        for seed in (0, 1):
            accuracies = [accuracy + 0.02 * seed] * 4
            options = ["--seed", str(seed), "--distillation", method]
            write_run(tmp_path / "s" / f"{HOSTILE}{method}{seed}" / "20260102-030405-s0", (0.1, 0.2, accuracies[0]),
                      options, accuracies=accuracies, seed=seed)  # fmt: skip
    unfinished = tmp_path / "s" / "half" / "20260102-030405-s0"
    (unfinished / "checkpoints").mkdir(parents=True)
    (unfinished / "config.yaml").write_text("{}")
    first = tmp_path / "s" / f"{HOSTILE}IDKD0" / "20260102-030405-s0"
    assert main(["report", str(first), "--quick"]) == 0
    assert main(["report", str(tmp_path / "s")]) == 0
    page, text = Page((tmp_path / "s" / "report.html").read_text()), (tmp_path / "s" / "report.md").read_text()
    assert len(page.all("script")) == 1
    assert "4 runs of 2 methods in 1 setting, seeds 0, 1." in page.text
    assert "Not finished: 1." in page.text
    charts = [figure["aria-label"] for figure in page.all("svg") if "aria-label" in figure]
    assert [text.split(" over")[0] for text in charts] == ["Test accuracy, node mean,", "Test accuracy, worst node,"]
    # mean of 80 and 82, sd sqrt(2), and the difference to none in both seeds 10
    assert "IDKD 2 81.0 ± 1.4 (2)" in page.text
    assert "+10.0 ± 0.0 (2)" in page.text
    assert "| IDKD | 2 | 81.0 ± 1.4 (2)" in text
    (link,) = (a["href"] for a in page.all("a") if a["href"][0] != "#")
    assert link == "%3Cscript%3Ealert%281%29%3C%7Cscript%3EIDKD0/20260102-030405-s0/report.html"
    html = MarkdownIt("commonmark").enable("table").render(text)
    allowed = {"h1", "h2", "p", "em", "table", "thead", "tbody", "tr", "th", "td", "ul", "li", "a"}
    assert {tag for tag, _ in Page(html).elements} <= allowed


def test_the_report_of_a_search_draws_its_pictures_anew_and_shows_each_once(tmp_path, monkeypatch):
    write_run(tmp_path / "s" / "cell" / "20260102-030405-s0")
    (tmp_path / "s" / "search.db").touch()
    (tmp_path / "s" / "large.png").write_bytes(b"0" * 1_000_000)

    def draw(folder):
        for name in ("importance.svg", "importance.png", "trials.png"):
            Path(folder, name).write_bytes(name.encode())

    monkeypatch.setattr("lightning_idkd.sweep.search_pictures.write_search_pictures", draw)
    assert main(["report", str(tmp_path / "s")]) == 0
    images = Page((tmp_path / "s" / "report.html").read_text()).all("img")
    assert [(i["alt"], i["src"].split(";")[0]) for i in images] == [
        ("importance", "data:image/svg+xml"), ("trials", "data:image/png"),
    ]  # fmt: skip
    assert [base64.b64decode(i["src"].split(",")[1]) for i in images] == [b"importance.svg", b"trials.png"]


def test_the_report_of_a_run_in_markdown_shows_hostile_names_as_text(run, capsys):
    run.file("plots/<b> `x`|.png").write_bytes(b"")
    assert main(["report", str(run.path), "--quick"]) == 0
    assert capsys.readouterr().out.split() == [str(run.file(f"report.{end}")) for end in ("md", "html")]
    page = Page(MarkdownIt("commonmark").enable("table").render(run.file("report.md").read_text()))
    assert {tag for tag, _ in page.elements} == {"h1", "h2", "p", "table", "thead", "tbody", "tr", "th", "td", "img",
                                                 "pre", "code"}  # fmt: skip
    assert f"{HOSTILE}, seed 0: 4 nodes, 12 epochs, 60 steps" in page.text
    assert page.all("img") == [{"src": "plots/%3Cb%3E%20%60x%60%7C.png", "alt": "<b> `x`|"}]


# ---------------------------------------------------------------------- mistakes


def test_mistakes_are_sentences(run, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    unfinished = write_run(tmp_path / "half" / "20260102-030405-s0")
    unfinished.file("summary.json").unlink()
    damaged = write_run(tmp_path / "damaged" / "20260102-030405-s0")
    damaged.json("summary.json", {"seed": 0, "name": "x"})
    for arguments, words in (
        ([str(tmp_path / "nowhere")], "does not exist"),
        ([str(tmp_path / "empty")], "is not a run folder, and there is no finished run below it"),
        ([str(unfinished.path)], "has not finished; continue it with --run.resume auto"),
        ([str(damaged.path), "--quick"], "is damaged, or not the summary of a run"),
        ([str(run.path), "--baseline", "none"], "--baseline: none given for a single run"),
        ([str(tmp_path), "--baseline", "nune"], "--baseline: 'nune' given"),
    ):
        assert main(["report", *arguments]) == 2, arguments
        error = capsys.readouterr().err
        assert words in error
        assert "Traceback" not in error


def test_without_the_data_of_a_run_the_report_says_why_there_is_no_confusion_matrix(run):
    assert main(["report", str(run.path)]) == 0
    text = Page(run.file("report.html").read_text()).text
    assert "There is no confusion matrix: " in text
    assert "has no checkpoint final.ckpt" in text or "has no checkpoint last.ckpt" in text


# ---------------------------------------------------------------------- W&B


def make_logger(run, monkeypatch):
    """A W&B logger of the run, and what it logs, as pairs of step and values."""
    import wandb

    logged = []
    fake = MagicMock(offline=True)
    fake.log = lambda values, step=None, commit=None: logged.append((step, values, commit))
    monkeypatch.setattr(wandb, "init", lambda **arguments: fake)
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = configure(["--config", str(CONFIG), "--logger.offline", "true"])
    return loggers.WandB(config, run), logged


def test_wandb_gets_the_report_with_the_last_line(run, monkeypatch):
    import wandb

    logger, logged = make_logger(run, monkeypatch)
    lines = [line | {"per_node": {"accuracy": ACCURACIES}} for line in run.metrics()]
    logger.write(lines, {})
    logger.finish(run.summary())
    (step, values, commit) = logged[-1]
    assert (step, commit) == (60, True)
    assert isinstance(values["report"], wandb.Html)
    assert values["report"].html == build_run_page(Result.read(run, run.summary()))
    assert [commit for step, values, commit in logged if "accuracy/node_mean" in values] == [True, True, False]


def test_a_report_that_fails_costs_wandb_nothing_else(run, monkeypatch, capsys):
    logger, logged = make_logger(run, monkeypatch)
    given = copy.deepcopy(run.summary())
    del given["homogeneity"]
    logger.finish(given)
    assert not logged
    assert "W&B gets no report of this run (UserError: " in capsys.readouterr().out
    logger.run.finish.assert_called_once_with(exit_code=0)


# ---------------------------------------------------------------------- in a browser


@pytest.mark.slow
def test_a_browser_shows_it_without_errors_on_any_screen_and_sorts_by_keyboard(run, tmp_path):
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no chromium in the PATH")
    page = build_run_page(Result.read(run, run.summary()), None, Confusion(np.eye(2, dtype=int), ["one", CLASS]))
    file = tmp_path / "report.html"
    file.write_text(page, encoding="utf-8")
    column = "[...document.querySelectorAll('#nodes ~ .scroll tbody tr')].map(r => r.cells[%d].textContent).join()"
    heading = "document.querySelectorAll('#nodes ~ .scroll th button')[%d]"

    async def use(page):
        grounds = set()
        for width in (400, 1200):
            for scheme in ("light", "dark"):
                await page.open(file, width, scheme)
                assert await page.evaluate("document.documentElement.scrollWidth") == width
                assert {address.split(":")[0] for address in page.addresses} <= {"file", "data"}, page.addresses
                grounds.add(await page.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert len(grounds) == 2
        assert await page.evaluate(column % 1) == "90.00%,80.00%,85.00%,45.00%"
        for order, shown in (
            ("ascending", "45.00%,80.00%,85.00%,90.00%"),
            ("descending", "90.00%,85.00%,80.00%,45.00%"),
        ):
            await page.evaluate(f"{heading % 1}.focus()")
            await page.press("Enter")
            assert await page.evaluate(column % 1) == shown
            assert await page.evaluate(f"{heading % 1}.closest('th').getAttribute('aria-sort')") == order
        await page.evaluate(f"{heading % 6}.click()")
        assert await page.evaluate(column % 6) == "0.400,0.800,0.900,–"  # what is not known stays last
        assert await page.evaluate("document.querySelectorAll('[aria-sort]').length") == 1
        assert not page.messages

    visit(program, tmp_path / "profile", use)


def test_the_report_command_names_a_users_mistake(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        report.write_report(str(tmp_path / "x"))
