"""Models from the Hugging Face hub, or from a server that speaks like it (`HF_ENDPOINT`).

huggingface_hub does the transfers: its cache is shared with other programs, resumes by byte ranges and locks its
files. Two things are added because incomplete and altered files have been reported as complete by it (hub issues
3007 and 3643): the list of files is fixed by one commit before the first byte, and each new file is hashed and
compared with what that commit says before anybody may use it.
"""

import contextlib
import errno
import hashlib
import json
import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from huggingface_hub import constants as hub_constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import hf_hub_download
from huggingface_hub.hf_api import HfApi, RepoSibling

from weft.config import Settings
from weft.errors import DoesNotFitError, ModelNotFoundError
from weft.launcher.fetched import FetchedModel, Progress, Report, check_space

_NUM_ATTEMPTS = 5
_MAX_RETRY_AFTER_S = 120.0
_NUM_PARALLEL_FILES = 4
_CHUNK_BYTES = 2**20

# What a model server reads. Pickles are never fetched: they run code when opened.
_SIDE_FILES = re.compile(r".*\.json|.*\.jinja|tokenizer\.model|.*\.tiktoken|merges\.txt|vocab\.txt")
_WEIGHT_FILES = re.compile(r"[^/]*\.safetensors")
# Training state and the second copy that some organisations keep for their own loader.
_OTHER_WEIGHTS = re.compile(r".*(arguments|args|training).*|consolidated.*")
_INDEX_FILE = "model.safetensors.index.json"

# The HTTP library below the hub client has changed with its versions; its root error stands behind the client's own.
_TRANSFER_ERRORS: tuple[type[Exception], ...] = (OSError, RuntimeError, HfHubHTTPError.__bases__[0])

_UNWRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR}
_NETWORK_REMEDY = "Check network, proxy and HF_ENDPOINT, or serve files that are on this machine."

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of a commit."""

    name: str
    size: int
    etag: str
    """sha256 for large files, git's blob hash for small ones; the file's name in the cache."""


def fetch_from_hub(
    repository: str,
    file_name: str | None,
    settings: Settings,
    report: Report,
    *,
    sleep: Callable[[float], None] = time.sleep,
) -> FetchedModel:
    """Download what serving `repository` (or its one file `file_name`) needs. Raises as `download.fetch`."""
    retry = _Retry(sleep, report)
    cache = Path(settings.huggingface_hub_cache or hub_constants.HF_HUB_CACHE)
    hub = _Hub(repository, settings, cache)
    if settings.offline:
        return _find_in_cache(hub, file_name)
    with _hub_errors_explained(repository, settings.revision, cache):
        commit, files = retry(hub.list_files)
        wanted = _choose(files, file_name, lambda: retry(lambda: hub.read_index(commit)))
        _check_space(hub, wanted)
        with _progress_reported(hub, wanted, report):
            _fetch_all(hub, commit, wanted, retry)
    hub.remember(commit)
    report(Progress(100, f"{repository} is complete"))
    snapshot = hub.folder / "snapshots" / commit
    return FetchedModel(snapshot / file_name if file_name else snapshot, commit)


class _Hub:
    """One repository at one endpoint, with one cache."""

    def __init__(self, repository: str, settings: Settings, cache: Path) -> None:
        self.repository = repository
        self.revision = settings.revision or "main"
        self._settings = settings
        self.cache = cache
        self.folder = cache / ("models--" + repository.replace("/", "--"))

    def list_files(self) -> tuple[str, list[HubFile]]:
        """Commit that the revision names now, and its files."""
        api = HfApi(endpoint=self._settings.hub_endpoint, token=self._settings.hub_token)
        info = api.model_info(self.repository, revision=self.revision, files_metadata=True, timeout=20)
        if info.sha is None:
            raise ModelNotFoundError(f"The hub names no commit for {self.repository}.")
        return info.sha, [_hub_file(sibling) for sibling in info.siblings or []]

    def read_index(self, commit: str) -> str:
        """Text of the file that says which weight files belong to the model."""
        return self.fetch_file(_INDEX_FILE, commit).read_text(encoding="utf-8")

    def fetch_file(self, name: str, commit: str, *, force: bool = False) -> Path:
        """Download one file, or go on with a download that was cut short."""
        return Path(
            hf_hub_download(
                self.repository,
                name,
                revision=commit,
                cache_dir=self.cache,
                endpoint=self._settings.hub_endpoint,
                token=self._settings.hub_token,
                force_download=force,
            )
        )

    def remember(self, commit: str) -> None:
        """Note what the revision meant, for starts without network. Only a complete download is worth it."""
        reference = self.folder / "refs" / self.revision
        if self.revision != commit:
            reference.parent.mkdir(parents=True, exist_ok=True)
            reference.write_text(commit)

    def blob(self, file: HubFile) -> Path:
        """Where the cache keeps the bytes of a file."""
        return self.folder / "blobs" / file.etag

    def seal(self, file: HubFile) -> Path:
        """A note that the bytes of this file were hashed, and when."""
        return Path(self._settings.cache_dir) / "hashed" / self.folder.name / file.etag


def _hub_file(sibling: RepoSibling) -> HubFile:
    if sibling.lfs is not None:
        return HubFile(sibling.rfilename, sibling.lfs.size, sibling.lfs.sha256)
    return HubFile(sibling.rfilename, sibling.size or 0, sibling.blob_id or "")


def _choose(files: Sequence[HubFile], file_name: str | None, read_index: Callable[[], str]) -> list[HubFile]:
    """The files that serving needs. Raises ModelNotFoundError when the repository has no usable weights."""
    names = {file.name for file in files}
    if file_name is not None:
        if file_name not in names:
            raise ModelNotFoundError(f"The repository has no file {file_name!r}.{_gguf_hint(names)}")
        return [file for file in files if file.name == file_name]
    weights = {name for name in names if _WEIGHT_FILES.fullmatch(name) and not _OTHER_WEIGHTS.fullmatch(name)}
    if _INDEX_FILE in names:
        weights = _listed_weights(read_index(), names)
    if not weights:
        raise ModelNotFoundError(
            f"The repository has no safetensors weights; pickle files are never loaded.{_gguf_hint(names)}"
        )
    if "config.json" not in names:
        raise ModelNotFoundError(f"The repository has no config.json.{_gguf_hint(names)}")
    return [file for file in files if file.name in weights or _SIDE_FILES.fullmatch(file.name)]


def _listed_weights(index: str, names: set[str]) -> set[str]:
    try:
        listed = set(json.loads(index)["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelNotFoundError(f"{_INDEX_FILE} of the repository is damaged: {type(error).__name__}.") from error
    missing = sorted(map(str, listed - names))
    if missing:
        raise ModelNotFoundError(f"{_INDEX_FILE} names files that the repository lacks: {', '.join(missing[:5])}.")
    return listed


def _gguf_hint(names: set[str]) -> str:
    found = sorted(name for name in names if name.endswith(".gguf"))
    return f" Its GGUF files, to be given as ID/FILE.gguf: {', '.join(found[:12])}." if found else ""


def _check_space(hub: _Hub, files: Sequence[HubFile]) -> None:
    hub.cache.mkdir(parents=True, exist_ok=True)
    check_space(hub.cache, sum(max(0, file.size - _present_bytes(hub, file)) for file in files))


def _present_bytes(hub: _Hub, file: HubFile) -> int:
    """Bytes of a file that are on this disk already, finished or not."""
    sizes = [0]
    for path in hub.blob(file).parent.glob(file.etag + "*"):
        with contextlib.suppress(OSError):
            sizes.append(path.stat().st_size)
    return min(file.size, max(sizes))


@contextmanager
def _progress_reported(hub: _Hub, files: Sequence[HubFile], report: Report) -> Iterator[None]:
    """Report once a second how many bytes are here: true for every way of transfer, resumed ones included."""
    total = sum(file.size for file in files) or 1
    is_done = threading.Event()

    def watch() -> None:
        while not is_done.wait(1.0):
            present = sum(_present_bytes(hub, file) for file in files)
            report(Progress(round(100 * present / total, 1), f"{present / 1e9:.2f} of {total / 1e9:.2f} GB"))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        is_done.set()
        watcher.join()


def _fetch_all(hub: _Hub, commit: str, files: Sequence[HubFile], retry: "_Retry") -> None:
    """Download all files, a few at a time; the first failure ends it."""
    with ThreadPoolExecutor(max_workers=_NUM_PARALLEL_FILES) as pool:
        pending = [pool.submit(_fetch_checked, hub, commit, file, retry) for file in files]
        try:
            for future in pending:
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _fetch_checked(hub: _Hub, commit: str, file: HubFile, retry: "_Retry") -> None:
    """Download a file and compare its hash; wrong bytes are thrown away and asked for once more."""
    for is_last in (False, True):
        path = retry(lambda: hub.fetch_file(file.name, commit, force=is_last))  # noqa: B023 (called before the next turn)
        if _is_sealed(hub, file, path):
            return
        found = _digest(path, file.etag)
        if found == file.etag:
            _seal(hub, file, path)
            return
        path.resolve().unlink(missing_ok=True)
        path.unlink(missing_ok=True)
    raise ModelNotFoundError(
        f"The hub sent wrong bytes for {file.name}: their hash is {found}, its commit says {file.etag}. "
        "They were thrown away."
    )


def _digest(path: Path, etag: str) -> str:
    """The hash of a file in the form of `etag`: sha256, or git's blob hash."""
    # SHA-1 is git's choice; large files, where forging pays, have sha256.
    digest = hashlib.sha256() if len(etag) == 64 else hashlib.sha1(b"blob %d\0" % path.stat().st_size)  # noqa: S324
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _stamp(path: Path) -> str:
    status = path.stat()
    return f"{status.st_size} {status.st_mtime_ns}"


