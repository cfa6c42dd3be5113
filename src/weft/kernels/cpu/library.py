"""Finds, builds when needed, and loads the compiled kernels.

The library is loaded with ctypes, which releases the interpreter lock during every call. Calls from several threads
are served one after another.
"""

import atexit
import ctypes
import os
from collections.abc import Callable
from ctypes import c_char_p, c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from pathlib import Path

from weft.kernels.cpu.build import SOURCE_DIR, BuildError, BuildOptions, build, is_whole, library_name

INSTRUCTION_SETS = ("avx2", "avx512", "avx512-bf16")
"""Names of the kernel tables, each one including the ones before."""

_POINTER, _SIZE, _CODE, _FLOAT = c_void_p, c_int64, c_int32, c_float
_LOGITS = (_POINTER, _SIZE, _SIZE, _SIZE)
_SIGNATURES: dict[str, tuple[type | None, tuple[type, ...]]] = {
    "weft_source_hash": (c_char_p, ()),
    "weft_compiler": (c_char_p, ()),
    "weft_select": (c_int32, (c_char_p,)),
    "weft_selected": (c_char_p, ()),
    "weft_set_threads": (None, (c_int32,)),
    "weft_threads": (c_int32, ()),
    "weft_stop": (None, ()),
    "weft_packed_bytes": (_SIZE, (_SIZE, _SIZE, _CODE)),
    "weft_pack_panels": (None, (_POINTER, _SIZE, _POINTER, _SIZE, _SIZE, _CODE)),
    "weft_linear": (
        None,
        (_POINTER, _SIZE, _POINTER, _POINTER, _POINTER, _SIZE, _POINTER, _SIZE, _SIZE, _SIZE, _SIZE, _CODE, _CODE),
    ),
    "weft_embedding": (_SIZE, (_POINTER, _SIZE, _SIZE, _POINTER, _SIZE, _SIZE, _CODE, _POINTER)),
    "weft_scale_rows": (None, (_POINTER, _CODE, _FLOAT, _SIZE, _SIZE)),
    "weft_take_rows": (_SIZE, (_POINTER, _SIZE, _SIZE, _POINTER, _SIZE, _SIZE, _CODE, _POINTER)),
    "weft_softcap": (None, (_POINTER, _SIZE, _SIZE, _SIZE, _FLOAT)),
    "weft_find_layout": (_CODE, (c_char_p, _CODE)),
    "weft_instruction_bytes": (_SIZE, ()),
    "weft_step_bytes": (_SIZE, ()),
    "weft_run_step": (_CODE, (_POINTER, _SIZE, _POINTER, _POINTER)),
    "weft_select_quantized": (c_int32, (c_char_p,)),
    "weft_selected_quantized": (c_char_p, ()),
    "weft_quantized_bytes": (_SIZE, (_SIZE, _SIZE, _POINTER)),
    "weft_quantize_weight": (None, (_POINTER, _SIZE, _CODE, _SIZE, _SIZE, _SIZE, _SIZE, _POINTER, _POINTER)),
    "weft_pack_codes": (None, (_POINTER, _POINTER, _POINTER, _SIZE, _SIZE, _POINTER, _POINTER)),
    "weft_quantized_linear": (
        None,
        (_POINTER, _SIZE, _POINTER, _POINTER, _POINTER, _SIZE, _POINTER, _SIZE, _SIZE, _SIZE, _SIZE, _CODE, _CODE),
    ),
    "weft_quantized_embedding": (_SIZE, (_POINTER, _SIZE, _POINTER, _SIZE, _SIZE, _CODE, _POINTER)),
    "weft_paged_attention": (
        _SIZE,
        (
            *(_POINTER, _SIZE, _POINTER, _POINTER, _POINTER, _SIZE, _POINTER, _SIZE, _SIZE, _POINTER, _POINTER),
            *(_SIZE, _SIZE, _FLOAT, _FLOAT, _SIZE, _SIZE, _SIZE, _SIZE, _SIZE, _CODE, _CODE),
        ),
    ),
    "weft_rotary_and_store": (
        _SIZE,
        (
            *(_POINTER, _SIZE, _POINTER, _SIZE, _POINTER, _SIZE, _POINTER, _SIZE, _SIZE, _POINTER, _POINTER),
            *(_POINTER, _POINTER, _SIZE, _SIZE, _SIZE, _SIZE, _SIZE, _SIZE, _CODE, _CODE),
        ),
    ),
    "weft_rms_norm": (
        None,
        (_POINTER, _SIZE, _SIZE, _SIZE, _POINTER, _POINTER, _POINTER, _POINTER, _SIZE, _FLOAT, _FLOAT, _CODE),
    ),
    "weft_gated_activation": (None, (_POINTER, _SIZE, _POINTER, _SIZE, _SIZE, _CODE, _CODE)),
    "weft_greedy": (None, (*_LOGITS, _POINTER, _POINTER)),
    "weft_token_logprobs": (_SIZE, (*_LOGITS, _POINTER, _POINTER)),
    "weft_race": (None, (*_LOGITS, _POINTER, _POINTER, _POINTER)),
    "weft_draw": (None, (*_LOGITS, _POINTER, _POINTER, _POINTER, _POINTER, _POINTER, _POINTER)),
}


@dataclass(frozen=True, slots=True)
class Loaded:
    """The outcome of looking for the library."""

    library: ctypes.CDLL | None
    notice: str = ""
    """Why there is none, in one line."""


class _Process:
    """What this process has loaded; at most one library."""

    loaded: Loaded | None = None


def load() -> Loaded:
    """The library of these very sources: from the package, from the user's cache, or compiled now.

    Never raises: without a compiler the notice says so and operations run in PyTorch.
    """
    if _Process.loaded is None:
        _Process.loaded = _load(_find_or_build)
    return _Process.loaded


def supported_instruction_sets() -> tuple[str, ...]:
    """Those of `INSTRUCTION_SETS` that this CPU has, when the library is there."""
    library = load().library
    if library is None:
        return ()
    selected = library.weft_selected()
    supported = tuple(name for name in INSTRUCTION_SETS if library.weft_select(name.encode()))
    library.weft_select(selected)
    return supported


def load_file(path: Path) -> Loaded:
    """Loads one given file, for tests of a special build (sanitizers); replaces what was loaded."""
    _Process.loaded = _load(lambda: path)
    return _Process.loaded


def _load(find: Callable[[], Path]) -> Loaded:
    try:
        library = ctypes.CDLL(str(find()))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except BuildError as error:
        return Loaded(None, str(error))
    except (OSError, AttributeError) as error:
        return Loaded(None, f"the compiled kernels do not load: {error}")
    if not library.weft_select(None):
        return Loaded(None, "the CPU has no AVX2, which the compiled kernels need")
    atexit.register(library.weft_stop)
    return Loaded(library)


def is_compiled() -> bool:
    """Whether `load` finds a library; otherwise it compiles one, which takes a minute or more."""
    return _Process.loaded is not None or _find() is not None


def _cache_directory() -> Path:
    return Path.home() / ".cache" / "weft" / "kernels"


def _find() -> Path | None:
    libraries = (directory / library_name() for directory in (SOURCE_DIR, _cache_directory()))
    return next((library for library in libraries if is_whole(library)), None)


def _find_or_build() -> Path:
    return _find() or build(SOURCE_DIR if os.access(SOURCE_DIR, os.W_OK) else _cache_directory(), BuildOptions())
