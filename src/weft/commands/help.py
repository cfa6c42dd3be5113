"""Help texts, written from the table of settings."""

import textwrap
from collections.abc import Iterator

from weft.config import GROUPS, default_of, options
from weft.config.options import SWITCH, Option

_WIDTH = 100
_INDENT = 10

_HEAD = """\
usage: weft serve [MODEL] [--setting value …]     (also: text-generation-launcher)

Serve a model over HTTP. MODEL is a directory, a .gguf file, a hub id, or a package-registry
reference; without one, a small chat model is downloaded and served.
"""

_EXAMPLES = """
Examples
  weft serve
  weft serve HuggingFaceTB/SmolLM2-1.7B-Instruct --port 8080
  weft serve ./model.Q4_K_M.gguf --max-total-tokens 4096
"""


def common_settings() -> str:
    """The dozen settings that most people need."""
    rows = [row for name, option in options().items() if option.is_common for row in _row(name, option)]
    tail = "\nAll settings: weft serve --help-all. Current values and their origins: weft config show.\n"
    return "\n".join([_HEAD, *rows]) + "\n" + _EXAMPLES + tail


def all_settings() -> str:
    """Every setting, by group."""
    lines = [_HEAD]
    for group in GROUPS:
        lines.append(group)
        for name, option in options().items():
            if option.group == group and not option.is_internal:
                lines.extend(_row(name, option))
        lines.append("")
    lines.append("A flag beats the environment, which beats the file given with --config.")
    return "\n".join(lines) + "\n"


def _row(name: str, option: Option) -> Iterator[str]:
    head = ", ".join(part for part in (option.short, option.flag) if part) or f"${option.env[0]}"
    placeholder = "|".join(option.choices) if option.choices else option.kind.placeholder
    heading = f"  {head} {placeholder}".rstrip()
    yield heading if len(heading) <= _WIDTH else f"  {head} {option.kind.placeholder}"
    variable = "" if option.flag is None else f" (${name.upper() if option.is_tgi else option.env[0]})"
    support = " Not supported yet." if option.works is not None and len(option.works) == 1 else ""
    text = f"{option.help}.{support} Default: {shown_default(name, option)}.{variable}"
    yield textwrap.fill(text, _WIDTH, initial_indent=" " * _INDENT, subsequent_indent=" " * _INDENT)


def shown_default(name: str, option: Option) -> str:
    """The default as a person would write it."""
    default = default_of(name)
    if name == "model_id":
        return "SmolLM2-135M-Instruct"
    if default is None or default in {(), ""}:
        return option.auto or "none"
    if option.kind is SWITCH:
        return "on" if default else "off"
    if isinstance(default, tuple):
        return ",".join(map(str, default))
    if isinstance(default, bool):
        return str(default).lower()
    return (
        f"{default:g}{' ' + option.unit if option.unit else ''}"
        if isinstance(default, float)
        else (f"{default}{' ' + option.unit if option.unit and option.unit != 'bytes' else ''}")
    )
