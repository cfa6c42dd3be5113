"""`weft download MODEL`: fetch a model without serving it."""

import sys
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from weft.commands.arguments import renamed, take_flag
from weft.config import resolve
from weft.errors import UsageError
from weft.launcher import fetched
from weft.launcher.download import fetch

_USAGE = "usage: weft download [MODEL] [--revision R] [--cache-dir PATH] [--huggingface-hub-cache PATH] [--offline]\n"
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
    """Leave out what only TGI's `download-weights` knows. Raises UsageError for other files than safetensors."""
    words, extension = take_flag(renamed(argv, {"--logger-level": "--log-level"}), "--extension", "an ending of names")
    if extension not in {None, ".safetensors"}:
        raise UsageError(
            f"--extension: {extension!r} is not supported; leave it out. Only .safetensors and .gguf files are read, "
            "because opening a pickle runs its code."
        )
    return [word for word in words if word not in _TGI_ONLY_SWITCHES]
