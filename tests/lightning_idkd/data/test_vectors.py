"""Vectors: their scaling, noise and form, sources of them, and the store that nodes train from."""

import numpy as np
import pytest
import torch
from small_stores import TRAIN, VALIDATION, split

from lightning_idkd import Remarks, Samples, UserError, VectorSource
from lightning_idkd.data import Concat, Digits, FeatureSkew, Noise, VectorInputs
from lightning_idkd.data.inputs import Inputs, restore
from lightning_idkd.data.store import Store

COLUMNS = ("age", "income", "constant", "day")


def table(count=18, seed=0):
    """Columns of different sizes: the last one varies by a few units around 2e9, where float32 has steps of 128."""
    rng = np.random.default_rng(seed)
    columns = [
        rng.normal(50, 9, count),
        rng.exponential(4e4, count),
        np.full(count, 0.1),
        2e9 + rng.normal(0, 3, count),
    ]
    return np.stack(columns, axis=1)


class Given(VectorSource):
    """A source of the vectors it is given."""

    def __init__(
        self, values, labels=None, names=("a", "b", "c"), columns=COLUMNS, limit=None, skip=None, classes=None
    ):
        super().__init__(limit=limit, skip=skip, classes=classes)
        self.values, self.names, self.columns = values, names, columns
        self.labels = [i % 3 for i in range(len(values))] if labels is None else labels

    def read(self, split, size, key):
        return self.names, zip(self.values, self.labels, strict=True), Remarks(columns=self.columns)


def store(public=None, dtype=torch.float64, **options):
    private = Given(table()).load("train")
    test = Given(table(5, 1)).load("test")
    public = public and public.load_like("train", private.inputs)
    return Store(private, test, public, split(), range(3), batch=2, dtype=dtype, **options)


# ---------------------------------------------------------------------- scaling


def test_features_have_mean_zero_and_deviation_one_over_the_training_samples():
    s, values = store(), table()
    train = values[[i for node in TRAIN for i in node]]
    varying = [0, 1, 3]
    np.testing.assert_allclose(s.inputs.mean, train.mean(0), rtol=1e-15)
    np.testing.assert_allclose(s.inputs.std[varying], train.std(0)[varying], rtol=1e-12)
    x, y = s.batch(torch.tensor([[0, 1], [2, 0], [6, 3]]), 0)
    chosen = values[[[0, 3], [9, 1], [16, 13]]]
    np.testing.assert_allclose(x[..., varying], ((chosen - train.mean(0)) / train.std(0))[..., varying], rtol=1e-9)
    assert y.argmax(2).tolist() == [[0, 0], [0, 1], [1, 1]]


def test_a_constant_feature_is_zero_and_not_divided_by_its_rounding():
    s = store()
    x, _ = s.batch(torch.tensor([[0], [0], [0]]), 0)
    assert x[..., 2].abs().max() < 1e-15
    assert s.inputs.std[2] == 1


def test_a_large_feature_of_small_variation_keeps_it_in_32_bits():
    x, _ = store(dtype=torch.float32).batch(torch.arange(3).expand(3, -1), 0)
    exact, _ = store(dtype=torch.float64).batch(torch.arange(3).expand(3, -1), 0)
    assert x.dtype == torch.float32
    np.testing.assert_allclose(x, exact, rtol=1e-6, atol=1e-7)


def test_evaluation_scales_by_the_training_samples_of_all_nodes():
    s = store()
    batches, labels = s.evaluation_set("validation", None)
    held_out = [i for node in VALIDATION for i in node]
    expected = (table()[held_out] - s.inputs.mean.numpy()) / s.inputs.std.numpy()
    given = torch.cat(list(batches()))
    order = [held_out.index(i) for i in sorted(held_out, key=lambda i: expected[held_out.index(i), 0])]
    np.testing.assert_allclose(given[given[:, 0].argsort()], expected[order], rtol=1e-12)
    assert sorted(labels.tolist()) == sorted(i % 3 for i in held_out)


# ---------------------------------------------------------------------- noise


def test_noise_is_uniform_over_the_range_of_every_private_feature():
    s = store()
    noise = s.inputs.draw_noise(4000)
    low, high = table().min(0), table().max(0)
    place = (noise.numpy() - low) / np.where(high > low, high - low, 1)
    assert place.min() >= 0
    assert place.max() < 1
    np.testing.assert_allclose(place.mean(0)[[0, 1, 3]], 0.5, atol=0.02)
    np.testing.assert_allclose(place.var(0)[[0, 1, 3]], 1 / 12, atol=0.005)
    assert np.abs(np.corrcoef(place[:, [0, 1, 3]].T) - np.eye(3)).max() < 0.05
    [batch] = list(s.noise_batches())
    expected = (noise[:256] - s.inputs.mean) / s.inputs.std
    np.testing.assert_allclose(batch, expected, rtol=1e-12)


