"""Which checkpoints embed, how, and which are refused: sentence-transformers' files, GGUF keys, --task, --pooling."""

from pathlib import Path
from typing import Any

import pytest
from tests.unit.models.model_files import LLAMA_CONFIG, llama_gguf, uint32, write_json, write_model

from weft.core.request import Pooling
from weft.errors import ModelNotFoundError
from weft.models.registry import Use, describe
from weft.models.spec import PoolingSpec

TRANSFORMER = {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}
POOLING = {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}
NORMALIZE = {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"}
DENSE = {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"}


def embedding_model(
    directory: Path,
    modules: list[dict[str, Any]] | None = None,
    pooling: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
) -> Path:
    write_model(directory, LLAMA_CONFIG | (config or {}))
    write_json(directory / "modules.json", [TRANSFORMER, POOLING, NORMALIZE] if modules is None else modules)
    (directory / "1_Pooling").mkdir()
    write_json(directory / "1_Pooling" / "config.json", pooling or {"pooling_mode_lasttoken": True})
    return directory


@pytest.mark.parametrize(
    ("pooling", "mode"),
    [
        ({"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False}, Pooling.LAST),
        ({"pooling_mode_mean_tokens": True, "word_embedding_dimension": 8, "include_prompt": True}, Pooling.MEAN),
        ({"pooling_mode_cls_token": True}, Pooling.CLS),
        ({"pooling_mode": "lasttoken", "embedding_dimension": 8}, Pooling.LAST),
        ({"pooling_mode": "mean"}, Pooling.MEAN),
    ],
)
def test_the_pooling_module_is_read_in_both_spellings(tmp_path: Path, pooling: dict[str, Any], mode: Pooling) -> None:
    assert describe(embedding_model(tmp_path, pooling=pooling)).pooling == PoolingSpec(mode=mode)


def test_a_model_without_normalize_module_is_not_normalised(tmp_path: Path) -> None:
    assert describe(embedding_model(tmp_path, [TRANSFORMER, POOLING])).pooling == PoolingSpec(
        mode=Pooling.LAST, normalizes=False
    )


def test_lengths_and_dimensions_come_from_their_files(tmp_path: Path) -> None:
    directory = embedding_model(tmp_path, config={"matryoshka_dimensions": [2, 4, 8]})
    write_json(directory / "sentence_bert_config.json", {"max_seq_length": 48, "do_lower_case": False})

    found = describe(directory)

    assert found.pooling == PoolingSpec(mode=Pooling.LAST, dimensions=(2, 4, 8), max_tokens=48)
    assert found.max_positions == 48


def test_a_length_beyond_the_context_is_the_context(tmp_path: Path) -> None:
    directory = embedding_model(tmp_path)
    write_json(directory / "sentence_bert_config.json", {"max_seq_length": 4096})

    assert describe(directory).max_positions == 64


def test_an_embedding_model_needs_no_output_layer(tmp_path: Path) -> None:
    directory = embedding_model(tmp_path, config={"architectures": ["LlamaModel"]})

    assert describe(directory).tied_embeddings
    with pytest.raises(ModelNotFoundError, match="generates text"):
        describe(directory, Use("generate"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modules": [TRANSFORMER, POOLING, DENSE, NORMALIZE]}, "Given: Transformer, Pooling, Dense, Normalize"),
        ({"modules": [TRANSFORMER]}, "Given: Transformer"),
        ({"modules": []}, "modules must be"),
        ({"modules": [TRANSFORMER, POOLING | {"path": "../1_Pooling"}]}, "`path` must be the name of a folder"),
        ({"pooling": {"pooling_mode_max_tokens": True}}, "pooling_mode_max_tokens"),
        ({"pooling": {"pooling_mode_lasttoken": True, "pooling_mode_cls_token": True}}, "one of"),
        ({"pooling": {"pooling_mode_lasttoken": False}}, "Given: none"),
        ({"pooling": {"pooling_mode": "weightedmean"}}, "lasttoken, mean and cls. Given: weightedmean"),
        ({"config": {"is_causal": False}}, "`is_causal` must be true"),
        ({"config": {"use_bidirectional_attention": True}}, "`use_bidirectional_attention` must be false"),
        ({"config": {"architectures": ["LlamaForSequenceClassification"]}}, "architectures"),
        ({"config": {"matryoshka_dimensions": [0]}}, "matryoshka_dimensions"),
    ],
)
def test_what_cannot_be_embedded_rightly_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelNotFoundError, match=message):
        describe(embedding_model(tmp_path, **changes))


def test_the_task_overrules_the_files(tmp_path: Path) -> None:
    embedding, plain = embedding_model(tmp_path / "a"), write_model(tmp_path / "b")

    assert describe(plain).pooling is None
    assert describe(plain, Use("embed")).pooling == PoolingSpec(mode=Pooling.LAST)
    assert describe(plain, Use("embed", "mean")).pooling == PoolingSpec(mode=Pooling.MEAN)
    assert describe(plain, Use("auto", "mean")).pooling == PoolingSpec(mode=Pooling.MEAN)
    assert describe(embedding, Use("auto", "cls")).pooling == PoolingSpec(mode=Pooling.CLS)
    assert describe(embedding, Use("generate")).pooling is None


@pytest.mark.parametrize(("number", "mode"), [(1, Pooling.MEAN), (2, Pooling.CLS), (3, Pooling.LAST)])
def test_a_gguf_file_says_its_pooling_by_a_number(tmp_path: Path, number: int, mode: Pooling) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(llama_gguf({"llama.pooling_type": uint32(number)}))

    assert describe(path).pooling == PoolingSpec(mode=mode)
    assert describe(path, Use("generate")).pooling is None


def test_a_gguf_file_without_pooling_generates_and_a_reranker_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(llama_gguf({"llama.pooling_type": uint32(0)}))
    assert describe(path).pooling is None

    path.write_bytes(llama_gguf({"llama.pooling_type": uint32(4)}))
    with pytest.raises(ModelNotFoundError, match="pooling_type"):
        describe(path)
