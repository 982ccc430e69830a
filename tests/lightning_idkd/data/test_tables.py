"""Tables in files and those of scikit-learn: the same numbers from every format, odd files, and messages."""

import csv

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from sklearn.datasets import load_breast_cancer, load_wine

from lightning_idkd import UserError
from lightning_idkd.data import ScikitLearn, Vectors

NAMES = ("height", "weight", "whole")


def rows(count=30, seed=0):
    rng = np.random.default_rng(seed)
    return np.column_stack([rng.normal(size=(count, 2)), rng.integers(0, 9, count)])


LABELS = [("cat", "dog", "eel")[i % 3] for i in range(30)]


def write_csv(path, values, labels, delimiter=",", header=True, names=NAMES):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=delimiter)
        if header:
            writer.writerow([*names, "label"])
        for row, label in zip(values.tolist(), labels, strict=True):
            writer.writerow([*map(repr, row), label])
    return path


def write_parquet(path, values, labels):
    columns = {name: values[:, i] for i, name in enumerate(NAMES)}
    pyarrow.parquet.write_table(pyarrow.table({**columns, "label": labels}), path)
    return path


def write_npz(path, values, labels):
    np.savez(path, **{name: values[:, i] for i, name in enumerate(NAMES)}, label=np.array(labels))
    return path


