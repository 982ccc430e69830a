"""Tables over runs whose summaries are written by hand."""

from __future__ import annotations

import csv
import io
import json
import math

import pytest
import yaml

from lightning_idkd.analysis.row_labels import build_sort_key, shorten
from lightning_idkd.analysis.rows import gather
from lightning_idkd.analysis.table import build_table, format_number, format_table
from lightning_idkd.cli import main

METRIC = "accuracy/node_mean"


@pytest.fixture
def runs(tmp_path):
    """Three methods with seeds 0, 1, 2 at one alpha, the first also at another; VanillaKD lacks seed 2."""
    values = {
        (0.1, None): [0.50, 0.52, 0.60],
        (0.1, "VanillaKD"): [0.53, 0.56],
        (0.1, "IDKD"): [0.54, 0.59, 0.68],
        (1.0, None): [0.7, 0.7, 0.7],
    }
    for (alpha, method), accuracies in values.items():
        for seed, accuracy in enumerate(accuracies):
            folder = tmp_path / f"{method}-{alpha}" / str(seed)
            folder.mkdir(parents=True)
            config = {
                "seed": seed, "graph": {"nodes": 16}, "node": {}, "train": {"lr": 0.1}, "run": {"precision": 32},
                "data": {"partition": {"class_path": "x.Dirichlet", "init_args": {"alpha": alpha}}},
                "gossip": {"class_path": "lightning_idkd.callbacks.DSGD", "init_args": {"momentum": 0.9}},
                "calibration": None, "callbacks": [],
                "distillation": method and {"class_path": f"lightning_idkd.callbacks.{method}",
                                            "init_args": {"start": 0.6}},
            }  # fmt: skip
            (folder / "config.yaml").write_text(yaml.safe_dump(config))
            summary = {"seed": seed, "accuracy": {"node_mean": accuracy}, "communication": {"label_bytes": 10}}
            (folder / "summary.json").write_text(json.dumps(summary))
    return tmp_path


def table(runs, baseline="none"):
    head, lines = build_table(gather([str(runs)]), [METRIC], baseline)
    cells = [
        [*map(str, line[:3]), *("-" if c is None else format_number(METRIC, *c) for c in line[3:])] for line in lines
    ]
    return head, cells


def test_rows_are_methods_in_settings_with_mean_and_deviation_over_seeds(runs):
    head, lines = table(runs, None)
    assert head == ["setting", "method", "seeds", METRIC]
    assert lines == [
        ["alpha=0.1", "IDKD", "3", "60.3 ± 7.1 (3)"],
        ["alpha=0.1", "VanillaKD", "2", "54.5 ± 2.1 (2)"],
        ["alpha=0.1", "none", "3", "54.0 ± 5.3 (3)"],
        ["alpha=1.0", "none", "3", "70.0 ± 0.0 (3)"],
    ]


def test_differences_are_paired_by_seed(runs):
    """IDKD gains 4, 7, 8 points; VanillaKD 3 and 4 on the two seeds that both have."""
    head, lines = table(runs)
    assert head[-1] == "against none"
    idkd = math.sqrt(((4 - 19 / 3) ** 2 + (7 - 19 / 3) ** 2 + (8 - 19 / 3) ** 2) / 2 / 3)
    assert [line[-1] for line in lines] == [f"6.3 ± {idkd:.1f} (3)", "3.5 ± 0.5 (2)", "-", "-"]


def test_of_runs_with_one_config_the_newest_counts(runs):
    again = runs / "None-0.1" / "1"
    newer = runs / "A name that comes first" / "9"
    newer.mkdir(parents=True)
    (newer / "config.yaml").write_text((again / "config.yaml").read_text())
    (newer / "summary.json").write_text(json.dumps({"seed": 1, "accuracy": {"node_mean": 0.62}}))
    assert table(runs, None)[1][2] == ["alpha=0.1", "none", "3", "57.3 ± 6.4 (3)"]


