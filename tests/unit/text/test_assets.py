"""What is read from a model directory or a GGUF file, and which file wins."""

import json
from pathlib import Path
from typing import Any

import pytest
from tests.unit.text.vocabularies import byte_level_tokenizer, write_byte_level_gguf

from weft.errors import ModelNotFoundError, StartupError, UsageError
from weft.limits import LIMITS
from weft.text.assets import TextAssets, load_text_assets

CONFIG = {"bos_token": "<|start|>", "eos_token": {"content": "<|end|>", "lstrip": False}, "model_max_length": 2048}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    byte_level_tokenizer()._backend.save(str(directory / "tokenizer.json"))
    return directory


def write(directory: Path, name: str, content: dict[str, Any] | str) -> None:
    (directory / name).parent.mkdir(exist_ok=True)
    (directory / name).write_text(content if isinstance(content, str) else json.dumps(content))


def load(model: Path, **options: Any) -> TextAssets:
    return load_text_assets(model, model.parent / "cache", num_threads=1, **options)


def template_of(assets: TextAssets, name: str = "default") -> str | None:
    return assets.chat_template and assets.chat_template.source(name)


def test_special_tokens_are_read_as_strings_or_objects(model: Path) -> None:
    write(model, "tokenizer_config.json", CONFIG)

    assets = load(model)

    assert dict(assets.special_tokens) == {"bos_token": "<|start|>", "eos_token": "<|end|>"}
    assert (assets.bos_token, assets.eos_token, assets.bos_token_id) == ("<|start|>", "<|end|>", 0)
    assert (assets.model_max_length, assets.chat_template) == (2048, None)


def test_a_model_may_name_special_tokens_of_its_own(model: Path) -> None:
    settings = {"image_token": "!", "add_bos_token": True, "extra_special_tokens": {"audio_token": "#"}}
    write(model, "tokenizer_config.json", settings)

    assert dict(load(model).special_tokens) == {"image_token": "!", "audio_token": "#"}


def test_a_bare_tokenizer_is_enough(model: Path) -> None:
    assets = load(model)

    assert (dict(assets.special_tokens), assets.eos_token_ids, assets.model_max_length) == ({}, (), None)


def test_a_length_that_means_unknown_is_none(model: Path) -> None:
    write(model, "tokenizer_config.json", {"model_max_length": 1e30})

    assert load(model).model_max_length is None


def test_the_old_file_of_special_tokens_fills_gaps(model: Path) -> None:
    write(model, "tokenizer_config.json", {"eos_token": "<|end|>"})
    write(model, "special_tokens_map.json", {"bos_token": "<|start|>", "eos_token": "other"})

    assert dict(load(model).special_tokens) == {"bos_token": "<|start|>", "eos_token": "<|end|>"}


def test_tokens_that_only_the_settings_call_special_become_special(model: Path) -> None:
    settings = {
        "pad_token": "hel",
        "extra_special_tokens": ["he"],
        "added_tokens_decoder": {"5": {"content": "!", "special": True}, "6": {"content": "#", "special": False}},
        "mask_token": "not in the vocabulary",
    }
    write(model, "tokenizer_config.json", settings)

    tokenizer = load(model).tokenizer

    special = [text for text in ("hel", "he", "!", "#") if tokenizer.is_special(tokenizer.token_to_id(text) or 0)]
    assert special == ["hel", "he", "!"]
    assert tokenizer.vocab_size == byte_level_tokenizer().vocab_size


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"generation_config.json": {"eos_token_id": [7, 5]}, "config.json": {"eos_token_id": 9}}, (5, 7)),
        ({"config.json": {"eos_token_id": 9}}, (9,)),
        ({"config.json": {"text_config": {"eos_token_id": 4}}}, (4,)),
        ({"generation_config.json": {"eos_token_id": 7}, "tokenizer_config.json": CONFIG}, (1, 7)),
        ({"config.json": {"eos_token_id": None}}, ()),
    ],
)
def test_every_end_of_text_is_known(model: Path, files: dict[str, dict[str, Any]], expected: tuple[int, ...]) -> None:
    for name, content in files.items():
        write(model, name, content)

    assert load(model).eos_token_ids == expected


def test_template_files_win_over_settings_and_settings_over_nothing(model: Path) -> None:
    write(model, "tokenizer_config.json", {"chat_template": "settings"})
    assert template_of(load(model)) == "settings"

    write(model, "chat_template.json", {"chat_template": "processor"})
    assert template_of(load(model)) == "processor"

    write(model, "chat_template.jinja", "file")
    write(model, "additional_chat_templates/tool_use.jinja", "tools")
    assets = load(model)
    assert (template_of(assets), template_of(assets, "tool_use")) == ("file", "tools")


