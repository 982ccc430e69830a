"""What nodes' detectors select, on rows whose images are features and on a real run."""

import math
from types import SimpleNamespace

import pytest
import torch
from short_runs import build
from sklearn.metrics import roc_auc_score
from torch import nn

from lightning_idkd.callback import OodScore
from lightning_idkd.callbacks import (
    KNN,
    MSP,
    ODIN,
    RMD,
    DensityRatio,
    Energy,
    Fixed,
    IdQuantile,
    KLMatching,
    Mahalanobis,
    Mixture,
    RankEnsemble,
    ReAct,
    TargetKept,
    ViM,
    Youden,
)
from lightning_idkd.cli import main
from lightning_idkd.config.parse import configure
from lightning_idkd.errors import UserError
from lightning_idkd.graph import Chain, Graph
from lightning_idkd.labels import MEASURES, Outputs
from lightning_idkd.network import Network
from lightning_idkd.nodes.stack import run_network
from lightning_idkd.training.calibrate import KEEPS_NONE, SAME_SCORE, Detectors, try_score
from lightning_idkd.training.fit import describe_parts


class First(OodScore):
    """The first logit."""

    def __call__(self, outputs):
        return outputs.logits[:, 0]


class Through(OodScore):
    """Whatever a function makes of the outputs."""

    def __init__(self, of):
        self.of = of

    def __call__(self, outputs):
        return self.of(outputs)


class Learns(First):
    """The first logit less the mean of the own ones."""

    def fit(self, outputs, labels):
        self.seen = len(outputs), labels.tolist()
        self.mean = outputs.logits[:, 0].mean()

    def __call__(self, outputs):
        return super().__call__(outputs) - self.mean


class Row(nn.Module):
    """A node that answers an image [F] with ``sign`` times it; features are the image."""

    def __init__(self, sign, offers):
        super().__init__()
        self.sign, self.offers = sign, offers

    def outputs(self, x):
        assert not self.training
        return Outputs(self.sign * x, x) if self.offers else Outputs(self.sign * x)


class FakeRun:
    """Nodes on a chain, all with the same images [., 2]: own ones, held-out ones, a public set and noise.

    ``private``, ``public`` and ``noise`` are first logits of the only, or of every, node; second ones are 0.
    """

    def __init__(
        self, calibration, private, public, noise=(0.0,), nodes=1, held_out=None, truth=None, labels=None, offers=True
    ):
        self.calibration, self.step, self.said = calibration, 0, []
        self.network = Network(Graph(Chain(), nodes))
        columns = [torch.tensor(v, dtype=torch.float32) for v in (private, public, noise)]
        private, self.public, self.noise = (torch.stack([v, torch.zeros(len(v))], 1) for v in columns)
        self.stack = SimpleNamespace(n=nodes, modules=[Row(1.0, offers) for _ in range(nodes)])
        held_out, own = len(private) if held_out is None else held_out, torch.arange(len(private))
        labels = torch.zeros(len(private), dtype=torch.int64) if labels is None else torch.tensor(labels)
        self.store = SimpleNamespace(
            own=[own] * nodes,
            labels=labels,
            held_out=lambda node: own[:held_out],
            private_batches=lambda index: private[index].split(3),
            public_batches=lambda: self.public.split(3),
            restore_order=lambda outputs: outputs,
            noise_batches=lambda: self.noise.split(3),
            truth=torch.full((len(self.public),), -1) if truth is None else torch.tensor(truth),
            counts=lambda: labels.bincount(minlength=2).int().expand(nodes, -1),
        )
        self.detectors = Detectors(calibration, self.stack, self.store, self.network, self.say)

    def answers(self):
        return [run_network(module.train(), self.public.split(3)) for module in self.stack.modules]

    def say(self, text):
        self.said.append(text)

    def calibrate(self):
        return self.detectors.select(self.answers(), self.step)


def name_of(value):
    return type(value).__name__


TEN = [5.0, 1, 4, 2, 3, 7, 6, 10, 9, 8]


# ---------------------------------------------------------------------- thresholds and what is kept


def test_samples_at_and_above_the_threshold_are_kept():
    run = FakeRun(Fixed(First(), threshold=2.0), [1.0, 2.0], [1.9999, 2.0, 2.0001], noise=[3.0, 1.0, 0.0, 2.0])
    [selection] = run.calibrate()
    assert selection.kept.tolist() == [False, True, True]
    assert selection.threshold == 2
    assert selection.private.tolist() == [1, 2]
    assert selection.public.tolist() == pytest.approx([1.9999, 2, 2.0001])
    assert selection.noise.tolist() == [3, 1, 0, 2]
    assert run.said == []
    assert run.network.counts()["other_bytes"] == 0


