"""`weft bench`, also known as `text-generation-benchmark`: how fast a running server answers, by number of streams.

Where TGI's tool speaks to the shards, this one speaks HTTP, so that router and queue count, and any server of
OpenAI's API can be measured. Every batch size is a number of requests sent at once; the next run begins when all of
them have their answers.
"""

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import uvloop
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from weft.benchmark.load import Reply, Target, stream_request
from weft.benchmark.profiles import PromptWriter, completion_body
from weft.commands.arguments import CommandParser, integer, number, unicode_text
from weft.commands.bench_report import SweepPoint, as_json, chart, summarize_runs, tables
from weft.commands.endpoint import Endpoint, EndpointError, find_endpoint, served_model
from weft.errors import UsageError

_EPILOG = """\
The flags are those of text-generation-benchmark; --tokenizer-name and --revision are read and not needed, because
the server counts. Prompts are random words of an exact number of tokens, so no two
share a prefix; every answer has exactly --decode-length tokens. The API key is read from WEFT_API_KEY (with --url
also from OPENAI_API_KEY). Tables are Markdown on standard output.

  weft bench -b 1 -b 8 -b 32 -s 512 -d 64 --json result.json
"""
_DEFAULT_BATCH_SIZES = (1, 2, 4, 8, 16, 32)
_CALIBRATION_WORDS = (16, 64)
_SAMPLING = ("top_k", "top_p", "typical_p", "repetition_penalty", "frequency_penalty")
# One token each behind a space in the vocabularies in use.
_WORDS = """
able about above across after again against air all along also always among another answer around ask away back bad
ball bank base bear beat bed began begin behind best better between big bird black blue boat body book both box boy
bring brown build busy call came car care carry case cat cause center certain change check child city class clear
close cold color come common contain cook cool copy corn cost count country cover cross cry cut dark day decide deep
did differ direct dog door down draw dream drive dry during each early earth east easy eat end enough even ever every
eye face fact fall family far farm fast father feel few field fig figure fill final find fine fire first fish five fly
follow food foot force form found four free friend from front full game gave get girl give gold good got govern great
green ground group grow had half hand happen hard has head hear heat help here high hold home horse hot hour house
"""


