"""A source that reads LSUN's scenes from the databases that its project publishes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lightning_idkd.data.source import Subset, expand
from lightning_idkd.errors import UserError, require


@dataclass
class LSUN(Subset):
    """The scenes of LSUN, a public set: all CATEGORY_val_lmdb/ folders below ``path``, as its download script makes
    them.

    It needs the package lmdb and data.image_size. The validation parts of all ten categories have 3,000 images; a
    single training part can have millions, which are all decoded before the limit applies.

    Args:
        path: the folder.
        part: val or train.
    """

    path: str = ""
    part: str = "val"

    def check(self, key: str) -> None:
        super().check(key)
        require(self.part in ("val", "train"), f"{key}.part", f"'{self.part}'", "val, train")

    def identity(self, split: str, size: int | None, key: str) -> tuple:
        files = [folder / "data.mdb" for folder in self._folders(split, key)]
        return ("lsun", [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files])

    def read(self, split: str, size: int | None, key: str) -> tuple[tuple[str, ...], Iterable[tuple]]:
        folders = self._folders(split, key)
        try:
            import lmdb  # noqa: F401 (so that it fails before anything is read)
        except ModuleNotFoundError as error:
            raise UserError(f"{key}: LSUN needs a package that is not installed: pip install lmdb") from error
        return tuple(folder.name.rsplit("_", 2)[0] for folder in folders), self._rows(folders, key)

    def _folders(self, split: str, key: str) -> list[Path]:
        if split == "test":
            raise UserError(f"{key}: LSUN has no labelled test part, so it can be a public set only")
        root = expand(self.path, f"{key}.path")
        folders = sorted(file.parent for file in root.glob(f"*_{self.part}_lmdb/data.mdb")) if self.path else []
        if not folders:
            databases = f"CATEGORY_{self.part}_lmdb/data.mdb"
            raise UserError(f"{key}.path: '{self.path}' holds no {databases}, the unpacked databases of LSUN")
        return folders

    def _rows(self, folders: list[Path], key: str) -> Iterator[tuple]:
        import lmdb

        for label, folder in enumerate(folders):
            try:
                with lmdb.open(str(folder), readonly=True, lock=False) as database, database.begin() as reading:
                    for _, image in reading.cursor():
                        yield image, label
            except lmdb.Error as error:
                raise UserError(f"{key}.path: '{folder}' cannot be read: {error}") from error