def test_markdown_csv_and_latex_hold_the_same_cells(runs, capsys):
    for form, wanted in (
        ("markdown", "| alpha=0.1 | IDKD | 3 | 60.3 ± 7.1 (3) |"),
        ("csv", "alpha=0.1,IDKD,3,0.603"),
        ("latex", r"alpha=0.1 & IDKD & 3 & 60.3 $\pm$ 7.1 (3) \\"),
    ):
        assert main(["compare", str(runs), "--metrics", METRIC, "--format", form]) == 0
        assert wanted in capsys.readouterr().out


def test_latex_headings_are_words_and_all_special_characters_are_escaped(runs, capsys):
    metrics = [METRIC, "communication/label_bytes", "ood/kept_fraction", "validation/node_mean", "my_own"]
    for path in runs.rglob("summary.json"):
        more = {"ood": {"kept_fraction": 0.5}, "validation": {"node_mean": 0.25}, "my_own": 3}
        path.write_text(json.dumps(json.loads(path.read_text()) | more))
    assert main(["compare", str(runs), "--metrics", *metrics, "--baseline", "none", "--format", "latex"]) == 0
    head = capsys.readouterr().out.split("\\toprule\n")[1].splitlines()[0]
    assert head == (
        r"setting & method & seeds & node mean (\%) & labels sent, bytes & share of public samples kept & "
        r"validation, node mean (\%) & my own & node mean (\%), difference to none \\"
    )
    text = r"a_b 5% {x} #1 & $y ~z ^w \v <u>"
    escaped = r"a\_b 5\% \{x\} \#1 \& \$y \textasciitilde{}z \textasciicircum{}w \textbackslash{}v $<$u$>$"
    assert escaped in format_table(["setting", "method", "seeds"], [["-", text, 1]], "latex")


def test_of_one_seed_there_is_no_spread_and_beside_every_spread_is_its_number_of_seeds(runs):
    one = runs / "None-0.1"
    for seed in ("1", "2"):
        (one / seed / "summary.json").unlink()
    lines = table(runs)[1]
    assert [line[2:] for line in lines] == [
        ["3", "60.3 ± 7.1 (3)", "4.0"], ["2", "54.5 ± 2.1 (2)", "3.0"], ["1", "50.0", "-"], ["3", "70.0 ± 0.0 (3)", "-"]
    ]  # fmt: skip


def test_a_plot_has_a_panel_a_metric_and_a_dot_a_row(runs, monkeypatch):
    from lightning_idkd.analysis import figures

    drawn, dots = [], figures.draw_dots
    monkeypatch.setattr(figures, "draw_dots", lambda *given: drawn.append(dots(*given)) or drawn[0])
    metrics = ["accuracy/node_mean", "communication/label_bytes"]
    file = runs / "plot.png"
    assert main(["compare", str(runs), "--metrics", *metrics, "--plot", str(file)]) == 0
    assert file.stat().st_size > 1000
    first, second = drawn[0].axes
    labels = [t.get_text() for t in first.get_yticklabels()]
    assert labels == ["alpha=0.1 IDKD", "alpha=0.1 VanillaKD", "alpha=0.1 none", "alpha=1.0 none"]
    means = [float(c.lines[0].get_xdata()[0]) for c in first.containers]
    assert means == pytest.approx([60.33333, 54.5, 54.0, 70.0])
    assert [float(c.lines[0].get_xdata()[0]) for c in second.containers] == [10] * 4
    assert [t.get_text() for t in first.texts] == ["3 seeds", "2 seeds", "3 seeds", "3 seeds"]
    assert [axes.get_xlabel() for axes in drawn[0].axes] == ["node mean (%)", "labels sent, bytes"]


def test_csv_has_all_digits_and_names_its_spreads(runs):
    head, idkd, _, _, last = format_table(*build_table(gather([str(runs)]), [METRIC], "none"), "csv").splitlines()
    columns = [f"{name}{end}" for name, sd in ((METRIC, " sd"), ("against none", " se")) for end in ("", sd, " seeds")]
    assert head == f"setting,method,seeds,{','.join(columns)}"
    assert float(idkd.split(",")[3]) == pytest.approx(1.81 / 3, rel=1e-12)
    assert idkd.split(",")[5] == "3"
    assert last.endswith(",,,0")


