"""Hooks with their payloads, and what crosses edges, in one tiny run of IDKD from the command line."""

import json
from inspect import signature
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from lightning_idkd.callback import HOOKS, Aggregation, Callback, Distillation, Gossip, Teacher
from lightning_idkd.cli import main
from lightning_idkd.errors import UserError
from lightning_idkd.labels import FineTuning, Labels, Selection
from lightning_idkd.network import Network
from lightning_idkd.training import build
from lightning_idkd.training.orchestrator import Orchestrator

NODES, EPOCHS, EXCHANGE = 4, 4, 2


class Recorder(Callback):
    """Notes every hook with all that it gets."""

    seen: list[tuple[str, dict]] = []  # noqa: RUF012 (the run makes its own instance)

    def on_check(self, run):
        self.seen.append(("on_check", {"run": run}))

    def on_fit_start(self, run):
        self.seen.append(("on_fit_start", {"run": run}))

    def on_epoch_start(self, run, epoch):
        self.seen.append(("on_epoch_start", {"run": run, "epoch": epoch}))

    def on_step_end(self, run, step, losses):
        self.seen.append(("on_step_end", {"run": run, "step": step, "losses": losses}))

    def on_calibration_end(self, run, epoch, selections):
        self.seen.append(("on_calibration_end", {"run": run, "epoch": epoch, "selections": selections}))

    def on_exchange_end(self, run, epoch, distilled):
        self.seen.append(("on_exchange_end", {"run": run, "epoch": epoch, "distilled": distilled}))

    def on_epoch_end(self, run, epoch):
        self.seen.append(("on_epoch_end", {"run": run, "epoch": epoch}))

    def on_training_end(self, run):
        self.seen.append(("on_training_end", {"run": run}))

    def on_evaluation_end(self, run, metrics):
        self.seen.append(("on_evaluation_end", {"run": run, "metrics": dict(metrics)}))

    def on_fit_end(self, run, summary):
        self.seen.append(("on_fit_end", {"run": run, "summary": dict(summary)}))


class Modest(Callback):
    """Takes of two payloads only what it wants."""

    seen: list = []  # noqa: RUF012

    def on_fit_start(self):
        self.seen.append("start")

    def on_step_end(self, losses):
        self.seen.append(losses)


class Watched(Network):
    """Notes what is given to it to be sent."""

    sent: list[tuple[str, object, dict]] = []  # noqa: RUF012

    def mix(self, T, step=0, **kwargs):
        self.sent.append(("mix", T.clone() if isinstance(T, Tensor) else T, kwargs))
        return super().mix(T, step, **kwargs)

    def swap(self, M, step=0, **kwargs):
        self.sent.append(("swap", M, kwargs))
        return super().swap(M, step, **kwargs)

    def all_reduce(self, T, **kwargs):
        self.sent.append(("all_reduce", T, kwargs))
        return super().all_reduce(T, **kwargs)

    def exchange(self, labels, step=0, **kwargs):
        self.sent.append(("exchange", labels, kwargs))
        return super().exchange(labels, step, **kwargs)

    def share(self, T, step=0, **kwargs):
        self.sent.append(("share", T, kwargs))
        return super().share(T, step, **kwargs)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, request):
    """A run of IDKD on four nodes: ``hooks``, payload names as ``called``, ``sent`` and the files in ``folder``."""
    folder = tmp_path_factory.mktemp("runs")
    config = str(request.config.rootpath / "configs" / "ring_digits.yaml")
    called, call = [], Orchestrator.call
    callbacks = json.dumps([{"class_path": f"{__name__}.{cls.__name__}"} for cls in (Recorder, Modest)])
    for watcher in (Recorder.seen, Modest.seen, Watched.sent):
        watcher.clear()

    def noted(self, hook, **payload):
        called.append((hook, ("run", *payload)))
        call(self, hook, **payload)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "Network", Watched)
        patch.setattr(Orchestrator, "call", noted)
        status = main(["fit", "--config", config, "--graph.nodes", str(NODES), "--train.epochs", str(EPOCHS),
                       "--train.evaluate_every", "1", "--distillation.init_args.start", str(EXCHANGE),
                       "--logger", "null", "--run.dir", str(folder), "--run.engine", "loop",
                       "--run.threads", "1", f"--callbacks={callbacks}"])  # fmt: skip
    assert status == 0
    yield SimpleNamespace(hooks=list(Recorder.seen), modest=list(Modest.seen), called=called, sent=list(Watched.sent),
                          run=Recorder.seen[0][1]["run"], folder=folder / "ring_digits" / "latest")  # fmt: skip
    for watcher in (Recorder.seen, Modest.seen, Watched.sent):
        watcher.clear()


