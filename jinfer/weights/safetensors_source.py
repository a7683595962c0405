"""Reads safetensors, one file or many, memory-mapped.

The format: 8 bytes little-endian header length, a JSON header `{name: {dtype, shape, data_offsets}}`, then
the data. Everything that the header claims is checked against the size of the file before a byte of data is
mapped, so a truncated or hostile file is an error and never a fault.
"""

from __future__ import annotations

import mmap
import os
import re
import weakref
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import ml_dtypes
import numpy as np

from jinfer.errors import ModelError
from jinfer.weights.files import parse_json_object, read_json_object, some

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# The limit of the format's own library: a header is a few hundred bytes per tensor.
HEADER_LIMIT = 100_000_000

DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}

# Weights that would have to be unpickled, which runs code, or that another reader is for.
REFUSED_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack", ".gguf")


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: `[start, stop)` in bytes from the beginning of its file."""

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


class SafetensorsFile:
    """One mapped file. Raises ModelError, naming file and problem, if it is not sound."""

    def __init__(self, path: Path):
        self.path = path
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                self.entries = _read_header(file, size, path)
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                self._fd = os.dup(file.fileno())
        except OSError as error:
            raise ModelError(f"{path} cannot be read: {error.strerror or error}") from error
        self._close = weakref.finalize(self, os.close, self._fd)

    def read(self, name: str) -> np.ndarray:
        entry = self.entries[name]
        size = os.fstat(self._fd).st_size
        if size < entry.stop:  # touching what is no longer there would end the process
            raise ModelError(
                f"{self.path} ends at byte {size}, and tensor {name[:200]!r} at byte {entry.stop}: the file was cut short "
                "while it was open, copy or download it again"
            )
        flat = np.frombuffer(self._map, np.uint8, entry.stop - entry.start, entry.start)
        if entry.start % entry.dtype.alignment:  # the format allows it, some writers do it
            flat = flat.copy()
        return flat.view(entry.dtype).reshape(entry.shape)

    def release(self, name: str) -> None:
        """Unmaps the pages of a tensor; else the whole file ends up counted as the process's memory."""
        entry = self.entries[name]
        start = entry.start - entry.start % mmap.PAGESIZE
        if hasattr(mmap, "MADV_DONTNEED") and entry.stop > entry.start:
            self._map.madvise(mmap.MADV_DONTNEED, start, entry.stop - start)

    def close(self) -> None:
        self._close()
        try:
            self._map.close()
        except BufferError:  # an array from `read` is still alive; the map goes when the array does
            pass


class SafetensorsSource:
    """A checkpoint of one or many safetensors files: a `TensorSource`."""

    def __init__(self, files: list[SafetensorsFile]):
        self._files = files
        self._home: dict[str, SafetensorsFile] = {}
        for file in files:
            for name in file.entries:
                if name in self._home:
                    raise ModelError(
                        f"tensor {name!r} is in {self._home[name].path.name} and again in {file.path}: "
                        "expected each tensor in one file"
                    )
                self._home[name] = file

    def names(self) -> Collection[str]:
        return self._home.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def dtype(self, name: str) -> np.dtype:
        return self._entry(name).dtype

    def read(self, name: str) -> np.ndarray:
        self._entry(name)
        return self._home[name].read(name)

    def release(self, name: str) -> None:
        self._entry(name)
        self._home[name].release(name)

    def close(self) -> None:
        for file in self._files:
            file.close()

    def _entry(self, name: str) -> Entry:
        if name not in self._home:
            raise ModelError(f"the checkpoint has no tensor {name!r}")
        return self._home[name].entries[name]


def open_safetensors(folder: Path) -> SafetensorsSource:
    """Opens the checkpoint of a model folder.

    `model.safetensors` if there is one, else the files that `model.safetensors.index.json` lists, else the
    folder's only safetensors file. Raises ModelError if there is none, if a file is missing or broken, or
    if the index and the files disagree.
    """
    if (folder / SINGLE_FILE).is_file():
        return SafetensorsSource([SafetensorsFile(folder / SINGLE_FILE)])
    if (folder / INDEX_FILE).is_file():
        return _open_indexed(folder)
    found = sorted(p for p in folder.glob("*.safetensors") if p.is_file() and not p.name.startswith("."))
    if len(found) == 1:
        return SafetensorsSource([SafetensorsFile(found[0])])
    if found:
        raise ModelError(
            f"{folder} has {len(found)} safetensors files ({some(p.name for p in found)}) and no "
            f"{INDEX_FILE}: copy the index of the checkpoint into the folder"
        )
    refused = sorted(p.name for p in folder.glob("*") if p.suffix.lower() in REFUSED_SUFFIXES)
    if refused:
        raise ModelError(
            f"{folder} has weights only as {some(refused)}; jinfer reads safetensors and never "
            "unpickles a file: convert the checkpoint, for example with transformers' "
            "`AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)`"
        )
    raise ModelError(f"{folder} has no weights: expected {SINGLE_FILE}, or {INDEX_FILE} with its files")


