"""`weft download MODEL`: fetch a model without serving it."""

import sys
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from weft.config import resolve
from weft.launcher import fetched
from weft.launcher.download import fetch

_USAGE = "usage: weft download [MODEL] [--revision R] [--cache-dir PATH] [--huggingface-hub-cache PATH] [--offline]\n"
_TGI_ONLY = {"--extension", "--logger-level"}
_TGI_ONLY_SWITCHES = {"--auto-convert", "--no-auto-convert", "--merge-lora"}


def download(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """Fetch a model, show progress on standard error, print its path on standard output."""
    if "--help" in argv or "-h" in argv:
        sys.stdout.write(_USAGE)
        return 0
    settings = resolve(list(_without_tgi_options(argv)), environ)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(settings.shown_model_name, total=100)

        def report(progress: fetched.Progress) -> None:
            bar.update(task, completed=progress.percent, description=progress.message)

        found = fetch(settings.model_id, settings, report)
    sys.stdout.write(f"{found.path}\n")
    return 0


def _without_tgi_options(argv: Sequence[str]) -> list[str]:
    """Leave out what only TGI's `download-weights` knows and what changes nothing here: safetensors, as they are."""
    kept: list[str] = []
    skips_next = False
    for word in argv:
        if skips_next:
            skips_next = False
        elif word in _TGI_ONLY:
            skips_next = True
        elif word not in _TGI_ONLY_SWITCHES and word.partition("=")[0] not in _TGI_ONLY:
            kept.append(word)
    return kept
