"""Everything about text that a model brings along: tokenizer, special tokens, chat template, end-of-text ids.

One function reads them, whatever form the model has: a directory with `tokenizer.json`, a GGUF file, or a directory
with a SentencePiece model, which is converted once. All of these files are hostile data and have a size limit.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import tokenizers

from weft.errors import ModelNotFoundError, UsageError
from weft.limits import LIMITS
from weft.text.chat import DEFAULT_TEMPLATE, ChatTemplate
from weft.text.gguf_tokenizer import cached_tokenizer_directory
from weft.text.slow_tokenizer import converted_tokenizer_directory
from weft.text.tokenizer import Tokenizer, read_tokenizer_file

Json = dict[str, Any]

RECOMMENDED_SAMPLING_NAMES = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""What is read of `generation_config.json` beside the end-of-text ids."""

_MAX_MODEL_LENGTH = 1 << 30
"""Larger values of `model_max_length` are transformers' way of saying that none is known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextAssets:
    """What the router needs to turn messages into token ids and token ids into text."""

    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    special_tokens: Mapping[str, str]
    """Name such as `bos_token` → text, for those that the model has."""
    eos_token_ids: tuple[int, ...]
    """Every id that ends a completion: of the generation settings, the model and the tokenizer."""
    recommended_sampling: Mapping[str, float]
    """Sampling parameters that the model's authors recommend, by the names of `RECOMMENDED_SAMPLING_NAMES`."""
    appended_token_id: int | None
    """Id of the end-of-text token where the model's settings put it behind every text; embedding models need it."""
    model_max_length: int | None
    """Longest sequence that the tokenizer's author had in mind, None when unknown."""

    @property
    def bos_token(self) -> str | None:
        """Text of the token that begins a sequence."""
        return self.special_tokens.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        """Text of the token that ends a sequence; `eos_token_ids` may hold more."""
        return self.special_tokens.get("eos_token")

    @property
    def bos_token_id(self) -> int | None:
        """Id of `bos_token`."""
        return None if self.bos_token is None else self.tokenizer.token_to_id(self.bos_token)


def load_text_assets(
    model_path: Path, cache_dir: Path, tokenizer_config_path: Path | None = None, *, num_threads: int = 2
) -> TextAssets:
    """Read the text side of a model.

    model_path             a model directory or a .gguf file
    cache_dir              where converted tokenizers are kept
    tokenizer_config_path  read instead of the model's `tokenizer_config.json`; its chat template wins over all others
    num_threads            threads that encode text

    Raises   ModelNotFoundError: a file is missing or unreadable · StartupError: a kind of tokenizer not supported ·
             UsageError: the cache cannot be written, and something must be converted
    """
    with _cache_faults_explained(cache_dir):
        directory = model_path if model_path.is_dir() else cached_tokenizer_directory(model_path, cache_dir)
        tokenizer_directory = directory
        if not (directory / "tokenizer.json").is_file():
            tokenizer_directory = converted_tokenizer_directory(directory, cache_dir)
    own_config = _read_json(directory / "tokenizer_config.json")
    config = own_config if tokenizer_config_path is None else _read_required_json(tokenizer_config_path)
    special_tokens = _special_tokens(config, directory)
    backend = read_tokenizer_file(tokenizer_directory / "tokenizer.json")
    _declare_special_tokens(backend, config, special_tokens)
    templates = (_templates_in(config) if tokenizer_config_path is not None else {}) or _templates(
        directory, own_config
    )
    tokenizer = Tokenizer(backend, num_threads=num_threads)
    return TextAssets(
        tokenizer=tokenizer,
        chat_template=ChatTemplate(templates, special_tokens) if templates else None,
        special_tokens=MappingProxyType(special_tokens),
        eos_token_ids=_eos_token_ids(directory, tokenizer, special_tokens.get("eos_token")),
        recommended_sampling=MappingProxyType(_recommended_sampling(directory)),
        appended_token_id=_appended_token_id(config, tokenizer, special_tokens.get("eos_token")),
        model_max_length=_model_max_length(config),
    )


@contextmanager
def _cache_faults_explained(cache_dir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"--cache-dir: {str(cache_dir)!r} must be a directory that can be written: converted tokenizers are kept "
            f"there ({error.strerror}). Choose another."
        ) from error


def _special_tokens(config: Json, directory: Path) -> dict[str, str]:
    """Returns name → text. Each value is a string, or an object with the string as `content`."""
    extra = config.get("extra_special_tokens")
    sources = [config, extra] if isinstance(extra, dict) else [config]
    if "added_tokens_decoder" not in config:
        # Before 2023 the names stood in a file of their own; newer files repeat it with less care.
        sources.append(_read_json(directory / "special_tokens_map.json"))
    found: dict[str, str] = {}
    for source in sources:
        for name, value in source.items():
            # Besides the usual names a model may have its own, such as `image_token`.
            text = _token_text(value) if name.endswith("_token") else None
            if text:
                found.setdefault(name, text)
    return found


