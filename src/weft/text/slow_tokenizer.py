"""Give a model that has only a SentencePiece (or another slow) tokenizer a `tokenizer.json`.

transformers knows how; it runs once, in a process of its own, because it needs seconds and hundreds of megabytes
that the router must not carry. Nothing from the model's repository is executed (`trust_remote_code` stays off).
"""

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from weft.errors import ModelNotFoundError, StartupError

_CONVERSION_TIMEOUT_S = 600
"""A vocabulary of 256 thousand tokens takes half a minute on a slow machine."""

_SOURCES = ("tokenizer.model", "spiece.model", "vocab.json", "merges.txt", "tekken.json", "tiktoken.model", "vocab.txt")
"""Files that a slow tokenizer is made of."""

_PROGRAM = """
import sys
from transformers import AutoTokenizer
AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=False).save_pretrained(sys.argv[2])
"""


def converted_tokenizer_directory(directory: Path, cache_dir: Path) -> Path:
    """Returns a directory with the `tokenizer.json` of the model in `directory`, converting it at most once.

    Raises   ModelNotFoundError: there is nothing to convert · StartupError: the conversion is not possible here
    """
    sources = [directory / name for name in _SOURCES if (directory / name).is_file()]
    if not sources:
        raise ModelNotFoundError(
            "The model has no tokenizer: neither tokenizer.json nor tokenizer.model is there. "
            "Add the tokenizer's files to the model directory."
        )
    target = cache_dir / "tokenizers" / _identity(sources)
    if not target.is_dir():
        _convert(directory, target)
    return target


def _identity(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        state = file.stat()
        digest.update(f"{file.resolve()} {state.st_size} {state.st_mtime_ns}".encode())
    return digest.hexdigest()[:32]


def _convert(directory: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="unfinished-", dir=target.parent) as unfinished:
        converted = Path(unfinished) / "converted"
        _run(directory, converted)
        if not (converted / "tokenizer.json").is_file():
            raise StartupError("The model's tokenizer has no fast form. Use a model that has a tokenizer.json.")
        try:
            converted.rename(target)
        except OSError:
            # Somebody else was faster; what they wrote is the same.
            if not target.is_dir():
                raise


def _run(directory: Path, converted: Path) -> None:
    command = [sys.executable, "-c", _PROGRAM, str(directory.resolve()), str(converted)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    try:
        subprocess.run(  # noqa: S603  # our own interpreter and program
            command, env=environment, check=True, capture_output=True, text=True, timeout=_CONVERSION_TIMEOUT_S
        )
    except subprocess.TimeoutExpired as error:
        raise StartupError(f"Converting the tokenizer took more than {_CONVERSION_TIMEOUT_S} s.") from error
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise StartupError(
            "The model has no tokenizer.json, and converting its tokenizer failed. Install transformers and "
            f"sentencepiece (`pip install transformers sentencepiece`), or add a tokenizer.json. Reason: {reason}"
        ) from error