@pytest.mark.parametrize(
    "templates",
    [
        [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}],
        {"default": "d", "tool_use": "t"},
    ],
)
def test_settings_may_hold_named_templates(model: Path, templates: object) -> None:
    write(model, "tokenizer_config.json", {"chat_template": templates})

    assets = load(model)

    assert (template_of(assets), template_of(assets, "tool_use")) == ("d", "t")


def test_settings_given_by_path_win_with_their_template(model: Path, tmp_path: Path) -> None:
    write(model, "tokenizer_config.json", {"bos_token": "<|end|>"})
    write(model, "chat_template.jinja", "model's")
    write(tmp_path, "mine.json", {"bos_token": "<|start|>", "chat_template": "mine"})
    write(tmp_path, "plain.json", {"bos_token": "<|start|>"})

    mine = load(model, tokenizer_config_path=tmp_path / "mine.json")
    plain = load(model, tokenizer_config_path=tmp_path / "plain.json")

    assert (mine.bos_token, template_of(mine), template_of(plain)) == ("<|start|>", "mine", "model's")


def test_a_gguf_file_brings_everything_along(tmp_path: Path) -> None:
    templates = {
        "tokenizer.chat_templates": ["tool_use"],
        "tokenizer.chat_template.tool_use": "tools",
        "tokenizer.chat_template": "plain",
    }

    assets = load(write_byte_level_gguf(tmp_path / "m.gguf", **templates))

    assert (template_of(assets), template_of(assets, "tool_use")) == ("plain", "tools")
    assert (assets.bos_token, assets.eos_token_ids) == ("<|start|>", (1,))


@pytest.mark.parametrize("content", ["{", "[]", '"x"', "[" * 100_000, '{"a": "\xff'])
def test_a_settings_file_that_is_no_object_is_an_error_that_names_it(model: Path, content: str) -> None:
    (model / "tokenizer_config.json").write_bytes(content.encode("latin-1"))

    with pytest.raises(ModelNotFoundError, match=r"tokenizer_config\.json"):
        load(model)


@pytest.mark.parametrize(
    "settings",
    [
        {"chat_template": [{"name": "default"}]},
        {"chat_template": {"default": 1}},
        {"chat_template": ["x"]},
        {"added_tokens_decoder": "x"},
        {"extra_special_tokens": 7},
    ],
)
def test_settings_of_the_wrong_shape_are_an_error_that_names_the_key(model: Path, settings: dict[str, Any]) -> None:
    write(model, "tokenizer_config.json", settings)

    with pytest.raises(ModelNotFoundError, match=f"`{next(iter(settings))}`"):
        load(model)


def test_files_beyond_their_limits_are_not_read(model: Path) -> None:
    with (model / "chat_template.jinja").open("wb") as file:
        file.truncate(LIMITS.max_template_chars + 1)

    with pytest.raises(ModelNotFoundError, match=r"chat_template\.jinja has .* at most"):
        load(model)


def test_a_template_in_the_settings_has_the_same_limit(model: Path) -> None:
    write(model, "tokenizer_config.json", {"chat_template": "x" * (LIMITS.max_template_chars + 1)})

    with pytest.raises(ModelNotFoundError, match="at most"):
        load(model)


def test_a_missing_settings_path_is_named_by_its_flag(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="--tokenizer-config-path"):
        load(model, tokenizer_config_path=tmp_path / "missing.json")


def test_a_directory_without_any_tokenizer_says_what_to_add(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        load_text_assets(tmp_path, tmp_path / "cache")


def test_a_cache_that_cannot_be_written_is_named_by_its_flag_where_it_is_needed(model: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").touch()
    write_byte_level_gguf(tmp_path / "model.gguf")

    with pytest.raises(UsageError, match=r"--cache-dir: .* must be a directory that can be written"):
        load_text_assets(tmp_path / "model.gguf", tmp_path / "cache")
    assert load(model).tokenizer, "a fast tokenizer needs no cache"


@pytest.mark.slow
def test_a_tokenizer_that_cannot_be_converted_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"no model")

    with pytest.raises(StartupError, match="pip install transformers sentencepiece"):
        load_text_assets(tmp_path, tmp_path / "cache")

    assert not list((tmp_path / "cache" / "tokenizers").iterdir())
