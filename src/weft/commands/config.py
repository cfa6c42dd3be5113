"""`weft config show`: every setting, its value and why it has that value."""

import sys
from collections.abc import Mapping, Sequence

from weft.config import resolve_with_origins
from weft.errors import UsageError


def config(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """Print name, value and origin of each setting, as `weft serve` with the same arguments would see them."""
    if not argv or argv[0] != "show":
        raise UsageError("usage: weft config show [MODEL] [--setting value …]")
    resolution = resolve_with_origins(argv[1:], environ)
    rows = [
        (name, _shown(value), resolution.origins[name])
        for name, value in resolution.settings.redacted().items()
        if name not in {"model_path", "model_sha"}
    ]
    name_width = max(len(name) for name, _, _ in rows)
    value_width = min(44, max(len(value) for _, value, _ in rows))
    for name, value, origin in rows:
        sys.stdout.write(f"{name:{name_width}}  {value:{value_width}}  {origin}\n")
    return 0


def _shown(value: object) -> str:
    if value is None or value == ():
        return "auto"
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)
