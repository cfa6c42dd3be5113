"""Turn the vocabulary inside a GGUF file into the `tokenizer.json` that it was made from.

A GGUF file keeps tokens, scores or merges, kinds of tokens, and the *name* of the rule that cuts text into words
(`tokenizer.ggml.pre`); `gguf_pre_tokenizers.py` knows the rules. The conversion happens once: the result is a cached
directory that looks like any model directory. See ADR-0014.

Source: ggml `docs/gguf.md`, section "Tokenizer"; token kinds of llama.cpp's `llama_token_type`
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from types import MappingProxyType
from typing import Any

import tokenizers

from weft.errors import ModelNotFoundError, StartupError
from weft.gguf.metadata import GgufMetadata, open_gguf_metadata
from weft.text.gguf_pre_tokenizers import PRE_TOKENIZERS

Json = dict[str, Any]

CONVERTER_VERSION = 1
"""Part of the cache key: raise it whenever a conversion gives another result."""

_IDENTITY_BYTES = 1 << 20
_SPACE_MARK = "▁"

_END_OF_TURN_NAMES = frozenset(
    {
        "<|eot_id|>",
        "<|eom_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<end_of_turn>",
        "<end_of_utterance>",
        "<turn|>",
        "<eos>",
        "</s>",
        "<EOT>",
        "[EOT]",
        "[EOS]",
        "<｜end▁of▁sentence｜>",
    }
)
"""Control tokens that end a turn by their name: many files declare only one of several (llama.cpp does the same)."""


class TokenKind(IntEnum):
    """`tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class _Vocabulary:
    tokens: list[str]
    kinds: list[int]
    ids: dict[str, int]
    """Token → id; the first one counts when a file lists a token twice."""

    @classmethod
    def read(cls, metadata: GgufMetadata) -> "_Vocabulary":
        tokens = metadata.get_list("tokenizer.ggml.tokens", str)
        kinds = metadata.get_list("tokenizer.ggml.token_type", int) or [int(TokenKind.NORMAL)] * len(tokens)
        if not tokens or len(kinds) != len(tokens):
            raise StartupError(
                f"The GGUF file lists {len(tokens)} tokens and {len(kinds)} kinds of tokens; it needs as many of both. "
                "Use a file that was made for text generation."
            )
        ids: dict[str, int] = {}
        for token_id, token in enumerate(tokens):
            ids.setdefault(token, token_id)
        return cls(tokens, kinds, ids)

    def special(self, metadata: GgufMetadata, name: str) -> int | None:
        """Returns the id under `tokenizer.ggml.<name>_token_id`, None when there is none."""
        token_id = metadata.get(f"tokenizer.ggml.{name}_token_id", int)
        return token_id if token_id is not None and token_id < len(self.tokens) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Parts:
    """What differs between kinds of tokenizers."""

    model: Json
    normalizer: Json | None
    pre_tokenizer: Json | None
    decoder: Json
    adds_bos: bool
    """Unless the file says otherwise."""


def cached_tokenizer_directory(gguf_path: Path, cache_dir: Path) -> Path:
    """Returns a directory with `tokenizer.json` and its companions for the file, converting it at most once.

    Raises   ModelNotFoundError: the file cannot be read · StartupError: its kind of tokenizer is not supported
    """
    directory = cache_dir / "tokenizers" / _identity(gguf_path)
    if not directory.is_dir():
        with open_gguf_metadata(gguf_path) as metadata:
            _write_directory(directory, convert_gguf_tokenizer(metadata))
    return directory


def convert_gguf_tokenizer(metadata: GgufMetadata) -> dict[str, Json]:
    """Returns the files of the tokenizer: name → content.

    Raises   StartupError: a kind of tokenizer that is not supported, or a vocabulary that makes no sense
    """
    vocabulary = _Vocabulary.read(metadata)
    kind = metadata.get("tokenizer.ggml.model", str)
    convert = _CONVERSIONS.get(kind or "")
    if convert is None:
        names = ", ".join(f"`{name}`" for name in _CONVERSIONS)
        raise StartupError(
            f"The GGUF file has a tokenizer of the kind `{kind}`; {names} are supported. "
            "Use the model's original repository instead."
        )
    parts = convert(metadata, vocabulary)
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(metadata, vocabulary),
        "normalizer": parts.normalizer,
        "pre_tokenizer": parts.pre_tokenizer,
        "post_processor": _post_processor(metadata, vocabulary, adds_bos=parts.adds_bos),
        "decoder": parts.decoder,
        "model": parts.model,
    }
    return {
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": _tokenizer_config(metadata, vocabulary),
        "generation_config.json": {"eos_token_id": _end_ids(metadata, vocabulary)},
    }


def _byte_level_bpe(metadata: GgufMetadata, vocabulary: _Vocabulary) -> _Parts:
    """`gpt2`: merges over bytes, words cut by a named rule."""
    name = metadata.get("tokenizer.ggml.pre", str)
    rule = PRE_TOKENIZERS.get(name or "")
    if rule is None:
        names = ", ".join(f"`{known}`" for known in sorted(PRE_TOKENIZERS))
        fault = f"by the unknown rule `{name}`" if name else "by a rule that it does not name"
        raise StartupError(
            f"The GGUF file cuts text into words {fault} (tokenizer.ggml.pre); known are {names}. "
            "Use a file made by a newer converter, or the model's original repository."
        )
    return _Parts(
        model=_bpe_model(vocabulary, _stored_merges(metadata, vocabulary), ignore_merges=rule.prefers_whole_words),
        normalizer={"type": "NFC"} if rule.composes_characters else None,
        pre_tokenizer={"type": "Sequence", "pretokenizers": list(rule.steps)},
        decoder={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        adds_bos=rule.adds_bos,
    )


def _sentencepiece_bpe(metadata: GgufMetadata, vocabulary: _Vocabulary) -> _Parts:
    """`llama`: SentencePiece's BPE, which merges the pair whose union has the best score."""
    prepends_space = metadata.get("tokenizer.ggml.add_space_prefix", bool)
    return _spaced_bpe(
        metadata,
        vocabulary,
        _merges_from_scores(metadata, vocabulary),
        prepends_space=prepends_space is None or prepends_space,
    )


def _gemma4_bpe(metadata: GgufMetadata, vocabulary: _Vocabulary) -> _Parts:
    """`gemma4`: SentencePiece's treatment of spaces with merges that are listed."""
    return _spaced_bpe(metadata, vocabulary, _stored_merges(metadata, vocabulary), prepends_space=False)


_CONVERSIONS: Mapping[str, Callable[[GgufMetadata, _Vocabulary], _Parts]] = MappingProxyType(
    {"gpt2": _byte_level_bpe, "llama": _sentencepiece_bpe, "gemma4": _gemma4_bpe}
)
"""`tokenizer.ggml.model` → conversion."""


def _spaced_bpe(
    metadata: GgufMetadata, vocabulary: _Vocabulary, merges: list[tuple[str, str]], *, prepends_space: bool
) -> _Parts:
    """Merges over characters, spaces written as ▁, and bytes for what has no token."""
    unknown = vocabulary.special(metadata, "unknown")
    mark_spaces: Json = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE_MARK}
    decoders: list[Json] = [
        {"type": "Replace", "pattern": {"String": _SPACE_MARK}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    normalizer: Json = mark_spaces
    if prepends_space:
        prepend = {"type": "Prepend", "prepend": _SPACE_MARK}
        normalizer = {"type": "Sequence", "normalizers": [prepend, mark_spaces]}
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return _Parts(
        model=_bpe_model(
            vocabulary,
            merges,
            unk_token=None if unknown is None else vocabulary.tokens[unknown],
            fuse_unk=True,
            byte_fallback=TokenKind.BYTE in vocabulary.kinds,
        ),
        normalizer=normalizer,
        pre_tokenizer=None,
        decoder={"type": "Sequence", "decoders": decoders},
        adds_bos=True,
    )


def _bpe_model(vocabulary: _Vocabulary, merges: list[tuple[str, str]], **settings: Any) -> Json:  # noqa: ANN401
    defaults = {"dropout": None, "unk_token": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    return {"type": "BPE", **defaults, **settings, "vocab": vocabulary.ids, "merges": merges}


def _stored_merges(metadata: GgufMetadata, vocabulary: _Vocabulary) -> list[tuple[str, str]]:
    merges = []
    for merge in metadata.get_list("tokenizer.ggml.merges", str):
        # A token may begin with a space, so the border is the first space behind the first character.
        border = merge.find(" ", 1)
        left, right = merge[:border], merge[border + 1 :]
        if (
            border < 1
            or left not in vocabulary.ids
            or right not in vocabulary.ids
            or left + right not in vocabulary.ids
        ):
            raise StartupError(
                "The GGUF file merges tokens that its vocabulary does not have (tokenizer.ggml.merges). "
                "Use a file made by a newer converter."
            )
        merges.append((left, right))
    return merges


def _merges_from_scores(metadata: GgufMetadata, vocabulary: _Vocabulary) -> list[tuple[str, str]]:
    """Returns every way to build a token from two others, best-scored token first.

    Source: the equivalence of SentencePiece's and rank-ordered BPE that transformers' `SentencePieceExtractor` uses
    """
    scores = metadata.get_list("tokenizer.ggml.scores", float)
    if len(scores) != len(vocabulary.tokens):
        raise StartupError(
            f"The GGUF file has {len(vocabulary.tokens)} tokens and {len(scores)} scores (tokenizer.ggml.scores); "
            "it needs as many of both. Use a file made by a newer converter."
        )
    parts = {
        token: token_id
        for token, token_id in vocabulary.ids.items()
        if vocabulary.kinds[token_id] in (TokenKind.NORMAL, TokenKind.UNUSED)
    }
    merges: list[tuple[float, int, int, str, str]] = []
    for token, token_id in parts.items():
        for border in range(1, len(token)):
            left_id, right_id = parts.get(token[:border]), parts.get(token[border:])
            if left_id is not None and right_id is not None:
                merges.append((-scores[token_id], left_id, right_id, token[:border], token[border:]))
    merges.sort()
    return [(left, right) for *_, left, right in merges]


def _added_tokens(metadata: GgufMetadata, vocabulary: _Vocabulary) -> list[Json]:
    """Tokens that are found in text before anything else is done to it."""
    kinds = {TokenKind.CONTROL: True, TokenKind.UNKNOWN: True, TokenKind.USER_DEFINED: False}
    swallows_spaces = _tokens_that_swallow_spaces(metadata)
    return [
        {
            "id": token_id,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": swallows_spaces(token),
            "normalized": False,
            "special": kinds[TokenKind(kind)],
        }
        for token_id, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.kinds, strict=True))
        if kind in kinds and token and vocabulary.ids[token] == token_id
    ]


def _tokens_that_swallow_spaces(metadata: GgufMetadata) -> Callable[[str], bool]:
    """Phi-3's control tokens take the spaces behind them along, which no key of the format says (as in llama.cpp)."""
    name = (metadata.get("general.name", str) or "").lower()
    is_phi3 = "phi-3" in name or "phi3" in name
    return lambda token: is_phi3 and token not in ("<unk>", "<s>", "<|endoftext|>")


def _post_processor(metadata: GgufMetadata, vocabulary: _Vocabulary, *, adds_bos: bool) -> Json:
    """Returns what puts BOS and EOS around a text when special tokens are asked for."""
    first = _end_token(metadata, vocabulary, "bos", by_default=adds_bos)
    last = _end_token(metadata, vocabulary, "eos", by_default=False)

    def around(sequence: str, type_id: int) -> list[Json]:
        marks = [{"SpecialToken": {"id": token, "type_id": type_id}} for token in (*first, *last)]
        inner = {"Sequence": {"id": sequence, "type_id": type_id}}
        return [*marks[: len(first)], inner, *marks[len(first) :]]

    return {
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": [*around("A", 0), *around("B", 1)],
        "special_tokens": {
            token: {"id": token, "ids": [vocabulary.ids[token]], "tokens": [token]} for token in (*first, *last)
        },
    }


def _end_token(metadata: GgufMetadata, vocabulary: _Vocabulary, name: str, *, by_default: bool) -> list[str]:
    """Returns the token to add at one end of a text, or nothing."""
    is_added = metadata.get(f"tokenizer.ggml.add_{name}_token", bool)
    token_id = vocabulary.special(metadata, name)
    if token_id is None or not (by_default if is_added is None else is_added):
        return []
    return [vocabulary.tokens[token_id]]


def _tokenizer_config(metadata: GgufMetadata, vocabulary: _Vocabulary) -> Json:
    config: Json = {}
    for key, name in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"), ("mask", "mask")):
        token_id = vocabulary.special(metadata, name)
        if token_id is not None:
            config[f"{key}_token"] = vocabulary.tokens[token_id]
    templates = {
        name: metadata.get(f"tokenizer.chat_template.{name}", str)
        for name in metadata.get_list("tokenizer.chat_templates", str)
    }
    templates["default"] = metadata.get("tokenizer.chat_template", str)
    config["chat_template"] = [{"name": name, "template": text} for name, text in templates.items() if text]
    return config


def _end_ids(metadata: GgufMetadata, vocabulary: _Vocabulary) -> list[int]:
    """Returns the declared end of text, and the control tokens that end a turn by their name."""
    declared = [vocabulary.special(metadata, name) for name in ("eos", "eot", "eom")]
    named = {name: vocabulary.ids[name] for name in _END_OF_TURN_NAMES if name in vocabulary.ids}
    if {"<|return|>", "<|call|>"} <= named.keys():
        # The harmony format: `<|end|>` closes one of several messages in an answer.
        named.pop("<|end|>", None)
    controls = [token_id for token_id in named.values() if vocabulary.kinds[token_id] == TokenKind.CONTROL]
    return sorted({token_id for token_id in (*declared, *controls) if token_id is not None})


def _identity(path: Path) -> str:
    """Returns a name for the content of the file: its size, time and first bytes, where the vocabulary begins."""
    try:
        with path.open("rb") as file:
            state = os.fstat(file.fileno())
            digest = hashlib.sha256(file.read(_IDENTITY_BYTES))
    except OSError as error:
        raise ModelNotFoundError(f"The GGUF file {path.name!r} cannot be read: {error.strerror}.") from error
    digest.update(f"{state.st_size} {state.st_mtime_ns} {CONVERTER_VERSION}".encode())
    return digest.hexdigest()[:32]


def _write_directory(directory: Path, files: dict[str, Json]) -> None:
    """Writes all files or none: another process may convert the same file at the same moment."""
    contents = {name: json.dumps(content, ensure_ascii=False, separators=(",", ":")) for name, content in files.items()}
    try:
        tokenizers.Tokenizer.from_str(contents["tokenizer.json"])
    except Exception as error:  # the library raises bare Exception, whatever is wrong
        raise StartupError(f"The tokenizer of the GGUF file makes no sense: {error}. Use another file.") from error
    directory.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix="unfinished-", dir=directory.parent))
    for name, content in contents.items():
        (unfinished / name).write_text(content, encoding="utf-8")
    try:
        unfinished.rename(directory)
    except OSError:
        # Somebody else was faster; what they wrote is the same.
        shutil.rmtree(unfinished)
        if not directory.is_dir():
            raise
