"""Clients that must not live in our own environment: installed once by exact version, kept in the user's cache."""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

INSTALL_TIMEOUT_S = 900.0


def npm_packages(requirements: Sequence[str]) -> Path:
    """A directory whose `node_modules` holds the packages."""

    def install(directory: Path) -> None:
        (directory / "package.json").write_text('{"private": true, "type": "module"}')
        _run("npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", *requirements, cwd=directory)

    return _made_once("npm", requirements, install)


def python_environment(requirements: Sequence[str]) -> Path:
    """The interpreter of a virtual environment that holds the packages and nothing of ours."""

    def install(directory: Path) -> None:
        _run(sys.executable, "-m", "venv", str(directory / "venv"), cwd=directory)
        python = directory / "venv" / "bin" / "python"
        _run(
            str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *requirements, cwd=directory
        )

    return _made_once("python", requirements, install) / "venv" / "bin" / "python"


def _made_once(kind: str, requirements: Sequence[str], install: Callable[[Path], None]) -> Path:
    """The directory for exactly these requirements. Complete when it exists: a failed attempt leaves no marker."""
    key = hashlib.sha256("\n".join((kind, sys.version, *sorted(requirements))).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "weft-test-clients"
    directory = cache / f"{kind}-{key}"
    marker = directory / "complete"
    if not marker.is_file():
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        install(directory)
        marker.touch()
    return directory


def _run(*command: str, cwd: Path) -> None:
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S, check=False,
        env={**os.environ, "TMPDIR": tempfile.gettempdir()},
    )  # fmt: skip
    assert done.returncode == 0, f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
