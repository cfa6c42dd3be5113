import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.unit.models.model_files import gguf_bytes, llama_gguf, string, uint32

from weft.errors import ModelNotFoundError
from weft.models.weights.gguf_file import GgmlType, GgufFile


def write(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    return path


def opened(tmp_path: Path, content: bytes) -> GgufFile:
    return GgufFile(write(tmp_path, content))


def test_metadata_and_directory_are_read(tmp_path: Path) -> None:
    file = opened(tmp_path, llama_gguf())

    assert file.metadata.scalars["llama.block_count"] == 1
    assert file.metadata.get_list("tokenizer.ggml.tokens", str)[:2] == ["t0", "t1"]
    tensor = file.tensors["token_embd.weight"]
    assert (tensor.shape, tensor.ggml_type, tensor.num_bytes) == ((16, 32), GgmlType.Q8_0, 16 * 34)
    assert tensor.offset % 32 == 0
    file.close()


@pytest.mark.parametrize(
    ("tensor", "fault"),
    [
        (("w", (32, 16), 8, 32), "`w` ends beyond the file"),
        (("w", (32, 2**40), 8, 0), "`w` ends beyond the file"),
        (("w", (33, 16), 8, 0), "rows of 33, no multiple of 32"),
        (("w", (32, 16), 19, 0), "`w` has quantization type 19; supported: F32, F16, Q4_0"),
        (("w", (2, 2, 2, 2, 2), 0, 0), "`w` has 5 dimensions"),
    ],
)
def test_a_tensor_the_file_cannot_hold_is_refused_by_name(
    tmp_path: Path, tensor: tuple[str, tuple[int, ...], int, int], fault: str
) -> None:
    with pytest.raises(ModelNotFoundError, match=fault):
        opened(tmp_path, gguf_bytes({}, [tensor], bytes(16 * 34)))


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "cannot be opened, or is empty"),
        (b"\x80\x04torch", "does not begin with the letters GGUF"),
        (struct.pack("<4sIQQ", b"GGUF", 3, 2**60, 0), "claims 1152921504606846976 tensors"),
        (struct.pack("<4sIQQQ", b"GGUF", 3, 1, 0, 2**40), "holds a tensor name of 1099511627776 bytes"),
        (struct.pack("<4sIQQ", b"GGUF", 3, 1, 0), "is truncated or damaged"),
        (gguf_bytes({"general.alignment": uint32(0)}, [], b""), "alignment"),
    ],
)
def test_a_file_that_lies_is_refused_in_one_line(tmp_path: Path, content: bytes, fault: str) -> None:
    with pytest.raises(ModelNotFoundError, match=fault):
        opened(tmp_path, content)


@given(position=st.integers(0, 2000), byte=st.integers(0, 255), cut=st.integers(0, 2000))
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_no_damage_leads_beyond_a_clear_error(tmp_path: Path, position: int, byte: int, cut: int) -> None:
    content = bytearray(llama_gguf())
    content[position % len(content)] = byte
    damaged = bytes(content[: len(content) - cut % len(content)])

    try:
        file = opened(tmp_path, damaged)
    except ModelNotFoundError as error:
        if "\n" in error.message:
            pytest.fail("an error is one line")
    else:
        assert all(tensor.offset + tensor.num_bytes <= len(damaged) for tensor in file.tensors.values())
        file.close()


def test_a_tensor_named_twice_is_refused(tmp_path: Path) -> None:
    twice = [("w", (4,), 0, 0), ("w", (4,), 0, 0)]

    with pytest.raises(ModelNotFoundError, match=r"holds tensor `w` twice"):
        opened(tmp_path, gguf_bytes({"general.name": string("n")}, twice, bytes(16)))
