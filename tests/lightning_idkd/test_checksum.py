"""Checksums inside files: every damaged byte is noticed, and archives read as before."""

from __future__ import annotations

import os
import zipfile

import pytest
import torch

from lightning_idkd.checksum import is_sealed, seal

STATE = {"X": torch.arange(6.0).reshape(2, 3), "epoch": 3}


@pytest.fixture
def archive(tmp_path):
    torch.save(STATE, tmp_path / "last.ckpt")
    seal(tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


def compute_crc(content: bytes) -> int:
    """CRC-32 bit by bit: polynomial 0x04C11DB7, reflected."""
    remainder = 0xFFFFFFFF
    for byte in content:
        remainder ^= byte
        for _ in range(8):
            remainder = remainder >> 1 ^ (0xEDB88320 if remainder & 1 else 0)
    return remainder ^ 0xFFFFFFFF


def test_a_file_ends_with_the_crc32_of_all_bytes_before_the_digits(archive):
    content = archive.read_bytes()
    assert content[-14:-8] == b"crc32 "
    assert int(content[-8:], 16) == compute_crc(content[:-8])
    assert is_sealed(archive) is True


def test_torch_and_zip_tools_read_a_sealed_archive(archive):
    for mmap in (False, True):
        assert torch.equal(torch.load(archive, weights_only=True, mmap=mmap)["X"], STATE["X"])
    with zipfile.ZipFile(archive) as file:
        assert file.testzip() is None
        assert file.comment == archive.read_bytes()[-14:]


def test_every_flipped_bit_of_every_byte_is_noticed(archive):
    content = archive.read_bytes()
    with open(archive, "r+b", buffering=0) as file:
        for position, byte in enumerate(content):
            for value, sound in ((byte ^ 1 << position % 8, False), (byte, True)):
                file.seek(position)
                file.write(bytes([value]))
                assert is_sealed(archive) is sound, position


def test_a_file_cut_anywhere_or_with_more_bytes_is_noticed(archive):
    content = archive.read_bytes()
    for length in reversed(range(len(content))):
        os.truncate(archive, length)
        assert is_sealed(archive) is False, length
    archive.write_bytes(content + b"\n")
    assert is_sealed(archive) is False


def test_an_archive_from_before_checksums_is_neither_whole_nor_damaged(tmp_path):
    torch.save(STATE, tmp_path / "old.ckpt")
    assert is_sealed(tmp_path / "old.ckpt") is None
    (tmp_path / "old.ckpt").write_bytes((tmp_path / "old.ckpt").read_bytes()[:-1])
    assert is_sealed(tmp_path / "old.ckpt") is False


def test_a_file_that_is_no_archive_keeps_its_content(tmp_path):
    (tmp_path / "library.so").write_bytes(b"content")
    seal(tmp_path / "library.so")
    assert (tmp_path / "library.so").read_bytes() == b"contentcrc32 %08x" % compute_crc(b"contentcrc32 ")