def test_a_calibration_is_against_the_public_set_or_noise():
    public, noise = [3.5, 5.5, 6.5], [8.5, 0.0]
    assert FakeRun(Youden(First()), TEN, public, noise).calibrate()[0].threshold == 7  # 4/10 - 0
    assert FakeRun(Youden(First(), against="noise"), TEN, public, noise).calibrate()[0].threshold == 1  # 1 - 1/2


def test_below_eight_held_out_samples_the_threshold_is_their_5_percent_quantile_said_once_in_one_line_for_all_nodes():
    run = FakeRun(Youden(First()), TEN, [0.5, 1.0, 6.5], nodes=2, held_out=7)
    for _ in range(3):
        for selection in run.calibrate():
            assert selection.threshold == 1
            assert selection.kept.tolist() == [False, True, True]
    few = "fewer than 8 held-out samples, so that the threshold is the 5 % quantile of a node's own scores"
    assert run.said == [f"nodes 0 (7), 1 (7): {few}"]
    enough = FakeRun(Youden(First()), TEN, [0.5, 1.0, 6.5], held_out=8)
    assert enough.calibrate()[0].threshold > 1
    assert enough.said == []


def test_a_node_without_held_out_samples_uses_its_training_samples():
    run = FakeRun(Youden(First()), [float(v) for v in range(40)], [3.0, 0.0], held_out=0)
    [selection] = run.calibrate()
    assert selection.threshold == 2
    assert len(selection.private) == 40
    assert math.isnan(selection.measures["auroc"])
    assert math.isnan(selection.measures["auroc_noise"])
    assert selection.measures["own_kept"] == 38 / 40
    assert len(run.said) == 1
    assert run.said[0].startswith("node 0 (0): fewer than 8 held-out samples")


@pytest.mark.parametrize("held_out", [0, 3, 10])
@pytest.mark.parametrize(
    "calibration", [IdQuantile(First(), 0.0), TargetKept(First()), Mixture(First()), Fixed(First(), threshold=1.0)]
)
def test_what_does_not_estimate_a_rate_needs_no_fallback(calibration, held_out):
    run = FakeRun(calibration, TEN, [0.0, 0.1, 5.0, 5.2], held_out=held_out)
    own = run.calibrate()[0].private
    assert run.calibrate()[0].threshold == calibration.threshold(own, torch.tensor([0.0, 0.1, 5.0, 5.2]))
    assert run.said == []


def test_pooled_thresholds_are_means_over_self_and_neighbours_and_cost_8_bytes_an_edge():
    run = FakeRun(IdQuantile(First(), 0.0, pooled=True), TEN, [0.0, 3.0], nodes=4)
    for i, module in enumerate(run.stack.modules):
        module.sign = float((1, 2, 6, 30)[i])  # so are the nodes' own thresholds
    found = run.calibrate()
    assert [s.threshold for s in found] == pytest.approx([3 / 2, 9 / 3, 38 / 3, 36 / 2])
    assert [s.measures["threshold"] for s in found] == [s.threshold for s in found]
    assert [s.kept.tolist() for s in found] == [[False, True]] * 4
    assert run.network.counts() == {"parameter_bytes": 0, "label_bytes": 0, "other_bytes": 6 * 8, "messages": 6}


def test_every_node_learns_anew_from_its_training_samples():
    run = FakeRun(IdQuantile(Learns(), 0.0), TEN, [0.0, 3.0], nodes=2, held_out=4, labels=[0, 1] * 5)
    run.stack.modules[1].sign = -1.0
    first, second = run.calibrate()
    assert run.calibration.score.seen == (10, [0, 1] * 5)
    assert first.private.tolist() == [-0.5, -4.5, -1.5, -3.5]
    assert second.private.tolist() == [0.5, 4.5, 1.5, 3.5]
    assert first.public.tolist() == [-5.5, -2.5]


def test_perturbed_images_are_judged_but_not_learned_from_and_labels_stay():
    class Moved(Learns):
        def perturb(self, module, x):
            assert isinstance(module, Row)
            return x + 100

    run = FakeRun(Fixed(Moved(), threshold=0.0), TEN, [0.0, 3.0], noise=[1.0], labels=[1] * 10, truth=[1, 1])
    [selection] = run.calibrate()
    assert run.calibration.score.mean == 5.5
    assert selection.private[1] == 95.5
    assert selection.public.tolist() == [94.5, 97.5]
    assert selection.noise.tolist() == [95.5]
    assert selection.measures["label_accuracy"] == 0  # 0 and 3 against 0: class 0 both


