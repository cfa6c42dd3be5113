import json
from pathlib import Path

import pytest

from weft.errors import ModelNotFoundError
from weft.limits import LIMITS
from weft.models.weights.config_file import ModelConfig, read_json_object


def config(**values: object) -> ModelConfig:
    return ModelConfig(values, "config.json")


@pytest.mark.parametrize("value", [True, 1.5, "8", 0, -1, 2**30, [8], {}])
def test_an_integer_of_another_type_or_range_is_refused_by_name(value: object) -> None:
    with pytest.raises(ModelNotFoundError, match=r"config.json: `hidden_size` must be an integer from 1 to"):
        config(hidden_size=value).integer("hidden_size")


@pytest.mark.parametrize("value", [True, "1e-5", float("nan"), float("inf"), -1, [1]])
def test_a_number_that_is_not_finite_or_too_small_is_refused(value: object) -> None:
    with pytest.raises(ModelNotFoundError, match=r"`rms_norm_eps` must be a number >= 0.0"):
        config(rms_norm_eps=value).number("rms_norm_eps")


def test_null_is_absent() -> None:
    assert config(head_dim=None).integer("head_dim", 64) == 64
    assert config(sliding_window=None).optional_integer("sliding_window") is None


def test_a_missing_field_without_default_is_named() -> None:
    with pytest.raises(ModelNotFoundError, match=r"config.json: `vocab_size` is missing"):
        config().integer("vocab_size")


@pytest.mark.parametrize("values", [[1.0], [1.0, "2"], [1.0, 0.0], [1.0, float("nan")], "ab", [1.0, True]])
def test_a_list_of_numbers_has_its_length_and_only_positive_numbers(values: object) -> None:
    with pytest.raises(ModelNotFoundError, match=r"`long_factor` must be a list of 2"):
        config(long_factor=values).numbers("long_factor", 2)


def test_an_unknown_choice_lists_the_known_ones() -> None:
    with pytest.raises(ModelNotFoundError, match=r"`hidden_act` must be one of gelu, silu. Given: relu"):
        config(hidden_act="relu").choice("hidden_act", {"silu": "silu", "gelu": "gelu"}, "silu")


def test_long_text_is_not_echoed() -> None:
    with pytest.raises(ModelNotFoundError) as error:
        config(model_type="x" * 10_000).text("model_type")

    assert len(error.value.message) < 200


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[" * 200_000, "not valid JSON"),
        (b"[1, 2]", "must hold a JSON object"),
    ],
)
def test_a_damaged_file_is_one_line(tmp_path: Path, content: bytes, fault: str) -> None:
    (tmp_path / "config.json").write_bytes(content)

    with pytest.raises(ModelNotFoundError, match=fault):
        read_json_object(tmp_path / "config.json")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"config.json is missing"):
        read_json_object(tmp_path / "config.json")


def test_size_is_checked_before_the_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(LIMITS.max_config_file_bytes + 1)

    with pytest.raises(ModelNotFoundError, match=r"at most"):
        read_json_object(path)


def test_an_object_is_returned_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"a": [1, None]}))

    assert read_json_object(tmp_path / "config.json") == {"a": [1, None]}