WRITERS = {
    "a.csv": write_csv,
    "a.tsv": lambda *a: write_csv(*a, delimiter="\t"),
    "semicolons.csv": lambda *a: write_csv(*a, delimiter=";"),
    "a.parquet": write_parquet,
    "a.npz": write_npz,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_numbers_and_classes(tmp_path, name):
    path = WRITERS[name](tmp_path / name, rows(), LABELS)
    train = Vectors(str(path), test_share=0).load("train")
    np.testing.assert_array_equal(train.values, rows())
    assert train.inputs.columns == NAMES
    assert train.classes == ("cat", "dog", "eel")
    assert train.labels.tolist() == [i % 3 for i in range(30)]


def test_a_fifth_of_every_class_is_the_test_set(tmp_path):
    path = write_csv(tmp_path / "a.csv", rows(), LABELS)
    train, test = (Vectors(str(path)).load(split) for split in ("train", "test"))
    assert train.labels.bincount().tolist() == [8, 8, 8]
    assert test.labels.bincount().tolist() == [2, 2, 2]
    both = np.concatenate([train.values, test.values])
    assert sorted(map(tuple, both)) == sorted(map(tuple, rows()))
    assert (train.classes, train.inputs.columns) == (test.classes, test.inputs.columns)
    assert len(Vectors(str(path), test_share=0.5).load("test")) == 15


def test_a_test_file_takes_the_place_of_the_choice(tmp_path):
    path = write_csv(tmp_path / "train.csv", rows(), LABELS)
    other = write_npz(tmp_path / "test.npz", rows(6, 3), LABELS[:6])
    source = Vectors(str(path), test_path=str(other))
    assert len(source.load("train")) == 30
    np.testing.assert_array_equal(source.load("test").values, rows(6, 3))


def test_a_matrix_in_an_npz_file_is_numbered_columns(tmp_path):
    np.savez(tmp_path / "a.npz", x=rows(), y=np.arange(30) % 2)
    samples = Vectors(str(tmp_path / "a.npz"), label="y", test_share=0).load("train")
    assert samples.inputs.columns == ("x0", "x1", "x2")
    assert samples.classes == ("0", "1")
    np.testing.assert_array_equal(samples.values, rows())


def test_columns_are_chosen_in_their_order(tmp_path):
    path = write_csv(tmp_path / "a.csv", rows(), LABELS)
    samples = Vectors(str(path), columns=["whole", "height"], test_share=0).load("train")
    np.testing.assert_array_equal(samples.values, rows()[:, [2, 0]])


@pytest.mark.parametrize("first", [b"", b"\xef\xbb\xbf", b"\r\n"])
@pytest.mark.parametrize("header", [True, False])
def test_a_first_line_of_numbers_is_a_row_and_one_of_names_is_not(tmp_path, header, first):
    path = write_csv(tmp_path / "a.csv", rows(), LABELS, header=header)
    path.write_bytes(first + path.read_bytes())
    samples = Vectors(str(path), label="label" if header else "3", test_share=0).load("train")
    np.testing.assert_array_equal(samples.values, rows())
    assert samples.inputs.columns == (NAMES if header else ("0", "1", "2"))


def test_whole_numbers_may_name_columns_as_pandas_does(tmp_path):
    path = write_csv(tmp_path / "a.csv", rows(), LABELS, names=("0", "1", "2"))
    samples = Vectors(str(path), test_share=0).load("train")
    assert samples.inputs.columns == ("0", "1", "2")
    assert len(samples) == 30


def test_the_header_of_a_numbered_array_is_no_sample(tmp_path):
    path = write_csv(tmp_path / "a.csv", rows(), [0, 1, 1] * 10)
    path.write_text("0,1,2,3" + path.read_text().removeprefix("height,weight,whole,label"))
    samples = Vectors(str(path), label=3, columns=[0, 2], test_share=0).load("train")
    assert (len(samples), samples.classes, samples.inputs.columns) == (30, ("0", "1"), ("0", "2"))
    assert samples.notes == ()


@pytest.mark.parametrize(("first", "header", "count"), [("5,3,1,a", False, 31), ("5,3,1,a", None, 30),
                                                        ("5,3,1,7", None, 31), ("5,3,1,7", True, 30),
                                                        ("2e5,0_1,nan,label", None, 30)])  # fmt: skip
def test_a_doubtful_first_line_is_settled_by_header(tmp_path, first, header, count):
    path = write_csv(tmp_path / "a.csv", rows(), [7] * 30)
    path.write_text(first + path.read_text().removeprefix("height,weight,whole,label"))
    names = ["0", "1", "2", "3"] if count == 31 else first.split(",")
    samples = Vectors(str(path), label=names[3], columns=names[:3], test_share=0, header=header)
    assert len(samples.load("train")) == count
    notes = samples.load("train").notes
    assert any("the first line has no names, so the columns are 0, 1, ..." in note for note in notes) == (
        count == 31 and header is None
    )


@pytest.mark.parametrize("name", ["", "Unnamed: 0"])
def test_the_row_numbers_of_pandas_are_no_feature(tmp_path, name):
    numbered = np.column_stack([np.arange(30), rows()])
    path = write_csv(tmp_path / "a.csv", numbered, LABELS, names=(name, *NAMES))
    samples = Vectors(str(path), test_share=0).load("train")
    assert samples.inputs.columns == NAMES
    [note] = samples.notes
    assert note.endswith(f"column '{name}', in which pandas numbers the rows, is left out")
    assert Vectors(str(path), columns=[name, "whole"]).load("train").inputs.columns == (name, "whole")


@pytest.mark.parametrize("index", [None, "patient"])
def test_the_index_of_a_parquet_file_is_no_feature(tmp_path, index):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(dict(zip(NAMES, rows().T, strict=True)) | {"label": LABELS})
    frame.index.name = index
    frame.sample(frac=1, random_state=0).to_parquet(tmp_path / "a.parquet")
    assert Vectors(str(tmp_path / "a.parquet"), test_share=0).load("train").inputs.columns == NAMES


def test_only_the_columns_of_the_private_set_are_read(tmp_path):
    inputs = Vectors(str(write_csv(tmp_path / "a.csv", rows(), LABELS))).load("train").inputs
    wide = tmp_path / "wide.csv"
    lines = [f"{row[2]!r},r{i},{'' if i else 1},{row[0]!r},{row[1]!r}" for i, row in enumerate(rows().tolist())]
    wide.write_text("\n".join(["whole,id,gaps,height,weight", *lines]))
    public = Vectors(str(wide), label=None).load_like("train", inputs, key="data.public")
    np.testing.assert_array_equal(public.values, rows())


def test_a_home_that_nobody_has_is_a_sentence():
    with pytest.raises(UserError, match=r"^data\.private\.path: '~nobody_has_this/a\.csv' names the folder of a user"):
        Vectors("~nobody_has_this/a.csv").load("train")


def test_a_column_that_turns_from_whole_numbers_to_fractions_is_read_whole(tmp_path):
    values = np.arange(200_000.0)[:, None].repeat(3, 1)
    values[-1] = 0.5
    path = write_csv(tmp_path / "a.csv", values, [0, 1] * 100_000)
    text = path.read_text().replace(".0,", ",")  # several blocks of whole numbers before the first fraction
    path.write_text(text)
    assert Vectors(str(path), test_share=0).load("train").values[-1].tolist() == [0.5] * 3


@pytest.mark.parametrize(("labels", "classes", "numbers"), [
    ([1, -1, 1, -1], ("1", "-1"), [0, 1, 0, 1]),  # -1 is a class of many tables, not a missing label
    ([0.0, 1.0, 1.0, 0.0], ("0", "1"), [0, 1, 1, 0]),
    ([7, 5, 7, 5], ("5", "7"), [1, 0, 1, 0]),
    ([True, False, True, True], ("False", "True"), [1, 0, 1, 1]),
    (["b", None, "a", None], ("a", "b"), [1, -1, 0, -1]),
    ([1.0, None, 0.0, None], ("0", "1"), [1, -1, 0, -1]),
])  # fmt: skip
def test_every_value_of_the_label_column_is_a_class_and_null_means_unlabelled(tmp_path, labels, classes, numbers):
    path = write_parquet(tmp_path / "a.parquet", rows(4), labels)
    samples = Vectors(str(path), test_share=0).load("train")
    assert samples.classes == classes
    assert samples.labels.tolist() == numbers


def test_labels_that_floats_cannot_tell_apart_are_refused(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", rows(2), [1e25, 1e25 + 1])
    with pytest.raises(
        UserError, match=r"^data\.private\.label: '.*' has the label 1e\+25; allowed: whole numbers below"
    ):
        Vectors(str(path)).load("train")


def test_an_empty_table_is_a_sentence(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.array([], dtype=str), label=np.array([], dtype=str))
    with pytest.raises(UserError, match=r"^data\.private: split 'train' holds no vectors"):
        Vectors(str(tmp_path / "a.npz")).load("train")


def test_kinds_of_numbers_are_all_numbers(tmp_path):
    from decimal import Decimal

    columns = {"flag": [True, False], "small": np.array([1, 2], np.int8), "money": [Decimal("1.50"), Decimal("2.25")]}
    pyarrow.parquet.write_table(pyarrow.table({**columns, "label": [0, 1]}), tmp_path / "a.parquet")
    samples = Vectors(str(tmp_path / "a.parquet"), test_share=0).load("train")
    assert samples.values.tolist() == [[1, 1, 1.5], [0, 2, 2.25]]


def test_a_public_table_needs_no_labels_and_keeps_all_rows(tmp_path):
    path = write_csv(tmp_path / "a.csv", rows(), LABELS)
    samples = Vectors(str(path), label=None, columns=list(NAMES)).load("train", key="data.public")
    assert len(samples) == 30
    assert samples.labels.unique().tolist() == [-1]
    with pytest.raises(
        UserError, match=r"^data\.private\.test_path: null given; '.*a\.csv' without labels has no test"
    ):
        Vectors(str(path), label=None, columns=list(NAMES)).load("test")


def replaced(path, old, new):
    path.write_text(path.read_text().replace(old, new, 1))
    return path


@pytest.mark.parametrize(("change", "arguments", "said"), [
    (None, {"label": "lable"}, r"\.label: '.*' has no column 'lable'; it has height, .*Did you mean.*label"),
    (None, {"columns": ["hight"]}, r"\.columns: '.*' has no column 'hight'; .*Did you mean.*height"),
    (None, {"columns": []}, r"\.columns: \[\] given; allowed: one column or more"),
    (None, {"columns": ["label"]}, r"\.columns: 'label' is the column of the labels"),
    (None, {"test_share": 1.0}, r"\.test_share: 1\.0 given; allowed: 0 to below 1"),
    (("height", "weight"), {}, r"\.path: '.*' is not a table: several columns are named 'weight'"),
    (("\n", "\n1,2,3,4,5,6\n"), {}, r"\.path: '.*' is not a table: .*Expected 4 columns, got 6"),
    (("\n", "\n?,2,3,cat\n"), {}, r"\.path: column 'height' of '.*' has '\?' in row 1; allowed: numbers "),
    (("\n", "\n,2,3,cat\n?,2,3,cat\n"), {}, r"\.path: column 'height' of '.*' has '\?' in row 2; allowed: numbers "),
    (None, {"columns": ["whole", "whole"]}, r"\.columns: 'whole' is named twice; allowed: every column once"),
    (("\n", "\n1e200,2,3,cat\n"), {}, r": vector 0 .* has the value 1e\+200 in column 'height'; allowed: finite"),
    (("\n", "\n,2,3,cat\n"), {}, r": vector 0 of split 'train' has no value in column 'height'; allowed: finite"),
    (("\n", "\ninf,2,3,cat\n"), {}, r": vector 0 of split 'train' has the value inf in column 'height'"),
])  # fmt: skip
def test_wrong_tables_and_arguments_are_refused(tmp_path, change, arguments, said):
    path = write_csv(tmp_path / "a.csv", rows(), LABELS)
    if change:
        replaced(path, *change)
    with pytest.raises(UserError, match=rf"^data\.private{said}"):
        Vectors(str(path), **{"test_share": 0, **arguments}).load("train")


@pytest.mark.parametrize(("name", "content", "said"), [
    ("absent.csv", None, r"'.*absent\.csv' is not a file; allowed: a file ending in \.npz, "),
    ("a.xlsx", b"PK", r"'.*a\.xlsx' ends in '\.xlsx'; allowed: a file ending in \.npz, "),
    ("a.npz", b"PK", r"'.*a\.npz' is not a table: "),
    ("a.parquet", b"PAR1", r"'.*a\.parquet' is not a table: "),
    ("b.parquet", b"PAR1" + b"x" * 60 + b"PAR1", r"'.*b\.parquet' is not a table: [^\n]*$"),
    ("a.csv", b"", r"'.*a\.csv' is not a table: "),
])  # fmt: skip
def test_files_that_are_not_tables_are_refused(tmp_path, name, content, said):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"^data\.private\.path: {said}"):
        Vectors(str(tmp_path / name)).load("train")


@pytest.mark.parametrize(("arrays", "said"), [
    ({"x": np.zeros((4, 8, 8)), "label": np.zeros(4)}, r"array 'x' has shape \[4, 8, 8\]; allowed: \[N\] or \[N, F\]"),
    ({"x": np.zeros((4, 2)), "label": np.zeros(3)}, r"'label' has 3 rows and 'x0' 4; allowed: equally many"),
    ({"x": np.zeros((4, 2)), "x0": np.zeros(4), "label": np.zeros(4)}, r"several columns are named 'x0'"),
    ({"x": np.array([[1], "a"], dtype=object), "label": np.zeros(2)}, r"Object arrays cannot be loaded"),
])  # fmt: skip
def test_arrays_of_another_form_are_refused(tmp_path, arrays, said):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(UserError, match=rf"^data\.private\.path: '.*a\.npz' is not a table: {said}"):
        Vectors(str(tmp_path / "a.npz")).load("train")


def test_the_tables_of_scikit_learn_are_whole_and_divided_by_class():
    train, test = (ScikitLearn("breast_cancer").load(split) for split in ("train", "test"))
    assert (train.classes, train.inputs.columns[:2]) == (("malignant", "benign"), ("mean radius", "mean texture"))
    assert test.labels.bincount().tolist() == [round(0.2 * 212), round(0.2 * 357)]
    table = load_breast_cancer()
    both = np.concatenate([np.column_stack([s.values, s.labels]) for s in (train, test)])
    assert sorted(map(tuple, both)) == sorted(map(tuple, np.column_stack([table.data, table.target])))
    assert len(ScikitLearn("wine").load("train")) + len(ScikitLearn("wine").load("test")) == len(load_wine().target)