# ---------------------------------------------------------------------- measures


def test_measures_of_a_hand_example():
    public, noise, truth = [-3.0, 9.0, 2.5, -1.0, 6.0, 8.0], [4.0, 0.5, 1.5, 2.0], [1, 0, -1, 1, 2, 1]
    run = FakeRun(Fixed(First(), threshold=2.5), TEN, public, noise, truth=truth, labels=[0, 2] * 5)
    run.store.counts = lambda: torch.tensor([[5, 0, 5]], dtype=torch.int32)
    [selection] = run.calibrate()
    assert selection.kept.tolist() == [False, True, True, False, True, True]
    assert list(selection.measures) == list(MEASURES)
    assert selection.measures == pytest.approx(
        {
            "auroc": roc_auc_score([1] * 10 + [0] * 6, TEN + public),
            "threshold": 2.5,
            "kept_fraction": 4 / 6,
            "own_kept": 8 / 10,
            "auroc_noise": roc_auc_score([1] * 10 + [0] * 4, TEN + noise),
            "noise_kept": 1 / 4,
            "known_fraction": 2 / 3,  # kept are the classes 0, -1, 2 and 1; it holds 0 and 2
            "label_accuracy": 1 / 3,  # of these three it calls all class 0
            "keeps_none": 0,
        }
    )


def test_without_shared_class_names_nothing_is_known_of_labels():
    [selection] = FakeRun(Fixed(First(), threshold=2.5), TEN, [3.0, 1.0]).calibrate()
    assert math.isnan(selection.measures["known_fraction"])
    assert math.isnan(selection.measures["label_accuracy"])
    assert selection.measures["kept_fraction"] == 0.5


def test_of_nothing_kept_only_the_threshold_is_known():
    [selection] = FakeRun(Fixed(First(), threshold=99.0), TEN, [3.0, 1.0], truth=[0, 1]).calibrate()
    found = selection.measures
    assert (found["kept_fraction"], found["own_kept"], found["noise_kept"], found["keeps_none"]) == (0, 0, 0, 1)
    assert math.isnan(found["known_fraction"])
    assert math.isnan(found["label_accuracy"])


# ---------------------------------------------------------------------- what is said of a node


@pytest.mark.parametrize(("threshold", "said"), [(99.0, "no"), (-99.0, "all")])
def test_a_node_that_keeps_none_or_all_says_so_once(threshold, said):
    run = FakeRun(Fixed(First(), threshold=threshold), TEN, [3.0, 1.0], nodes=2)
    for _ in range(3):
        run.calibrate()
    assert run.said == [
        f"nodes 0 (threshold {threshold:.4g}), 1 (threshold {threshold:.4g}): {said} public samples are kept"
    ]


@pytest.mark.parametrize("calibration", [Youden, IdQuantile, Mixture, TargetKept])
def test_constant_scores_are_reported_and_keep_all(calibration):
    run = FakeRun(calibration(First()), [2.0] * 10, [2.0] * 5, noise=[2.0])
    for _ in range(2):
        [selection] = run.calibrate()
        assert selection.kept.all()
        assert selection.threshold == 2
        assert selection.measures["auroc"] == 0.5
    assert run.said == ["node 0: all samples have the same First", "node 0 (threshold 2): all public samples are kept"]


def test_a_remark_names_twenty_nodes_and_how_many_more_and_later_only_new_ones():
    run = FakeRun(Youden(First()), TEN, [0.5, 6.5], nodes=3, held_out=9)
    several = [{KEEPS_NONE: f"threshold {i}"} if i % 2 else {} for i in range(60)]
    run.detectors.print_remarks(several)
    names = ", ".join(f"{i} (threshold {i})" for i in range(1, 40, 2))
    assert run.said == [f"nodes {names} and 10 more: no public samples are kept"]
    run.detectors.print_remarks([{KEEPS_NONE: ""}, *several[1:], {SAME_SCORE: "", KEEPS_NONE: ""}])
    assert run.said[1:] == ["node 60: all samples have the same First", "nodes 0, 60: no public samples are kept"]


def test_an_msp_threshold_is_also_written_as_a_probability():
    """log(0.7 / 0.3) = 0.8473; log-odds of 30 are no 1.000."""
    assert MSP().written(math.log(0.7 / 0.3)) == "threshold 0.8473, probability 0.700"
    assert [MSP().written(s) for s in (30.0, -30.0)] == ["threshold 30, probability above 0.999",
                                                        "threshold -30, probability below 0.001"]  # fmt: skip
    for p in (1e-9, 0.02, 0.5, 0.98):
        assert MSP().probability(MSP().from_probability(p)) == pytest.approx(p, rel=1e-12)
    assert Energy().written(3.0) == "threshold 3"


