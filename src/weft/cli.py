"""The command line: a table of commands, each a function that is imported when it is called.

`weft serve` and `text-generation-launcher` are one command. Nothing here, and nothing that `--help` needs, imports
torch, transformers or gRPC.
"""

import errno
import importlib
import io
import os
import sys
from collections.abc import Callable, Mapping, Sequence

from weft import __version__
from weft.errors import StartupError, UsageError

COMMANDS: Mapping[str, tuple[str, str]] = {
    "serve": ("weft.commands.serve:serve", "serve a model over HTTP"),
    "chat": ("weft.commands.chat:chat", "talk to a model in the terminal"),
    "bench": ("weft.commands.bench:bench", "measure a running server by number of streams"),
    "batch": ("weft.commands.batch:batch", "answer a file of requests in OpenAI's batch format"),
    "verify": ("weft.commands.verify:verify", "ask recorded requests again and compare every token"),
    "download": ("weft.commands.download:download", "fetch a model into the cache and print where it is"),
    "plan": ("weft.commands.plan:plan", "tell whether a model fits, from its headers alone"),
    "doctor": ("weft.commands.doctor:doctor", "check this machine, and its kernels against their references"),
    "config": ("weft.commands.config:config", "show every setting, its value and where the value comes from"),
    "router": ("weft.commands.process:router", "run the HTTP process alone, for a shard that runs"),
    "shard": ("weft.commands.process:shard", "run one model process alone, for a router to come"),
}
"""Name → where its function stands, and what it does."""

_USAGE = """\
usage: weft COMMAND [ARGUMENT …]

{commands}

weft COMMAND --help explains a command, weft --version prints the version."""


def main() -> int:
    """The command `weft`; returns the exit code."""
    return _guarded(_weft, sys.argv[1:])


def launcher_main() -> int:
    """TGI's `text-generation-launcher`: `weft serve`."""
    return _guarded(lambda argv: _run("serve", argv), sys.argv[1:])


def router_main() -> int:
    """TGI's `text-generation-router`: `weft router`."""
    return _guarded(lambda argv: _run("router", argv), sys.argv[1:])


def server_main() -> int:
    """TGI's `text-generation-server`: `serve` and `download-weights`."""
    return _guarded(_server, sys.argv[1:])


def benchmark_main() -> int:
    """TGI's `text-generation-benchmark`: `weft bench`."""
    return _guarded(lambda argv: _run("bench", argv), sys.argv[1:])


def _weft(argv: Sequence[str]) -> int:
    name = argv[0] if argv else "--help"
    if name in {"-h", "--help", "help"}:
        width = max(map(len, COMMANDS))
        lines = (f"  {command:{width}}  {text}" for command, (_, text) in COMMANDS.items())
        sys.stdout.write(_USAGE.format(commands="\n".join(lines)) + "\n")
        return 0
    if name in {"-V", "--version"}:
        return _print_version()
    if name not in COMMANDS:
        raise UsageError(f"weft: no command {name!r}. Commands: {', '.join(COMMANDS)}.")
    return _run(name, argv[1:])


_SERVER_USAGE = """\
usage: text-generation-server COMMAND [ARGUMENT …]

  serve MODEL             run one shard alone, for text-generation-router
  download-weights MODEL  fetch a model into the cache and print where it is

text-generation-server COMMAND --help explains a command."""


def _server(argv: Sequence[str]) -> int:
    names = {"serve": "shard", "download-weights": "download"}
    name = argv[0] if argv else "--help"
    if name in {"-h", "--help"}:
        sys.stdout.write(_SERVER_USAGE + "\n")
        return 0
    if name in {"-V", "--version"}:
        return _print_version()
    if name == "quantize":
        raise UsageError(
            "text-generation-server quantize: not supported yet; `weft serve --quantize int8` (or int4) rounds any "
            "checkpoint while it is loaded."
        )
    if name not in names:
        raise UsageError(f"text-generation-server: no command {name!r}. Commands: {', '.join(names)}.")
    return _run(names[name], argv[1:])


def _run(name: str, argv: Sequence[str]) -> int:
    if "--version" in argv or "-V" in argv:
        return _print_version()
    module, _, function = COMMANDS[name][0].partition(":")
    command: Callable[[Sequence[str], Mapping[str, str]], int] = getattr(importlib.import_module(module), function)
    return command(argv, os.environ)


def _print_version() -> int:
    sys.stdout.write(f"weft {__version__}\n")
    return 0


def _guarded(command: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    """Turn expected failures into a message and an exit code; anything else is a bug and shows its trace."""
    # What a user typed need not be in the terminal's encoding, nor even be text.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return _flushed(command(argv))
    except StartupError as error:
        sys.stderr.write(f"Error: {error.message}\n")
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of our output (`| head`) has left; nothing more may be written, not even at exit.
        _discard_output()
        return 0
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        _discard_output()
        sys.stderr.write("Error: there is no room left where the output goes, or in the temporary directory.\n")
        return 1


def _flushed(status: int) -> int:
    """`status`, once the output is where it belongs: later nobody could say that it is not."""
    sys.stdout.flush()
    return status


def _discard_output() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
