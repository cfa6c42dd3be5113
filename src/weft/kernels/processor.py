"""What this processor can do, as far as a choice depends on it."""

from functools import cache
from pathlib import Path

_BFLOAT16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16", "svebf16"})


@cache
def features() -> frozenset[str]:
    """Feature flags as Linux names them; empty where it does not say."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return frozenset()
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in {"flags", "Features"}:
            return frozenset(value.split())
    return frozenset()


def has_bfloat16() -> bool:
    """True when products of bfloat16 numbers have an instruction of their own (AVX512-BF16, AMX, Arm BF16)."""
    return bool(features() & _BFLOAT16_FLAGS)
