"""What an attacker finds: planted leaks are found, and nothing where there is none."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from short_runs import SHORT, run_of
from torch.nn.functional import one_hot

from lightning_idkd.analysis import audit, leakage
from lightning_idkd.analysis.leakage import Attacker, combine, compute_scores, fit_head, infer_distributions
from lightning_idkd.callbacks import SelfTraining
from lightning_idkd.cli import main
from lightning_idkd.labels import Labels

CONFIG = str(Path(__file__).parents[3] / "configs" / "ring_digits.yaml")


def random_numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---------------------------------------------------------------------- label distributions


def planted(share):
    """Distributions of 8 nodes over 5 classes, and evidence whose ratio to the overall one is a power of theirs."""
    true = (2 * random_numbers(8, 5)).softmax(1)
    overall = true.mean(0)
    return true, overall, (overall.log() + share * (true.log() - true.log().mean(0))).softmax(1)


@pytest.mark.parametrize("share", [1.0, 0.1])
def test_a_planted_distribution_is_inferred_from_faint_evidence(share):
    """The estimate starts from the overall distribution, which is not the geometric mean, so it is not exact."""
    true, overall, evidence = planted(share)
    guess = leakage.divergence(true, overall.expand_as(true)).mean()
    inferred = leakage.divergence(true, infer_distributions([evidence], true, overall)).mean()
    assert guess > 0.6
    assert inferred < 0.15 * guess


def test_evidence_that_says_nothing_leaves_the_overall_distribution():
    true, overall, _ = planted(1.0)
    inferred = infer_distributions([torch.full((8, 5), 0.2)], true, overall)
    torch.testing.assert_close(inferred, overall.expand_as(true), rtol=1e-9, atol=0)


def test_the_exponent_for_a_node_does_not_depend_on_its_own_distribution():
    true, overall, evidence = planted(0.5)
    other = true.clone()
    other[3] = torch.tensor([1.0, 0, 0, 0, 0])
    a, b = (infer_distributions([evidence], known, overall) for known in (true, other))
    assert torch.equal(a[3], b[3])


def test_useless_evidence_beside_useful_evidence_does_little_harm():
    true, overall, evidence = planted(0.5)
    noise = random_numbers(8, 5, seed=1).softmax(1)
    alone, both = (infer_distributions(e, true, overall) for e in ([evidence], [evidence, noise]))
    assert leakage.divergence(true, both).mean() < leakage.divergence(true, alone).mean() + 0.1


def test_errors_of_distributions_are_those_of_their_definitions():
    true, wrong = torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([[0.25, 0.25, 0.5]])
    assert leakage.divergence(true, wrong).item() == pytest.approx(math.log(2))
    assert leakage.total_variation(true, wrong).item() == pytest.approx(0.5)


# ---------------------------------------------------------------------- scores


def test_log_odds_are_those_of_the_softmax():
    logits, labels = random_numbers(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
    p = np.exp(logits.numpy())
    p = (p / p.sum(1, keepdims=True))[range(6), labels.numpy()]
    np.testing.assert_allclose(leakage.log_odds(logits, labels), np.log(p / (1 - p)))


def test_the_two_scores_are_the_log_likelihood_and_the_distance_from_the_shadows():
    confidence = random_numbers(5, 7).numpy()
    scores = compute_scores(torch.from_numpy(confidence), 2)
    shadows = confidence[[0, 1, 3, 4]]
    np.testing.assert_allclose(scores["loss"], np.log(1 / (1 + np.exp(-confidence[2]))))
    spread = math.sqrt(np.mean([np.mean((shadows[:, j] - shadows[:, j].mean()) ** 2) for j in range(7)]))
    np.testing.assert_allclose(scores["lira"], (confidence[2] - shadows.mean(0)) / spread)


def test_combined_scores_count_alike_whatever_their_scale():
    a, b = random_numbers(2, 50)
    expected = (a.numpy() / a.numpy().std(ddof=1)) + (b.numpy() / b.numpy().std(ddof=1))
    np.testing.assert_allclose(combine(torch.stack([a, 1000 * b])), expected)


def test_a_student_of_a_linear_teacher_has_its_logits():
    features, teacher = random_numbers(200, 4), random_numbers(5, 3, seed=1)
    index = torch.arange(0, 200, 2)
    logits = (torch.cat([features, torch.ones(200, 1)], 1) @ teacher / 3).double()
    labels = Labels(index, logits[index].softmax(1))
    student = leakage.with_one(features) @ fit_head(features, labels)
    torch.testing.assert_close(student.softmax(1), logits.softmax(1), atol=5e-3, rtol=0)


def test_a_student_without_labels_knows_nothing():
    labels = Labels(torch.empty(0, dtype=torch.int64), torch.empty(0, 3))
    assert torch.equal(fit_head(random_numbers(20, 4), labels), torch.zeros(5, 3, dtype=torch.float64))


# ---------------------------------------------------------------------- rates


def rates_of(scores, members, counts):
    """AUROC and the true-positive rate at 1 % false positives, pair by pair and threshold by threshold."""
    inside = [s for s, m, c in zip(scores, members, counts, strict=True) for _ in range(c) if m]
    outside = [s for s, m, c in zip(scores, members, counts, strict=True) for _ in range(c) if not m]
    wins = np.mean([(a > b) + 0.5 * (a == b) for a in inside for b in outside])
    found = [0.0]
    for threshold in set(scores):
        if np.mean([b >= threshold for b in outside]) <= 0.01:
            found.append(np.mean([a >= threshold for a in inside]))
    return wins, max(found)


@pytest.mark.parametrize("digits", [0, 1, 6])
def test_rates_are_those_of_all_pairs_and_all_thresholds(digits):
    """Rounded scores tie."""
    g = np.random.default_rng(digits)
    members = g.random(230) < 0.4
    scores = (g.normal(size=230) + 0.8 * members).round(digits)
    counts = np.stack([np.ones(230, int), g.integers(0, 4, 230)])
    auroc, tpr = leakage.measure_rates(torch.tensor(scores), torch.tensor(members), torch.tensor(counts))
    expected = [rates_of(scores.tolist(), members.tolist(), row.tolist()) for row in counts]
    np.testing.assert_allclose(np.stack([auroc, tpr], 1), expected)


def test_a_draw_of_the_bootstrap_takes_as_many_of_every_stratum_as_it_has():
    strata = torch.tensor([0, 1, 1, 0, 2, 1, 1, 1])
    counts = leakage.resample(strata, "test")
    assert torch.equal(counts[0], torch.ones(8, dtype=torch.int64))
    for stratum, size in ((0, 2), (1, 5), (2, 1)):
        assert (counts[:, strata == stratum].sum(1) == size).all()
    assert 0.7 < (counts[1:, 1] == 0).double().mean() / 0.8**5 < 1.3
    assert torch.equal(counts, leakage.resample(strata, "test"))


# ---------------------------------------------------------------------- networks


N = 4


def few_digits(configs):
    """A run of four nodes before its first step; each has 24 digits to train on, and 16 held out."""
    few = ["--data.private.limit", "160", "--data.partition", "IID", "--data.validation", "0.4"]
    return run_of(configs, *few, "--node.network.norm", "group")


def attacked(configs, steps):
    """Membership in sets with random labels, which nodes learn alone in so many steps."""
    run = few_digits(configs)
    store, stack = run.store, run.stack
    store.labels = torch.randint(10, store.labels.shape, generator=torch.Generator().manual_seed(0))
    own = torch.stack(store.own)
    x = store.inputs.scale(store.pool[own.flatten()]).unflatten(0, own.shape)
    for step in range(steps):
        stack.step(x, one_hot(store.labels[own], 10).float(), step)
        stack.X.sub_(0.3 * stack.G)
    attacker = Attacker(run, list(range(N)), 200)
    return attacker.report([attacker.mass], [attacker.scores(attacker.confidence)])["membership"]


def test_networks_that_have_learnt_their_samples_by_heart_give_them_away(configs):
    found = attacked(configs, 200)
    assert found["loss"]["auroc"]["value"] > 0.9
    assert found["lira"]["auroc"]["value"] > 0.9
    assert found["loss"]["auroc"]["low"] > 0.8


def test_untrained_networks_give_nothing_away(configs):
    for attack, rates in attacked(configs, 0).items():
        assert rates["auroc"]["low"] < 0.5 < rates["auroc"]["high"], attack


def test_candidates_are_as_many_members_as_others_and_mixed(configs):
    run = few_digits(configs)
    attacker = Attacker(run, list(range(N)), 200)
    for node, c in enumerate(attacker.candidates):
        train, held_out = (set(part[node].tolist()) for part in (run.store.split.train, run.store.split.validation))
        inside, outside = c.index[c.members].tolist(), c.index[~c.members].tolist()
        assert len(set(inside)) == len(set(outside)) == 16
        assert set(inside) <= train
        assert set(outside) <= held_out
        assert torch.equal(c.labels, run.store.labels[c.index])
    assert any(c.members.tolist() != sorted(c.members.tolist(), reverse=True) for c in attacker.candidates)


# ---------------------------------------------------------------------- a run

FORMS = ["as in the run", "raw", "aligned", "sharpened, T 0.5", "one-hot", "top-1", "float16", "uint8", "filtered",
         "filtered, aligned", "RandomizedResponse, epsilon 2", "LaplaceLabels, epsilon 2"]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("audited")
    assert main(["fit", "--config", CONFIG, *SHORT, "--run.dir", str(folder), "--run.until", "3"]) == 0
    unfinished = folder / "ring_digits" / "latest"
    assert main(["fit", "--config", CONFIG, *SHORT, "--run.dir", str(folder), "--run.from", str(unfinished)]) == 0
    return unfinished.resolve()


def test_an_audit_has_every_form_of_labels_alone_and_with_the_parameters(run, capsys):
    folder = str(run)
    capsys.readouterr()
    assert main(["audit", folder, "--json", "--epsilon", "2", "--samples", "30"]) == 0
    said = capsys.readouterr().out
    result = json.loads(said)
    assert result["run"] == folder
    assert result["attacked"] == [0, 1, 2, 3]
    assert set(result["guesses"]) == {"uniform", "global"}
    seen = [(row["sees"], row["labels"]) for row in result["results"]]
    forms = [form for sees, form in seen if sees == "labels"]
    assert seen[:2] == [("nothing", None), ("parameters", None)]
    assert seen[2:] == [(sees, form) for form in forms for sees in ("labels", "both")]
    assert forms == FORMS
    of_form = {row["labels"]: row for row in result["results"] if row["sees"] == "labels"}
    bitmap, all_samples = 5 + 38, 300  # of 300 public samples
    assert of_form["raw"]["label_bytes"] == all_samples * 4 * 11
    assert of_form["uint8"]["label_bytes"] == bitmap + all_samples * 10
    assert of_form["RandomizedResponse, epsilon 2"]["label_bytes"] == bitmap + all_samples
    assert [row["epsilon"] for row in of_form.values()] == [None] * 10 + [2.0] * 2
    assert of_form["as in the run"]["distribution"] == of_form["filtered"]["distribution"]
    for row in result["results"]:
        for rates in row["membership"].values():
            assert 0 <= rates["tpr"]["value"] <= 1
            assert rates["auroc"]["low"] <= rates["auroc"]["value"] <= rates["auroc"]["high"]
    uniform = result["guesses"]["uniform"]["tv"]["value"]
    assert uniform == pytest.approx(0.5 * np.abs(label_shares(run) - 0.1).sum(1).mean())


def label_shares(run):
    """Label distribution of the samples that every node trains on, from the run's own files."""
    from lightning_idkd import load

    counts = np.stack([np.bincount(load(run).train(node).labels, minlength=10) for node in range(4)])
    return counts / counts.sum(1, keepdims=True)


