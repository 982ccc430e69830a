"""Encodings of labels; the counted bytes are the length of the encoded message."""

from __future__ import annotations

from typing import Literal

from lightning_idkd.callback import Encoding
from lightning_idkd.errors import require
from lightning_idkd.labels import Labels

TYPE_CHECKING = False  # by a name of ours: jsonargparse runs the block of typing's, which would load torch
if TYPE_CHECKING:
    from torch import Tensor


class Packed(Encoding):
    """Sends the index of the samples (as a bitmap or a list), then their largest probabilities in a short number
    format.

    With ``top`` below the number of classes, receivers spread the remaining probability evenly over the other classes.
    Received probabilities are scaled to sum to 1.

    Args:
        values: Number format: ``float32``, ``float16``, or ``uint8`` in steps of 1/255.
        top: Number of classes per label that are sent; null for all.
        index: ``bitmap`` of the public set, ``list`` of 4-byte indices, or the ``shorter`` of the two.
    """

    def __init__(self, values: Literal["float32", "float16", "uint8"] = "float16", top: int | None = None,
                 index: Literal["shorter", "bitmap", "list"] = "shorter"):  # fmt: skip
        require(top is None or top >= 1, "distillation.encoding.top", top, "1 or more, or null for all classes")
        self.values, self.top, self.index = values, top, index

    def encode(self, labels: Labels, public: int) -> bytes:
        p = labels.probabilities.float().cpu()
        parts = [write_index(labels.index, public, self.index)]
        top = self._top(p.shape[1])
        if top < p.shape[1]:
            p, classes = p.topk(top, dim=1)
            parts.append(classes.numpy().astype("<u2").tobytes())
        parts.append(self._write(p))
        if labels.weights is not None:
            weights = labels.weights.float().cpu()
            if self.values == "uint8":
                weights = weights.clamp_min(1 / 255)  # a weight that rounds to 0 would not count as a vote
            parts.append(self._write(weights))
        return b"".join(parts)

    def decode(self, message: bytes, public: int, classes: int, weighted: bool) -> Labels:
        import numpy as np
        import torch

        index, position = read_index(message, public)
        size, top = len(index), self._top(classes)
        if top < classes:
            top_classes = np.frombuffer(message, "<u2", size * top, position).astype(np.int64)
            position += 2 * size * top
        p, position = self._read(message, size * top, position)
        p = p.view(size, top)
        if top < classes:
            rest = ((1 - p.sum(1, keepdim=True)) / (classes - top)).clamp_min(0)
            p = rest.expand(size, classes).scatter(1, torch.from_numpy(top_classes).view(size, top), p)
        total = p.sum(1, keepdim=True)  # 0 if all probabilities round to 0, as with very many classes
        p = torch.where(total > 0, p / total.clamp_min(1e-12), 1 / classes)
        weights = self._read(message, size, position)[0] if weighted else None
        return Labels(index, p, weights, len(message))

    def _top(self, classes: int) -> int:
        return min(self.top or classes, classes)

    def _write(self, T: Tensor) -> bytes:
        if self.values == "uint8":
            return (255 * T).round().byte().numpy().tobytes()
        return T.numpy().astype("<f4" if self.values == "float32" else "<f2").tobytes()

    def _read(self, message: bytes, count: int, position: int) -> tuple[Tensor, int]:
        import numpy as np
        import torch

        kind = {"float32": "<f4", "float16": "<f2", "uint8": "u1"}[self.values]
        numbers = torch.from_numpy(np.frombuffer(message, kind, count, position).astype(np.float32))
        return (numbers / 255 if self.values == "uint8" else numbers), position + count * np.dtype(kind).itemsize


def write_index(index: Tensor, public: int, form: str) -> bytes:
    """Returns the part of a message that names the labelled samples: its form (1 for a list, 0 for a bitmap), their
    number in 4 bytes, and the list or bitmap; see :class:`Packed` for the ``form``."""
    import numpy as np
    import torch

    if not torch.equal(index.sort().values, index):
        raise ValueError("labels must be in ascending order of their samples")
    samples = index.cpu().numpy()
    indices, kept = samples.astype("<i4").tobytes(), np.zeros(public, bool)
    kept[samples] = True
    bitmap = np.packbits(kept).tobytes()
    as_list = form == "list" or (form == "shorter" and len(indices) < len(bitmap))
    return bytes([as_list]) + len(samples).to_bytes(4, "little") + (indices if as_list else bitmap)


def read_index(message: bytes, public: int) -> tuple[Tensor, int]:
    """Returns the index [s] that :func:`write_index` has put at the begin of a message, and the position after it."""
    import numpy as np
    import torch

    as_list, size, position = bool(message[0]), int.from_bytes(message[1:5], "little"), 5
    if as_list:
        index, length = np.frombuffer(message, "<i4", size, position).astype(np.int64), 4 * size
    else:
        length = -(-public // 8)
        index = np.flatnonzero(np.unpackbits(np.frombuffer(message, np.uint8, length, position))[:public])
    return torch.from_numpy(index), position + length
