"""The reader of GGUF keys: every type, and files made to hurt."""

import random
import struct
from pathlib import Path

import gguf
import pytest
from tests.unit.text.vocabularies import write_byte_level_gguf

from weft.errors import ModelNotFoundError
from weft.gguf.metadata import open_gguf_metadata
from weft.limits import LIMITS

U32, STRING, ARRAY = 4, 8, 9


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def write(path: Path, body: bytes, *, num_keys: int = 1, version: int = 3, magic: bytes = b"GGUF") -> Path:
    path.write_bytes(magic + struct.pack("<IQQ", version, 0, num_keys) + body)
    return path


def read_all(path: Path) -> None:
    """Read every scalar, and the lists a tokenizer is made of."""
    with open_gguf_metadata(path) as metadata:
        metadata.get_list("tokenizer.ggml.tokens", str)
        metadata.get_list("tokenizer.ggml.merges", str)
        metadata.get_list("tokenizer.ggml.token_type", int)


def test_values_of_every_type_come_back(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "all.gguf", "llama")
    numbers = {"uint8": 200, "int8": -5, "uint16": 60_000, "int16": -300, "uint32": 4_000_000_000, "int32": -70_000}
    for kind, number in {**numbers, "uint64": 2**63, "int64": -(2**40), "float32": 0.5, "float64": 0.1}.items():
        getattr(writer, f"add_{kind}")(kind, number)
    writer.add_bool("yes", val=True)
    writer.add_string("text", "größe")
    writer.add_array("words", ["a", "", "ü"])
    writer.add_array("counts", [1, -2, 3])
    writer.add_array("weights", [0.5, 1.5])
    writer.add_array("flags", [True, False])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()

    with open_gguf_metadata(tmp_path / "all.gguf") as metadata:
        assert metadata.version == 3
        assert metadata.scalars == {
            "general.architecture": "llama",
            **numbers,
            "uint64": 2**63,
            "int64": -(2**40),
            "float32": 0.5,
            "float64": 0.1,
            "yes": True,
            "text": "größe",
        }
        assert metadata.get_list("words", str) == ["a", "", "ü"]
        assert metadata.get_list("counts", int) == [1, -2, 3]
        assert metadata.get_list("weights", float) == [0.5, 1.5]
        assert metadata.get_list("flags", bool) == [True, False]
        assert metadata.end_offset == (tmp_path / "all.gguf").stat().st_size


def test_typed_access_says_which_key_holds_something_else(tmp_path: Path) -> None:
    body = string("k") + struct.pack("<II", U32, 7) + string("list") + struct.pack("<IIQI", ARRAY, U32, 1, 7)

    with open_gguf_metadata(write(tmp_path / "m.gguf", body, num_keys=2)) as metadata:
        assert (metadata.get("k", int), metadata.get("missing", int)) == (7, None)
        assert (metadata.get_list("list", int), metadata.get_list("missing", str)) == ([7], [])
        with pytest.raises(ModelNotFoundError, match=r"m.gguf cannot.*`k` should hold one str but holds a int"):
            metadata.get("k", str)
        with pytest.raises(ModelNotFoundError, match="`list` should hold one int but holds a list"):
            metadata.get("list", int)
        for key in ("k", "list"):
            with pytest.raises(ModelNotFoundError, match=f"`{key}` should be a list of str"):
                metadata.get_list(key, str)


def test_a_list_that_is_no_text_is_refused_when_it_is_read(tmp_path: Path) -> None:
    body = string("k") + struct.pack("<IIQQ", ARRAY, STRING, 1, 1) + b"\xff"

    with (
        open_gguf_metadata(write(tmp_path / "m.gguf", body)) as metadata,
        pytest.raises(ModelNotFoundError, match="a string of a list is no text"),
    ):
        metadata.get_list("k", str)


HOSTILE = {
    "not GGUF": (b"", {"magic": b"GGML"}, "letters GGUF"),
    "unknown version": (b"", {"version": 1}, "version 1"),
    "big endian": (b"", {"version": 0x03000000}, "little-endian"),
    "too many keys": (b"", {"num_keys": LIMITS.max_gguf_keys + 1}, "keys"),
    "fewer keys than claimed": (b"", {"num_keys": 1}, "ends after"),
    "endless key": (struct.pack("<Q", 2**63), {}, "longer than"),
    "key beyond the file": (struct.pack("<Q", 1000), {}, "ends after"),
    "unknown value type": (string("k") + struct.pack("<I", 13), {}, "unknown value type 13"),
    "string beyond the file": (string("k") + struct.pack("<IQ", STRING, 2**40), {}, "longer than"),
    "huge array": (string("k") + struct.pack("<IIQ", ARRAY, U32, LIMITS.max_gguf_array_length + 1), {}, "elements"),
    "array beyond the file": (string("k") + struct.pack("<IIQ", ARRAY, U32, 10_000), {}, "ends after"),
    "array of arrays": (string("k") + struct.pack("<IIQ", ARRAY, ARRAY, 1), {}, "unknown value type 9"),
    "strings beyond the file": (string("k") + struct.pack("<IIQ", ARRAY, STRING, 10_000), {}, "list of strings"),
    "long string in a list": (
        string("k") + struct.pack("<IIQQ", ARRAY, STRING, 1, 2**63),
        {},
        "in the middle of a value",
    ),
    "no UTF-8": (struct.pack("<Q", 1) + b"\xff" + struct.pack("<II", U32, 7), {}, "utf-8"),
}


@pytest.mark.parametrize(("body", "header", "reason"), HOSTILE.values(), ids=HOSTILE)
def test_a_file_made_to_hurt_is_refused_with_the_reason(
    tmp_path: Path, body: bytes, header: dict[str, int], reason: str
) -> None:
    with pytest.raises(ModelNotFoundError, match=reason):
        read_all(write(tmp_path / "hostile.gguf", body, **header))  # type: ignore[arg-type]


def test_missing_and_empty_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.gguf").touch()

    for name in ("empty.gguf", "missing.gguf"):
        with pytest.raises(ModelNotFoundError, match="cannot be read"):
            read_all(tmp_path / name)


def test_damage_anywhere_is_an_error_or_another_value_but_never_a_crash(tmp_path: Path) -> None:
    whole = write_byte_level_gguf(tmp_path / "whole.gguf").read_bytes()
    dice = random.Random(7)
    num_refused = 0
    for attempt in range(200):
        damaged = bytearray(whole[: dice.randrange(100, len(whole))] if attempt % 2 else whole)
        for _ in range(4):
            damaged[dice.randrange(len(damaged))] = dice.randrange(256)
        (tmp_path / "damaged.gguf").write_bytes(damaged)
        try:
            read_all(tmp_path / "damaged.gguf")
        except ModelNotFoundError:
            num_refused += 1

    assert num_refused > 100