def test_the_attacked_labels_are_those_of_the_checkpoint_before_the_final_gossip(run):
    """The raw labels of node 1, by the network that `load` gives."""
    from lightning_idkd import load

    loaded = load(run, "last.ckpt")
    rebuilt = audit.rebuild(loaded)
    forms, _ = audit.list_forms(rebuilt, [])
    expected = loaded.outputs(loaded.stack.modules[1], loaded.public()).logits.softmax(1)
    torch.testing.assert_close(forms["raw"].label(rebuilt)[1].probabilities, expected, rtol=1e-4, atol=1e-6)


def test_a_table_says_what_its_numbers_are_and_fits_a_narrow_terminal(run, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(audit, "list_forms", lambda run, epsilons: ({}, ["a note"]))
    assert main(["audit", str(run)]) == 0
    said = capsys.readouterr().out
    seen = [line.split()[0] for line in said.splitlines() if re.match(r"(guess|nothing|parameters)", line)]
    assert seen == ["guess:", "guess:", "nothing", "parameters"]
    assert "…" not in said
    for words in ("AUROC", "LiRA", "KL (in nats)", "95 % interval", "note: a note"):
        assert words in said


# ---------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(("distillation", "note"), [
    (None, "the run exchanges no labels (distillation is null), so that an attacker sees only parameters"),
    (SelfTraining(), "SelfTraining sends no labels, so that an attacker sees only parameters"),
])  # fmt: skip
def test_a_run_that_sends_no_labels_has_no_forms_of_them(distillation, note):
    assert audit.list_forms(SimpleNamespace(distillation=distillation), [1.0]) == ({}, [note])


