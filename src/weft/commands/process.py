"""`weft router` and `weft shard`: one process of a server, alone.

With `--run-dir` they join a running launcher, which starts them by the same modules; without it they are TGI's
`text-generation-router` and `text-generation-server serve`.
"""

import importlib
import sys
from collections.abc import Mapping, Sequence

from weft import __version__
from weft.commands import standalone

_ROUTER_HELP = """\
usage: weft router [--setting value …]     (also: text-generation-router)

Serve HTTP for a shard that runs already. Settings are those of `weft serve` (weft serve --help-all), and:

  --master-shard-uds-path PATH  the shard's socket. Default: /tmp/text-generation-server-0
  --tokenizer-name MODEL        the model that the shard serves: its tokenizer and templates are read (--model-id)

weft router print-schema writes the OpenAPI document.
"""
_SHARD_HELP = """\
usage: weft shard MODEL [--setting value …]     (also: text-generation-server serve)

Load a model and serve it to a router on a socket. Settings are those of `weft serve` (weft serve --help-all), and:

  --uds-path PREFIX     the socket is PREFIX-0. Default: /tmp/text-generation-server
  --logger-level LEVEL  as --log-level

Several ranks find each other through `weft serve --num-shard N`.
"""


def router(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """Run the router; `print-schema` writes the OpenAPI document, as TGI's does."""
    if list(argv) == ["print-schema"]:
        document = importlib.import_module("weft.router.openapi").build_document(
            importlib.import_module("weft.router.app").ROUTES, __version__
        )
        sys.stdout.write(document.decode() + "\n")
        return 0
    if _asks_for_help(argv):
        sys.stdout.write(_ROUTER_HELP)
        return 0
    if _is_for_module(argv):
        return _run("weft.router.main", argv)
    return standalone.run_router(argv, environ)


def shard(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """Run one shard."""
    if _asks_for_help(argv):
        sys.stdout.write(_SHARD_HELP)
        return 0
    if _is_for_module(argv):
        return _run("weft.server.main", argv)
    return standalone.run_shard(argv, environ)


def _is_for_module(argv: Sequence[str]) -> bool:
    return "--run-dir" in (word.partition("=")[0] for word in argv)


def _asks_for_help(argv: Sequence[str]) -> bool:
    return "--help" in argv or "-h" in argv


def _run(module: str, argv: Sequence[str]) -> int:
    sys.argv = [module, *argv]
    status: int = importlib.import_module(module).main()
    return status
