"""Checksums of archives and libraries, kept inside the file, so that they survive links, copies and new names.

A sealed file ends with ``crc32 `` and eight hexadecimal digits: the CRC-32 of all bytes before the digits. An archive
of torch is a zip file, which may end with a comment; there the checksum is that comment, so torch and zip tools read
the archive as before.
"""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

MARK = b"crc32 "
LENGTH = len(MARK) + 8
"""Bytes at the end of a sealed file."""
END = b"PK\5\6"
"""How the last record of a zip file begins; the length of the comment ends it."""
END_LENGTH = 22
BLOCK = 2**20
"""Bytes read at once."""


def seal(path: Path) -> None:
    """Append the checksum to a complete file."""
    with open(path, "r+b") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - END_LENGTH))
        if file.read(len(END)) == END:
            file.seek(-2, os.SEEK_END)
            file.write(struct.pack("<H", LENGTH))
        file.seek(0, os.SEEK_END)
        file.write(MARK)
        file.seek(0)
        checksum = compute_checksum(file, end + len(MARK))
        file.seek(0, os.SEEK_END)
        file.write(b"%08x" % checksum)


def is_sealed(path: Path) -> bool | None:
    """Whether a file has the checksum that it ends with; None for a complete archive from before checksums.

    CRC-32 notices every change within 32 neighbouring bits, such as a changed byte, and misses one in 2^32 others.

    Raises:
        OSError: the file is missing or cannot be read.
    """
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - LENGTH))
        mark, digits = file.read(len(MARK)), file.read()
        if mark == MARK:
            file.seek(0)
            return digits == b"%08x" % compute_checksum(file, size - 8)
        file.seek(max(0, size - END_LENGTH))
        end = file.read()
    return None if end.startswith(END) and end.endswith(b"\0\0") else False


def compute_checksum(file, length: int) -> int:
    """The CRC-32 of the next ``length`` bytes of a file."""
    checksum = 0
    while length > 0 and (block := file.read(min(BLOCK, length))):
        checksum, length = zlib.crc32(block, checksum), length - len(block)
    return checksum