def _is_sealed(hub: _Hub, file: HubFile, path: Path) -> bool:
    try:
        return hub.seal(file).read_text() == _stamp(path)
    except OSError:
        return False


def _seal(hub: _Hub, file: HubFile, path: Path) -> None:
    seal = hub.seal(file)
    seal.parent.mkdir(parents=True, exist_ok=True)
    seal.write_text(_stamp(path))


def _find_in_cache(hub: _Hub, file_name: str | None) -> FetchedModel:
    """What earlier downloads left. Raises ModelNotFoundError unless it is complete."""
    reference = hub.folder / "refs" / hub.revision
    commit = reference.read_text().strip() if reference.is_file() else hub.revision
    snapshot = hub.folder / "snapshots" / commit
    names = {str(path.relative_to(snapshot)) for path in snapshot.rglob("*") if path.is_file()}
    files = [HubFile(name, 0, "") for name in sorted(names)]
    try:
        _choose(files, file_name, lambda: (snapshot / _INDEX_FILE).read_text(encoding="utf-8"))
    except ModelNotFoundError as error:
        raise ModelNotFoundError(
            f"{hub.repository} ({hub.revision}) is not complete in the cache and --offline forbids to download it."
        ) from error
    return FetchedModel(snapshot / file_name if file_name else snapshot, commit)


class _Retry:
    """Calls again what failed for a reason that may pass: network, 5xx, 429. Waits double and jitter."""

    def __init__(self, sleep: Callable[[float], None], report: Report) -> None:
        self._sleep = sleep
        self._report = report

    def __call__(self, work: Callable[[], _T]) -> _T:
        """The result of `work`, or its last error."""
        for attempt in range(_NUM_ATTEMPTS - 1):
            try:
                return work()
            except _TRANSFER_ERRORS as error:
                wait_s = _wait_before_retry(error, attempt)
                if wait_s is None:
                    raise
                self._report(Progress(0, f"{_cause(error)}; trying again in {wait_s:.0f} s"))
                self._sleep(wait_s)
        return work()


def _wait_before_retry(error: Exception, attempt: int) -> float | None:
    """Seconds to wait; None when trying again is of no use."""
    backoff_s = 2.0**attempt * random.uniform(0.5, 1.5)  # noqa: S311 (jitter)
    if isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS}:
        return None
    response = _http_error(error)
    if response is None:
        # The hub client's word for "no answer and nothing cached"; a missing file is an HTTP error.
        return backoff_s
    if response.response.status_code == 429:
        retry_after = str(response.response.headers.get("Retry-After", ""))
        asked_s = float(retry_after) if retry_after.isdigit() else backoff_s
        return asked_s if asked_s <= _MAX_RETRY_AFTER_S else None
    return backoff_s if response.response.status_code >= 500 or response.response.status_code == 408 else None


def _http_error(error: BaseException | None) -> HfHubHTTPError | None:
    """The HTTP answer that an error, or the error it came from, stands for."""
    while error is not None:
        if isinstance(error, HfHubHTTPError) and getattr(error, "response", None) is not None:
            return error
        error = error.__cause__
    return None


def _cause(error: Exception) -> str:
    answer = _http_error(error)
    return f"the hub answered {answer.response.status_code}" if answer else f"no connection ({type(error).__name__})"


@contextmanager
def _hub_errors_explained(repository: str, revision: str | None, cache: Path) -> Iterator[None]:
    """Turn the hub client's errors into ours, with the remedy."""
    try:
        yield
    except GatedRepoError as error:
        raise ModelNotFoundError(
            f"{repository} is gated: accept its terms on the hub and set HF_TOKEN to a token of that account."
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelNotFoundError(
            f"The hub knows no model {repository!r}, or it is private: check the name, or set HF_TOKEN."
        ) from error
    except RevisionNotFoundError as error:
        raise ModelNotFoundError(f"--revision: {repository} has no revision {revision!r}.") from error
    except LocalEntryNotFoundError as error:
        raise ModelNotFoundError(f"{repository} could not be downloaded: {_cause(error)}. {_NETWORK_REMEDY}") from error
    except EntryNotFoundError as error:
        raise ModelNotFoundError(f"A file of {repository} is missing on the hub.") from error
    except HfHubHTTPError as error:
        raise ModelNotFoundError(f"{repository} could not be downloaded: {_cause(error)}.") from error
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise DoesNotFitError(
                "The disk became full during the download; what is there is kept. Make room and start again, "
                "or choose another disk with --huggingface-hub-cache."
            ) from error
        if error.errno in _UNWRITABLE:
            raise ModelNotFoundError(
                f"--huggingface-hub-cache: cannot write to {str(cache)!r} ({error.strerror}). Choose another directory."
            ) from error
        raise ModelNotFoundError(f"{repository} could not be downloaded: {error}") from error
    except _TRANSFER_ERRORS as error:
        raise ModelNotFoundError(f"{repository} could not be downloaded: {_cause(error)}. {_NETWORK_REMEDY}") from error
