"""`weft batch run`: a file of requests in OpenAI's batch format, answered through a server, resumable at any moment."""

import argparse
import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from weft.commands.arguments import CommandParser, integer
from weft.commands.batch_file import check_input, finished_ids, lines_of
from weft.commands.batch_run import BatchRun, Outcome
from weft.commands.endpoint import Endpoint, find_endpoint
from weft.commands.own_server import own_server
from weft.errors import UsageError

_EPILOG = """\
Each line of FILE is {"custom_id": …, "method": "POST", "url": "/v1/chat/completions", "body": {…}}; the urls are
/v1/chat/completions, /v1/completions, /v1/responses and /v1/embeddings. Answers are appended to OUT as they come,
failures to its neighbour OUT.errors.jsonl. Run the same command again to go on: what OUT has is not asked again,
failures are.

Without --url a server runs as long as the batch does; it serves --model under every name that the file uses. The API
key is read from WEFT_API_KEY (with --url also from OPENAI_API_KEY).
"""


def batch(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """Run a batch; 0 when every request has its answer, 1 when some failed, 130 when interrupted."""
    arguments = _parse(argv)
    source = Path(arguments.file)
    output = Path(arguments.output) if arguments.output else source.with_suffix(".out.jsonl")
    errors = output.with_suffix(".errors.jsonl")
    console = Console(stderr=True)
    checked = check_input(source)
    num_requests = len(checked.custom_ids)
    with ExitStack() as stack:
        answers = stack.enter_context(lines_of(output))
        done = finished_ids(answers)
        num_done = sum(custom_id in done for custom_id in checked.custom_ids)
        if num_done == num_requests:
            console.print(f"All {num_requests:,} requests have their answer in {escape(str(output))}.", highlight=False)
            return 0
        failures = stack.enter_context(lines_of(errors, keeps_content=False))
        stack.callback(_remove_empty, output, errors)  # while both are locked: an empty file may be another run's
        endpoint = _endpoint(arguments, environ, stack, console)
        run = BatchRun(endpoint, checked, done, answers, failures, concurrency=arguments.concurrency)
        try:
            is_complete = _run(run, num_requests, num_done, console)
        finally:
            _report(run, num_requests - num_done, output, errors, console)
    if not is_complete:
        return 130
    return 1 if run.num_failed else 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    if not argv or argv[0] not in {"run", "-h", "--help"}:
        raise UsageError("usage: weft batch run FILE.jsonl [-o OUT.jsonl] [--url URL | --model MODEL]")
    parser = CommandParser("weft batch run", "Answer a file of requests in OpenAI's batch format.", _EPILOG)
    parser.add_argument("file", metavar="FILE.jsonl", help="one request per line")
    parser.add_argument("-o", "--output", metavar="OUT.jsonl", help="answers; default: FILE.out.jsonl")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--url", help="server to ask")
    where.add_argument("--model", metavar="MODEL", help="model to serve for the batch; default: that of `weft serve`")
    parser.add_argument(
        "--concurrency", type=integer(1, 4096), default=32, metavar="N", help="requests in flight at once; default: 32"
    )
    return parser.parse_args(argv[1:] if argv[0] == "run" else argv)


def _endpoint(
    arguments: argparse.Namespace, environ: Mapping[str, str], stack: ExitStack, console: Console
) -> Endpoint:
    if arguments.url is not None:
        return find_endpoint(arguments.url, environ)
    flags = ("--any-model-name", "--max-concurrent-requests", str(max(128, arguments.concurrency)))
    with console.status("starting the server") as status:
        return stack.enter_context(
            own_server(arguments.model, flags, environ, lambda text: status.update(escape(text)))
        )


def _run(run: BatchRun, num_requests: int, num_done: int, console: Console) -> bool:
    """Drive the run under a progress bar. False: interrupted."""
    counts = (MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    columns = (TextColumn("{task.description}"), BarColumn(), *counts)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("requests", total=num_requests, completed=num_done)

        def show(outcome: Outcome) -> None:
            bar.advance(task)
            if not outcome.is_answer:
                bar.update(task, description=f"requests, {run.num_failed:,} failed")

        try:
            asyncio.run(run.run(show))
        except KeyboardInterrupt:
            return False
    return True


def _remove_empty(*files: Path) -> None:
    """Files that were made only to see whether they could be."""
    for file in files:
        with contextlib.suppress(OSError):
            if file.stat().st_size == 0:
                file.unlink()


def _report(run: BatchRun, num_asked: int, output: Path, errors: Path, console: Console) -> None:
    tokens = f", {run.completion_tokens:,} tokens generated" if run.completion_tokens else ""
    console.print(f"{run.num_answered:,} answered{tokens}: {escape(str(output))}", highlight=False)
    if run.num_failed:
        console.print(f"{run.num_failed:,} failed: {escape(str(errors))}", highlight=False)
    else:
        errors.unlink(missing_ok=True)
    num_left = num_asked - run.num_answered
    if num_left:
        console.print(f"{num_left:,} have no answer yet; the same command goes on with them.", highlight=False)
