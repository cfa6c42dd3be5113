"""`weft verify`: ask recorded requests again and name the first token that is not the one recorded."""

import argparse
import asyncio
import contextlib
import random
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import httpx2
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from weft.commands.arguments import CommandParser, integer
from weft.commands.endpoint import Endpoint, EndpointError, find_endpoint, refusal_text
from weft.commands.own_server import own_server
from weft.commands.recorded_requests import RecordedRequests, Recording, open_recording
from weft.commands.verify_run import Difference, Token, VerifyRun, differing_parts
from weft.errors import StartupError, UsageError

_EPILOG = """\
A server writes a recording with `weft serve --record FILE`: token ids, parameters with the seed, and every bit of the
log-probabilities. Requests are sent again, many at once and with --shuffle in another order, because neither may change
a token. The exit code is 0 when all are the same, 1 when one is not.

Without --url a server runs as long as this takes, with the model and the numeric flags that the recording names; flags
behind `--` are added, for example: weft verify FILE -- --threads 1 --max-batch-prefill-tokens 64

The API key is read from WEFT_API_KEY (with --url also from OPENAI_API_KEY).
"""
_MAX_SHOWN = 20


class OtherServerError(StartupError):
    """The server has other weights, another numeric configuration or other kernels than the one that recorded."""

    code = "other_server"