def test_an_unfinished_run_is_refused(tmp_path, run, capsys):
    unfinished = run.parent / sorted(path.name for path in run.parent.iterdir() if path.name != "latest")[0]
    assert main(["audit", str(unfinished)]) == 2
    assert "is not finished (after 3 of 6 epochs); idkd audit needs a finished run" in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "said"), [
    (["--epsilon", "0"], "--epsilon: 0.0 given; allowed: above 0 to 20"),
    (["--epsilon", "1", "-3"], "--epsilon: -3.0 given; allowed: above 0 to 20"),
    (["--samples", "0"], "--samples: 0 given; allowed: 1 or more"),
    ([], "'nowhere' is not a run folder"),
])  # fmt: skip
def test_mistakes_are_reported_with_their_option(arguments, said, capsys):
    assert main(["audit", "nowhere", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_the_table_breaks_no_word_in_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    interval = {"value": 0.5, "low": 0.4, "high": 0.6}
    rates = {attack: {"auroc": interval, "tpr": interval} for attack in leakage.ATTACKS}
    row = {"sees": "both", "labels": "RandomizedResponse, epsilon 4", "label_bytes": 26400.0,
           "distribution": {"kl": interval, "tv": interval}, "membership": rates}  # fmt: skip
    audit.show({"run": "runs/" + "x" * 90, "attacked": [0], "samples": 9, "guesses": {}, "results": [row],
                  "notes": []})  # fmt: skip
    out = capsys.readouterr().out
    assert "RandomizedResponse," in out
    assert "x" * 90 in out
    assert max(len(line) for line in out.splitlines()[1:] if "±" in line) <= 80
