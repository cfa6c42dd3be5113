"""What a client gets of a prompt's vector: cut, of length 1, as numbers or as base64."""

import base64
import math
import struct
from array import array
from collections.abc import Sequence

_LEAST_LENGTH = 1e-12
"""As in torch's `normalize`: a vector of zeros stays one."""


def finished_vector(values: bytes, dimensions: int | None, *, normalizes: bool) -> list[float]:
    """The first `dimensions` numbers of a vector, divided by their length; every number is one of float32.

    Units   values: float32, little-endian; dimensions: None for all
    """
    vector = struct.unpack(f"<{len(values) // 4}f", values)[:dimensions]
    if normalizes:
        length = max(math.hypot(*vector), _LEAST_LENGTH)
        vector = tuple(number / length for number in vector)
    return array("f", vector).tolist()


def base64_of(vector: Sequence[float]) -> str:
    """Its float32 bytes, little-endian, as OpenAI's clients read them."""
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode("ascii")
