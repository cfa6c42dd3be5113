"""What is started where: device, ranks, threads, ports, the private directory, the children's environments."""

import contextlib
import dataclasses
import errno
import fcntl
import os
import platform
import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

from weft import __version__
from weft.config import Settings, default_of, options
from weft.errors import PortInUseError, UsageError

_LOCK_FILE = "launcher.lock"


def settle(settings: Settings, environ: Mapping[str, str], *, num_gpus: int | None = None) -> Settings:
    """Choose what the user left open and the launcher must know: ranks, threads per rank, rendezvous port.

    `num_gpus` is the number of visible GPUs, counted here unless given. Raises UsageError when `--sharded true`
    finds fewer than two devices.
    """
    count = count_visible_gpus(environ) if num_gpus is None else num_gpus
    num_shard = _num_shard(settings, count)
    threads = settings.threads or max(1, len(os.sched_getaffinity(0)) // num_shard)
    return dataclasses.replace(
        settings, num_shard=num_shard, threads=threads, master_port=settings.master_port or _free_port()
    )


def settings_without_effect(settings: Settings, environ: Mapping[str, str]) -> Iterator[str]:
    """Settings that change nothing on the devices of this machine."""
    is_cpu = settings.device == "cpu" or (settings.device == "auto" and count_visible_gpus(environ) == 0)
    if is_cpu and settings.cuda_memory_fraction != default_of("cuda_memory_fraction"):
        yield "--cuda-memory-fraction has no effect: the model runs on the CPU, where --kv-pool-bytes bounds memory."


def _num_shard(settings: Settings, num_gpus: int) -> int:
    """Source: TGI 3.3.7 launcher, `find_num_shards`; CPUs are not counted, because one rank uses all cores."""
    if settings.sharded is False:
        return 1
    if settings.num_shard is not None:
        return settings.num_shard
    devices = num_gpus if settings.device == "cuda" else 1
    if settings.sharded and devices < 2:
        raise UsageError(
            f"--sharded true needs at least two devices and found {devices}; say how many with --num-shard."
        )
    return max(1, devices)


def count_visible_gpus(environ: Mapping[str, str], driver: Path = Path("/proc/driver/nvidia/gpus")) -> int:
    """GPUs this process may use. An empty list of visible devices means none, unlike in TGI."""
    for variable in ("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES"):
        visible = environ.get(variable)
        if visible is not None and visible not in {"all", "void"}:
            return len([name for name in visible.split(",") if name.strip() not in {"", "-1", "none"}])
    return len(list(driver.iterdir())) if driver.is_dir() else 0


def describe_machine(environ: Mapping[str, str]) -> dict[str, str | int]:
    """What a bug report needs (`--env`); versions are read without importing anything."""
    versions = {}
    for package in ("torch", "tokenizers", "grpcio", "safetensors"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {
        "weft": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": count_visible_gpus(environ),
        **versions,
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def check_port(hostname: str, port: int) -> None:
    """Raise PortInUseError unless the router will be able to listen there."""
    for family, kind, protocol, _, address in socket.getaddrinfo(
        hostname.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    ):
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(address)
                probe.listen(1)
            except OSError as error:
                raise PortInUseError(_port_fault(hostname, port, error)) from error


def _port_fault(hostname: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"--port: {port} is in use; stop what listens there or choose another port."
    if error.errno == errno.EACCES:
        return f"--port: {port} needs privileges that this user has not; choose a port of 1024 or more."
    return f"--hostname: cannot listen on {hostname}:{port}: {error.strerror}."


@contextmanager
def private_directory(settings: Settings) -> Iterator[Path]:
    """A directory for sockets and settings that only this user can enter, gone afterwards.

    A launcher that was killed leaves its directory behind; it is recognised by a lock that nobody holds and removed
    by the next launcher with the same prefix. Raises UsageError where nothing can be written.
    """
    prefix = Path(settings.shard_uds_path)
    for left_over in prefix.parent.glob(prefix.name + "-*"):
        _remove_if_abandoned(left_over)
    try:
        directory = Path(tempfile.mkdtemp(prefix=prefix.name + "-", dir=prefix.parent))
    except OSError as error:
        raise UsageError(
            f"--shard-uds-path: cannot make a directory in {str(prefix.parent)!r} ({error.strerror}); choose a prefix "
            "where this user may write."
        ) from error
    lock = os.open(directory / _LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        os.close(lock)


def _remove_if_abandoned(directory: Path) -> None:
    with contextlib.suppress(OSError):  # of another user, or being removed right now
        if directory.lstat().st_uid != os.getuid():  # lstat: others may put links into /tmp
            return
        lock = os.open(directory / _LOCK_FILE, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(directory, ignore_errors=True)
        finally:
            os.close(lock)


def child_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The launcher's environment without settings (children read the run directory) and without secrets."""
    settings_of_ours = {variable for option in options().values() for variable in option.env}
    kept = {name: value for name, value in environ.items() if name not in settings_of_ours}
    return {**kept, "PYTHONUNBUFFERED": "1"}


def shard_environment(settings: Settings, environ: Mapping[str, str]) -> dict[str, str]:
    """As `child_environment`, plus what native libraries read when they are loaded."""
    threads = str(settings.threads)
    return {
        **child_environment(environ),
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        # Two thread pools that spin would take the cores from each other.
        "OMP_WAIT_POLICY": "passive",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
    }