def copy(runs, name, **change):
    """One more run, of the config of the first one with some keys changed."""
    folder = runs / name / "0"
    folder.mkdir(parents=True)
    config = yaml.safe_load((runs / "None-0.1" / "0" / "config.yaml").read_text()) | change
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "summary.json").write_text(json.dumps({"seed": 0, "accuracy": {"node_mean": 0.5}}))


def test_values_are_in_the_order_of_their_numbers(runs):
    for alpha in (100, 10, 2.5, 1e-05, None):
        copy(runs, f"more-{alpha}", data={"partition": {"class_path": "x.Dirichlet", "init_args": {"alpha": alpha}}})
    settings = list(dict.fromkeys(line[0] for line in table(runs, None)[1]))
    assert settings == [f"alpha={v}" for v in ("1e-05", "0.1", "1.0", "2.5", "10", "100", "none")]
    assert sorted(["x-10", "x-2", "y=-10", "y=-2", "y=3", "D2", "D10"], key=build_sort_key) == [
        "D2", "D10", "x-2", "x-10", "y=-10", "y=-2", "y=3"
    ]  # fmt: skip


def test_a_run_with_another_callback_or_node_module_leaves_the_others_labels_alone(runs):
    copy(runs, "named", node={"module": "lightning_idkd.node.NodeModule"}, train={"lr": 0.2})
    before = {tuple(line[:2]) for line in table(runs, None)[1]}
    drop = {"class_path": "pack.age.Drop", "init_args": {"p": 0.1}}
    copy(runs, "callback", callbacks=[drop])
    copy(runs, "two", callbacks=[drop, {"class_path": "pack.Watch"}])
    copy(runs, "module", node={"module": "my.own.Margins"}, train={"lr": 0.2})
    after = {tuple(line[:2]) for line in table(runs, None)[1]}
    assert after - before == {
        ("alpha=0.1 lr=0.1", "none +pack.age.Drop"), ("alpha=0.1 lr=0.1", "none +pack.age.Drop+pack.Watch"),
        ("alpha=0.1 module=my.own.Margins lr=0.2", "none"),
    }  # fmt: skip
    assert before <= after


def test_a_run_with_faults_names_them_and_the_others_have_none(runs):
    lost = {"class_path": "lightning_idkd.callbacks.MessageLoss", "init_args": {"p": 0.1}}
    copy(runs, "lossy", faults=[lost])
    settings = {line[0] for line in table(runs, None)[1] if "alpha=0.1" in line[0]}
    assert {setting.split()[1] for setting in settings} == {"faults=none", "faults=MessageLoss"}


def test_rows_of_one_label_differ_by_further_keys_whichever_run_is_newer(tmp_path, runs):
    copy(runs, "a", run={"precision": 64})
    copy(runs, "b", distillation={"class_path": "mine.IDKD", "init_args": {"start": 0.6}})
    methods = [line[1] for line in table(runs, None)[1] if line[0] == "alpha=0.1"]
    assert methods == ["IDKD", "VanillaKD", "mine.IDKD", "none precision=32", "none precision=64"]


def test_users_classes_have_their_import_paths_so_that_no_label_collides(runs):
    """Rules of one name in the project and in two modules, and no class path of the project in full."""
    for module in ("mine", "other"):
        copy(runs, module, gossip={"class_path": f"{module}.DSGD", "init_args": {"momentum": 0.9}})
    methods = [line[1] for line in table(runs, None)[1] if line[0] == "alpha=0.1"]
    assert methods == ["DSGD IDKD", "DSGD VanillaKD", "DSGD none", "mine.DSGD none", "other.DSGD none"]


def test_labels_that_collide_get_one_short_key_that_separates_all_rows(tmp_path, runs):
    """Of the first of two callbacks of one class, p separates two of three rows, and q all of them."""
    for p, q in ((1, 5), (1, 6), (2, 7)):
        both = [{"class_path": "pack.Drop", "init_args": given} for given in ({"p": p, "q": q}, {"p": 0, "q": 0})]
        copy(runs, f"{q}", callbacks=both)
    methods = [line[1] for line in table(runs, None)[1] if "Drop" in line[1]]
    assert methods == [f"none +pack.Drop+pack.Drop q={q}" for q in (5, 6, 7)]


