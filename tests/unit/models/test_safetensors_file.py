import json
import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tests.unit.models.model_files import safetensors_bytes, with_header, write_json

from weft.errors import ModelNotFoundError
from weft.models.weights.safetensors_file import read_directory, read_header

TENSORS = {"a": ("F32", [2, 3], bytes(24)), "b": ("BF16", [4], bytes(8))}


def write(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    return path


def entry(**changes: object) -> dict[str, object]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes


def test_entries_say_where_each_tensor_is(tmp_path: Path) -> None:
    content = safetensors_bytes(TENSORS)

    first, second = read_header(write(tmp_path, content))

    assert (first.name, first.dtype, first.shape, first.num_bytes) == ("a", "F32", (2, 3), 24)
    assert second.offset == len(content) - 8


@pytest.mark.parametrize(
    ("header", "data", "fault"),
    [
        ({"a": entry(data_offsets=[0, 4])}, bytes(4), "4 bytes where its shape needs 8"),
        ({"a": entry(data_offsets=[4, 12])}, bytes(12), "gap or an overlap"),
        ({"a": entry(), "b": entry(data_offsets=[4, 12])}, bytes(12), "gap or an overlap"),
        ({"a": entry()}, bytes(9), "has .* bytes where its header describes"),
        ({"a": entry()}, bytes(7), "has .* bytes where its header describes"),
        ({"a": entry(shape=[2**40])}, bytes(8), "where its shape needs"),
        ({"a": entry(shape=[-2])}, bytes(8), "malformed entry"),
        ({"a": entry(shape="2")}, bytes(8), "malformed entry"),
        ({"a": entry(data_offsets=[8, 0])}, bytes(8), "where its shape needs"),
        ({"a": entry(data_offsets=[0, True])}, bytes(8), "malformed entry"),
        ({"a": entry(dtype="I64", data_offsets=[8, 0])}, bytes(8), "gap or an overlap"),
        ({"a": 3}, bytes(8), "malformed entry"),
        ([1], b"", "no object"),
    ],
)
def test_a_header_that_does_not_account_for_every_byte_is_refused(
    tmp_path: Path, header: object, data: bytes, fault: str
) -> None:
    with pytest.raises(ModelNotFoundError, match=fault):
        read_header(write(tmp_path, with_header(header, data)))


def test_a_header_larger_than_the_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"claims a header of 1099511627776 bytes"):
        read_header(write(tmp_path, struct.pack("<Q", 2**40) + bytes(100)))


@given(position=st.integers(0, 170), byte=st.integers(0, 255), cut=st.integers(0, 200))
@example(position=0, byte=0, cut=0)
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_no_damage_leads_beyond_a_clear_error(tmp_path: Path, position: int, byte: int, cut: int) -> None:
    content = bytearray(safetensors_bytes(TENSORS))
    content[position % len(content)] = byte
    damaged = bytes(content[: len(content) - cut % len(content)])
    path = write(tmp_path, damaged)

    try:
        entries = read_header(path)
    except ModelNotFoundError as error:
        if "\n" in error.message:
            pytest.fail("an error is one line")
    else:
        assert all(item.offset + item.num_bytes <= len(damaged) for item in entries)


def test_an_index_decides_which_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "one.safetensors").write_bytes(safetensors_bytes({"a": TENSORS["a"]}))
    (tmp_path / "two.safetensors").write_bytes(safetensors_bytes({"b": TENSORS["b"]}))
    (tmp_path / "stray.safetensors").write_bytes(b"not read")
    write_json(
        tmp_path / "model.safetensors.index.json", {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    )

    assert {name: item.path.name for name, item in read_directory(tmp_path).items()} == {
        "a": "one.safetensors",
        "b": "two.safetensors",
    }


@pytest.mark.parametrize(
    ("weight_map", "fault"),
    [
        ({"a": "gone.safetensors"}, "gone.safetensors is missing although"),
        ({"a": "../outside.safetensors"}, "must name .safetensors files beside it"),
        ({"a": "/etc/passwd"}, "must name .safetensors files beside it"),
        ({"a": 1}, "must name .safetensors files beside it"),
        ({}, "`weight_map` must be an object"),
        (None, "`weight_map` must be an object"),
    ],
)
def test_an_index_cannot_name_a_file_elsewhere_or_one_that_is_not_there(
    tmp_path: Path, weight_map: object, fault: str
) -> None:
    write_json(tmp_path / "model.safetensors.index.json", {"weight_map": weight_map})

    with pytest.raises(ModelNotFoundError, match=fault):
        read_directory(tmp_path)


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / f"{name}.safetensors").write_bytes(safetensors_bytes({"a": TENSORS["a"]}))

    with pytest.raises(ModelNotFoundError, match=r"`a` stands in both one.safetensors and two.safetensors"):
        read_directory(tmp_path)


def test_a_pickled_checkpoint_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")

    with pytest.raises(ModelNotFoundError, match=r"pytorch_model.bin is a pickled checkpoint.*Convert"):
        read_directory(tmp_path)


def test_metadata_is_no_tensor(tmp_path: Path) -> None:
    header = json.loads(json.dumps({"__metadata__": {"format": "pt"}, "a": entry()}))

    assert [item.name for item in read_header(write(tmp_path, with_header(header, bytes(8))))] == ["a"]
