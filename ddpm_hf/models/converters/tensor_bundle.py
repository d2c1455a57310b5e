"""Checkpoints of TensorFlow (`model.ckpt-N.index`, `model.ckpt-N.data-*`), read without TensorFlow.

The index is a sorted table as LevelDB writes it: blocks of (key, value) whose keys share prefixes, and at the end a
footer with the place of the block of blocks. Each value is a protocol buffer, `BundleEntryProto`: type, shape, and
where in which data file the bytes are. Both formats are public (tensorflow/core/lib/io/format.h,
tensorflow/core/protobuf/tensor_bundle.proto).
"""

import math
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

MAGIC, FOOTER = 0xDB4775248B80FB57, 48  # bytes
TYPES = {1: "<f4", 2: "<f8", 3: "<i4", 4: "|u1", 5: "<i2", 6: "|i1", 9: "<i8", 10: "|b1", 19: "<f2"}  # of DataType
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # wire types of protocol buffers
MASK_DELTA = 0xA282EAD8  # by which stored checksums are changed


class Entry(NamedTuple):
    """Where a tensor lies."""

    dtype: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    checksum: int | None  # masked CRC-32C


def is_bundle(path: Path) -> bool:
    """Whether a path is the index of a checkpoint, its name without a suffix, or a folder with one."""
    return path.name.endswith(".index") or bool(find_indices(path))


def find_indices(path: Path) -> list[Path]:
    """The index files that a path may mean."""
    if path.name.endswith(".index"):
        return [path]
    beside = path.with_name(f"{path.name}.index") if path.name else path
    return [beside] if beside.is_file() else sorted(path.glob("*.index")) if path.is_dir() else []


def read_bundle(path: Path, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, np.ndarray]:
    """The tensors of a checkpoint, by name; their checksums are compared.

    Args:
        path: its index, its name without a suffix, or a folder that holds one checkpoint.
        wanted: which names to read.

    Raises:
        ValueError: files that are missing, truncated or damaged, or compressed blocks.
    """
    indices = find_indices(path)
    if len(indices) != 1:
        raise ValueError(f"{path} holds {len(indices)} checkpoints (*.index); name one of them")
    index = indices[0]
    prefix = index.name.removesuffix(".index")
    try:
        entries, shards = read_index(index.read_bytes())
        files = [index.with_name(f"{prefix}.data-{number:05d}-of-{shards:05d}") for number in range(shards)]
        data = [np.memmap(file, mode="r") if file.stat().st_size else np.empty(0, np.uint8) for file in files]
        return {name: _read(name, entry, data[entry.shard]) for name, entry in entries.items() if wanted(name)}
    except (struct.error, IndexError, KeyError, OverflowError, UnicodeDecodeError) as error:
        raise ValueError(f"{index}: truncated, or not the index of a TensorFlow checkpoint") from error
    except OSError as error:
        raise ValueError(f"{index}: {error.strerror}: {error.filename}") from error


def _read(name: str, entry: Entry, data: np.ndarray) -> np.ndarray:
    """A tensor's values."""
    if entry.dtype not in TYPES:
        raise ValueError(f"{name}: TensorFlow's type {entry.dtype} is not supported")
    dtype = np.dtype(TYPES[entry.dtype])
    raw = data[entry.offset : entry.offset + entry.size]
    if len(raw) != entry.size or entry.size != dtype.itemsize * int(np.prod(entry.shape, dtype=np.int64)):
        raise ValueError(f"{name}: the data file is truncated, or of another checkpoint")
    if entry.checksum is not None and masked(crc32c(raw)) != entry.checksum:
        raise ValueError(f"{name}: its checksum differs; the data file is damaged")
    return np.frombuffer(raw.tobytes(), dtype).reshape(entry.shape)


def read_index(content: bytes) -> tuple[dict[str, Entry], int]:
    """(the tensors' entries by name, the number of data files) of an index.

    Raises:
        ValueError: it is not one.
    """
    if len(content) < FOOTER or struct.unpack("<Q", content[-8:])[0] != MAGIC:
        raise ValueError("truncated, or not the index of a TensorFlow checkpoint")
    footer = content[-FOOTER:]
    _, at = _handle(footer, 0)  # of the block of meta data, which is empty
    place, _ = _handle(footer, at)
    entries, shards = {}, 1
    for _, value in _block(content, *place):
        for key, entry in _block(content, *_handle(value, 0)[0]):
            if key:
                entries[key.decode()] = parse_entry(entry)
            else:  # the header of the whole checkpoint: the first field is the number of data files
                shards = next((int(number) for field, number in _fields(entry) if field == 1), 1)
    return entries, shards


