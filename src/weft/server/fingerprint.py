"""What decides which tokens a request gets, in three short hashes: weights, numeric configuration, kernels.

Batch size, threads, pool size and neighbours are not in it, because they change nothing.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from weft import __version__
from weft.kernels import registry as kernel_registry
from weft.kernels.cpu.build import source_hash
from weft.models.weights.safetensors_file import weight_files

_WORDS_PER_PAGE = 512
"""64-bit words that share a sum: 4 KiB."""
_READ_BYTES = 4 << 20
_PART_CHARS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class NumericConfiguration:
    """Every choice beside weights and kernels that changes a bit of a logit or of a token."""

    dtype: str
    weights: str
    """How matrices are kept, with the size of groups; empty: in `dtype`."""
    kv_cache: str
    """Type of cached keys and values."""
    block_size_tokens: int
    """The tile that attention sums over."""
    world_size: int
    """Ranks add their shares up."""
    is_long_context: bool
    """Which of the two frequency lists of a LongRoPE model is in force."""
    watermark: tuple[float, float]
    """Share of the green list and what its tokens get; for requests that ask for the watermark."""

    @property
    def is_rounded(self) -> bool:
        """Weights or cache hold fewer bits than activations."""
        return bool(self.weights) or self.kv_cache != self.dtype


def fingerprint(weights: str, configuration: NumericConfiguration, device: str) -> str:
    """WEIGHTS-CONFIGURATION-KERNELS, each 8 hexadecimal digits; `weights` is that of `digest_of_weights`.

    device   name of the processor where kernels depend on it (a GPU), else empty
    """
    device_type = "cuda" if device else "cpu"
    kernels = (kernel_registry.kernel_set(device_type), device, source_hash(), torch.__version__, __version__)
    return "-".join(part[:_PART_CHARS] for part in (weights, _hash(repr(configuration)), _hash(repr(kernels))))


def digest_of_weights(path: Path) -> str:
    """Hexadecimal digits that tell models apart by what their files hold (tensors and config.json), not by their place.

    A sum of 64-bit words for each 4 KiB, hashed: any single change shows, and reading is as fast as memory. It is no
    defence against somebody who wants two models to look alike; for that, a reference carries a SHA-256.
    """
    digest = hashlib.sha256()
    for file in _files(path):
        size = file.stat().st_size
        digest.update(f"{file.suffix}\0{size}\0".encode())
        for sums in _page_sums(file):
            digest.update(sums)
    return digest.hexdigest()


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else [path / "config.json", *weight_files(path)]


def _page_sums(file: Path) -> Iterator[bytes]:
    buffer = bytearray(_READ_BYTES)
    with file.open("rb", buffering=0) as source:
        while True:
            # A regular file gives less than asked for at its end only.
            count = source.readinto(buffer) or 0
            if count == 0:
                return
            # The last page is filled up with zeros, so that every byte belongs to a word.
            padded = -(-count // (8 * _WORDS_PER_PAGE)) * 8 * _WORDS_PER_PAGE
            buffer[count:padded] = bytes(padded - count)
            words = np.frombuffer(buffer, dtype=np.uint64, count=padded // 8)
            yield words.reshape(-1, _WORDS_PER_PAGE).sum(axis=1, dtype=np.uint64).tobytes()


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
