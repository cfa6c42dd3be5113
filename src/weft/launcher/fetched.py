"""What a download is given and gives back; shared by every place a model may come from."""

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from weft.errors import DoesNotFitError


@dataclass(frozen=True, slots=True)
class FetchedModel:
    """A model on this machine."""

    path: Path
    """Directory with config.json, or a .gguf file."""
    sha: str | None = None
    """Commit of a hub model, sha256 of a registry member; None for local paths."""


def fault_of_model(reference: str, message: str) -> str:
    """What is wrong with a model, with the flag that named it; messages that name a flag stay as they are."""
    return message if message.startswith("--") else f"--model-id {reference}: {message}"


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a download has come."""

    percent: float
    message: str


Report = Callable[[Progress], None]


def ignore_progress(_progress: Progress) -> None:
    """A report that nobody reads."""


def check_space(directory: Path, needed_bytes: int) -> None:
    """Raise DoesNotFitError unless `needed_bytes` more fit, with a little left over, on the disk of `directory`."""
    free_bytes = shutil.disk_usage(directory).free
    if needed_bytes + 64 * 2**20 > free_bytes:
        raise DoesNotFitError(
            f"The download needs {needed_bytes / 1e9:.2f} GB and the disk has {free_bytes / 1e9:.2f} GB free; "
            "make room, or choose another disk with --cache-dir or --huggingface-hub-cache."
        )


@contextmanager
def exclusive(lock_file: Path, when_waiting: Callable[[], None]) -> Iterator[None]:
    """Hold a lock that every process of this machine respects and that dies with its holder."""
    lock_file.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            when_waiting()
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