def _handle(content: bytes, at: int) -> tuple[tuple[int, int], int]:
    """((offset, size) of a block, where the next thing begins)."""
    offset, at = read_varint(content, at)
    size, at = read_varint(content, at)
    return (offset, size), at


def _block(content: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """The (key, value) pairs of a block; a key is written without what it shares with the one before."""
    block = content[offset : offset + size]
    kind, checksum = content[offset + size], content[offset + size + 1 : offset + size + 5]
    if kind != 0:
        raise ValueError("a compressed index, which is not supported; save it again with TensorFlow")
    if masked(crc32c(np.frombuffer(content[offset : offset + size + 1], np.uint8))) != int.from_bytes(
        checksum, "little"
    ):
        raise ValueError("the checksum of the index differs; it is damaged")
    end = len(block) - 4 - 4 * struct.unpack("<I", block[-4:])[0]  # before the restart points
    at, key = 0, b""
    while at < end:
        shared, at = read_varint(block, at)
        added, at = read_varint(block, at)
        length, at = read_varint(block, at)
        key = key[:shared] + block[at : at + added]
        yield key, block[at + added : at + added + length]
        at += added + length


def parse_entry(message: bytes) -> Entry:
    """A `BundleEntryProto`."""
    found = dict(_fields(message))
    if 7 in found:
        raise ValueError("a tensor in slices (partitioned variables), which is not supported")
    shape = tuple(dict(_fields(size)).get(1, 0) for field, size in _fields(found.get(2, b"")) if field == 2)
    return Entry(
        found.get(1, 0), shape, found.get(3, 0), found.get(4, 0), found.get(5, 0), found.get(6)
    )  # fmt: skip


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of each field of a protocol buffer: an int, or bytes."""
    at = 0
    while at < len(message):
        tag, at = read_varint(message, at)
        kind = tag & 7
        if kind == VARINT:
            value, at = read_varint(message, at)
        elif kind in (FIXED32, FIXED64):
            width = 4 if kind == FIXED32 else 8
            value, at = int.from_bytes(message[at : at + width], "little"), at + width
        elif kind == BYTES:
            length, at = read_varint(message, at)
            if at + length > len(message):
                raise ValueError("a truncated entry of the index")
            value, at = message[at : at + length], at + length
        else:
            raise ValueError("a malformed entry of the index")
        yield tag >> 3, value


def read_varint(content: bytes, at: int) -> tuple[int, int]:
    """(a number in groups of seven bits, where the next thing begins)."""
    value, shift = 0, 0
    while True:
        byte = content[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError("a malformed number in the index")


def _table() -> np.ndarray:
    table: np.ndarray = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, (table >> 1) ^ np.uint32(0x82F63B78), table >> 1)
    return table


CRC_TABLE = _table()


def crc32c(data: np.ndarray) -> int:
    """The CRC-32C (Castagnoli) of bytes, uint8 [L].

    A CRC is linear: stretches of equal length are reduced side by side, each as if zeros were before it, and joined.

    >>> hex(crc32c(np.frombuffer(b"123456789", np.uint8)))
    '0xe3069283'
    """
    lanes = min(len(data), 2 * math.isqrt(len(data))) or 1
    length = len(data) // lanes
    body, rest = data[: lanes * length].reshape(lanes, length), data[lanes * length :]
    states: np.ndarray = np.zeros(lanes + 32, np.uint32)
    states[0] = 0xFFFFFFFF
    states[lanes:] = np.uint32(1) << np.arange(32, dtype=np.uint32)  # what becomes of each bit over a stretch
    stretches: np.ndarray = np.zeros((length, lanes + 32), np.uint8)
    stretches[:, :lanes] = body.T
    for column in stretches:
        states = CRC_TABLE[(states ^ column) & 0xFF] ^ (states >> np.uint32(8))
    bits, state = states[lanes:].tolist(), int(states[0])
    for own in states[1:lanes].tolist():
        moved = 0
        for bit in range(32):
            if state >> bit & 1:
                moved ^= bits[bit]
        state = moved ^ own
    for byte in rest.tolist():
        state = int(CRC_TABLE[(state ^ byte) & 0xFF]) ^ (state >> 8)
    return state ^ 0xFFFFFFFF


def masked(checksum: int) -> int:
    """A checksum as it is stored: rotated and shifted."""
    return (((checksum >> 15) | (checksum << 17)) + MASK_DELTA) & 0xFFFFFFFF
