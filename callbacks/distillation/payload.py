"""How labels are written on an edge; what is counted is the length of what is written."""

from __future__ import annotations

from typing import Literal

from lightning_idkd.callback import Encoding
from lightning_idkd.errors import require


class Packed(Encoding):
    """Which samples (a bitmap or indices, whichever is shorter), then their largest probabilities in a small number format.

    With ``top`` below the number of classes the left out share is spread evenly over the other classes.

    Args:
        values: ``float32``, ``float16``, or ``uint8`` in steps of 1/255, made to sum to 1 again on arrival.
        top: Number of classes a label that cross; null for all.
        index: ``bitmap`` of the public set, 4-byte ``list`` of indices, or the ``shorter`` one.
    """

    def __init__(self, values: Literal["float32", "float16", "uint8"] = "float16", top: int | None = None,
                 index: Literal["shorter", "bitmap", "list"] = "shorter"):  # fmt: skip
        require(top is None or top >= 1, "distillation.encoding.top", top, "1 or more, or null for all classes")
        self.values, self.top, self.index = values, top, index

    def encode(self, labels, public):
        import numpy as np
        import torch

        index = labels.index.cpu().numpy()
        listed = index.astype("<i4").tobytes()
        kept = np.zeros(public, bool)
        kept[index] = True
        bitmap = np.packbits(kept).tobytes()
        as_list = self.index == "list" or (self.index == "shorter" and len(listed) < len(bitmap))
        p = labels.probabilities.float().cpu()
        parts = [bytes([as_list]), len(index).to_bytes(4, "little"), listed if as_list else bitmap]
        if self._top(p.shape[1]) < p.shape[1]:
            p, classes = p.topk(self.top, dim=1)
            parts.append(classes.numpy().astype("<u2").tobytes())
        parts.append(self._numbers(p))
        if labels.weights is not None:
            weights = labels.weights.float().cpu()  # one that rounds to 0 would be no vote at all
            parts.append(self._numbers(weights.clamp_min(1 / 255) if self.values == "uint8" else weights))
        if not torch.equal(labels.index.sort().values, labels.index):
            raise ValueError("labels are sent in ascending order of their samples")
        return b"".join(parts)

    def decode(self, message, public, classes, weighted):
        import numpy as np
        import torch

        from lightning_idkd.labels import Labels

        as_list, size, at = bool(message[0]), int.from_bytes(message[1:5], "little"), 5
        length = 4 * size if as_list else -(-public // 8)
        raw = np.frombuffer(message, "<i4" if as_list else np.uint8, count=length // (4 if as_list else 1), offset=at)
        index = torch.from_numpy(raw.astype(np.int64) if as_list else np.flatnonzero(np.unpackbits(raw)[:public]))
        at += length
        top = self._top(classes)
        if top < classes:
            chosen = torch.from_numpy(np.frombuffer(message, "<u2", size * top, at).astype(np.int64)).view(size, top)
            at += 2 * size * top
        p, at = self._read(message, size * top, at)
        p = p.view(size, top)
        if top < classes:
            rest = ((1 - p.sum(1, keepdim=True)) / (classes - top)).clamp_min(0)
            p = rest.expand(size, classes).scatter(1, chosen, p)
        total = p.sum(1, keepdim=True)  # 0 where all of very many classes round to 0
        p = torch.where(total > 0, p / total.clamp_min(1e-12), 1 / classes)
        weights = self._read(message, size, at)[0] if weighted else None
        return Labels(index, p, weights, len(message))

    def _top(self, classes: int) -> int:
        return min(self.top or classes, classes)

    def _numbers(self, T) -> bytes:
        if self.values == "uint8":
            return (255 * T).round().byte().numpy().tobytes()
        return T.numpy().astype("<f4" if self.values == "float32" else "<f2").tobytes()

    def _read(self, message: bytes, count: int, at: int):
        import numpy as np
        import torch

        kind = {"float32": "<f4", "float16": "<f2", "uint8": "u1"}[self.values]
        found = torch.from_numpy(np.frombuffer(message, kind, count, at).astype(np.float32))
        return (found / 255 if self.values == "uint8" else found), at + count * np.dtype(kind).itemsize
