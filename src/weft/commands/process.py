"""`weft router` and `weft shard`: one process of a server, for people who debug it.

Both work on the run directory that a launcher has made (`--run-dir`); the launcher starts them by the same modules.
"""

import importlib
import sys
from collections.abc import Mapping, Sequence

from weft import __version__
from weft.errors import UsageError


def router(argv: Sequence[str], _environ: Mapping[str, str]) -> int:
    """Run `weft.router.main`; `print-schema` writes the OpenAPI document, as TGI's router does."""
    if list(argv) == ["print-schema"]:
        document = importlib.import_module("weft.router.openapi").build_document(
            importlib.import_module("weft.router.app").ROUTES, __version__
        )
        sys.stdout.write(document.decode() + "\n")
        return 0
    return _run("weft.router.main", argv, "text-generation-launcher starts the router")


def shard(argv: Sequence[str], _environ: Mapping[str, str]) -> int:
    """Run `weft.server.main`."""
    return _run("weft.server.main", argv, "text-generation-launcher starts the shards")


def _run(module: str, argv: Sequence[str], hint: str) -> int:
    if not {"--run-dir", "--help", "-h"}.intersection(word.partition("=")[0] for word in argv):
        raise UsageError(f"{hint}; to start one alone, give it the --run-dir of a running launcher.")
    sys.argv = [module, *argv]
    status: int = importlib.import_module(module).main()
    return status
