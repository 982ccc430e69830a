"""Labels as bytes: what arrives, how exactly, and how many bytes it took."""

import struct

import numpy as np
import pytest
import torch
from four_nodes import real_run

from lightning_idkd.callbacks import IDKD, MSP, Fixed, Mean, Packed, VanillaKD
from lightning_idkd.errors import UserError
from lightning_idkd.graph import Chain, Graph
from lightning_idkd.labels import Labels
from lightning_idkd.network import Network

HEAD = 5  # one byte says bitmap or list, four say how many labels
WIDTH = {"float32": 4, "float16": 2, "uint8": 1}
every_format = pytest.mark.parametrize("values", WIDTH)


def some(size, public, classes=10, weighted=False, sharpness=2.0, seed=0):
    """Labels of so many samples of a public set."""
    g = torch.Generator().manual_seed(seed)
    index = torch.randperm(public, generator=g)[:size].sort().values
    p = (sharpness * torch.randn(size, classes, generator=g)).softmax(1)
    return Labels(index, p, (torch.randperm(size, generator=g) + 1) / max(size, 1) if weighted else None)


def there_and_back(encoding, labels, public):
    """What arrives, and the message."""
    message = encoding.encode(labels, public)
    assert type(message) is bytes
    return encoding.decode(message, public, labels.probabilities.shape[1], labels.weights is not None), message


def largest(row, top):
    """Its ``top`` largest classes alone, the others sharing what is left evenly."""
    kept = sorted(range(len(row)), key=lambda c: -row[c])[:top]
    rest = (1 - sum(row[c] for c in kept)) / max(len(row) - top, 1)
    return [row[c] if c in kept else rest for c in range(len(row))]


# ---------------------------------------------------------------------- round trips