def test_a_constant_rmd_of_a_node_with_one_class_is_reported():
    run = FakeRun(Youden(RMD()), TEN, [3.0, 1.0])
    assert run.calibrate()[0].kept.all()
    assert run.said[0] == "node 0: all samples have the same RMD"


@pytest.mark.parametrize("score", [MSP(), KNN(3), Mahalanobis(), DensityRatio(10), KLMatching()], ids=name_of)
def test_other_scores_do_not_mind_one_class(score):
    run = FakeRun(Youden(score), TEN, [30.0, 4.5, -40.0])
    [selection] = run.calibrate()
    assert math.isfinite(selection.threshold)
    assert not any("the same" in said for said in run.said)


# ---------------------------------------------------------------------- scores in error


@pytest.mark.parametrize(
    ("of", "said"),
    [
        (lambda o: o.logits, r"calibration\.score: Through returns \[15, 2\] for 15 samples; a score has shape \[15\]"),
        (lambda o: o.logits[:, :1], r"Through returns \[15, 1\] for 15 samples; a score has shape \[15\]"),
        (lambda o: o.logits.mean(), r"Through returns \[\] for 15 samples; a score has shape \[15\]"),
        (lambda o: o.logits[1:, 0], r"Through returns \[14\] for 15 samples; a score has shape \[15\]"),
        (lambda o: [0.0] * len(o), r"Through returns list for 15 samples; a score has shape \[15\]"),
        (lambda o: o.logits[:, 1] / 0, r"calibration\.score: Through is not finite for 15 of 15 samples of node 0$"),
        (lambda o: 1 / (o.logits[:, 0] - 3), r"Through is not finite for 2 of 15 samples of node 0$"),
    ],
)
def test_a_score_of_another_shape_or_not_finite_is_refused_with_its_class(of, said):
    with pytest.raises(UserError, match=said):
        FakeRun(Youden(Through(of)), TEN, [3.0, 1.0, 0.0, 0.5]).calibrate()


@pytest.mark.parametrize("score", [First(), KNN(3), Mahalanobis(), RankEnsemble([MSP(), First()])], ids=name_of)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(("where", "samples"), [("own", "1 of 10"), ("public", "2 of 13")])
def test_logits_that_are_not_finite_are_refused_before_any_score_sees_them(score, bad, where, samples):
    fitted = score.fitted or where == "public"
    own, public = (TEN, [bad, 3, bad - 1]) if where == "public" else ([*TEN[:9], bad], [3.0, 1.0, 0.0])
    run = FakeRun(Youden(score), own, public, noise=[], nodes=2)
    samples = samples if fitted else "1 of 13"
    with pytest.raises(UserError, match=rf"the logits of node 0 are not finite for {samples} samples$"):
        run.calibrate()


@pytest.mark.parametrize("score", [KNN(3), ViM(1), ReAct()], ids=name_of)
def test_features_asked_of_a_network_that_offers_none_are_refused(score):
    with pytest.raises(
        UserError, match=rf"calibration\.score: {name_of(score)} needs features\(x\) \[B, F\], which this net"
    ):
        FakeRun(Youden(score), TEN, [3.0, 1.0], offers=False).calibrate()


# ---------------------------------------------------------------------- a real run


SHORT = [
    "--logger=null", "--graph.nodes=4", "--data.public.samples=300", "--run.engine=loop", "--run.threads=1",
    "--run.pictures=false",
]  # fmt: skip


@pytest.fixture(scope="module")
def real(pytestconfig):
    """An untrained run of four nodes on digits, with a public set of glyphs."""
    config = configure(["--config", str(pytestconfig.rootpath / "configs" / "ring_digits.yaml"), *SHORT])
    return config, build(config)


def use(run, calibration):
    """Let a run calibrate otherwise."""
    run.calibration = run.detectors.calibration = calibration


SCORES = [
    "MSP", "MaxLogit", "Energy", "Entropy", "GEN", "Margin", "KLMatching", "KNN", "Mahalanobis", "RMD", "ViM",
    "DensityRatio", "ReAct", "ASH", "SCALE", "ODIN",
]  # fmt: skip


