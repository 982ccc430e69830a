"""Writes the model card of an exported consensus model: the README.md that the Hugging Face hub shows."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from lightning_idkd.analysis.export import PROGRAM, has_plain_code
from lightning_idkd.config.kinds import summarise
from lightning_idkd.config.resolved import look_up
from lightning_idkd.config.trust import find_object, is_own_class
from lightning_idkd.data.identity import abridge
from lightning_idkd.data.inputs import Inputs
from lightning_idkd.records.markup import escape_markdown, fence
from lightning_idkd.records.report import format_bytes
from lightning_idkd.records.run_page import PAPER
from lightning_idkd.records.run_result import name_class

NAMES = {
    "accuracy": "accuracy",
    "calibration_error": "calibration error",
    "auroc_test_against_public": "AUROC, test against public samples",
}
"""The measures of an evaluation, in words. The run's own ``ood.auroc`` compares held-out private with public samples.
"""
STORED = {
    "images": ("pixels", "uint8", ""),
    "vectors": ("features", "float64", ", in the order of the `columns` in `config.json`"),
}
"""Per kind of data, the name of stored values, their type, and the order of features."""


def write_card(
    about: dict[str, Any],
    inputs: Inputs,
    data: dict[str, Any] | None,
    summary: dict[str, Any] | None,
    evaluation: dict[str, Any] | None,
    licence: str,
    parameters: int,
    has_program: bool,
    depends_on_batch: bool,
) -> str:
    """Write the card: YAML for the hub, then results, data, method, how to load the model, its limits, a citation.

    Args:
        about: the content of ``config.json``.
        inputs: the form of the samples.
        data: the identity of the run's sets (:func:`lightning_idkd.data.identity.record`), if it is known.
        summary: the run's ``summary.json``; None for parameters from before the end of the run.
        evaluation: what :func:`~lightning_idkd.analysis.evaluate.evaluate` returns for the run's own test set; without
            one, the results are those of the summary.
        licence: the licence of the weights, by its name on the hub.
        parameters: number of parameters of the network.
        has_program: whether there is a ``model.pt2``.
        depends_on_batch: whether an output depends on the other samples of its batch.
    """
    results = evaluation or (summary and {"accuracy": summary["accuracy"]}) or {}
    head = yaml.safe_dump(describe_metadata(about, results, licence), sort_keys=False, allow_unicode=True)
    nodes, name = about["config"]["graph"]["nodes"], about["run"].split("/")[0]
    title = f"# {escape_markdown(name)}: the consensus model of {count(nodes, 'node')}"
    parts = [
        f"---\n{head}---\n\n{title}\n\n{describe_model(about, summary, nodes)}",
        f"## Results\n\n{describe_results(about, data, summary, results)}",
        f"## Data\n\n{describe_data(about, inputs, data, summary)}",
        f"## Method\n\n{describe_method(about, summary, parameters)}",
        f"## How to load it\n\n{describe_loading(about, inputs, has_program)}",
        f"## Limits\n\n{describe_limits(inputs, nodes, depends_on_batch)}",
        f"## Licence\n\n{describe_licence(licence)}",
        f"## Citation\n\nlightning-idkd, which trained the model, implements this paper:\n\n{fence(PAPER, 'bibtex')}",
    ]
    return "\n\n".join(parts)


def describe_metadata(about: dict, results: dict, licence: str) -> dict[str, Any]:
    """The YAML at the top of the card, which the hub reads."""
    sets = [look_up(about["config"], f"data.{key}") for key in ("private", "public")]
    hub_names = list(dict.fromkeys(name for chosen in sets for name in list_hub_names(chosen)))
    task = "image-classification" if "channels" in about else "tabular-classification"
    metadata: dict[str, Any] = {"license": licence, "library_name": "pytorch", "pipeline_tag": task}
    metadata["tags"] = ["decentralized-learning", "knowledge-distillation", "lightning-idkd"]
    metadata |= {"datasets": hub_names} if hub_names else {}
    metadata["metrics"] = ["accuracy"]
    if not results:
        return metadata
    words = {"consensus": "accuracy of the consensus, which is this model", "node_mean": "mean accuracy of the nodes"}
    metrics = [
        {"type": "accuracy", "value": round(results["accuracy"][which], 6), "name": name}
        for which, name in words.items()
    ]
    own = list_hub_names(sets[0])
    dataset = {"name": name_set(sets[0]), "type": own[0] if own else name_set(sets[0]), "split": "test"}
    result = {"task": {"type": task}, "dataset": dataset, "metrics": metrics}
    return metadata | {"model-index": [{"name": about["run"].split("/")[0], "results": [result]}]}


def describe_model(about: dict, summary: dict | None, nodes: int) -> str:
    """What the model is, in a few sentences."""
    graph = name_class(about["config"]["graph"]["topology"])
    text = (
        f"A classifier of {len(about['classes'])} classes, trained by decentralised learning: {count(nodes, 'node')} "
        f"on a graph ({graph}), each with private samples of its own, trained together without a server. The model is "
        f"their consensus, the mean of the parameters of all honest nodes after {count(about['epochs'], 'epoch')}."
    )
    if summary is None:
        return f"{text} The parameters are from before the end of the run."
    kinds = ("parameter", "label", "other")
    sent = [format_bytes(summary["communication"][f"{kind}_bytes"]) for kind in kinds]
    return (
        f"{text} The nodes sent {sent[0]} of parameters, {sent[1]} of labels of public samples, and {sent[2]} of other "
        "messages."
    )


def describe_results(about: dict, data: dict | None, summary: dict | None, results: dict) -> str:
    """A table of the results, and the protocol that they follow."""
    if not results:
        return "These parameters were not evaluated."
    rows = ["| | this model | nodes: mean | sd | least | most |", "| --- | --- | --- | --- | --- | --- |"]
    for key in NAMES:
        if key in results:
            values = (results[key][k] for k in ("consensus", "node_mean", "node_std", "node_min", "node_max"))
            rows.append(f"| {NAMES[key]} | {' | '.join(f'{value:.4f}' for value in values)} |")
    config = about["config"]
    images = results.get("images") or (data and data["test"]["images"])
    samples = f"all {images:,} test samples" if images else "all test samples"
    merged = " and an exact mean" if config["train"]["final_merge"] else ""
    private, after = name_set(config["data"]["private"]), ", before the final gossip"
    if summary:
        after = f", after {count(config['train']['final_gossip'], 'step')} of final gossip{merged}"
    protocol = (
        f"Protocol: one run with the seed {config['seed']}, evaluated on {samples} of {private}, which training does "
        f"not use{after}. Accuracies are fractions. "
        "*This model* is the consensus; the other columns are the honest nodes, each with its own parameters, and *sd* "
        "is the standard deviation over them, not over seeds. A comparison with other methods needs several seeds and "
        "the same number of steps of final gossip."
    )
    if summary and (before := summary["accuracy"].get("node_mean_before_final_gossip")) is not None:
        protocol += f" Before the final gossip, the mean accuracy of the nodes is {before:.4f}."
    return "\n".join(rows) + f"\n\n{protocol}"


def describe_data(about: dict, inputs: Inputs, data: dict | None, summary: dict | None) -> str:
    """The private and the public set, and how the former is divided."""
    config = about["config"]["data"]
    counts = {key: f"{data[key]['images']:,} " if data and data.get(key) else "" for key in ("train", "public")}
    text = (
        f"- Private set: {counts['train']}{inputs.plural} of {name_set(config['private'])}, {inputs.form}, divided "
        f"over the nodes by {describe_class(config['partition'])}; each node holds out {config['validation']:.0%} of "
        f"its samples for calibration.{explain_set(config['private'])}\n- Classes: "
        f"{escape_markdown(abridge(about['classes']))}."
    )
    if config["public"] is not None:
        text += f"\n- Public set, without labels: {counts['public']}{inputs.plural} of {name_set(config['public'])}."
    if summary:
        before, after = summary["homogeneity"]["before"], summary["homogeneity"]["after"]
        text += (
            "\n- Heterogeneity (total variation between the labels of a node and those of all, mean over the nodes): "
        )
        text += f"{before:.3f}"
        text += f", and {after:.3f} with the exchanged labels." if summary.get("exchanges") else "."
    return text


def describe_method(about: dict, summary: dict | None, parameters: int) -> str:
    """The network and the parts of the training, by class and arguments."""
    config = about["config"]
    train = config["train"]
    rows = {
        "network": f"{describe_class(config['node']['network'])}, {parameters:,} parameters",
        "loss": describe_class(config["node"]["loss"]),
        "graph": f"{describe_class(config['graph']['topology'])}, {count(config['graph']['nodes'], 'node')}",
        "rule": describe_class(config["gossip"]),
        "training": f"{count(train['epochs'], 'epoch')}, batches of {train['batch_size']} a node, "
        f"learning rate {train['lr']:g} with {describe_class(train['schedule'])}",
        "calibration": describe_class(config["calibration"]),
        "distillation": describe_class(config["distillation"]),
        "callbacks": ", ".join(describe_class(c) for c in config["callbacks"]),
        "faults": ", ".join(describe_class(f) for f in config["faults"]),
        "code": (summary or {}).get("git_commit") or "",
    }
    lines = [f"- {name}: {escape_markdown(text)}" for name, text in rows.items() if text and text != "none"]
    return "\n".join(lines) + "\n\n`config.json` has all keys, with which the run can be repeated."


def describe_loading(about: dict, inputs: Inputs, has_program: bool) -> str:
    """Code that loads the model, first with torch alone."""
    name, dtype, order = STORED.get(inputs.plural, ("samples", "", ""))
    shape = ", ".join(map(str, inputs.shape))
    text = (
        f"The model takes {name}, {dtype} [N, {shape}]{order}, and returns logits [N, {len(about['classes'])}] of the "
    )
    text += "`classes` in `config.json`. It scales its input itself."
    if has_program:
        value = f"torch.zeros(1, {shape}, dtype=torch.{dtype})" if dtype else "..."
        text += f" `{PROGRAM}` needs torch alone (it was written by torch {version('torch')}). It takes batches of any "
        text += f"""size, runs on the CPU and cannot be trained further:

```python
import torch

model = torch.export.load("{PROGRAM}").module()
{name} = {value}  # your {inputs.plural}
classes = model({name}).argmax(1)
```"""
    return f"{text}\n\nThe parameters are in `model.safetensors`. {describe_network(about, name)}"


def describe_network(about: dict, name: str) -> str:
    """Code that loads the parameters into their network; ``name`` is the variable that holds samples."""
    if has_plain_code(about):
        return f"""`network.py` has the network in plain torch, and loads them (it needs safetensors):

```python
import network

model = network.load(".")
logits = model({name})
```"""
    chosen, k = about["config"]["node"]["network"], len(about["classes"])
    path, own = chosen["init_args"].get("path", ""), name_class(chosen)
    text = f"They belong to {path or describe_class(chosen)}, whose input is scaled: subtract `mean` and divide by "
    text += "`std` of `config.json`, one number a channel (for pixels from 0 to 255) or feature."
    if path.startswith("torchvision.models."):
        imported, arguments = "import torchvision", chosen["init_args"].get("arguments") or {}
        call = f"{path}({', '.join([f'num_classes={k}', *list_arguments(arguments)])})"
    elif own in ("MobileNetV2", "ViT") and not chosen["init_args"].get("feature_norm"):
        imported = f"from lightning_idkd.models import {own}"
        arguments = {key: value for key, value in chosen["init_args"].items() if key != "feature_norm"}
        call = f"{own}({', '.join(list_arguments(arguments))}).build({about['channels']}, {about['size']}, {k})"
    else:
        return text
    return f"""{text}

