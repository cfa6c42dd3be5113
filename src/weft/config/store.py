"""Resolved settings on their way from the launcher to its children: a private file, never a command line."""

import dataclasses
import json
import os
from pathlib import Path

from weft.config.settings import Settings, options
from weft.errors import UsageError

SETTINGS_FILE = "settings.json"


def save_settings(run_dir: Path, settings: Settings) -> None:
    """Write resolved settings for the children, at once and readable by this user only."""
    unfinished = run_dir / (SETTINGS_FILE + ".new")
    unfinished.unlink(missing_ok=True)
    descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
        json.dump(dataclasses.asdict(settings), stream, indent=1)
    unfinished.replace(run_dir / SETTINGS_FILE)


def load_settings(run_dir: Path) -> Settings:
    """Read what `save_settings` wrote. Raises UsageError when there is no such file or another version wrote it."""
    try:
        stored = json.loads((run_dir / SETTINGS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"--run-dir: {run_dir} holds no readable {SETTINGS_FILE}; the launcher makes one.") from error
    if not isinstance(stored, dict) or stored.keys() != options().keys():
        raise UsageError(f"--run-dir: {SETTINGS_FILE} was written by another version of weft; restart the launcher.")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()}
    return Settings(**values)  # type: ignore[arg-type]  # keys were compared above, values are what we wrote
