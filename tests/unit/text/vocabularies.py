"""Tiny vocabularies of the two kinds that language models use, as tokenizers and as GGUF files."""

from pathlib import Path
from typing import Any

import gguf
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from weft.text.token_pieces import BYTE_ALPHABET
from weft.text.tokenizer import Tokenizer

BYTE_LEVEL_TOKENS = ("<|start|>", "<|end|>", *BYTE_ALPHABET, "he", "hel", "Ġw", "Ġhe", "ðŁ")
BYTE_LEVEL_MERGES = (("h", "e"), ("he", "l"), ("Ġ", "w"), ("Ġ", "he"), ("ð", "Ł"))
USER_DEFINED = "<think>"

SPACED_TOKENS = (
    "<unk>",
    "<s>",
    "</s>",
    *(f"<0x{byte:02X}>" for byte in range(256)),
    "▁",
    "h",
    "i",
    "▁h",
    "▁hi",
    "é",
    "hi",
    "ih",
)
SPACED_SCORES = (*(0.0,) * 259, -5.0, -6.0, -7.0, -2.0, -1.0, -8.0, -3.0, -1.5)
"""Worse for `hi` than for `ih`, whose id is larger: only the score decides which is merged first."""


def byte_level_tokenizer(*, adds_start: bool = False) -> Tokenizer:
    """Merges over bytes, as GPT-2, Llama 3 and SmolLM2 have it."""
    vocabulary = {token: token_id for token_id, token in enumerate(BYTE_LEVEL_TOKENS)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=list(BYTE_LEVEL_MERGES)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in BYTE_LEVEL_TOKENS[:2]])
    backend.add_tokens([AddedToken(USER_DEFINED, special=False, normalized=False)])
    if adds_start:
        backend.post_processor = processors.TemplateProcessing(
            single="<|start|> $A", special_tokens=[("<|start|>", vocabulary["<|start|>"])]
        )
    return Tokenizer(backend, num_threads=1)


def spaced_tokenizer() -> Tokenizer:
    """Spaces written as ▁ and single bytes for what has no token, as Llama 2 and Gemma have it."""
    vocabulary = {token: token_id for token_id, token in enumerate(SPACED_TOKENS)}
    merges = [("▁h", "i"), ("▁", "hi"), ("i", "h"), ("▁", "h"), ("h", "i")]
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(list(SPACED_TOKENS[:3]))
    return Tokenizer(backend, num_threads=1)


def write_byte_level_gguf(path: Path, **changes: Any) -> Path:
    """Write the byte-level vocabulary as a GGUF file; `changes` replace or (None) drop keys of `tokenizer.ggml`."""
    control, normal, user_defined = 3, 1, 4
    return _write_gguf(
        path,
        {
            "model": "gpt2",
            "pre": "smollm",
            "tokens": [*BYTE_LEVEL_TOKENS, USER_DEFINED],
            "token_type": [control, control, *[normal] * (len(BYTE_LEVEL_TOKENS) - 2), user_defined],
            "merges": [" ".join(merge) for merge in BYTE_LEVEL_MERGES],
            "bos_token_id": 0,
            "eos_token_id": 1,
            **changes,
        },
    )


def write_spaced_gguf(path: Path, **changes: Any) -> Path:
    """Write the SentencePiece-like vocabulary as a GGUF file; `changes` as above."""
    unknown, control, byte, normal = 2, 3, 6, 1
    return _write_gguf(
        path,
        {
            "model": "llama",
            "tokens": list(SPACED_TOKENS),
            "scores": list(SPACED_SCORES),
            "token_type": [unknown, control, control, *[byte] * 256, *[normal] * 8],
            "bos_token_id": 1,
            "eos_token_id": 2,
            "unknown_token_id": 0,
            **changes,
        },
    )


def _write_gguf(path: Path, keys: dict[str, Any]) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in keys.items():
        key = name if "." in name else f"tokenizer.ggml.{name}"
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value:
            writer.add_array(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path
