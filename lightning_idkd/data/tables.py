"""Sources of vectors: tables in files, and the small tables that scikit-learn brings."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lightning_idkd.data.identity import abridge
from lightning_idkd.data.inputs import Inputs
from lightning_idkd.data.samples import Remarks, Samples, draw_test_part, number_classes
from lightning_idkd.data.source import expand
from lightning_idkd.data.vectors import VectorInputs, VectorSource
from lightning_idkd.errors import UserError, did_you_mean, require

Table = dict[str, Any]
"""The columns of a file by their names: arrays [N], or pyarrow's columns."""
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
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
            ``test_path``; a set without labels has none. A public set leaves them out too, so that one file may
            serve both.
        label: column of the labels; null for a public set without labels.
        columns: columns of the features, in this order; null for all but that of the labels and those in which pandas
            numbers the rows.
        header: whether the first line of a CSV file has the names of the columns; null: if it is no line of numbers.
    """

    path: str
    test_path: str | None = None
    test_share: float = 0.2
    label: str | int | None = "label"
    columns: list[str | int] | None = None
    header: bool | None = None

    def __post_init__(self) -> None:
        self.label = None if self.label is None else str(self.label)
        self.columns = None if self.columns is None else [str(name) for name in self.columns]

    def check(self, key: str) -> None:
        super().check(key)
        require(0 <= self.test_share < 1, f"{key}.test_share", self.test_share, "0 to below 1")
        if self.columns is not None:
            require(len(self.columns) > 0, f"{key}.columns", self.columns, "one column or more, or null for all")
            if twice := [name for name in self.columns if self.columns.count(name) > 1]:
                raise UserError(f"{key}.columns: '{twice[0]}' is named twice; allowed: every column once")
            if self.label in self.columns:
                raise UserError(f"{key}.columns: '{self.label}' is the column of the labels; allowed: other columns")

    def load_like(self, split: str, inputs: Inputs, *, key: str = "data.private") -> Samples:
        """As :meth:`VectorSource.load_like`; of the file's columns only those of ``inputs`` are read."""
        if not isinstance(inputs, VectorInputs) or self.columns is not None:
            return super().load_like(split, inputs, key=key)
        return replace(self, columns=list(inputs.columns)).load_like(split, inputs, key=key)

    def read(self, split: str, size: int | None, key: str) -> tuple[tuple[str, ...], Iterable[tuple], Remarks]:
        own_test = split == "test" and self.test_path is not None
        where, path = (f"{key}.test_path", self.test_path) if own_test else (f"{key}.path", self.path)
        table, notes = read_table(path, self.header, where)
        if self.label is not None and self.label not in table:
            hint = did_you_mean(self.label, table)
            has = f"'{path}' has no column '{self.label}'; it has {abridge([*table])}"
            raise UserError(f"{key}.label: {has}.{hint} null is for a public set without labels")
        columns, notes = self._choose_columns(table, notes)
        for name in columns:
            if name not in table:
                hint = did_you_mean(name, table)
                raise UserError(f"{key}.columns: '{path}' has no column '{name}'; it has {abridge([*table])}.{hint}")
        if not columns:
            raise UserError(f"{where}: '{path}' has no column but that of the labels")
        values = np.stack([to_numbers(table[name], name, path, where, key) for name in columns], axis=1)
        remarks = Remarks(columns=columns, notes=[f"{where.removeprefix(key)}: '{path}': {note}" for note in notes])
        names: tuple[str, ...] = ()
        labels = np.full(len(values), -1)
        if self.label is None:
            remarks.note_unlabelled(".label: null given, so the vectors have no labels")
        else:
            read = to_labels(table[self.label], f"{key}.label", path)
            names, numbers, note = number_classes(read)
            labels = np.array(numbers)
            if note and not own_test and not all(isinstance(label, str) for label in read):
                remarks.notes.append(note)
        if self.test_path is None:
            test = draw_test_part(labels, self.test_share)
            if split == "test" and not test.any():
                why = "without labels" if self.label is None else f"with test_share {self.test_share}"
                raise UserError(f"{key}.test_path: null given; '{path}' {why} has no test samples")
            chosen = test if split == "test" else ~test
            values, labels = values[chosen], labels[chosen]
        return names, zip(values, labels.tolist(), strict=True), remarks

    def _choose_columns(self, table: Table, notes: list[str]) -> tuple[list[str], list[str]]:
        """The columns of the features, and the notes, with one about columns that are left out."""
        if self.columns is not None:
            return list(map(str, self.columns)), notes
        numbered = [name for name in table if name != self.label and is_row_number(name)]
        if numbered:
            left_out = ", ".join(f"'{name}'" for name in numbered)
            notes = [*notes, f"column {left_out}, in which pandas numbers the rows, is left out"]
        return [name for name in table if name != self.label and name not in numbered], notes


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


def read_table(path: str, header: bool | None, key: str) -> tuple[Table, list[str]]:
    """The columns of a file, and notes about it.

    Args:
        path: the file.
        header: see :class:`Vectors`.
        key: config key of the path, for messages.

    Raises:
        UserError: there is no such file, or it is not a table.
    """
    file = expand(path, key)
    if not file.is_file() or file.suffix.lower() not in ENDINGS:
        why = "is not a file" if not file.is_file() else f"ends in '{file.suffix}'"
        raise UserError(f"{key}: '{path}' {why}; allowed: a file ending in {', '.join(ENDINGS)}")
    try:
        if file.suffix.lower() == ".npz":
            return read_arrays(file), []
        return (read_parquet(file), []) if file.suffix.lower() == ".parquet" else read_csv(file, header)
    except Exception as error:  # numpy, zipfile and pyarrow raise many kinds for damaged files
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the source says that it cannot be read
        first = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"{key}: '{path}' is not a table: {first}") from error


