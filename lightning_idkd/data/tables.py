"""Sources of vectors: tables in files, and the small tables that scikit-learn brings."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lightning_idkd.data.identity import abridge
from lightning_idkd.data.samples import Remarks, draw_test_part, number_classes
from lightning_idkd.data.vectors import VectorSource
from lightning_idkd.errors import UserError, did_you_mean, require

Table = dict[str, Any]
"""The columns of a file by their names: arrays [N], or pyarrow's columns."""
ENDINGS = (".npz", ".parquet", ".csv", ".tsv", ".txt", ".data")


@dataclass
class Vectors(VectorSource):
    """The rows of a table of numbers: a CSV or parquet file, or the arrays of a ``.npz`` file.

    A CSV file may have commas, semicolons or tabs; where its first line has no column names, columns are named 0, 1,
    and so on. An array [N] of a ``.npz`` file is a column, and an array x [N, F] is the columns x0, x1, and so on. The
    values of the label column are the classes; a sample without a value there has no label.

    Args:
        path: file of the training samples, or of a public set.
        test_path: file of the test samples; null for a fixed random choice from ``path``.
        test_share: share of the samples of every class in ``path`` that are the test set where there is no
            ``test_path``; a set without labels has none.
        label: column of the labels; null for a public set without labels.
        columns: columns of the features, in this order; null for all but that of the labels.
    """

    path: str
    test_path: str | None = None
    test_share: float = 0.2
    label: str | None = "label"
    columns: list[str] | None = None

    def check(self, key: str) -> None:
        super().check(key)
        require(0 <= self.test_share < 1, f"{key}.test_share", self.test_share, "0 to below 1")
        if self.columns is not None:
            require(len(self.columns) > 0, f"{key}.columns", self.columns, "one column or more, or null for all")
            if self.label in self.columns:
                raise UserError(f"{key}.columns: '{self.label}' is the column of the labels; allowed: other columns")

    def read(self, split: str, size: int | None, key: str) -> tuple[tuple[str, ...], Iterable[tuple], Remarks]:
        own_test = split == "test" and self.test_path is not None
        where, path = (f"{key}.test_path", self.test_path) if own_test else (f"{key}.path", self.path)
        table = read_table(Path(path).expanduser(), where)
        if self.label is not None and self.label not in table:
            hint = did_you_mean(self.label, table)
            has = f"'{path}' has no column '{self.label}'; it has {abridge([*table])}"
            raise UserError(f"{key}.label: {has}.{hint} null is for a public set without labels")
        columns = [name for name in table if name != self.label] if self.columns is None else self.columns
        for name in columns:
            if name not in table:
                hint = did_you_mean(name, table)
                raise UserError(f"{key}.columns: '{path}' has no column '{name}'; it has {abridge([*table])}.{hint}")
        if not columns:
            raise UserError(f"{where}: '{path}' has no column but that of the labels")
        values = np.stack([to_numbers(table[name], name, path, where, key) for name in columns], axis=1)
        remarks = Remarks(columns=columns)
        names, labels = (), np.full(len(values), -1)
        if self.label is None:
            remarks.lacking(".label: null given, so the vectors have no labels")
        else:
            names, numbers, note = number_classes(to_labels(table[self.label]))
            labels = np.array(numbers)
            remarks.notes += [note] if note and not own_test else []
        if self.test_path is None:
            test = draw_test_part(labels, self.test_share)
            if split == "test" and not test.any():
                why = "without labels" if self.label is None else f"with test_share {self.test_share}"
                raise UserError(f"{key}.test_path: null given; '{path}' {why} has no test samples")
            chosen = test if split == "test" else ~test
            values, labels = values[chosen], labels[chosen]
        return names, zip(values, labels.tolist(), strict=True), remarks


@dataclass
class ScikitLearn(VectorSource):
    """A small table that scikit-learn brings: breast_cancer (569 samples of 30 features, 2 classes), wine (178 of 13, 3
    classes) or iris (150 of 4, 3 classes).

    The split is fixed: 20 % of every class are the test set, drawn at random once; the others keep their order.

    Source: UCI; Wolberg et al., 1995; Aeberhard and Forina, 1992; Fisher, 1936.

    Args:
        name: name of the table.
    """

    name: Literal["breast_cancer", "wine", "iris"] = "breast_cancer"

    def read(self, split: str, size: int | None, key: str) -> tuple[tuple[str, ...], Iterable[tuple], Remarks]:
        import sklearn.datasets

        table = getattr(sklearn.datasets, f"load_{self.name}")()
        test = draw_test_part(table.target, 0.2)
        chosen = test if split == "test" else ~test
        samples = zip(table.data[chosen], table.target[chosen].tolist(), strict=True)
        return tuple(map(str, table.target_names)), samples, Remarks(columns=tuple(map(str, table.feature_names)))


