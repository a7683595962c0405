"""Reading safetensors: every dtype, one file and many, and no broken or hostile file ever does more than raise."""

import contextlib
import json
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jinfer.errors import ModelError
from jinfer.weights.safetensors_source import DTYPES, open_safetensors

VALUES = np.arange(6, dtype=np.float32).reshape(2, 3)


def encode(header: Any, data: bytes, length: int | None = None) -> bytes:
    """The bytes of a file with this header, as it is or as JSON."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape: Any = (2,), offsets: Any = (0, 8), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def write(folder: Path, content: bytes, name: str = "model.safetensors") -> Path:
    (folder / name).write_bytes(content)
    return folder


def read_all(folder: Path) -> dict[str, np.ndarray]:
    source = open_safetensors(folder)
    try:
        return {name: np.array(source.read(name)) for name in source.names()}
    finally:
        source.close()


@pytest.mark.parametrize("code", sorted(DTYPES))
def test_reads_every_dtype(code, tmp_path):
    dtype = DTYPES[code]
    values = (np.arange(6) % 2).astype(dtype).reshape(2, 3)
    write(tmp_path, encode({"w": entry([2, 3], [0, values.nbytes], code)}, values.tobytes()))
    source = open_safetensors(tmp_path)
    assert (source.shape("w"), source.dtype("w")) == ((2, 3), dtype)
    assert source.read("w").tobytes() == values.tobytes()
    source.close()


@pytest.mark.parametrize("shards", [1, 3])
def test_reads_what_the_format_library_writes(shards, write_checkpoint):
    rng = np.random.default_rng(0)
    tensors = {
        f"t{i}": rng.standard_normal((i, 4)).astype([np.float32, ml_dtypes.bfloat16, np.float16][i % 3])
        for i in range(6)
    } | {"scalar": np.array(2.5, np.float32)}
    found = read_all(write_checkpoint(tensors, shards))
    assert found.keys() == tensors.keys()
    for name, values in tensors.items():
        assert found[name].dtype == values.dtype
        np.testing.assert_array_equal(found[name], values)


def test_reads_data_that_is_not_aligned(tmp_path):
    header = json.dumps({"a": entry([1], [0, 1], "U8"), "b": entry([2, 3], [1, 25])}).encode()
    write(tmp_path, encode(header, b"\x07" + VALUES.tobytes()))
    np.testing.assert_array_equal(read_all(tmp_path)["b"], VALUES)


def test_released_tensor_can_be_read_again(write_checkpoint):
    source = open_safetensors(write_checkpoint({"a": VALUES, "b": VALUES + 1}))
    source.release("a")
    np.testing.assert_array_equal(source.read("a"), VALUES)
    np.testing.assert_array_equal(source.read("b"), VALUES + 1)
    source.close()


def test_tensors_are_read_only(write_checkpoint):
    source = open_safetensors(write_checkpoint({"a": VALUES}))
    with pytest.raises(ValueError, match="read-only"):
        source.read("a")[0, 0] = 1
    source.close()


def test_unknown_tensor_is_named(write_checkpoint):
    source = open_safetensors(write_checkpoint({"a": VALUES}))
    for ask in (source.read, source.shape, source.dtype, source.release):
        with pytest.raises(ModelError, match="no tensor 'q'"):
            ask("q")
    source.close()


BROKEN = {
    "empty file": (b"", "0 bytes.*truncated"),
    "shorter than its prefix": (b"abc", "3 bytes.*truncated"),
    "header beyond the file": (encode({"w": entry()}, bytes(8), 10**6), "header has 1000000 bytes"),
    "header of exabytes": (struct.pack("<Q", 2**63) + b"{}", "truncated or no safetensors"),
    "a pickle": (b"\x80\x02}q\x00." + bytes(64), "truncated or no safetensors"),
    "no JSON": (encode(b"{oops", b""), "not valid JSON"),
    "no UTF-8": (encode(b'{"\xff": 1}', b""), "not valid JSON"),
    "nested to the stack's end": (encode(b'{"a":' + b"[" * 200_000, b""), "nested too deeply|not valid JSON"),
    "a number of 10000 digits": (encode(b'{"a":' + b"1" * 10_000 + b"}", b""), "not valid JSON"),
    "a list": (encode([], b""), "expected an object"),
    "the same name twice": (encode(b'{"w": {}, "w": {}}', b""), "appears twice"),
    "entry is a list": (encode({"w": []}, b""), "tensor 'w' is described by list"),
    "no dtype": (
        encode({"w": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8)),
        "tensor 'w' has dtype None",
    ),
    "unknown dtype": (encode({"w": entry(dtype="F4")}, bytes(8)), "has dtype 'F4', expected one of"),
    "dtype is a list": (encode({"w": entry(dtype=["F32"])}, bytes(8)), "has dtype"),
    "negative size": (encode({"w": entry([-2])}, bytes(8)), r"has shape \[-2\]"),
    "size is a float": (encode({"w": entry([2.0])}, bytes(8)), "has shape"),
    "size is true": (encode({"w": entry([True, 2])}, bytes(8)), "has shape"),
    "200 dimensions": (encode({"w": entry([1] * 200)}, bytes(8)), "has shape"),
    "sizes that overflow": (encode({"w": entry([2**62, 2**62, 4])}, bytes(8)), "needs .* bytes"),
    "offsets the wrong way round": (encode({"w": entry(offsets=[8, 0])}, bytes(8)), "data_offsets"),
    "three offsets": (encode({"w": entry(offsets=[0, 8, 8])}, bytes(8)), "data_offsets"),
    "negative offset": (encode({"w": entry(offsets=[-8, 0])}, bytes(8)), "data_offsets"),
    "offsets do not fit the shape": (encode({"w": entry([3])}, bytes(12)), "needs 12 bytes"),
    "data is cut off": (encode({"w": entry()}, bytes(7)), "truncated"),
    "data is too long": (encode({"w": entry()}, bytes(9)), "corrupt"),
    "overlap": (encode({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12)), "overlap"),
    "hole": (encode({"a": entry(), "b": entry(offsets=[12, 20])}, bytes(20)), "hole"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_file_is_named(case, tmp_path):
    content, problem = BROKEN[case]
    with pytest.raises(ModelError, match=problem) as caught:
        open_safetensors(write(tmp_path, content))
    assert "model.safetensors" in str(caught.value)
    assert len(str(caught.value)) < 1000


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_damage_does_more_than_raise(data, tmp_path):
    names = {"a": entry([2, 3], [0, 24]), "b": entry([1], [24, 26], "BF16")}
    content = bytearray(encode(names, VALUES.tobytes() + b"ab"))
    for _ in range(data.draw(st.integers(1, 4))):
        if not content:
            break
        at = data.draw(st.integers(0, len(content) - 1))
        what = data.draw(st.sampled_from(["change", "cut", "insert", "drop"]))
        if what == "change":
            content[at] = data.draw(st.integers(0, 255))
        elif what == "cut":
            del content[at:]
        elif what == "insert":
            content[at:at] = data.draw(st.binary(max_size=9))
        else:
            del content[at]
    write(tmp_path, bytes(content))
    with contextlib.suppress(ModelError):
        read_all(tmp_path)


def test_index_may_not_point_outside(tmp_path):
    (tmp_path / "inside").mkdir()
    write(tmp_path, encode({"w": entry()}, bytes(8)), "secret.safetensors")
    for name in (
        "../secret.safetensors",
        str(tmp_path / "secret.safetensors"),
        "a/b.safetensors",
        "..\\s.safetensors",
    ):
        index = tmp_path / "inside" / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": {"w": name}}))
        with pytest.raises(ModelError, match="same folder"):
            open_safetensors(tmp_path / "inside")


@pytest.mark.parametrize(
    ("index", "problem"),
    [
        ("nonsense", "not valid JSON"),
        ("[]", "expected an object"),
        ("{}", "no 'weight_map'"),
        ('{"weight_map": []}', "no 'weight_map'"),
        ('{"weight_map": {"w": 3}}', "tensor 'w' is in 3"),
        ('{"weight_map": {"w": "model.bin"}}', "same folder"),
        ('{"weight_map": {"w": "gone.safetensors"}}', "lacks gone.safetensors"),
        (
            '{"weight_map": {"w": "a.safetensors", "x": "a.safetensors"}}',
            "'x' is in a.safetensors, and it is not",
        ),
    ],
)
def test_broken_index_is_named(index, problem, tmp_path):
    write(tmp_path, encode({"w": entry()}, bytes(8)), "a.safetensors")
    write(tmp_path, index.encode(), "model.safetensors.index.json")
    with pytest.raises(ModelError, match=problem):
        open_safetensors(tmp_path)


def test_tensor_in_two_files_is_named(tmp_path):
    for name in ("a.safetensors", "b.safetensors"):
        write(tmp_path, encode({"w": entry(), name: entry(offsets=[8, 16])}, bytes(16)), name)
    index = {"weight_map": {"w": "a.safetensors", "b.safetensors": "b.safetensors"}}
    write(tmp_path, json.dumps(index).encode(), "model.safetensors.index.json")
    with pytest.raises(ModelError, match=r"'w' is in a.safetensors and again in .*b.safetensors"):
        open_safetensors(tmp_path)


def test_one_file_of_any_name_is_found_and_several_need_an_index(tmp_path):
    write(tmp_path, encode({"w": entry()}, bytes(8)), "weights.safetensors")
    assert read_all(tmp_path).keys() == {"w"}
    write(tmp_path, encode({"x": entry()}, bytes(8)), "more.safetensors")
    with pytest.raises(ModelError, match="2 safetensors files .* no model.safetensors.index.json"):
        open_safetensors(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.PT"])
def test_pickles_are_refused(name, tmp_path):
    write(tmp_path, b"anything", name)
    with pytest.raises(ModelError, match=f"only as {name}; .* never unpickles"):
        open_safetensors(tmp_path)


def test_folder_without_weights_is_named(tmp_path):
    with pytest.raises(ModelError, match="has no weights: expected model.safetensors"):
        open_safetensors(tmp_path)


def test_a_file_that_is_cut_short_while_it_is_open_is_an_error(write_checkpoint):
    """Touching what a mapped file no longer has would be a signal that ends the process."""
    folder = write_checkpoint({"a": VALUES, "b": np.zeros(2**16, np.float32)})
    source = open_safetensors(folder)
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(4096)
    with pytest.raises(
        ModelError, match=r"model.safetensors ends at byte 4096, and tensor 'b' at byte .* cut short"
    ):
        source.read("b")
    source.close()