def read_arrays(path: Path) -> Table:
    """The arrays of a ``.npz`` file as columns."""
    columns: list[tuple[str, np.ndarray]] = []
    with np.load(path, allow_pickle=False) as arrays:
        for name in arrays.files:
            array = arrays[name]
            if array.ndim not in (1, 2):
                raise ValueError(f"array '{name}' has shape {list(array.shape)}; allowed: [N] or [N, F]")
            columns += [(name, array)] if array.ndim == 1 else [(f"{name}{i}", c) for i, c in enumerate(array.T)]
    require_different([name for name, _ in columns])
    if columns:
        least, most = (choose(columns, key=lambda column: len(column[1])) for choose in (min, max))
        if len(least[1]) != len(most[1]):
            rows = f"'{least[0]}' has {len(least[1]):,} rows and '{most[0]}' {len(most[1]):,}"
            raise ValueError(f"{rows}; allowed: equally many")
    return dict(columns)


def read_parquet(path: Path) -> Table:
    """The columns of a parquet file, without the index of pandas where that has a name of its own."""
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(path)
    require_different(table.column_names)
    index = (table.schema.pandas_metadata or {}).get("index_columns", [])
    columns = zip(table.column_names, table.columns, strict=True)
    return {name: column for name, column in columns if name not in index or is_row_number(name)}


def read_csv(path: Path, header: bool | None) -> tuple[Table, list[str]]:
    """The columns of a text file, whose first line may name them, and notes."""
    from pyarrow import csv as reader

    text = path.read_bytes().removeprefix(b"\xef\xbb\xbf").lstrip(b"\r\n ")
    first = (text[: 2**20].splitlines() or [b""])[0].decode(errors="replace").strip()
    delimiter = max(",;\t", key=first.count)
    cells = [cell.strip() for cell in next(csv.reader([first], delimiter=delimiter), [])]
    starts_with_data = is_line_of_numbers(cells) if header is None else not header
    names = [str(i) for i in range(len(cells))] if starts_with_data else cells
    require_different(names)
    most = 2**31 - 1  # a smaller block could take a column for whole numbers whose first fraction comes later
    options = reader.ReadOptions(
        column_names=names, skip_rows=0 if starts_with_data else 1, block_size=min(max(len(text), 1), most)
    )
    table = reader.read_csv(io.BytesIO(text), options, reader.ParseOptions(delimiter=delimiter))
    notes = []
    if starts_with_data and header is None:
        notes = ["the first line has no names, so the columns are 0, 1, ... (header: true if it has)"]
    return dict(zip(names, table.columns, strict=True)), notes


def require_different(names: Sequence[str]) -> None:
    """Raise a ValueError if two columns have the same name."""
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"several columns are named '{min(twice)}'")


def is_row_number(name: str) -> bool:
    """Whether pandas gives this name to a column in which it numbers the rows."""
    return name in ("", "Unnamed: 0") or name.startswith("__index_level_")


def is_line_of_numbers(cells: list[str]) -> bool:
    """Whether the first line of a file is a row of data rather than the names of the columns.

    It is data if all cells are numbers, or if any is a fraction. The line 0, 1, 2, ... counts as names, since pandas
    gives these names to the columns of an array.
    """
    if cells == [str(i) for i in range(len(cells))]:
        return False
    fraction = any("." in cell and NUMBER.fullmatch(cell) for cell in cells)
    return fraction or (bool(cells) and all(NUMBER.fullmatch(cell) for cell in cells))


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
    if not len(column):
        return np.empty(0)
    texts = [str(value) for value in column]
    row = next((i for i, text in enumerate(texts) if text not in ("", "None") and not is_number(text)), 0)
    given = f"column '{name}' of '{path}' has '{texts[row]}' in row {row + 1}"
    raise UserError(
        f"{where}: {given}; allowed: numbers ({key}.columns chooses the columns, {key}.label that of the labels)"
    )


def to_labels(column: Any, key: str, path: str) -> list[int | str]:
    """The values of a label column, whole numbers as integers and others as texts; -1 is a missing value.

    If a number is negative, all labels become texts, since -1 is then a class.
    """
    labels: list[int | str | None] = []
    for value in column.tolist() if isinstance(column, np.ndarray) else column.to_pylist():
        text = value.decode(errors="backslashreplace") if isinstance(value, bytes) else value
        text = text.strip() if isinstance(text, str) else text
        if isinstance(text, float) and abs(text) >= 2**53:
            raise UserError(f"{key}: '{path}' has the label {text:g}; allowed: whole numbers below 2^53, or texts")
        if text is None or text == "" or text != text:  # NaN differs from itself
            labels.append(None)
        elif isinstance(text, (int, float)) and not isinstance(text, bool) and float(text).is_integer():
            labels.append(int(text))
        else:
            labels.append(str(text))
    negative = any(isinstance(label, int) and label < 0 for label in labels)
    return [-1 if label is None else str(label) if negative else label for label in labels]
