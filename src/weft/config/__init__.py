"""Every setting, once.

    options.py          kinds of settings, and what a row of the table says
    settings.py         the table
    file.py             TOML and YAML
    resolve.py          flags, environment and file → Settings, all faults reported together
    contradictions.py   settings that do not go together
    store.py            Settings on their way to the children

Why a table of our own: docs/adr/0006-config-table.md.
"""

from weft.config.resolve import Resolution, resolve, resolve_with_origins, setting_named
from weft.config.settings import DEFAULT_MODEL, DEFAULT_MODEL_SAMPLING, GROUPS, Settings, default_of, options
from weft.config.store import load_settings, save_settings

__all__ = [
    "DEFAULT_MODEL",
    "DEFAULT_MODEL_SAMPLING",
    "GROUPS",
    "Resolution",
    "Settings",
    "default_of",
    "load_settings",
    "options",
    "resolve",
    "resolve_with_origins",
    "save_settings",
    "setting_named",
]