def bench(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """Measure and print; 0 when every request was answered in full, else 1."""
    arguments = _parse(argv)
    endpoint = find_endpoint(arguments.url, environ)
    target = _target(endpoint)
    if arguments.json:
        _check_writable(Path(arguments.json))
    with endpoint.client() as client:
        model = arguments.model or served_model(client, endpoint)
    sweep = Sweep(target, model, arguments)
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("calibrating", total=sweep.num_runs)
        points: list[SweepPoint] = uvloop.run(sweep.run(lambda text: bar.update(task, advance=1, description=text)))
    parameters = _parameters(arguments, model, endpoint)
    sys.stdout.write(tables(parameters, points) + "\n\n" + chart(points) + "\n")
    if arguments.json:
        _write(Path(arguments.json), as_json(parameters, points))
    for error in dict.fromkeys(error for point in points for error in point.errors):
        console.print(f"Error: {_readable(error)}", style="red", highlight=False, markup=False, soft_wrap=True)
    return 1 if any(point.num_failed for point in points) else 0


def _readable(error: str) -> str:
    """What a refusal says, without the JSON around it."""
    status, brace, rest = error.partition("{")
    try:
        content = json.loads(brace + rest)["error"]
        return status + str(content["message"] if isinstance(content, dict) else content)
    except (ValueError, LookupError, TypeError):
        return error


class Sweep:
    """Runs for every batch size, on one server."""

    def __init__(self, target: Target, model: str, arguments: argparse.Namespace) -> None:
        self._target = target
        self._model = model
        self._arguments = arguments
        self._batch_sizes: Sequence[int] = arguments.batch_size or _DEFAULT_BATCH_SIZES
        self._prompts = PromptWriter(_WORDS.split(), seed=time.time_ns())
        self._sampling = _sampling(arguments)
        self._num_words = 1

    @property
    def num_runs(self) -> int:
        """Of all batch sizes together, those that only warm up included."""
        return len(self._batch_sizes) * int(self._arguments.runs + self._arguments.warmups)

    async def run(self, report: Callable[[str], None]) -> list[SweepPoint]:
        """Measure. `report` hears the start of the next run, after each.

        Raises   EndpointError: the server refuses the very first request
        """
        await self._calibrate()
        points = []
        for batch_size in self._batch_sizes:
            for _ in range(self._arguments.warmups):
                await self._send(batch_size)
                report(f"warming up, batch size {batch_size}")
            runs = []
            for _ in range(self._arguments.runs):
                runs.append(await self._send(batch_size))
                report(f"batch size {batch_size}")
            points.append(summarize_runs(batch_size, runs))
        return points

    async def _send(self, batch_size: int) -> list[Reply]:
        bodies = [self._body(self._num_words, self._arguments.decode_length) for _ in range(batch_size)]
        return list(await asyncio.gather(*(stream_request(self._target, body) for body in bodies)))

    def _body(self, num_words: int, output_tokens: int) -> dict[str, Any]:
        return {**completion_body(self._model, self._prompts.text(num_words), output_tokens), **self._sampling}

    async def _calibrate(self) -> None:
        """Find how many words make `--sequence-length` tokens: a tokenizer may add its own or split a word."""
        counts = []
        for num_words in _CALIBRATION_WORDS:
            reply = await stream_request(self._target, self._body(num_words, 2))
            if reply.error is not None:
                raise EndpointError(f"the server does not take the benchmark's requests: {reply.error}")
            counts.append(reply.prompt_tokens)
        self._num_words = words_for(self._arguments.sequence_length, counts)


def words_for(num_tokens: int, counts: Sequence[int]) -> int:
    """Words of a prompt of `num_tokens` tokens, at least one.

    counts   what the server counted for prompts of `_CALIBRATION_WORDS` words; zeros when it counts nothing
    """
    few, many = _CALIBRATION_WORDS
    if counts[1] <= counts[0]:
        return max(1, num_tokens)
    tokens_per_word = (counts[1] - counts[0]) / (many - few)
    return max(1, round((num_tokens - counts[0]) / tokens_per_word) + few)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = CommandParser("weft bench", "Measure a running server by number of concurrent streams.", _EPILOG)
    parser.add_argument("--url", help="server to measure; default http://localhost:3000")
    parser.add_argument(
        "--model",
        type=unicode_text,
        metavar="NAME",
        help="model to ask for; default: the first one that the server lists",
    )
    parser.add_argument("-t", "--tokenizer-name", help=argparse.SUPPRESS)
    parser.add_argument("--revision", help=argparse.SUPPRESS)
    parser.add_argument(
        "-b", "--batch-size", action="append", type=integer(1, 4096), metavar="N",
        help="requests at once; may be given several times; default: 1 2 4 8 16 32",
    )  # fmt: skip
    for short, flag, low, high, default, text in (
        ("-s", "--sequence-length", 1, 10**6, 10, "tokens of a prompt"),
        ("-d", "--decode-length", 1, 10**6, 8, "tokens of an answer"),
        ("-r", "--runs", 1, 10**5, 10, "runs per batch size"),
        ("-w", "--warmups", 0, 10**5, 1, "runs before them that do not count"),
        (None, "--top-k", 1, 2**31 - 1, None, "sample among the k likeliest tokens"),
        (None, "--top-n-tokens", 0, 20, None, "log-probabilities of the n likeliest tokens"),
    ):
        words = (short, flag) if short else (flag,)
        explained = text if default is None else f"{text}; default: {default}"
        parser.add_argument(*words, type=integer(low, high), default=default, metavar="N", help=explained)
    for flag, low_limit, high_limit in (
        ("--temperature", 0.0, 2.0), ("--top-p", 0.0, 1.0), ("--typical-p", 0.0, 1.0),
        ("--repetition-penalty", 0.0, 10.0), ("--frequency-penalty", -2.0, 2.0),
    ):  # fmt: skip
        parser.add_argument(
            flag, type=number(low_limit, high_limit), metavar="X", help="as in the API; default: neutral"
        )
    parser.add_argument("--do-sample", action="store_true", help="sample instead of taking the likeliest token")
    parser.add_argument("--json", metavar="FILE", help="also write the figures as JSON")
    parser.add_argument("--watermark", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("-m", "--master-shard-uds-path", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.watermark:
        raise UsageError("weft bench: --watermark cannot be measured over OpenAI's API, which has none; leave it out.")
    if arguments.master_shard_uds_path:
        raise UsageError("weft bench: measures over HTTP, not on a shard's socket: use --url instead of -m.")
    return arguments


def _sampling(arguments: argparse.Namespace) -> dict[str, Any]:
    given = {name: getattr(arguments, name) for name in _SAMPLING}
    fields: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if arguments.temperature is not None:
        fields["temperature"] = arguments.temperature
    elif arguments.do_sample or {"top_k", "top_p", "typical_p"} & fields.keys():
        fields["temperature"] = 1.0
    if arguments.top_n_tokens is not None:
        fields["logprobs"] = arguments.top_n_tokens
    return fields


def _target(endpoint: Endpoint) -> Target:
    parts = urlsplit(endpoint.root)
    if parts.scheme != "http" or parts.hostname is None:
        raise UsageError(f"--url: the benchmark measures plain http, without encryption. Given: {endpoint.root}")
    headers = tuple(endpoint.headers.items())
    return Target(host=parts.hostname, port=parts.port or 80, path=f"{parts.path}/v1/completions", headers=headers)


def _parameters(arguments: argparse.Namespace, model: str, endpoint: Endpoint) -> dict[str, Any]:
    return {
        "Model": model,
        "URL": endpoint.root,
        "Sequence Length": arguments.sequence_length,
        "Decode Length": arguments.decode_length,
        "N Runs": arguments.runs,
        "Warmups": arguments.warmups,
        "Temperature": arguments.temperature,
        "Top K": arguments.top_k,
        "Top P": arguments.top_p,
        "Typical P": arguments.typical_p,
        "Repetition Penalty": arguments.repetition_penalty,
        "Frequency Penalty": arguments.frequency_penalty,
        "Top N Tokens": arguments.top_n_tokens,
        "Do Sample": arguments.do_sample,
    }


def _check_writable(path: Path) -> None:
    """Before minutes are spent on measuring. Raises UsageError."""
    _tell_unwritable(path, lambda: path.open("a").close())


def _write(path: Path, content: dict[str, Any]) -> None:
    _tell_unwritable(path, lambda: path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8"))


def _tell_unwritable(path: Path, write: Callable[[], object]) -> None:
    try:
        write()
    except OSError as error:
        raise UsageError(f"--json: cannot write {path}: {error.strerror}.") from error
