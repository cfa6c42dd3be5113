"""How text is cut into words before merging, by the name that a GGUF file gives it (`tokenizer.ggml.pre`).

Each rule is written as the `tokenizer.json` of the original model has it: steps run in order, each cutting the pieces
of the one before. Names that share a rule share a row. A name that is not here is refused: a wrong rule gives token
ids that look right and answers that are subtly worse.

Source: the published `tokenizer.json` of each model family; names from llama.cpp's `convert_hf_to_gguf_update.py`
"""

from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

Step = dict[str, Any]
"""One pre-tokenizer in the form of `tokenizer.json`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PreTokenizer:
    """A rule, with the habits that come with its name unless the file says otherwise."""

    steps: tuple[Step, ...]
    composes_characters: bool = False
    """Text is brought to Unicode NFC first."""
    prefers_whole_words: bool = False
    """A word that is a token is taken without merging (`ignore_merges`)."""
    adds_bos: bool = False


def _split(pattern: str) -> Step:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _byte_level(*, splits_words: bool) -> Step:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": splits_words}


def _digits(*, one_by_one: bool) -> Step:
    return {"type": "Digits", "individual_digits": one_by_one}


_GPT2_WORDS = _byte_level(splits_words=True)
_BYTES = _byte_level(splits_words=False)
_SINGLE_DIGITS = _digits(one_by_one=True)

_ENGLISH_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_PUNCTUATION = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"

_LLAMA3 = _split(rf"{_ENGLISH_ENDINGS}|{_WORD}|\p{{N}}{{1,3}}|{_PUNCTUATION}|{_SPACES}")
_QWEN2 = _split(rf"{_ENGLISH_ENDINGS}|{_WORD}|\p{{N}}|{_PUNCTUATION}|{_SPACES}")
_QWEN35 = _split(
    rf"{_ENGLISH_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
_SEED_CODER = _split(rf"{_ENGLISH_ENDINGS}|{_WORD}|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}")

_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CAMEL_PUNCTUATION = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"


def _camel_case(*, ending: str, digits: str) -> Step:
    """Words that also break before a capital letter (OpenAI's o200k and its relatives)."""
    start = r"[^\r\n\p{L}\p{N}]?"
    words = f"{start}{_UPPER}*{_LOWER}+{ending}|{start}{_UPPER}+{_LOWER}*{ending}"
    return _split(f"{words}|{digits}|{_CAMEL_PUNCTUATION}|{_SPACES}")


_O200K = _camel_case(ending=f"{_ENGLISH_ENDINGS}?", digits=r"\p{N}{1,3}")
_TEKKEN = _camel_case(ending="", digits=r"\p{N}")

_DEEPSEEK_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373"
    "\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f"
    "\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77"
    "\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d"
    "\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb"
    "\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128"
    "\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4"
    "\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf"
    "\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
    "\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
"""Letters that have case, as escapes: some of them look like ASCII and are not."""
_DEEPSEEK_CHINESE = _split("[一-龥ࠀ-一가-퟿]+")
_DEEPSEEK_LLM = (
    _split("[\r\n]"),
    _split(rf"\s?[{_DEEPSEEK_LETTERS}]+"),
    _split(r"\s?[!-/:-~！-／：-～‘-‟　-。]+"),
    _split(r"\s+$"),
    _DEEPSEEK_CHINESE,
    _SINGLE_DIGITS,
    _BYTES,
)
_DEEPSEEK_CODER = (
    _split("[\r\n]"),
    _split(r"\s?\p{L}+"),
    _split(r"\s?\p{P}+"),
    _DEEPSEEK_CHINESE,
    _SINGLE_DIGITS,
    _BYTES,
)
_DEEPSEEK_V3 = (
    _split(r"\p{N}{1,3}"),
    _split("[一-龥぀-ゟ゠-ヿ]+"),
    _split(
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
        rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}"
    ),
    _BYTES,
)
_FALCON = (
    {"type": "Punctuation", "behavior": "Contiguous"},
    _GPT2_WORDS,
    _digits(one_by_one=False),
    _split("[0-9][0-9][0-9]"),
)
_BLOOM = _split(r" ?[^(\s|[.,!?…。，、।۔،])]+")

_ROWS: tuple[tuple[tuple[str, ...], PreTokenizer], ...] = (
    (
        ("gpt-2", "phi-2", "jais", "trillion", "exaone4", "granite-docling", "gigachat", "a.x-4.0", "mellum"),
        PreTokenizer(steps=(_GPT2_WORDS,)),
    ),
    (("mpt", "olmo"), PreTokenizer(steps=(_GPT2_WORDS,), composes_characters=True)),
    (
        ("smollm", "starcoder", "refact", "codeshell", "exaone", "minerva-7b", "mellum2"),
        PreTokenizer(steps=(_SINGLE_DIGITS, _GPT2_WORDS)),
    ),
    (("command-r",), PreTokenizer(steps=(_SINGLE_DIGITS, _GPT2_WORDS), composes_characters=True)),
    (
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
        PreTokenizer(steps=(_LLAMA3, _BYTES), prefers_whole_words=True, adds_bos=True),
    ),
    (("dbrx", "smaug-bpe", "chatglm-bpe"), PreTokenizer(steps=(_LLAMA3, _BYTES))),
    (("glm4", "glm5"), PreTokenizer(steps=(_LLAMA3, _BYTES), prefers_whole_words=True)),
    (("qwen2", "deepseek-r1-qwen"), PreTokenizer(steps=(_QWEN2, _BYTES), composes_characters=True)),
    (("stablelm2", "grok-2", "megrez", "hunyuan", "solar-open"), PreTokenizer(steps=(_QWEN2, _BYTES))),
    (("qwen35",), PreTokenizer(steps=(_QWEN35, _BYTES), composes_characters=True)),
    (("gpt-4o", "llama4", "kanana2"), PreTokenizer(steps=(_O200K, _BYTES))),
    (("minimax-m2",), PreTokenizer(steps=(_O200K, _BYTES), composes_characters=True)),
    (("tekken",), PreTokenizer(steps=(_TEKKEN, _BYTES), prefers_whole_words=True, adds_bos=True)),
    (("deepseek-llm",), PreTokenizer(steps=_DEEPSEEK_LLM)),
    (("deepseek-coder",), PreTokenizer(steps=_DEEPSEEK_CODER)),
    (("deepseek-v3", "hunyuan-dense", "joyai-llm"), PreTokenizer(steps=_DEEPSEEK_V3)),
    (("falcon",), PreTokenizer(steps=_FALCON)),
    (("seed-coder",), PreTokenizer(steps=(_SEED_CODER, _BYTES))),
    (("bloom", "poro-chat", "gpt3-finnish"), PreTokenizer(steps=(_BLOOM, _BYTES))),
    (("viking",), PreTokenizer(steps=(_BLOOM, _SINGLE_DIGITS, _BYTES))),
)

PRE_TOKENIZERS = MappingProxyType({name: rule for names, rule in _ROWS for name in names})
"""`tokenizer.ggml.pre` → rule."""