def _open_indexed(folder: Path) -> SafetensorsSource:
    index = folder / INDEX_FILE
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index} has no 'weight_map': expected an object of tensor names and file names")
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or not re.fullmatch(r"[^/\\\0]+\.safetensors", file):
            raise ModelError(
                f"{index} says that tensor {tensor!r} is in {file!r}: "
                "expected the name of a .safetensors file of the same folder"
            )
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ModelError(f"{folder} lacks {some(missing)}, which {INDEX_FILE} lists: download the rest of it")
    source = SafetensorsSource([SafetensorsFile(folder / name) for name in names])
    for tensor, file in weight_map.items():
        if tensor not in source.names():
            source.close()
            raise ModelError(f"{index} says that tensor {tensor!r} is in {file}, and it is not")
    return source


def _read_header(file: Any, size: int, path: Path) -> dict[str, Entry]:
    prefix = file.read(8)
    if len(prefix) < 8:
        raise ModelError(f"{path} has {size} bytes, too few for safetensors: the file is truncated")
    length = int.from_bytes(prefix, "little")
    if length > HEADER_LIMIT or length > size - 8:
        raise ModelError(
            f"{path} says its header has {length} bytes, and the file has {size}: "
            "it is truncated or no safetensors file, copy or download it again"
        )
    header = parse_json_object(file.read(length), f"the header of {path}")
    header.pop("__metadata__", None)
    data = 8 + length
    entries = {name: _entry(name, told, data, size, path) for name, told in header.items()}
    _check_layout(entries, data, size, path)
    return entries


def _entry(name: str, told: Any, data: int, size: int, path: Path) -> Entry:
    where = f"{path}: tensor {name[:200]!r}"
    if not isinstance(told, dict):
        raise ModelError(f"{where} is described by {type(told).__name__}, expected an object")
    code, shape, offsets = told.get("dtype"), told.get("shape"), told.get("data_offsets")
    if not isinstance(code, str) or code not in DTYPES:
        raise ModelError(f"{where} has dtype {code!r}, expected one of {', '.join(DTYPES)}")
    if not _are_sizes(shape):
        raise ModelError(f"{where} has shape {str(shape)[:120]}, expected a list of sizes")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ModelError(f"{where} has data_offsets {str(offsets)[:120]}, expected [begin, end]")
    dtype = DTYPES[code]
    count = 1
    for dim in shape:
        count *= dim
    if count * dtype.itemsize != offsets[1] - offsets[0]:
        raise ModelError(
            f"{where} with shape {shape} and dtype {code} needs {count * dtype.itemsize} bytes, "
            f"and its data_offsets {offsets} hold {offsets[1] - offsets[0]}"
        )
    if data + offsets[1] > size:
        raise ModelError(
            f"{where} ends at byte {data + offsets[1]}, and the file has {size}: "
            "it is truncated, copy or download it again"
        )
    return Entry(dtype, tuple(shape), data + offsets[0], data + offsets[1])


def _are_sizes(values: Any) -> TypeGuard[list[int]]:
    return (
        isinstance(values, list)
        and len(values) <= 16
        and all(isinstance(v, int) and not isinstance(v, bool) and 0 <= v < 2**63 for v in values)
    )


def _check_layout(entries: dict[str, Entry], data: int, size: int, path: Path) -> None:
    """The data must be covered without holes or overlaps, as the format demands."""
    position = data
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != position:
            raise ModelError(
                f"{path}: tensor {name[:200]!r} begins at byte {entry.start}, expected {position}: "
                "tensors overlap or leave a hole, the file is corrupt"
            )
        position = entry.stop
    if position != size:
        raise ModelError(
            f"{path} has {size} bytes and its tensors end at byte {position}: the file is corrupt"
        )
