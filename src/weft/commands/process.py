"""`weft router` and `weft shard`: one process of a server, alone.

With `--run-dir` they join a running launcher, which starts them by the same modules; without it they are TGI's
`text-generation-router` and `text-generation-server serve`.
"""

import importlib
import sys
from collections.abc import Mapping, Sequence

from weft import __version__
from weft.commands import standalone


def router(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """Run the router; `print-schema` writes the OpenAPI document, as TGI's does."""
    if list(argv) == ["print-schema"]:
        document = importlib.import_module("weft.router.openapi").build_document(
            importlib.import_module("weft.router.app").ROUTES, __version__
        )
        sys.stdout.write(document.decode() + "\n")
        return 0
    if _is_for_module(argv):
        return _run("weft.router.main", argv)
    return standalone.run_router(argv, environ)


def shard(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """Run one shard."""
    if _is_for_module(argv):
        return _run("weft.server.main", argv)
    return standalone.run_shard(argv, environ)


def _is_for_module(argv: Sequence[str]) -> bool:
    return bool({"--run-dir", "--help", "-h"}.intersection(word.partition("=")[0] for word in argv))


def _run(module: str, argv: Sequence[str]) -> int:
    sys.argv = [module, *argv]
    status: int = importlib.import_module(module).main()
    return status