@every_format
@pytest.mark.parametrize("index", ["shorter", "bitmap", "list"])
@pytest.mark.parametrize(("size", "public"), [(0, 1), (1, 1), (3, 7), (8, 8), (9, 9), (5, 300), (300, 301)])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_samples_arrive_exactly_and_the_size_is_the_messages(values, index, size, public, weighted):
    sent = some(size, public, weighted=weighted)
    got, message = there_and_back(Packed(values, index=index), sent, public)
    assert torch.equal(got.index, sent.index)
    assert got.index.dtype == torch.int64
    assert (got.probabilities.shape, got.probabilities.dtype) == ((size, 10), torch.float32)
    assert (got.weights is not None) == weighted
    where = {"bitmap": -(-public // 8), "list": 4 * size}
    where["shorter"] = min(where.values())
    assert got.nbytes == got.size == len(message) == HEAD + where[index] + WIDTH[values] * size * (10 + weighted)


@pytest.mark.parametrize(("values", "error"), [("float32", 3e-7), ("float16", 2.0**-10), ("uint8", 5.5 / 255)])
def test_probabilities_arrive_within_the_rounding_of_their_format_and_sum_to_one(values, error):
    """Half floats have 11 bits, twice rounded by the sum; a byte is off by half a step, a sum of ten by ten halves."""
    for sharpness in (0.1, 2.0, 20.0):
        sent = some(200, 500, sharpness=sharpness)
        got, _ = there_and_back(Packed(values), sent, 500)
        np.testing.assert_allclose(got.probabilities.sum(1), 1, rtol=0, atol=1e-6)
        assert (got.probabilities >= 0).all()
        off = (got.probabilities - sent.probabilities).abs()
        assert off.max() <= error
        assert values == "float32" or off.max() > 0


@pytest.mark.parametrize("values", ["float16", "uint8"])
def test_hard_and_uniform_labels_are_exact(values):
    hard = Labels(torch.arange(3), torch.eye(4)[[2, 0, 3]])
    assert torch.equal(there_and_back(Packed(values), hard, 3)[0].probabilities, hard.probabilities)
    uniform = Labels(torch.arange(2), torch.full((2, 5), 0.2))
    torch.testing.assert_close(there_and_back(Packed(values), uniform, 3)[0].probabilities, uniform.probabilities)


def test_float32_arrives_as_it_was_up_to_its_sum():
    sent = some(50, 64, weighted=True)
    got, _ = there_and_back(Packed("float32"), sent, 64)
    torch.testing.assert_close(got.probabilities, sent.probabilities, rtol=3e-7, atol=0)
    assert torch.equal(got.weights, sent.weights)


def test_labels_of_very_many_classes_that_round_to_nothing_are_uniform():
    """A thousand classes of 1/1000 are less than half a step of 1/255."""
    sent = Labels(torch.arange(2), torch.full((2, 1000), 1e-3))
    got, _ = there_and_back(Packed("uint8"), sent, 2)
    torch.testing.assert_close(got.probabilities, sent.probabilities)


@every_format
@pytest.mark.parametrize("top", [1, 3, 9])
def test_the_largest_probabilities_cross_and_the_rest_is_spread_evenly(values, top):
    sent = some(40, 77, sharpness=1.0)
    got, message = there_and_back(Packed(values, top), sent, 77)
    assert len(message) == HEAD + 10 + 40 * top * (2 + WIDTH[values])  # two bytes name a class
    expected = np.array([largest(row, top) for row in sent.probabilities.double().tolist()])
    error = {"float32": 1e-6, "float16": 2e-3, "uint8": (top + 1) * 0.5 / 255}[values]
    np.testing.assert_allclose(got.probabilities, expected, rtol=0, atol=1.1 * error)
    np.testing.assert_allclose(got.probabilities.sum(1), 1, rtol=0, atol=1e-6)
    assert torch.equal(got.probabilities.argmax(1), sent.probabilities.argmax(1)) or values == "uint8"


@every_format
@pytest.mark.parametrize("top", [10, 11, 1000])
def test_a_top_of_all_classes_or_more_is_all_classes(values, top):
    sent = some(9, 20)
    assert Packed(values, top).encode(sent, 20) == Packed(values).encode(sent, 20)
    got, plain = (there_and_back(e, sent, 20)[0] for e in (Packed(values, top), Packed(values)))
    assert torch.equal(got.probabilities, plain.probabilities)


def test_classes_beyond_a_byte_keep_their_name():
    p = torch.zeros(2, 1000)
    p[0, 999], p[0, 256], p[1, 255] = 0.75, 0.25, 1.0
    got, _ = there_and_back(Packed("float16", 2), Labels(torch.arange(2), p), 2)
    torch.testing.assert_close(got.probabilities, p)


@pytest.mark.parametrize(("values", "error"), [("float32", 0.0), ("float16", 2.0**-11), ("uint8", 1 / 255)])
def test_weights_arrive_and_none_is_lost(values, error):
    """The lowest of 600 ranks rounds to 0 in steps of 1/255, which would be no vote at all."""
    sent = some(600, 600, classes=3, weighted=True)
    got, _ = there_and_back(Packed(values), sent, 600)
    assert (got.weights > 0).all()
    assert (got.weights - sent.weights).abs().max() <= error
    assert Mean()({0: got}).probabilities.isfinite().all()


# ---------------------------------------------------------------------- the bytes themselves


def test_a_message_byte_by_byte():
    sent = Labels(torch.tensor([1, 9]), torch.tensor([[0.75, 0.25], [0.0, 1.0]]), torch.tensor([1.0, 0.5]))
    bitmap = bytes([0b01000000, 0b01000000])  # samples 1 and 9 of 12, first bit first
    halves = struct.pack("<4e", 0.75, 0.25, 0.0, 1.0)
    assert Packed("float16").encode(sent, 12) == (
        b"\0" + struct.pack("<I", 2) + bitmap + halves + struct.pack("<2e", 1, 0.5)
    )
    listed = struct.pack("<2i", 1, 9)
    assert Packed("uint8", index="list").encode(sent, 12) == (
        b"\1" + struct.pack("<I", 2) + listed + bytes([191, 64, 0, 255]) + bytes([255, 128])
    )
    first = struct.pack("<2H", 0, 1) + struct.pack("<2f", 0.75, 1.0)
    assert Packed("float32", 1).encode(sent, 12) == (
        b"\0" + struct.pack("<I", 2) + bitmap + first + struct.pack("<2f", 1, 0.5)
    )


@pytest.mark.parametrize("public", [1, 31, 32, 33, 64, 1000])
def test_the_shorter_index_is_taken(public):
    """Four bytes a sample against an eighth of a byte for every public one; the bitmap where they are equal."""
    for size in range(min(public, 40) + 1):
        sent = some(size, public, classes=2)
        chosen, bitmap, listed = (Packed("uint8", index=i).encode(sent, public) for i in ("shorter", "bitmap", "list"))
        assert len(chosen) == min(len(bitmap), len(listed))
        assert chosen == (listed if 4 * size < -(-public // 8) else bitmap)


@every_format
@pytest.mark.parametrize("top", [None, 2])
@pytest.mark.parametrize("index", ["shorter", "bitmap", "list"])
def test_no_labels_are_a_message_too(values, top, index):
    for weighted in (False, True):
        nothing = Labels(torch.empty(0, dtype=torch.int64), torch.empty(0, 4), torch.empty(0) if weighted else None)
        got, message = there_and_back(Packed(values, top, index), nothing, 100)
        assert (got.index.shape, got.probabilities.shape) == ((0,), (0, 4))
        assert got.weights is None or got.weights.shape == (0,)
        assert len(message) == HEAD + (13 if index == "bitmap" else 0)


@pytest.mark.parametrize("index", ["shorter", "bitmap", "list"])
def test_an_index_out_of_order_is_refused(index):
    """A bitmap would hand the labels to other samples."""
    with pytest.raises(ValueError, match="ascending order"):
        Packed(index=index).encode(Labels(torch.tensor([4, 2]), torch.eye(2)), 8)


@pytest.mark.parametrize("top", [0, -3])
def test_no_class_at_all_is_refused_with_the_key(top):
    with pytest.raises(UserError, match=rf"distillation\.encoding\.top: {top} given; allowed: 1 or more, or null"):
        Packed(top=top)


# ---------------------------------------------------------------------- on an edge


@every_format
def test_what_is_counted_is_what_is_written(values):
    """Nodes 0, 1, 2 of a chain send to 1, 2, 1 neighbours; their messages have different lengths."""
    net, encoding = Network(Graph(Chain(), 3)), Packed(values)
    sent = [some(size, 500) for size in (0, 3, 200)]
    got = [there_and_back(encoding, labels, 500) for labels in sent]
    received = net.exchange([labels for labels, _ in got])
    lengths = [len(message) for _, message in got]
    assert lengths == [HEAD, HEAD + 3 * (4 + 10 * WIDTH[values]), HEAD + 63 + 200 * 10 * WIDTH[values]]
    assert net.counts()["label_bytes"] == lengths[0] + 2 * lengths[1] + lengths[2]
    for r in received:
        for sender, labels in r.items():
            assert torch.equal(labels.index, sent[sender].index)


def test_a_run_counts_the_encoded_labels():
    """Eleven public samples of three classes on a ring of four: one vanilla exchange, one that keeps nothing."""
    run = real_run(VanillaKD(start=0, encoding=Packed("uint8", 2)))
    run.call("on_epoch_start", epoch=0)
    assert run.network.counts()["label_bytes"] == 8 * (HEAD + 2 + 11 * 2 * (2 + 1))
    run = real_run(IDKD(start=0, encoding=Packed()), Fixed(MSP(), threshold=1e6))
    run.call("on_epoch_start", epoch=0)
    assert run.network.counts()["label_bytes"] == 8 * HEAD
    assert [len(d) for d in run.store.distilled] == [0] * 4