def test_gaussian_noise_has_a_quarter_of_the_range_as_deviation():
    inputs = Given(table()).load("train").inputs
    noise = Noise("gaussian", 4000).load_like("train", inputs, key="data.public")
    place = ((noise.values - inputs.low) / (inputs.high - inputs.low))[:, [0, 1, 3]].numpy()
    assert place.min() == 0  # clipped, as 2 % of them are on either side
    assert place.max() == 1
    np.testing.assert_allclose(place.mean(0), 0.5, atol=0.02)
    np.testing.assert_allclose(place.std(0), 0.2387, atol=0.01)  # of N(1/2, 1/4) clipped to [0, 1]
    assert noise.labels.unique().tolist() == [-1]
    few = Noise("gaussian", 40).load_like("train", inputs, key="data.public")
    assert torch.equal(few.values, noise.values[:40])


def test_the_range_is_that_of_the_samples_that_are_used():
    whole, part = Given(table()), Given(table(), limit=5)
    chosen = part.load("train")
    assert torch.equal(chosen.inputs.low, chosen.values.amin(0))
    assert (chosen.inputs.low >= whole.load("train").inputs.low).all()
    assert not torch.equal(chosen.inputs.low, whole.load("train").inputs.low)


# ---------------------------------------------------------------------- form and identity


def test_inputs_come_back_from_a_file(tmp_path):
    s = store(dtype=torch.float32)
    torch.save(s.describe(), tmp_path / "facts.pt")
    inputs = restore(torch.load(tmp_path / "facts.pt", weights_only=True), torch.float32)
    assert inputs.columns == COLUMNS
    assert (inputs.shape, str(inputs), inputs.sizes) == ((4,), "4 features", {"features": 4})
    values = torch.from_numpy(table())
    assert torch.equal(inputs.scale(values), s.inputs.scale(values))
    assert torch.equal(inputs.draw_noise(3), s.inputs.draw_noise(3))


def test_the_identity_has_columns_values_and_labels():
    one = Given(table()).load("train").identity
    assert one["columns"] == list(COLUMNS)
    assert one["images"] == 18
    other = table()
    other[3, 1] = np.nextafter(other[3, 1], np.inf)
    assert Given(other).load("train").identity["pixels"] != one["pixels"]
    assert Given(table(), columns=("b", *COLUMNS[1:])).load("train").identity != one


# ---------------------------------------------------------------------- sources


def test_another_set_is_brought_to_the_columns_of_the_private_one():
    inputs = Given(table()).load("train").inputs
    shuffled = [3, 1, 0, 2]
    wider = np.concatenate([table(7, 5)[:, shuffled], np.full((7, 1), 9)], axis=1)
    columns = (*(COLUMNS[i] for i in shuffled), "more")
    public = Given(wider, columns=columns).load_like("train", inputs, key="data.public")
    np.testing.assert_array_equal(public.values, table(7, 5))
    assert public.inputs.columns == COLUMNS
    assert public.stored == "5 features"
    assert torch.equal(public.inputs.low, public.values.amin(0))


def test_sources_need_no_column_names():
    assert Given(table(), columns=()).load("train").inputs.columns == ("0", "1", "2", "3")


def test_vectors_of_a_known_identity_come_from_the_cache_the_second_time(monkeypatch, tmp_path):
    monkeypatch.setenv("IDKD_CACHE", str(tmp_path))

    class Known(Given):
        def identity(self, split, size, key):
            return ("known", split)

    first, second = Known(table()).load("train"), Known(table(9, 9)).load("train")
    assert second.identity == first.identity
    assert type(second) is type(first)
    assert torch.equal(second.inputs.low, first.values.amin(0))


def test_subsets_and_classes_are_those_of_every_source():
    chosen = Given(table(), limit=6).load("train")
    rest = Given(table(), skip=6).load("train")
    both = torch.cat([chosen.values, rest.values]).numpy()
    assert sorted(map(tuple, both)) == sorted(map(tuple, table()))
    assert Given(table(), classes=["b"]).load("train").labels.tolist() == [0] * 6


def test_several_sets_of_vectors_are_one():
    inputs = Given(table()).load("train").inputs
    joined = Concat([Given(table(4, 2)), Noise(samples=3)]).load_like("train", inputs, key="data.public")
    np.testing.assert_array_equal(joined.values[:4], table(4, 2))
    assert torch.equal(joined.values[4:], inputs.draw_noise(3))
    assert joined.labels.tolist() == [0, 1, 2, 0, -1, -1, -1]
    assert torch.equal(joined.inputs.low, joined.values.amin(0))
    assert Concat([Given(table())]).expect(None, None).columns == COLUMNS
    turned = Given(table(3, 4)[:, ::-1], columns=COLUMNS[::-1])
    private = Concat([Given(table()), turned]).load("train")
    np.testing.assert_array_equal(private.values, np.concatenate([table(), table(3, 4)]))


