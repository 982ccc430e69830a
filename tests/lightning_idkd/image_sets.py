"""Small image sets in memory and in parquet files."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def png(array: np.ndarray | Image.Image, **save) -> bytes:
    image, file = array if isinstance(array, Image.Image) else Image.fromarray(array), io.BytesIO()
    image.save(file, "png", **save)
    return file.getvalue()


def pictures(n: int, size: int = 4, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, 3)).astype(np.uint8)


def write_parquet(file: Path, arrays, labels=None, image="image", label="label", names=None, features=True):
    """A table of PNG files as `datasets` stores it; without ``features`` its schema tells of no image and no class."""
    import datasets

    columns = {image: [{"bytes": png(a), "path": None} for a in arrays]}
    kinds = {image: datasets.Image()}
    if labels is not None:
        columns[label] = labels
        kinds[label] = datasets.ClassLabel(names=names) if names else datasets.Value("int64")
    file.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    pq.write_table(table.cast(datasets.Features(kinds).arrow_schema) if features else table, file)


def quadrants(labels, seed: int = 0) -> np.ndarray:
    """Images [n, 8, 8] whose bright quadrant is their label, 0 to 3."""
    images = np.random.default_rng(seed).integers(0, 60, (len(labels), 8, 8)).astype(np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[label // 2 * 4 :, label % 2 * 4 :][:4, :4] += 150
    return images