def _token_text(value: object) -> str | None:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _declare_special_tokens(backend: tokenizers.Tokenizer, config: Json, special_tokens: Mapping[str, str]) -> None:
    """Makes the tokenizer know as special what only `tokenizer_config.json` calls so, as transformers does.

    Tokens that the vocabulary does not have are left out: their ids would lie outside the embedding table.
    """
    extra_key = "extra_special_tokens" if config.get("extra_special_tokens") else "additional_special_tokens"
    listed = [entry for entry in _entries(config, "added_tokens_decoder") if isinstance(entry, dict)]
    entries = [*_entries(config, extra_key), *(entry for entry in listed if entry.get("special") is True)]
    texts = {*special_tokens.values(), *filter(None, map(_token_text, entries))}
    known = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    missing = sorted(text for text in texts - known if backend.token_to_id(text) is not None)
    backend.add_special_tokens([tokenizers.AddedToken(text, normalized=False, special=True) for text in missing])


def _entries(config: Json, key: str) -> Iterable[object]:
    """Returns the values of the list or object under `key`, none when the key is missing."""
    match config.get(key):
        case None:
            return ()
        case dict(named):
            return named.values()
        case list(entries):
            return entries
    raise _wrong_shape(key)


def _templates(directory: Path, config: Json) -> dict[str, str]:
    """Returns the model's chat templates: name → source. Files of their own win over the tokenizer's settings."""
    from_files = {}
    main = directory / "chat_template.jinja"
    if main.is_file():
        from_files[DEFAULT_TEMPLATE] = _read_text(main, LIMITS.max_template_chars)
    for file in sorted((directory / "additional_chat_templates").glob("*.jinja")):
        from_files[file.stem] = _read_text(file, LIMITS.max_template_chars)
    return from_files or _templates_in(_read_json(directory / "chat_template.json")) or _templates_in(config)


def _templates_in(config: Json) -> dict[str, str]:
    """Returns the templates in a settings file: one string, a list of named ones, or an object of named ones."""
    match config.get("chat_template"):
        case None:
            return {}
        case str(source):
            named: dict[Any, Any] = {DEFAULT_TEMPLATE: source}
        case list(entries) if all(isinstance(entry, dict) for entry in entries):
            named = {entry.get("name"): entry.get("template") for entry in entries}
        case dict(named):
            pass
        case _:
            raise _wrong_shape("chat_template")
    if not all(isinstance(text, str) for text in (*named, *named.values())):
        raise _wrong_shape("chat_template")
    for source in named.values():
        _check_size("chat_template", len(source), LIMITS.max_template_chars)
    return named


def _eos_token_ids(directory: Path, tokenizer: Tokenizer, eos_token: str | None) -> tuple[int, ...]:
    settings = _read_json(directory / "generation_config.json")
    if "eos_token_id" not in settings:
        settings = _read_json(directory / "config.json")
    declared = settings.get("eos_token_id", settings.get("text_config", {}).get("eos_token_id"))
    ids = set(declared) if isinstance(declared, list) else {declared}
    if eos_token is not None:
        ids.add(tokenizer.token_to_id(eos_token))
    return tuple(sorted(token_id for token_id in ids if isinstance(token_id, int)))


def _appended_token_id(config: Json, tokenizer: Tokenizer, eos_token: str | None) -> int | None:
    """Older files say this beside `tokenizer.json` instead of in it."""
    is_appended = config.get("add_eos_token") is True and eos_token is not None
    return tokenizer.token_to_id(eos_token) if is_appended and eos_token is not None else None


def _recommended_sampling(directory: Path) -> dict[str, float]:
    """Returns the recommended parameters that are in range; a model recommended to be greedy gets temperature 0."""
    settings = _read_json(directory / "generation_config.json")
    named = {name: settings.get(name) for name in RECOMMENDED_SAMPLING_NAMES}
    found = {name: float(value) for name, value in named.items() if isinstance(value, int | float) and value >= 0}
    if found.get("temperature", 1.0) > 0 and settings.get("do_sample") is False:
        found["temperature"] = 0.0
    return found


def _model_max_length(config: Json) -> int | None:
    length = config.get("model_max_length")
    return int(length) if isinstance(length, int | float) and 0 < length <= _MAX_MODEL_LENGTH else None


def _read_required_json(file: Path) -> Json:
    if not file.is_file():
        raise ModelNotFoundError("--tokenizer-config-path names no file. Give the path of a tokenizer_config.json.")
    return _read_json(file)


def _read_json(file: Path) -> Json:
    """Returns the object in the file, an empty one when there is no file."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(_read_text(file, LIMITS.max_config_file_bytes))
    except (ValueError, RecursionError) as error:
        raise ModelNotFoundError(f"{file.name} is not valid JSON: {error}. Fetch the model again.") from error
    if not isinstance(content, dict):
        raise ModelNotFoundError(f"{file.name} must hold a JSON object. Fetch the model again.")
    return content


def _read_text(file: Path, max_bytes: int) -> str:
    _check_size(file.name, file.stat().st_size, max_bytes)
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ModelNotFoundError(f"{file.name} is not UTF-8 text. Fetch the model again.") from error


def _check_size(name: str, size: int, limit: int) -> None:
    if size > limit:
        raise ModelNotFoundError(f"{name} has {size} bytes; at most {limit} are read. Check the model's files.")


def _wrong_shape(key: str) -> ModelNotFoundError:
    return ModelNotFoundError(f"`{key}` in the tokenizer's settings has an unknown form. Check the model's files.")