def verify(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """Replay recordings; 0 when every token and every bit is the same, 1 when not, 130 when interrupted."""
    words, flags = _split(argv)
    arguments = _parse(words, flags)
    console = Console(stderr=True)
    with ExitStack() as stack:
        recording = open_recording(arguments.files, stack)
        endpoint = _endpoint(arguments, flags, recording, environ, stack, console)
        fingerprint = served_fingerprint(endpoint)
        comparable = _comparable(recording.requests, fingerprint, console, is_any=arguments.any_fingerprint)
        lines = comparable.first(arguments.limit)
        seed = random.getrandbits(32) if arguments.seed is None else arguments.seed
        is_shuffled = arguments.shuffle or arguments.seed is not None
        if is_shuffled:
            console.print(f"order: --seed {seed}", highlight=False)
        run = VerifyRun(endpoint, lines, concurrency=arguments.concurrency, shuffle_seed=seed if is_shuffled else None)
        differences: list[Difference] = []
        try:
            _run(run, len(lines), differences, console)
        except KeyboardInterrupt:
            return 130
        for difference in differences:
            sys.stdout.write(_explained(difference, endpoint) + "\n")
    return _report(run, fingerprint)


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    words = list(argv)
    place = words.index("--") if "--" in words else len(words)
    return words[:place], words[place + 1 :]


def _parse(words: Sequence[str], flags: Sequence[str]) -> argparse.Namespace:
    parser = CommandParser("weft verify", "Ask recorded requests again and compare every token.", _EPILOG)
    parser.add_argument("files", metavar="RECORDING", nargs="+", help="files that --record wrote, oldest first")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--url", help="server to ask")
    where.add_argument("--model", metavar="MODEL", help="model to serve instead of the recorded one")
    parser.add_argument(
        "--concurrency", type=integer(1, 4096), default=32, metavar="N", help="requests in flight at once; default: 32"
    )
    parser.add_argument("--shuffle", action="store_true", help="ask in another order, so that neighbours are others")
    parser.add_argument("--seed", type=integer(0, 2**32 - 1), metavar="N", help="shuffle in this very order")
    parser.add_argument("--limit", type=integer(1, 10**9), metavar="N", help="ask the first N requests only")
    parser.add_argument(
        "--any-fingerprint", action="store_true", help="compare although the server is another one, and warn"
    )
    arguments = parser.parse_args(words)
    if flags and arguments.url is not None:
        raise UsageError("weft verify: flags behind `--` are for a server of its own. Leave out --url, or the flags.")
    return arguments


def _endpoint(
    arguments: argparse.Namespace,
    flags: Sequence[str],
    recording: Recording,
    environ: Mapping[str, str],
    stack: ExitStack,
    console: Console,
) -> Endpoint:
    if arguments.url is not None:
        return find_endpoint(arguments.url, environ)
    if not recording.servers:
        raise UsageError("weft verify: the recording does not say which server wrote it. Name one with --url.")
    server = recording.servers[-1]
    places = ("--max-concurrent-requests", str(max(128, arguments.concurrency)))
    own_flags = with_flags([*server.flags, *places], flags)
    with console.status("starting the server") as status:
        return stack.enter_context(
            own_server(arguments.model or server.model, own_flags, environ, lambda text: status.update(escape(text)))
        )


def with_flags(recorded: Sequence[str], own: Sequence[str]) -> list[str]:
    """Pairs of flag and value, without those that the user's flags replace, and the user's."""
    given = {word.partition("=")[0] for word in own}
    pairs = zip(recorded[::2], recorded[1::2], strict=True)
    return [*(word for pair in pairs if pair[0] not in given for word in pair), *own]


def served_fingerprint(endpoint: Endpoint) -> str:
    """What the server calls itself. Raises EndpointError."""
    with endpoint.client() as client:
        try:
            response = client.get("/info")
        except httpx2.TransportError as error:
            raise endpoint.unreachable(error) from error
    if response.status_code != 200:
        raise EndpointError(f"{endpoint.root}/info: {refusal_text(response)}")
    try:
        return f"fp_{response.json()['fingerprint']}"
    except (ValueError, LookupError, TypeError) as error:
        raise EndpointError(f"{endpoint.root} has no fingerprint under /info: it is no Weft.") from error


def _comparable(requests: RecordedRequests, served: str, console: Console, *, is_any: bool) -> RecordedRequests:
    """The requests that this server must answer alike. Raises OtherServerError when there is none."""
    counts = requests.by_fingerprint()
    others = sorted(counts.keys() - {served})
    for other in others:
        parts = " and ".join(differing_parts(other, served))
        what = "are compared all the same" if is_any else "are left out"
        console.print(
            f"{counts[other]:,} requests {what}: {other} recorded them, and {served} has {parts}.", highlight=False
        )
    comparable = requests if is_any else requests.of(served)
    if not comparable:
        parts = "; ".join(f"{other}: {' and '.join(differing_parts(other, served))}" for other in others)
        raise OtherServerError(
            f"weft verify: the server ({served}) is not the one that recorded ({parts}), so tokens may differ. Serve "
            "the recorded model with the recorded flags and version, or compare with --any-fingerprint."
        )
    return comparable


def _run(run: VerifyRun, count: int, differences: list[Difference], console: Console) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("requests", total=count)

        def show(difference: Difference | None) -> None:
            bar.advance(task)
            if difference is not None:
                bar.update(task, description=f"requests, {run.tally.num_different:,} differ")
                if len(differences) < _MAX_SHOWN:
                    differences.append(difference)

        asyncio.run(run.run(show))


def _explained(difference: Difference, endpoint: Endpoint) -> str:
    line = difference.line
    name = line.request_id + (f"#{line.index}" if line.index else "")
    if difference.problem:
        return f"request {name}: {difference.problem}"
    tokens = [token for token in (difference.recorded, difference.got) if token is not None]
    texts = _texts([token.token_id for token in tokens], endpoint)

    def shown(token: Token | None) -> str:
        if token is None:
            return "the end"
        return (
            f"{token.token_id} {texts[token.token_id]!r} logprob {token.logprob} ({float.fromhex(token.logprob):.6f})"
        )

    return (
        f"request {name}: token {difference.position} of {len(line.token_ids)}: recorded {shown(difference.recorded)}, "
        f"got {shown(difference.got)}"
    )


def _texts(token_ids: Sequence[int], endpoint: Endpoint) -> dict[int, str]:
    """What ids read as; nothing where the server does not know them, or is gone."""
    texts = dict.fromkeys(token_ids, "")
    with endpoint.client() as client, contextlib.suppress(httpx2.TransportError):
        for token_id in token_ids:
            response = client.post("/detokenize", json={"tokens": [token_id]})
            if response.status_code == 200:
                texts[token_id] = response.json()["prompt"]
    return texts


def _report(run: VerifyRun, fingerprint: str) -> int:
    tally = run.tally
    asked = f"{tally.num_requests:,} requests with {tally.num_tokens:,} tokens asked again of {fingerprint}"
    if not tally.num_different:
        sys.stdout.write(f"{asked}: every id and every bit is the same.\n")
        return 0
    left = tally.num_different - _MAX_SHOWN
    more = f" ({left:,} not shown)" if left > 0 else ""
    sys.stdout.write(f"{asked}: {tally.num_different:,} differ{more}.\n")
    return 1
