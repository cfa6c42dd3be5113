"""Reading checkpoints: faults are one line that names file and tensor, and a rank reads its own share."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.numerics.checkpoints import random_model, save
from tests.numerics.families import FAMILIES
from tests.numerics.gguf_files import write_gguf
from tests.numerics.paged_driver import PagedDriver, SharedExchange, ThreadedGroup

from weft.errors import ModelNotFoundError
from weft.models.decoder import Decoder, load_decoder
from weft.models.layers.reader import WeightReader
from weft.models.registry import describe
from weft.models.weights.partition import Span
from weft.models.weights.source import SafetensorsSource
from weft.parallel.groups import SoloGroup

pytestmark = pytest.mark.numerics

LLAMA = next(row for row in FAMILIES if row.name == "llama")
CPU = torch.device("cpu")
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return save(random_model(LLAMA), tmp_path)


def load(directory: Path, dtype: torch.dtype = torch.float32, **options: bool) -> Decoder:
    return load_decoder(directory, describe(directory), dtype=dtype, device=CPU, group=SoloGroup(), **options)


def change(directory: Path, name: str, tensor: torch.Tensor | None) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    if tensor is None:
        del tensors[name]
    else:
        tensors[name] = tensor
    save_file(tensors, path)


def logits_of(decoder: Decoder, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    driver = PagedDriver([decoder], dtype=dtype)
    return driver.step([(driver.start([1, 2, 3, 4, 5]), 5)])[0]


def test_a_missing_tensor_is_named(directory: Path) -> None:
    change(directory, Q_PROJ, None)

    with pytest.raises(ModelNotFoundError, match=f"Tensor `{Q_PROJ}` is missing from the safetensors files"):
        load(directory)


def test_a_tensor_of_another_shape_is_named_with_its_file(directory: Path) -> None:
    change(directory, Q_PROJ, torch.zeros(96, 47))

    with pytest.raises(
        ModelNotFoundError,
        match=rf"model.safetensors: tensor `{Q_PROJ}` has shape \[96, 47\] where the configuration needs \[96, 48\]",
    ):
        load(directory)


def test_a_tensor_of_integers_is_named_with_its_file(directory: Path) -> None:
    change(directory, Q_PROJ, torch.zeros(96, 48, dtype=torch.int8))

    with pytest.raises(ModelNotFoundError, match=f"model.safetensors: tensor `{Q_PROJ}` is stored as I8; supported"):
        load(directory)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_numbers_that_are_not_finite_are_found_when_asked_for(directory: Path, value: float) -> None:
    change(directory, Q_PROJ, torch.zeros(96, 48).index_fill(1, torch.tensor([5]), value))

    with pytest.raises(ModelNotFoundError, match=f"tensor `{Q_PROJ}` holds values that are not finite"):
        load(directory, check_finite=True)
    load(directory)


def test_a_gguf_file_without_a_tensor_names_it(tmp_path: Path) -> None:
    model = random_model(LLAMA)
    path = tmp_path / "model.gguf"
    write_gguf(path, model)
    path.write_bytes(path.read_bytes().replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_xx.weight"))

    with pytest.raises(ModelNotFoundError, match=r"Tensor `blk.1.ffn_up.weight` is missing from model.gguf"):
        load(path)


def test_several_files_read_like_one(directory: Path, tmp_path: Path) -> None:
    expected = logits_of(load(directory))
    tensors = load_file(directory / "model.safetensors")
    names = sorted(tensors)
    weight_map = {name: f"part-{index % 3}.safetensors" for index, name in enumerate(names)}
    for part in set(weight_map.values()):
        save_file({name: tensors[name] for name in names if weight_map[name] == part}, directory / part)
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    assert torch.equal(logits_of(load(directory)), expected)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_half_precision_files_are_computed_in_the_dtype_asked_for(directory: Path, stored: torch.dtype) -> None:
    tensors = {name: tensor.to(stored) for name, tensor in load_file(directory / "model.safetensors").items()}
    save_file({name: tensor.float() for name, tensor in tensors.items()}, directory / "model.safetensors")
    expected = logits_of(load(directory))

    save_file(tensors, directory / "model.safetensors")

    assert torch.equal(logits_of(load(directory)), expected)


def test_the_file_may_change_after_loading(directory: Path) -> None:
    """Weights are copies: a download that rewrites its files must not reach a model that serves."""
    decoder = load(directory)
    expected = logits_of(decoder)

    path = directory / "model.safetensors"
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(size // 2)
        file.write(bytes(size // 2))

    assert torch.equal(logits_of(decoder), expected)


class RecordingSource(SafetensorsSource):
    """Counts the numbers that are read."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.num_read = 0

    def read_into(self, out: torch.Tensor, name: str, rows: Span, columns: Span | None) -> None:
        super().read_into(out, name, rows, columns)
        self.num_read += out.numel()


def test_a_rank_reads_no_more_than_its_share(directory: Path) -> None:
    """All matrices are divided; only the norms, of 48 numbers each, are read by everyone."""
    description = describe(directory)
    exchange = SharedExchange(2)
    num_read = []
    for rank in range(2):
        source = RecordingSource(directory)
        reader = WeightReader(source, dtype=torch.float32, device=CPU)
        Decoder(reader, description.spec, description.max_positions, ThreadedGroup(rank, exchange))
        source.close()
        num_read.append(source.num_read)

    num_norms = 5 * 48
    assert sum(num_read) == description.num_parameters + num_norms


def test_memory_is_what_the_description_said_and_the_padding_of_packed_matrices(directory: Path) -> None:
    description = describe(directory)
    tables = description.max_positions * 16 * 4

    padding = load(directory).weights_bytes - description.weights_bytes("float32") - tables

    assert 0 <= padding < 0.2 * description.weights_bytes("float32")


def test_progress_rises_to_one(directory: Path) -> None:
    told: list[float] = []

    load_decoder(
        directory, describe(directory), dtype=torch.float32, device=CPU, group=SoloGroup(), progress=told.append
    )

    assert told == [0.5, 1.0]


def test_a_step_without_wanted_rows_gives_no_logits(directory: Path) -> None:
    decoder = load(directory)

    assert decoder.logits(torch.empty(0, 48)).shape == (0, 211)
