"""Vectors of numbers, such as the rows of a table: their form, and the base class of their sources."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_idkd.data.decode import check_samples, number_labels
from lightning_idkd.data.identity import abridge
from lightning_idkd.data.inputs import Inputs
from lightning_idkd.data.samples import Remarks, Samples
from lightning_idkd.data.source import Subset
from lightning_idkd.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from typing_extensions import Self

Tensor = Any  # torch's; jsonargparse would run an import under TYPE_CHECKING, which takes seconds
LARGEST = 1e150  # the square of a larger value could overflow


@dataclass(eq=False)
class VectorInputs(Inputs):
    """Vectors of F features: values and pools are float64 [N, F], inputs [N, F].

    Values keep 64 bits until they are scaled, so that a large feature of small variation, such as a date, loses no
    precision.

    Args:
        columns: names of the features.
        low: least value of each feature in its set, float64 [F].
        high: largest value of each feature.
    """

    columns: tuple[str, ...]
    low: Tensor
    high: Tensor

    plural = "vectors"

    @property
    def shape(self) -> tuple[int]:
        return (len(self.columns),)

    @property
    def sizes(self) -> dict[str, int]:
        return {"features": len(self.columns)}

    @property
    def form(self) -> str:
        return f"{len(self.columns)} features"

    def __str__(self) -> str:
        return self.form

    def facts(self) -> dict[str, Any]:
        return {"kind": self.plural, "columns": list(self.columns)}

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"low": self.low, "high": self.high}

    @classmethod
    def from_facts(cls, facts: dict[str, Any]) -> Inputs:
        return cls(tuple(facts["columns"]), facts.get("low"), facts.get("high"))

    @classmethod
    def join(cls, sets: Sequence[tuple[Self, Tensor]]) -> tuple[Self, Tensor]:
        import torch

        columns, values = sets[0][0].columns, []
        for inputs, own in sets:
            if alone := sorted(set(columns) ^ set(inputs.columns)):
                raise ValueError(f"vectors differ in their columns: not all have '{alone[0]}'")
            values.append(own[:, [inputs.columns.index(name) for name in columns]])
        joined = torch.cat(values)
        return cls(columns, joined.amin(0), joined.amax(0)), joined

    def measure(self, values: Tensor, samples: Tensor, device: Any, dtype: Any) -> Inputs:
        """As :meth:`Inputs.measure`, per feature.

        A constant feature is only centred, since its measured deviation is rounding error.
        """
        chosen = values[samples]
        mean = chosen.mean(0)
        std = (chosen - mean).square().mean(0).sqrt()
        constant = std <= 1e-12 * chosen.abs().amax(0)
        return self._scaled_by(mean.to(device), std.where(~constant, 1).to(device), dtype)

    def scale(self, pool: Tensor) -> Tensor:
        return ((pool - self.mean) / self.std).to(self.dtype)

    def draw_noise(self, count: int, kind: str = "uniform") -> Tensor:
        """As :meth:`Inputs.draw_noise`, over the range of every feature in its set.

        ``gaussian`` has the middle of that range as mean and a quarter of it as deviation, and is clipped to it.
        """
        import torch

        from lightning_idkd import randomness

        index = torch.arange(count * len(self.columns)).view(count, -1)
        drawn = randomness.uniform(0, "noise", index).double()
        if kind == "gaussian":
            drawn = (0.5 + 0.25 * torch.special.ndtri(drawn)).clamp(0, 1)
        return self.low + drawn * (self.high - self.low)


class VectorSource(Subset):
    """Base class of the sources of vectors. Your own source defines `read`: a sample is an array [F] of finite numbers,
    and ``Remarks(columns=...)`` names the features if they have names."""

    def expect(self, size: int | None, channels: int | None) -> Inputs:
        return self.load("train", size, channels).inputs

    def load_like(self, split: str, inputs: Inputs, *, key: str = "data.private") -> Samples:
        """As :meth:`Source.load_like`; columns are matched by name, and further ones are left out."""
        if not isinstance(inputs, VectorInputs):
            allowed = f"{inputs.plural}, as the private samples"
            raise UserError(f"{key}: {type(self).__name__} holds vectors; allowed: {allowed}")
        samples = self.load(split, key=key)
        columns = samples.inputs.columns
        if columns == inputs.columns:
            return samples
        for name in inputs.columns:
            if name not in columns:
                hint = did_you_mean(name, columns)
                has = f"it has {abridge(columns)}"
                raise UserError(
                    f"{key}: the {split} vectors have no column '{name}', as the private ones do; {has}.{hint}"
                )
        order = [columns.index(name) for name in inputs.columns]
        return with_columns(samples, inputs.columns, samples.values[:, order].contiguous())

    def load(
        self, split: str, size: int | None = None, channels: int | None = None, *, key: str = "data.private"
    ) -> Samples:
        """As :meth:`Subset.load`; ``size`` and ``channels`` are None, since vectors have neither."""
        for name, value in (("image_size", size), ("channels", channels)):
            if value is not None:
                raise UserError(
                    f"data.{name}: {value} given; allowed for {type(self).__name__}, which holds vectors: null"
                )
        samples = super().load(split, key=key)
        return with_columns(samples, samples.inputs.columns, samples.values)

    def convert(
        self,
        classes: tuple[str, ...] | None,
        samples: Iterable[tuple],
        split: str,
        size: int | None,
        channels: int | None,
        key: str,
        remarks: Remarks,
    ) -> Samples:
        import torch

        vectors, labels = [], []
        for vector, label in check_samples(samples, classes, split, key):
            vectors.append(as_vector(vector, len(vectors), split, key))
            labels.append(label)
            if len(vector) != len(vectors[0]):
                sizes = f"vector {len(vectors) - 1} of split '{split}' has {len(vector)} features"
                raise UserError(f"{key}: {sizes}; allowed: {len(vectors[0])}, as the first one")
        if not vectors:
            raise UserError(f"{key}: split '{split}' holds no vectors")
        values = np.stack(vectors)
        columns = tuple(remarks.columns) or tuple(map(str, range(values.shape[1])))
        if len(columns) != values.shape[1] or len(set(columns)) < len(columns):
            given = f"{type(self).__name__} names {len(columns)} columns ({abridge(columns)})"
            raise UserError(f"{key}: {given}; allowed: {values.shape[1]} different names, one a feature")
        wrong = np.argwhere(~(np.abs(values) < LARGEST))
        if len(wrong):
            row, column = wrong[0]
            many = f" ({len(wrong):,} such values in all)" if len(wrong) > 1 else ""
            what = "no value" if np.isnan(values[row, column]) else f"the value {values[row, column]}"
            where = f"vector {row} of split '{split}' has {what} in column '{columns[column]}'{many}"
            raise UserError(
                f"{key}: {where}; allowed: finite numbers below {LARGEST:g} (fill the gaps, or leave the column out)"
            )
        names, numbers, notes = number_labels(classes, labels)
        unlabelled = remarks.unlabelled if -1 in numbers else ""
        tensor = torch.from_numpy(values)
        inputs = VectorInputs(columns, tensor.amin(0), tensor.amax(0))
        return Samples(tensor, numbers, names, inputs.form, (*remarks.notes, *notes), unlabelled, inputs)


def with_columns(samples: Samples, columns: tuple[str, ...], values: Tensor) -> Samples:
    """The samples with these values [N, F] of features named ``columns``."""
    return replace(samples, values=values, inputs=VectorInputs(columns, values.amin(0), values.amax(0)))


def as_vector(vector: Any, number: int, split: str, key: str) -> np.ndarray:
    """One sample as float64 [F], or a UserError that names it."""
    try:
        array = np.asarray(vector)
    except (ValueError, RuntimeError):  # a list of unequal lists, a tensor that requires gradients
        array = np.asarray(str(vector))
    if array.ndim != 1 or not len(array) or array.dtype.kind not in "biuf":
        given = f"of shape {list(array.shape)} and type {array.dtype}"
        where = f"vector {number} of split '{split}' is {given}"
        raise UserError(f"{key}: {where}; allowed: an array [F] of numbers")
    return array.astype(np.float64)