```python
{imported}
from safetensors.torch import load_file

network = {call}.eval()
network.load_state_dict(load_file("model.safetensors"))
```"""


def list_arguments(arguments: dict) -> list[str]:
    """Keyword arguments in Python."""
    return [f"{key}={value!r}" for key, value in arguments.items()]


def describe_limits(inputs: Inputs, nodes: int, depends_on_batch: bool) -> str:
    """What a user of the model should know before trusting it."""
    lines = [
        "It gives each input one of the classes above, also an input that belongs to none of them. It expects "
        f"{inputs.plural} like those of the private set.",
        "It comes from a research experiment and is not tested for any use in practice.",
        "Training sent no private sample, but what the nodes sent reveals something about their samples, and so may "
        "this model. `config.json` has the mean and the standard deviation of the private training samples.",
    ]
    if nodes > 1:
        lines.append("In the run, each node answers with its own parameters; their accuracy differs from this model's.")
    if depends_on_batch:
        lines.append("The network normalises with the statistics of the current batch, so an answer depends on the "
                     "other samples of its batch. The results are of shuffled batches of 256.")  # fmt: skip
    return "\n".join(f"- {line}" for line in lines)


def describe_licence(licence: str) -> str:
    """The licence, and what it does not cover."""
    code = "The code that trained the model, and `network.py` where there is one, have the MIT licence."
    if licence == "unknown":
        return f"No licence was chosen for the parameters (`--license` does so). {code}"
    return f"The parameters have the licence `{licence}`. {code}"


def count(number: int, what: str) -> str:
    """A number of things, such as ``2 epochs``."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def describe_class(chosen: dict | None) -> str:
    """A class with its arguments that are set, such as ``Dirichlet(alpha=0.05)``; ``none`` for None."""
    if chosen is None:
        return "none"
    given = (chosen.get("init_args") or {}).items()
    values = {key: value for key, value in given if value is not False and value not in (None, [], {})}
    texts = (f"{k}={describe_class(v) if isinstance(v, dict) and 'class_path' in v else v}" for k, v in values.items())
    return f"{name_class(chosen)}({', '.join(texts)})" if values else name_class(chosen)


def explain_set(chosen: dict) -> str:
    """What the documentation says first about a built-in set that its class alone names; empty for other sets."""
    name, path = name_class(chosen), chosen["class_path"]
    known = name_set(chosen) == name and is_own_class(path)
    return f" {name}: {summarise(find_object(path))}" if known else ""


def list_hub_names(chosen: dict | None) -> list[str]:
    """The names on the Hugging Face hub of the sets that a config chooses."""
    arguments = (chosen or {}).get("init_args") or {}
    if parts := arguments.get("parts"):
        return [name for part in parts for name in list_hub_names(part)]
    path = str(arguments.get("path") or "")
    is_hub = chosen is not None and name_class(chosen) == "HuggingFace" and re.fullmatch(r"[\w.-]+/[\w.-]+", path)
    return [path] if is_hub and not Path(path).is_dir() else []


def name_set(chosen: dict) -> str:
    """The name of a set: that on the hub, of its files, or else of its class."""
    arguments = chosen.get("init_args") or {}
    if parts := arguments.get("parts"):
        return " and ".join(name_set(part) for part in parts)
    if names := list_hub_names(chosen):
        return names[0]
    name = arguments.get("name") or Path(str(arguments.get("path") or "")).name
    return f"{name} ({name_class(chosen)})" if name else name_class(chosen)
