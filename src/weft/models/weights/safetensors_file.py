"""The safetensors container: which file holds which tensor at which bytes, every number checked. Torch-free.

The header must account for every byte of the file before anything is allocated by it: no gap, no overlap, nothing
beyond the end.

Source   github.com/huggingface/safetensors, README "Format"
"""

import json
import struct
from dataclasses import dataclass
from pathlib import Path

from weft.errors import ModelNotFoundError
from weft.limits import LIMITS
from weft.models.weights.config_file import read_json_object

DTYPE_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
"""Storage types this server reads, and their size. Others may stand in a file as long as no model asks for them."""

DTYPE_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


PICKLED_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt"})


@dataclass(frozen=True, slots=True)
class SafetensorsEntry:
    """One tensor: where it is and what it is."""

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    """From the start of the file."""
    num_bytes: int


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model directory: those its index names, else `model.safetensors`, else all.

    Raises   ModelNotFoundError: none there, one missing, or only pickled weights
    """
    index = directory / INDEX_NAME
    if index.is_file():
        return [directory / name for name in _indexed_files(index)]
    single = directory / SINGLE_NAME
    if single.is_file():
        return [single]
    files = sorted(directory.glob("*.safetensors"))
    if files:
        return files
    pickled = sorted(path.name for path in directory.iterdir() if path.suffix in PICKLED_SUFFIXES)
    if pickled:
        raise pickled_checkpoint(pickled[0])
    raise ModelNotFoundError("The model directory holds no .safetensors file.")


def pickled_checkpoint(name: str) -> ModelNotFoundError:
    """The refusal of a checkpoint that only `torch.load` could open."""
    return ModelNotFoundError(
        f"{name} is a pickled checkpoint, which can run code when loaded and is never opened. "
        "Convert the model to safetensors."
    )


def read_directory(directory: Path) -> dict[str, SafetensorsEntry]:
    """Name → entry for all weight files of a model directory.

    Raises   ModelNotFoundError: a file is missing or damaged, or a tensor stands in two files
    """
    entries: dict[str, SafetensorsEntry] = {}
    for path in weight_files(directory):
        for entry in read_header(path):
            if entry.name in entries:
                raise ModelNotFoundError(
                    f"Tensor `{entry.name}` stands in both {entries[entry.name].path.name} and {path.name}."
                )
            entries[entry.name] = entry
    return entries


def read_header(path: Path) -> list[SafetensorsEntry]:
    """The entries of one file in order of offset. Raises ModelNotFoundError naming the file and the fault."""
    try:
        file_size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            header_size = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else file_size
            if header_size > min(LIMITS.max_safetensors_header_bytes, file_size - 8):
                raise _damaged(path, f"claims a header of {header_size} bytes")
            header: object = json.loads(file.read(header_size))
    except OSError:
        raise ModelNotFoundError(f"{path.name} is missing or cannot be read.") from None
    except (ValueError, RecursionError):
        raise _damaged(path, "has a header that is not JSON") from None
    if not isinstance(header, dict):
        raise _damaged(path, "has a header that is no object")
    data_start = 8 + header_size
    entries = [_entry(path, name, value, data_start) for name, value in header.items() if name != "__metadata__"]
    entries.sort(key=lambda entry: (entry.offset, entry.num_bytes))
    _check_coverage(path, entries, data_start, file_size)
    return entries


def _indexed_files(index: Path) -> list[str]:
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelNotFoundError(f"{index.name}: `weight_map` must be an object of tensor name to file name.")
    names: set[str] = set()
    for name in weight_map.values():
        # A plain name cannot leave the model directory.
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelNotFoundError(f"{index.name}: `weight_map` must name .safetensors files beside it.")
        names.add(name)
    for name in sorted(names):
        if not (index.parent / name).is_file():
            raise ModelNotFoundError(f"{name} is missing although {index.name} names it; download the model again.")
    return sorted(names)


def _entry(path: Path, name: str, value: object, data_start: int) -> SafetensorsEntry:
    if not isinstance(value, dict):
        raise _damaged(path, f"has a malformed entry for tensor `{name[:80]}`")
    dtype, shape, offsets = value.get("dtype"), _counts(value.get("shape")), _counts(value.get("data_offsets"))
    if not isinstance(dtype, str) or shape is None or offsets is None or len(offsets) != 2:
        raise _damaged(path, f"has a malformed entry for tensor `{name[:80]}`")
    num_bytes = offsets[1] - offsets[0]
    if dtype in DTYPE_BYTES:
        expected = DTYPE_BYTES[dtype]
        for dimension in shape:
            expected *= dimension
        if expected != num_bytes:
            raise _damaged(path, f"gives tensor `{name[:80]}` {num_bytes} bytes where its shape needs {expected}")
    return SafetensorsEntry(name, path, dtype, shape, data_start + offsets[0], num_bytes)


def _counts(value: object) -> tuple[int, ...] | None:
    """The list as a tuple when it holds at most eight counts; None otherwise."""
    if not isinstance(value, list) or len(value) > 8:
        return None
    counts = tuple(item for item in value if isinstance(item, int) and not isinstance(item, bool))
    return counts if len(counts) == len(value) and all(0 <= item < 2**48 for item in counts) else None


def _check_coverage(path: Path, entries: list[SafetensorsEntry], data_start: int, file_size: int) -> None:
    position = data_start
    for entry in entries:
        if entry.offset != position or entry.num_bytes < 0:
            raise _damaged(path, f"has a gap or an overlap at tensor `{entry.name[:80]}`")
        position += entry.num_bytes
    if position != file_size:
        raise _damaged(path, f"has {file_size} bytes where its header describes {position}")


def _damaged(path: Path, what: str) -> ModelNotFoundError:
    return ModelNotFoundError(f"{path.name} {what}; download it again.")