def test_two_classes_of_the_project_with_one_name_have_their_class_paths_as_the_last_resort(runs):
    copy(runs, "older", gossip={"class_path": "lightning_idkd.older.DSGD", "init_args": {"momentum": 0.9}})
    methods = {line[1] for line in table(runs, None)[1] if line[1].startswith("none") and line[0] == "alpha=0.1"}
    paths = ("callbacks", "older")
    assert methods == {f"none class_path=lightning_idkd.{package}.DSGD" for package in paths}


def test_runs_with_equal_labels_but_different_configs_are_separate_rows(runs):
    """A key outside a method's and a setting's groups, and the argument of an extra callback."""
    drops = [{"callbacks": [{"class_path": "m.Drop", "init_args": {"p": p}}]} for p in (0.1, 0.5)]
    for name, change in zip("abc", ({"run": {"precision": 64}}, *drops), strict=True):
        copy(runs, name, **change)
    methods = [line[1] for line in table(runs, None)[1]]
    assert len(methods) == len(set(methods)) == 7
    assert any("64" in m or "32" in m for m in methods)
    assert any("p=0.1" in m for m in methods)
    assert any("p=0.5" in m for m in methods)


def test_foreign_files_are_left_out_with_a_line(runs, capsys):
    (runs / "summary").mkdir()
    (runs / "summary" / "summary.json").write_text("{}")
    assert len(table(runs, None)[1]) == 4
    assert "left out" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["config.yaml", "summary.json"])
def test_a_damaged_run_is_left_out_by_the_name_of_its_file(runs, capsys, name):
    copy(runs, "torn", seed=1)
    file = runs / "torn" / "0" / name
    file.write_text("{")
    assert len(table(runs, None)[1]) == 4
    assert capsys.readouterr().err.startswith(f"left out: '{file.resolve()}' is damaged")


@pytest.mark.parametrize(
    "change", [{"accuracy": "high"}, {"seed": [1]}, {"communication": {"label_bytes": "1 MB"}}, {"throughput": 3}]
)
def test_a_run_whose_measures_are_no_numbers_is_left_out(runs, capsys, change):
    copy(runs, "odd", seed=1)
    file = runs / "odd" / "0" / "summary.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    assert len(table(runs, None)[1]) == 4
    assert capsys.readouterr().err == f"left out: '{file.resolve().parent}' is not a run of this version\n"


def test_runs_that_have_not_finished_are_counted(runs, capsys):
    for seed in (0, 1):
        folder = runs / "IDKD-0.1" / str(seed)
        (folder / "checkpoints").mkdir()
        (folder / "summary.json").unlink()
    (runs / "VanillaKD-0.1" / "0" / "checkpoints").mkdir()
    gather([str(runs), str(runs / "IDKD-0.1" / "0" / ".."), str(runs / "VanillaKD-0.1")])
    assert capsys.readouterr().err == "left out: 2 unfinished runs\n"


@pytest.mark.parametrize("metric", ["per_node/accuracy", "ood/auroc", "foo/bar"])
def test_only_metrics_with_a_number_are_suggested(runs, capsys, metric):
    for path in runs.rglob("summary.json"):
        more = {"per_node": {"accuracy": [0.1, 0.2]}, "ood": {"auroc": None}, "peak": 3}
        path.write_text(json.dumps(json.loads(path.read_text()) | more))
    assert main(["compare", str(runs), "--metrics", metric]) == 2
    allowed = "accuracy/node_mean, communication/label_bytes, peak, seed"
    assert capsys.readouterr().err.endswith(f"error: --metrics: no run has a number '{metric}'. Allowed: {allowed}\n")
    assert main(["compare", str(runs), "--metrics", "accuracy"]) == 2
    assert capsys.readouterr().err.endswith("'accuracy'. Allowed: accuracy/node_mean\n")
    assert main(["compare", str(runs), "--metrics", "acuracy/node_men"]) == 2
    assert capsys.readouterr().err.endswith("Did you mean 'accuracy/node_mean'?\n")


