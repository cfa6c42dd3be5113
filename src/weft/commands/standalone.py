"""A router or a shard without a launcher, as TGI's `text-generation-router` and `text-generation-server serve` are.

Each gets a private run directory of its own, as a launcher would make it. Between them stands one name: the shard's
socket, `<--uds-path>-0`, a link into the shard's private directory.
"""

import contextlib
import dataclasses
import importlib
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from weft.commands.arguments import renamed, take_flag
from weft.config import Settings, resolve, save_settings
from weft.errors import ModelNotFoundError, PortInUseError, UsageError
from weft.launcher import layout
from weft.launcher.download import fetch
from weft.launcher.fetched import fault_of_model

_SOCKET = "--master-shard-uds-path"
_READY = b'{"state": "ready", "phase": "ready", "percent": 100}\n'
_ROUTER_NAMES = {"--tokenizer-name": "--model-id"}
_SERVER_NAMES = {"--uds-path": "--shard-uds-path", "--logger-level": "--log-level"}


def run_router(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """Serve HTTP for shards that run already. Raises UsageError when none answers."""
    words, target = take_flag(renamed(argv, _ROUTER_NAMES), _SOCKET, "the path of a shard's socket")
    settings = resolve(words, environ)
    shard_socket = Path(target or settings.shard_uds_path + "-0").absolute()
    if not is_answered(shard_socket):
        raise UsageError(
            f"{_SOCKET}: no shard answers at {str(shard_socket)!r}; start one with `text-generation-server serve MODEL "
            "--uds-path PREFIX` (its socket is PREFIX-0), or start everything with text-generation-launcher."
        )
    with _run_directory(settings) as run_dir:
        (run_dir / "shard-0.sock").symlink_to(shard_socket)
        _say_ready()
        status: int = importlib.import_module("weft.router.main").main(["--run-dir", str(run_dir)], is_alone=True)
        return status


def run_shard(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """Load a model and serve it on a socket. One rank: several need a launcher between them."""
    words = [word for word in renamed(argv, _SERVER_NAMES) if word != "--no-sharded"]
    settings = resolve(_without_sharded(words), environ)
    if (settings.num_shard or 1) > 1:
        raise UsageError("--num-shard: several ranks find each other through text-generation-launcher; start that.")
    settings = layout.settle(dataclasses.replace(settings, num_shard=1), environ)
    with _run_directory(settings) as run_dir, _public_name(settings, run_dir):
        # Read by native libraries when they are loaded, which happens below.
        os.environ.update(layout.shard_environment(settings, environ))
        arguments = ["--run-dir", str(run_dir), "--rank", "0", "--world-size", "1"]
        try:
            status: int = importlib.import_module("weft.server.main").main(arguments, is_alone=True)
        except ModelNotFoundError as error:
            raise ModelNotFoundError(fault_of_model(settings.model_id, error.message)) from error
        return status


def is_answered(path: Path) -> bool:
    """Whether somebody listens on a Unix socket."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except OSError:
            return False
        return True


def _without_sharded(words: Sequence[str]) -> list[str]:
    """TGI's `--sharded` is a switch here, and means that other ranks are coming."""
    if "--sharded" in words:
        raise UsageError("--sharded: several ranks find each other through text-generation-launcher; start that.")
    return list(words)


@contextmanager
def _run_directory(settings: Settings) -> Iterator[Path]:
    """A private directory with the settings of one process, whose model is on this machine."""
    model = fetch(settings.model_id, settings)
    with layout.private_directory(settings) as run_dir:
        save_settings(run_dir, dataclasses.replace(settings, model_path=str(model.path), model_sha=model.sha))
        yield run_dir


@contextmanager
def _public_name(settings: Settings, run_dir: Path) -> Iterator[None]:
    """The name by which a router finds the socket in the private directory. Raises PortInUseError."""
    name = Path(settings.shard_uds_path + "-0")
    if is_answered(name):
        raise PortInUseError(f"--uds-path: a shard answers at {str(name)!r} already; stop it or choose another prefix.")
    try:
        name.unlink(missing_ok=True)  # of a shard that was killed
        name.symlink_to((run_dir / "shard-0.sock").absolute())
    except OSError as error:
        raise PortInUseError(f"--uds-path: cannot make {str(name)!r}: {error.strerror}.") from error
    try:
        yield
    finally:
        with contextlib.suppress(FileNotFoundError):
            name.unlink()


def _say_ready() -> None:
    """Standard input says what a launcher would say, the shards are ready, and stays open until the process ends."""
    reader, writer = os.pipe()
    os.write(writer, _READY)
    os.dup2(reader, 0)
    os.close(reader)
