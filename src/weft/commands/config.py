"""`weft config show`: every setting, its value, where the value comes from and why."""

import sys
from collections.abc import Iterator, Mapping, Sequence

from weft.config import Resolution, options, resolve_with_origins
from weft.errors import UsageError
from weft.launcher import layout

_USAGE = "usage: weft config show [MODEL] [--setting value …]"
_HELP = f"""\
{_USAGE}

Print every setting that `weft serve` with the same arguments, environment and --config file would have: its name,
its value, where the value comes from (a flag, $VARIABLE, a file, this machine, default) and why.

  weft config show --config weft.toml --max-total-tokens 4096
  PORT=8080 weft config show
"""

_LEFT_TO_THE_SYSTEM = {"master_port"}
"""Settled by the launcher, too, but to another value at each start."""


def config(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """Print name, value, origin and reason of each setting, as `weft serve` with the same arguments would see them.

    What else `weft serve` would say about them goes to standard error.
    """
    if "--help" in argv or "-h" in argv:
        sys.stdout.write(_HELP)
        return 0
    if not argv or argv[0] != "show":
        raise UsageError(_USAGE)
    resolution = resolve_with_origins(argv[1:], environ)
    rows = list(_rows(resolution, environ))
    widths = [min(44, max(len(row[column]) for row in rows)) for column in range(3)]
    for row in rows:
        cells = (f"{cell:{width}}" for cell, width in zip(row, widths, strict=False))
        sys.stdout.write("  ".join((*cells, row[3])).rstrip() + "\n")
    idle = layout.settings_without_effect(resolution.settings, environ)
    for text in (*resolution.notes, *resolution.warnings, *idle):
        sys.stderr.write(f"Note: {text}\n")
    return 0


def _rows(resolution: Resolution, environ: Mapping[str, str]) -> Iterator[tuple[str, str, str, str]]:
    """(name, value, where it comes from, why) of each setting."""
    settings = resolution.settings.redacted()
    settled = layout.settle(resolution.settings, environ).redacted()
    for name, option in options().items():
        if option.is_internal:
            continue
        value, origin = settings[name], resolution.origins[name]
        is_open = value in (None, ())
        if is_open and settled[name] != value and name not in _LEFT_TO_THE_SYSTEM:
            yield name, _shown(settled[name]), "this machine", option.auto
        elif is_open and option.auto:
            yield name, "auto", origin, option.auto
        else:
            beaten = resolution.beaten.get(name, ())
            yield name, _shown(value), origin, f"beats {', '.join(beaten)}" if beaten else ""


def _shown(value: object) -> str:
    if value in (None, ()):
        return "none"
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)