@pytest.mark.parametrize("name", SCORES)
def test_every_score_runs_on_real_nodes(name, real):
    from lightning_idkd import callbacks

    run = real[1]
    use(run, Youden(getattr(callbacks, name)()))
    selections = run.calibrate(run.answers())
    assert all(s.kept.shape == (300,) for s in selections)
    assert all(0 < s.measures["known_fraction"] <= 1 for s in selections if s.kept.any())
    assert run.progress.ood["auroc_noise"] > 0
    assert len(run.progress.per_node["threshold"]) == 4


@pytest.mark.parametrize("detector", ["MaxSoftmax", "GMM", "NCI", "NNGuide", "fDBD", "TemperatureScaling", "PNML"])
def test_detectors_of_pytorch_ood_run_on_real_nodes(detector, real):
    pytest.importorskip("pytorch_ood")
    from lightning_idkd.callbacks import PytorchOOD

    run = real[1]
    use(run, Youden(PytorchOOD(detector)))
    assert len(run.calibrate(run.answers())) == 4


def test_odin_is_msp_at_its_temperature_of_moved_images(real):
    run = real[1]
    score = ODIN(10.0, 0.1)
    use(run, IdQuantile(score))
    found = run.calibrate(run.answers())[1]
    module = run.stack.modules[1]
    moved = run_network(module, (score.perturb(module.eval(), x) for x in run.store.public_batches())).logits
    moved = moved[run.store.public_order().argsort()]
    torch.testing.assert_close(found.public, MSP()(Outputs(moved / 10)), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found.public, MSP()(Outputs(run.answers()[1].logits / 10)))


def test_known_classes_are_those_of_the_same_name(real):
    config, run = real
    glyphs = config.data.public.load("train", 8, 1, key="data.public")
    names = [glyphs.classes[label] for label in glyphs.labels.tolist()]
    digits = [run.store.classes.index(name) if name in run.store.classes else -1 for name in names]
    use(run, Fixed(MSP(), threshold=-100.0))
    for i, selection in enumerate(run.calibrate(run.answers())):
        held = set(run.store.labels[run.store.own[i]].tolist())
        known = [c for c in digits if c >= 0]
        assert len(known) == 100
        assert selection.measures["known_fraction"] == pytest.approx(sum(c in held for c in known) / 100)
        right = run.answers()[i].logits.argmax(1) == torch.tensor(digits)
        assert selection.measures["label_accuracy"] == pytest.approx(right.sum().item() / 100)


def test_pooled_thresholds_are_declared_and_counted_in_a_real_run(real):
    config, run = real
    before, said = run.network.counts()["other_bytes"], describe_parts(config, run).get("shares", "")
    assert "thresholds" not in said
    use(run, Youden(MSP(), pooled=True))
    assert "thresholds" in describe_parts(config, run)["shares"]
    run.calibrate(run.answers())
    assert run.network.counts()["other_bytes"] - before == 8 * 8


@pytest.mark.parametrize(("threshold", "kept", "said"), [(1e6, "0.0%", "no"), (-1e6, "100.0%", "all")])
def test_training_goes_on_whether_none_or_all_are_kept(threshold, kept, said, configs, tmp_path, capsys):
    fixed = f"{{class_path: Fixed, init_args: {{score: {{class_path: MSP}}, threshold: {threshold}}}}}"
    options = ["--train.epochs=3", "--distillation.start=1", "--distillation.every=1", "--calibration", fixed]
    config = str(configs / "ring_digits.yaml")
    assert main(["fit", "--config", config, *SHORT, *options, "--run.dir", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    (line,) = (line for line in printed.splitlines() if line.endswith(f": {said} public samples are kept"))
    assert line.startswith("nodes 0 (threshold ")
    assert [f", {node} (threshold " in line for node in (1, 2, 3)] == [True] * 3
    assert f"kept {kept} of the public set" in printed


def test_the_rehearsal_leaves_rows_buffers_and_the_random_numbers_as_they_are():
    """With batch norm, whose statistics a pass in training mode would move, and a score that changes the images."""
    config = configure(["--data.private", "Digits", "--data.public", "Glyphs", "--graph.nodes", "3",
                        "--distillation", "IDKD", "--calibration.score", "ODIN",
                        "--node.network", "ResNet", "--node.network.norm", "batch",
                        "--node.network.depth", "8", "--node.network.width", "4"])  # fmt: skip
    run = build(config)
    before = [run.stack.X.clone(), *(b.clone() for b in run.stack.buffers.values()), torch.get_rng_state()]
    try_score(config.calibration.score, run.stack, run.store)
    after = [run.stack.X, *run.stack.buffers.values(), torch.get_rng_state()]
    assert all(map(torch.equal, before, after))