def read_table(path: Path, key: str) -> Table:
    """The columns of a file.

    Raises:
        UserError: there is no such file, or it is not a table.
    """
    if not path.is_file() or path.suffix.lower() not in ENDINGS:
        why = "is not a file" if not path.is_file() else f"ends in '{path.suffix}'"
        raise UserError(f"{key}: '{path}' {why}; allowed: a file ending in {', '.join(ENDINGS)}")
    read = {".npz": read_arrays, ".parquet": read_parquet}.get(path.suffix.lower(), read_csv)
    try:
        return read(path)
    except OSError:
        raise  # the source says that it cannot be read
    except Exception as error:  # numpy, zipfile and pyarrow raise many kinds for damaged files
        first = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"{key}: '{path}' is not a table: {first}") from error


def read_arrays(path: Path) -> Table:
    """The arrays of a ``.npz`` file as columns."""
    table: Table = {}
    with np.load(path, allow_pickle=False) as arrays:
        for name in arrays.files:
            array = arrays[name]
            if array.ndim not in (1, 2):
                raise ValueError(f"array '{name}' has shape {list(array.shape)}; allowed: [N] or [N, F]")
            if array.ndim == 1:
                table[name] = array
            else:
                table |= {f"{name}{i}": column for i, column in enumerate(array.T)}
    if sizes := {name: len(column) for name, column in table.items()}:
        least, most = min(sizes, key=sizes.__getitem__), max(sizes, key=sizes.__getitem__)
        if sizes[least] != sizes[most]:
            raise ValueError(f"'{least}' has {sizes[least]:,} rows and '{most}' {sizes[most]:,}; allowed: equally many")
    return table


def read_parquet(path: Path) -> Table:
    """The columns of a parquet file."""
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(path)
    return dict(zip(table.column_names, table.columns, strict=True))


def read_csv(path: Path) -> Table:
    """The columns of a text file, whose first line may name them."""
    from pyarrow import csv as reader

    text = path.read_bytes().removeprefix(b"\xef\xbb\xbf").lstrip(b"\r\n ")
    first = text.split(b"\n", 1)[0].decode(errors="replace").strip()
    delimiter = max(",;\t", key=first.count)
    cells = next(csv.reader(io.StringIO(first), delimiter=delimiter), [])
    # a name may be a whole number, since pandas numbers the columns of an array; it is hardly a fraction
    bare = bool(cells) and (
        all(map(is_number, cells)) or any(is_number(c) and not c.strip().isdecimal() for c in cells)
    )
    names = [str(i) for i in range(len(cells))] if bare else [cell.strip() for cell in cells]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"several columns are named '{min(twice)}'")
    options = reader.ReadOptions(column_names=names, skip_rows=0 if bare else 1, block_size=max(len(text), 1))
    table = reader.read_csv(io.BytesIO(text), options, reader.ParseOptions(delimiter=delimiter))
    return dict(zip(names, table.columns, strict=True))


def is_number(cell: str) -> bool:
    """Whether a cell is a number."""
    try:
        float(cell)
    except ValueError:
        return False
    return True


def to_numbers(column: Any, name: str, path: str, where: str, key: str) -> np.ndarray:
    """A column as float64 [N], with NaN where it has no value.

    Raises:
        UserError: it has other values than numbers.
    """
    if not isinstance(column, np.ndarray):
        import pyarrow

        kind = column.type
        if pyarrow.types.is_boolean(kind):
            column = column.cast(pyarrow.int8())
        if pyarrow.types.is_null(kind) or pyarrow.types.is_decimal(kind) or pyarrow.types.is_boolean(kind):
            column = column.cast(pyarrow.float64())
        column = column.to_numpy()
    if column.dtype.kind in "biuf":
        return column.astype(np.float64)
    row, value = next(((i, v) for i, v in enumerate(column) if not is_number(str(v))), (0, column[0]))
    raise UserError(
        f"{where}: column '{name}' of '{path}' has {value!r} in row {row + 1}; allowed: numbers ({key}.columns chooses "
        f"the columns, {key}.label the one with the labels)"
    )


def to_labels(column: Any) -> list[int | str]:
    """The values of a label column, whole numbers as integers and others as texts; -1 is a missing value.

    Where a number is negative all are texts, since -1 is a class there.
    """
    labels: list[int | str | None] = []
    for value in column.tolist() if isinstance(column, np.ndarray) else column.to_pylist():
        text = value.decode(errors="backslashreplace") if isinstance(value, bytes) else value
        if text is None or text == "" or text != text:  # NaN differs from itself
            labels.append(None)
        elif isinstance(text, (int, float)) and not isinstance(text, bool) and float(text).is_integer():
            labels.append(int(text))
        else:
            labels.append(str(text))
    negative = any(isinstance(label, int) and label < 0 for label in labels)
    return [-1 if label is None else str(label) if negative else label for label in labels]