def test_noise_is_cut_down_like_any_set():
    inputs = Given(table()).load("train").inputs
    whole = Noise(samples=20).load_like("train", inputs, key="data.public")
    few, rest = (Noise(samples=20, **cut).load_like("train", inputs, key="data.public")
                 for cut in ({"limit": 6}, {"skip": 6}))  # fmt: skip
    both = torch.cat([few.values, rest.values]).tolist()
    assert (len(few), sorted(both)) == (6, sorted(whole.values.tolist()))
    with pytest.raises(UserError, match=r"^data\.public\.classes: this set has no class 'a'"):
        Noise(samples=20, classes=["a"]).load_like("train", inputs, key="data.public")


def test_a_kind_of_data_has_a_word_of_its_own():
    with pytest.raises(TypeError, match="Second: another kind of data is called vectors"):
        type("Second", (VectorInputs,), {"plural": "vectors"})
    third = type("Third", (VectorInputs,), {"plural": "third vectors"})
    try:
        facts = {"kind": "third vectors", "columns": ["a"]}
        assert type(restore(facts)) is third
    finally:
        del Inputs.kinds["third vectors"]


def test_copies_of_test_vectors_are_counted():
    public = np.concatenate([table(3, 7), table(5, 1)[:2]])
    assert store(Given(public)).duplicates() == 2


def spoiled(row, column, value):
    values = table()
    values[row, column] = value
    return values


@pytest.mark.parametrize(("values", "said"), [
    (spoiled(3, 1, np.nan), r"vector 3 of split 'train' has no value in column 'income'; allowed: finite numbers"),
    (spoiled(3, 1, np.inf), r"vector 3 .* has the value inf in column 'income'; allowed: finite numbers"),
    ([*spoiled(3, 1, np.nan)[:4], *spoiled(0, 0, np.nan)], r"vector 3 .* 'income' \(2 such values in all\); allowed"),
    ([np.ones(4), np.ones(3)], r"vector 1 of split 'train' has 3 features; allowed: 4, as the first one"),
    ([np.ones((2, 2))], r"vector 0 .* is of shape \[2, 2\] and type float64; allowed: an array \[F\] of numbers"),
    ([np.array(["1", "2"])], r"vector 0 .* is of shape \[2\] and type <U1; allowed: an array \[F\] of numbers"),
    ([], r"split 'train' holds no vectors"),
])  # fmt: skip
def test_what_is_not_a_table_of_numbers_is_refused(values, said):
    with pytest.raises(UserError, match=rf"^data\.private: {said}"):
        Given(values).load("train")


@pytest.mark.parametrize(("load", "said"), [
    (lambda i: Given(table(), columns=("age", "incme", "constant", "day")).load_like("train", i, key="data.public"),
     r"data\.public: the train vectors have no column 'income', .*it has age, incme, constant, day\. .*'incme'"),
    (lambda i: Digits().load_like("train", i, key="data.public"),
     r"data\.public: Digits holds images; allowed: vectors, as the private samples"),
    (lambda i: Given(table()).load_like("train", Digits().load("train").inputs, key="data.public"),
     r"data\.public: Given holds vectors; allowed: images, as the private samples"),
    (lambda i: Given(table()).load("train", 8), r"data\.image_size: 8 given; allowed for Given, .* vectors: null"),
    (lambda i: Given(table()).load("train", None, 3), r"data\.channels: 3 given; allowed for Given, .* vectors: null"),
    (lambda i: store(augment="crop"), r"data\.augment: crop given; allowed for vectors: none"),
    (lambda i: Concat([Given(table()), Given(table(), columns=("a", "b", "c", "d"))]).load("train"),
     r"data\.private\.parts: vectors differ in their columns: not all have 'a'"),
    (lambda i: Given(table(), columns=("a", "b")).load("train"),
     r"data\.private: Given names 2 columns \(a, b\); allowed: 4 different names"),
    (lambda i: Given(table(), columns=("a", "b", "a", "c")).load("train"),
     r"data\.private: Given names 4 columns .* allowed: 4 different names"),
    (lambda i: Given([[1, [2]]]).load("train"), r"data\.private: vector 0 of .* allowed: an array \[F\] of numbers"),
    (lambda i: Samples(torch.ones(2, 2), torch.zeros(2), ()), r"Samples: no inputs given; allowed: those of a kind"),
    (lambda i: restore({"kind": "tokens"}), r"data: tokens are a kind of data that no imported class describes"),
    (lambda i: Concat([Given(table()), Digits()]).load("train"),
     r"data\.private\.parts: vectors and images given; allowed: sets of one kind"),
    (lambda i: FeatureSkew().check(Given(table()).load("train")),
     r"data\.partition: FeatureSkew rotates images; allowed for vectors: the other partitions"),
])  # fmt: skip
def test_what_only_another_kind_has_is_refused(load, said):
    with pytest.raises(UserError, match=f"^{said}"):
        load(Given(table()).load("train").inputs)