def payloads(tiny, hook):
    return [payload for name, payload in tiny.hooks if name == hook]


# ---------------------------------------------------------------------- definition


@pytest.mark.parametrize("base", [Callback, Gossip])
def test_an_unknown_hook_is_refused_naming_the_nearest(base):
    with pytest.raises(
        UserError, match=r"Mine\.on_epoch_finish is not a hook\. Did you mean 'on_epoch_\w+'\?.*on_fit_end"
    ):
        type("Mine", (base,), {"on_epoch_finish": lambda self, run: None})
    with pytest.raises(UserError, match="Did you mean 'on_step_end'"):
        type("Mine", (base,), {"on_step_ended": lambda self, run: None})


def test_an_unknown_payload_is_refused_naming_what_there_is():
    with pytest.raises(UserError, match=r"Mine\.on_step_end has no payload 'loss'; it gets run, step, losses"):
        type("Mine", (Callback,), {"on_step_end": lambda self, run, loss: None})


def test_every_hook_may_take_all_or_nothing_of_its_payload():
    for hook, payload in HOOKS.items():
        assert tuple(signature(getattr(Recorder, hook)).parameters) == ("self", *payload)
        type("Mine", (Callback,), {hook: lambda self: None})


def test_the_command_line_reports_a_wrong_hook_in_a_users_module(tmp_path, monkeypatch, capsys, configs):
    (tmp_path / "my_hooks.py").write_text(
        "from lightning_idkd.callback import Callback\nclass Mine(Callback):\n    def on_steps_end(self, run): pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = str(configs / "ring_digits.yaml")
    assert main(["fit", "--config", config, '--callbacks=[{"class_path": "my_hooks.Mine"}]']) == 2
    assert "on_step_end" in capsys.readouterr().err


# ---------------------------------------------------------------------- a run


def test_every_hook_is_called_with_exactly_its_payload(tiny):
    assert {name for name, _ in tiny.called} == set(HOOKS)
    for name, payload in tiny.called:
        assert sorted(payload) == sorted(HOOKS[name])
    assert [name for name, _ in tiny.hooks].count("on_step_end") == [name for name, _ in tiny.called].count(
        "on_step_end"
    )


def test_hooks_come_in_the_order_of_a_run(tiny):
    steps = len(payloads(tiny, "on_step_end")) // EPOCHS
    epoch = ["on_epoch_start", *["on_step_end"] * steps, "on_epoch_end", "on_evaluation_end"]
    names = [name for name, _ in tiny.hooks]
    once = ("on_calibration_end", "on_exchange_end")
    *before, evaluation = epoch * EPOCHS
    expected = ["on_check", "on_fit_start", *before, "on_training_end", evaluation, "on_fit_end"]
    assert [n for n in names if n not in once] == expected
    first = names.index("on_calibration_end")
    assert names[first + 1] == "on_exchange_end"
    assert names[:first].count("on_epoch_end") == EXCHANGE
    assert names[:first].count("on_step_end") == EXCHANGE * steps


def test_payloads_are_what_their_names_say(tiny):
    assert all(isinstance(payload["run"], Orchestrator) for _, payload in tiny.hooks)
    assert [p["epoch"] for p in payloads(tiny, "on_epoch_start")] == [0, 1, 2, 3]
    assert [p["epoch"] for p in payloads(tiny, "on_epoch_end")] == [1, 2, 3, 4]
    steps = payloads(tiny, "on_step_end")
    assert [p["step"] for p in steps] == list(range(1, len(steps) + 1))
    assert all(p["losses"].shape == (NODES,) and p["losses"].isfinite().all() for p in steps)
    [calibration], [exchange], [end] = (payloads(tiny, f"on_{name}_end") for name in ("calibration", "exchange", "fit"))
    assert calibration["epoch"] == exchange["epoch"] == EXCHANGE
    public = tiny.run.store.public
    assert [type(s) for s in calibration["selections"]] == [Selection] * NODES
    assert all(s.kept.shape == (public,) and s.kept.dtype == torch.bool for s in calibration["selections"])
    assert [type(d) for d in exchange["distilled"]] == [Labels] * NODES
    assert [p["metrics"]["epoch"] for p in payloads(tiny, "on_evaluation_end")] == [1, 2, 3, 4]
    written = [json.loads(line) for line in (tiny.folder / "metrics.jsonl").read_text().splitlines()]
    assert [p["metrics"] for p in payloads(tiny, "on_evaluation_end")] == written
    assert end["summary"]["accuracy"] == json.loads((tiny.folder / "summary.json").read_text())["accuracy"]


def test_a_callback_takes_of_a_payload_what_it_wants(tiny):
    start, *losses = tiny.modest
    assert start == "start"
    assert all(torch.equal(a, b["losses"]) for a, b in zip(losses, payloads(tiny, "on_step_end"), strict=True))


def test_distilled_labels_are_the_means_of_the_selected_ones(tiny):
    [calibration], [exchange] = payloads(tiny, "on_calibration_end"), payloads(tiny, "on_exchange_end")
    [messages] = [sent for how, sent, _ in tiny.sent if how == "exchange"]
    for node, distilled in enumerate(exchange["distilled"]):
        circle = [(node + d) % NODES for d in (-1, 0, 1)]
        kept = torch.stack([calibration["selections"][i].kept for i in circle])
        assert torch.equal(distilled.index, kept.any(0).nonzero()[:, 0])
        dense = torch.zeros(3, tiny.run.store.public, 10)
        for at, i in enumerate(circle):
            dense[at, messages[i].index] = messages[i].probabilities
        mean = (dense.sum(0) / kept.sum(0)[:, None])[distilled.index]
        torch.testing.assert_close(distilled.probabilities, mean)


# ---------------------------------------------------------------------- nothing private leaves a node


def test_only_parameters_and_labels_of_public_samples_cross_edges(tiny):
    parameters, public, k = tiny.run.stack.parameters, tiny.run.store.public, tiny.run.store.k
    assert {how for how, *_ in tiny.sent} == {"mix", "exchange"}
    for how, sent, kwargs in tiny.sent:
        assert "kind" not in kwargs  # nothing is sent as 'other', or as what it is not
        if how == "mix":
            assert type(sent) is Tensor
            assert sent.dtype == torch.float32
            assert sent.ndim == 2
            assert len(sent) == NODES
            assert sent.shape[1] <= parameters
            continue
        assert [type(message) for message in sent] == [Labels] * NODES
        for message in sent:
            assert set(vars(message)) == {"index", "probabilities", "weights", "size"}
            assert (message.weights, message.size) == (None, None)
            assert message.index.dtype == torch.int64
            assert torch.equal(message.index, message.index.unique())
            assert 0 <= message.index.min() <= message.index.max() < public
            assert message.probabilities.shape == (len(message.index), k)
            torch.testing.assert_close(message.probabilities.sum(1), torch.ones(len(message.index)))


def test_all_that_crossed_is_counted(tiny):
    """Two edges leave each of the four nodes of the ring."""
    width = sum(sent.shape[1] for how, sent, _ in tiny.sent if how == "mix")
    [messages] = [sent for how, sent, _ in tiny.sent if how == "exchange"]
    said = json.loads((tiny.folder / "summary.json").read_text())["communication"]
    assert said["parameter_bytes"] == 2 * NODES * width * 4
    assert said["label_bytes"] == sum(2 * len(message.index) * (4 + 10 * 4) for message in messages)
    assert said["other_bytes"] == 0
    steps = len(payloads(tiny, "on_step_end"))
    assert width == (steps + 1) * tiny.run.stack.parameters  # and one final gossip
    assert said["messages"] == 2 * NODES * (steps + 1 + 1)


def test_what_is_mixed_is_what_the_rule_moved(tiny):
    """The final gossip mixes the very rows the nodes hold: their mean is the consensus model afterwards."""
    last = [sent for how, sent, _ in tiny.sent if how == "mix"][-1]
    torch.testing.assert_close(last.mean(0), tiny.run.stack.X.mean(0), rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------- distillation's parts


class First(Aggregation):
    """The label of the first that kept a sample; notes what it gets."""

    def combine(self, probabilities, votes, senders):
        self.got = probabilities, votes, senders
        return probabilities[(votes > 0).int().argmax(0), torch.arange(votes.shape[1])]


def test_an_aggregation_gets_every_senders_labels_in_the_place_of_their_sample():
    one = Labels(torch.tensor([2, 7]), torch.tensor([[0.1, 0.9], [0.2, 0.8]]), torch.tensor([0.5, 1.0]))
    two = Labels(torch.tensor([0, 2]), torch.tensor([[0.3, 0.7], [0.4, 0.6]]))
    none = Labels(torch.empty(0, dtype=torch.int64), torch.empty(0, 2))
    rule = First()
    found = rule({3: one, 5: two, 8: none})
    probabilities, votes, senders = rule.got
    assert senders == [3, 5, 8]
    assert votes.tolist() == [[0.0, 0.5, 1.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
    kept = [[(2, 0), (7, 1)], [(0, 0), (2, 1)], []]
    for v, labels in enumerate((one, two, none)):
        for sample, row in kept[v]:
            assert torch.equal(probabilities[v, [0, 2, 7].index(sample)], labels.probabilities[row])
    assert found.index.tolist() == [0, 2, 7]
    torch.testing.assert_close(found.probabilities, torch.tensor([[0.3, 0.7], [0.1, 0.9], [0.2, 0.8]]))
    assert (found.weights, rule.shares, rule.prepare(None, 0)) == (None, "", None)


def test_without_a_teacher_nodes_ask_themselves():
    run = SimpleNamespace(stack=SimpleNamespace(X=torch.ones(2, 3)))
    teacher = Distillation.teacher
    assert type(teacher) is Teacher
    assert teacher.rows(run) is run.stack.X
    assert (teacher.on_step_end(run), teacher.state_dict(run), teacher.load_state_dict({}, run)) == (None, {}, None)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"private_share": 0},
            r"distillation\.tuning\.private_share: 0 given; allowed: between 0 and 1, skew, or null",
        ),
        ({"private_share": 1.0}, r"distillation\.tuning\.private_share: 1\.0 given"),
        ({"private_share": float("nan")}, r"distillation\.tuning\.private_share: nan given"),
        ({"weight": 0.0}, r"distillation\.tuning\.weight: 0\.0 given; allowed: above 0"),
        ({"weight": float("inf")}, r"distillation\.tuning\.weight: inf given"),
        ({"temperature": 0}, r"distillation\.tuning\.temperature: 0 given; allowed: above 0"),
        ({"temperature": float("inf")}, r"distillation\.tuning\.temperature: inf given"),
        ({"temperature": float("nan")}, r"distillation\.tuning\.temperature: nan given"),
    ],
)
def test_mistakes_in_tuning_are_refused_with_their_key(options, said):
    with pytest.raises(UserError, match=said):
        FineTuning(**options)


def test_tuning_is_off_by_default():
    tuning = FineTuning()
    assert vars(tuning) == {"private_share": None, "count_distilled": False, "balance": "none", "weight": 1.0,
                            "confidence": False, "temperature": 1.0}  # fmt: skip