def test_the_terminal_shows_every_setting_whole(runs, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    assert main(["compare", str(runs), "--metrics", METRIC, "--baseline", "none"]) == 0
    said = capsys.readouterr().out
    assert "…" not in said
    assert said.count("alpha=0.1") == 3


def test_settings_are_named_by_the_shortest_distinct_ends_of_their_keys():
    keys = {"data.partition.alpha", "train.lr", "gossip.alpha", "graph.nodes"}
    assert [shorten(key, keys) for key in sorted(keys)] == ["partition.alpha", "gossip.alpha", "nodes", "lr"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], ["nowhere", "does not exist"]),
        (["{runs}", "--metrics", "accuracy/node_men"], ["accuracy/node_men", "'accuracy/node_mean'"]),
        (["{runs}", "--metrics", METRIC, "--baseline", "IDK"], ["--baseline", "IDK", "'IDKD'", "VanillaKD"]),
        (["{runs}", "--format", "html"], ["format", "html", "latex"]),
        (["{runs}", "--metrics", METRIC, "--plot", "{runs}/x.docx"], ["--plot", "x.docx", "png"]),
        (["{runs}", "--metrics", METRIC, "--plot", "{runs}/no/x.png"], ["--plot", "a folder that exists"]),
        (["{runs}", "--metrics", METRIC, "--plot", "{runs}/t"], ["--plot", ".pdf, .svg or .png"]),
        (["{runs}", "--metrics", METRIC, "--plot", "{runs}/t.gif", "--x", "bytes"], ["--plot", ".pdf, .svg or .png"]),
        (["{runs}/empty"], ["no finished run"]),
    ],
)
def test_mistakes(runs, capsys, arguments, words):
    (runs / "empty").mkdir()
    assert main(["compare", *(a.format(runs=runs) for a in arguments)]) == 2
    said = capsys.readouterr().err
    for word in words:
        assert word in said


# ---------------------------------------------------------------------- over epochs, bytes and simulated time


@pytest.fixture
def evaluated(runs):
    """The runs at alpha 0.1 without distillation and with IDKD, whose evaluations are at epochs 1, 2 and 3.

    In them accuracies are 0.1, 0.2 and 0.3 plus a tenth of the seed, and with IDKD 0.1 more.
    """
    for method, more, second in (("None", 0.0, 5.0), ("IDKD", 0.1, 7.0)):
        for seed in range(3):
            lines = []
            for epoch in (1, 2, 3):
                lines.append({
                    "epoch": epoch, METRIC: 0.1 * (epoch + seed) + more, "communication/parameter_bytes": 100 * epoch,
                    "communication/label_bytes": 10, "communication/messages": 4,
                    "time/simulated": second * epoch + seed,
                })  # fmt: skip
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (runs / f"{method}-0.1" / str(seed) / "metrics.jsonl").write_text(text)
    return [str(runs / "None-0.1"), str(runs / "IDKD-0.1")]


def test_a_target_adds_epochs_bytes_and_seconds_of_the_first_evaluation_that_reaches_it(evaluated, capsys):
    given = ["--metrics", METRIC, "--target", "0.39", "--format", "csv"]
    assert main(["compare", *evaluated, *given]) == 0
    head, idkd, none = csv.reader(io.StringIO(capsys.readouterr().out))
    columns = {name: column for column, name in enumerate(head)}
    epochs, sent, seconds = "epochs to 0.39", "bytes sent to 0.39", "simulated seconds to 0.39"

    def cells(line, name):
        assert head[columns[name] + 3] == f"{name} never"
        return [float(line[columns[name] + i]) for i in (0, 2, 3)]  # mean, number of seeds in it, number of others

    # IDKD: seed 0 at epoch 3, seed 1 at 2, seed 2 at 1; without distillation seed 0 never, seed 1 at 3, seed 2 at 2
    assert cells(idkd, epochs) == [2, 3, 0]
    assert cells(idkd, sent) == [210, 3, 0]
    assert cells(idkd, seconds) == [(21 + 15 + 9) / 3, 3, 0]
    assert cells(none, epochs) == [2.5, 2, 1]
    assert cells(none, sent) == [260, 2, 1]
    assert cells(none, seconds) == [(16 + 12) / 2, 2, 1]


