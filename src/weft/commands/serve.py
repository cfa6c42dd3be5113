"""`weft serve`, also known as `text-generation-launcher`."""

import sys
import time
from collections.abc import Mapping, Sequence

from weft.commands.help import all_settings, common_settings
from weft.config import resolve_with_origins


def serve(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """Start a server and stay until it ends; returns the exit code."""
    started = time.monotonic()
    if "--help-all" in argv:
        sys.stdout.write(all_settings())
        return 0
    if "--help" in argv or "-h" in argv:
        sys.stdout.write(common_settings())
        return 0
    resolution = resolve_with_origins(argv, environ)
    from weft.launcher.launcher import launch  # late: help and wrong settings are answered before asyncio is loaded

    return launch(resolution.settings, environ, started, notes=resolution.notes, warnings=resolution.warnings)
