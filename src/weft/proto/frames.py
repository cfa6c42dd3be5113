"""Protobuf messages on a byte stream, each behind its length.

    frame = length (4 bytes, little-endian, unsigned) + message

Both ends bound the length before they spend memory on it.
"""

import asyncio
import struct
from collections.abc import AsyncIterator
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from weft.limits import LIMITS

_HEADER = struct.Struct("<I")

_Frame = TypeVar("_Frame", bound=Message)


class BrokenFrameError(Exception):
    """What came is no frame: the stream cannot be understood any further."""


def pack_frame(message: Message) -> bytes:
    """A message behind its length. Raises BrokenFrameError when the other end would refuse it."""
    body = message.SerializeToString()
    _check_length(len(body))
    return _HEADER.pack(len(body)) + body


async def read_frames(reader: asyncio.StreamReader, kind: type[_Frame]) -> AsyncIterator[_Frame]:
    """Messages until the other end closes; what is left of a frame that was cut off then is dropped.

    Raises   BrokenFrameError: a length above the limit, or bytes that are no such message
    """
    while True:
        try:
            (length,) = _HEADER.unpack(await reader.readexactly(_HEADER.size))
            _check_length(length)
            body = await reader.readexactly(length)
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        message = kind()
        try:
            message.ParseFromString(body)
        except DecodeError as error:
            raise BrokenFrameError(f"{length} bytes are no {kind.__name__}") from error
        yield message


def _check_length(length: int) -> None:
    if length > LIMITS.max_wire_message_bytes:
        raise BrokenFrameError(f"a frame of {length} bytes; at most {LIMITS.max_wire_message_bytes} are taken")