@pytest.mark.parametrize(
    ("form", "some", "none"),
    [
        ("table", "3 ± 0 (1 of 3; 2 never)", "never (3)"),
        ("markdown", "| 3 (1 of 3; 2 never) |", "| never (3) |"),
        ("latex", "& 3 (1 of 3; 2 never) &", "& never (3) &"),
    ],
)
def test_seeds_that_never_reach_a_target_are_counted_beside_the_mean_of_the_others(evaluated, capsys, form, some, none):
    """With IDKD seed 2 alone reaches 0.6, at epoch 3; without distillation the best is 0.5."""
    assert main(["compare", *evaluated, "--metrics", METRIC, "--target", "0.6", "--format", form]) == 0
    said = capsys.readouterr().out
    assert some.replace(" ± 0", "") in said
    assert none in said
    assert "never: seeds that do not reach the target, which are not in the mean" in said


def test_a_plot_of_a_target_says_which_seeds_never_reach_it(evaluated, tmp_path, monkeypatch):
    from lightning_idkd.analysis import figures

    drawn, save = [], figures.save
    monkeypatch.setattr(figures, "save", lambda figure, *given: drawn.append(figure) or save(figure, *given))
    given = ["--metrics", METRIC, "--target", "0.6", "--plot", str(tmp_path / "x.svg")]
    assert main(["compare", *evaluated, *given]) == 0
    epochs = drawn[0].axes[1]
    assert [text.get_text() for text in epochs.texts] == ["2 never", "3 never"]
    assert len(epochs.containers) == 1  # of IDKD; no seed without distillation reaches 0.6


def test_a_line_that_another_process_is_writing_is_left_out(evaluated, runs, capsys):
    given = ["compare", *evaluated, "--metrics", METRIC, "--target", "0.39"]
    assert main(given) == 0
    before = capsys.readouterr().out
    for path in runs.rglob("metrics.jsonl"):
        path.write_text(path.read_text() + '{"epoch": 4, "accur')
    assert main(given) == 0
    assert capsys.readouterr().out == before


def test_runs_without_a_clock_reach_a_target_without_seconds(evaluated, runs, capsys):
    for path in runs.rglob("metrics.jsonl"):
        path.write_text(path.read_text().replace("time/simulated", "other"))
    assert main(["compare", *evaluated, "--metrics", METRIC, "--target", "0.39"]) == 0
    head = capsys.readouterr().out.splitlines()[0]
    assert "epochs to 0.39" in head
    assert "seconds" not in head


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--x", "time"], "--x: time given; allowed: with --curves FILE, the picture to draw"),
        (["--x", "tme", "--plot", "x.png"], "x: 'tme' given. Did you mean 'time'? Allowed: epoch, step, bytes, time"),
        (["--target", "60"], "--target: 60.0 given; allowed: a fraction above 0, at most 1"),
        (["--target", "0.8"], "--target: no run has accuracy/node_mean 0.8 in an evaluation; the best has 0.6"),
        (["--target", "0.3", "--metrics", "communication/label_bytes"],
         "--target: the first of --metrics: 'communication/label_bytes' given; allowed: an accuracy"),
        (["--x", "epoch", "--plot", "x.png", "--metrics", "communication/messages", METRIC], "--metrics: no run has"),
    ],
)  # fmt: skip
def test_wrong_axes_and_targets_are_refused(evaluated, tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    metrics = [] if "--metrics" in arguments else ["--metrics", METRIC]
    assert main(["compare", *evaluated, *metrics, *arguments]) == 2
    assert f"error: {said}" in capsys.readouterr().err
    assert not (tmp_path / "x.png").exists()
