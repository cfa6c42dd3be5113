"""Measure servers over HTTP, one at a time: ours alone, or ours beside its peers in one sitting.

    python benchmark/serving.py                      # the default model, quick
    python benchmark/serving.py --peers --repeats 3  # A B A B …, medians and ratios

Every repeat starts each server anew, waits until it is ready, warms it up, runs every profile and stops it. A
Markdown table goes to standard output, everything measured to `--json`, progress to standard error.
"""

import argparse
import json
import os
import platform
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from urllib.request import urlopen

import uvloop
from gguf import GGUFReader, Keys
from model_forms import make_model_forms
from peers import Launch, Server, all_peers, make_peers_environment, weft

from weft.benchmark.host import CpuMeter, ProcessTreeUsage, measure_process_tree, measure_read_bandwidth
from weft.benchmark.load import Reply, Target, run_closed_loop, stream_request
from weft.benchmark.profiles import PROFILES, WARM_UP, Profile, PromptWriter, completion_body, single_token_words
from weft.benchmark.report import (
    Figures,
    figures_table,
    format_number,
    markdown_table,
    median_of,
    ratio_table,
    summarize,
)
from weft.config import resolve
from weft.launcher.download import fetch

DEFAULT_PROFILES = ("streams-1", "streams-16", "streams-64", "long-prompt", "shared-prefix", "first-token")
START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 20.0
PROFILE_TIMEOUT_S = 600.0


@dataclass(slots=True, kw_only=True)
class Sitting:
    """Everything measured, in order of measuring."""

    figures: dict[tuple[str, str], list[Figures]] = field(default_factory=dict)
    """(profile title, server label) → one entry per repeat."""
    startup_s: dict[str, list[float]] = field(default_factory=dict)
    memory: dict[str, list[ProcessTreeUsage]] = field(default_factory=dict)
    """At the end of each start, server label → usage."""
    bandwidth_gb_per_s: list[float] = field(default_factory=list)

    def as_json(self) -> dict[str, object]:
        """Plain values for a file."""
        return {
            "machine": {"processor": _processor_name(), "cores": os.cpu_count(), "python": platform.python_version()},
            "commit": _commit(),
            "startup_s": self.startup_s,
            "memory": {label: [asdict(usage) for usage in usages] for label, usages in self.memory.items()},
            "bandwidth_gb_per_s": self.bandwidth_gb_per_s,
            "figures": [
                {"profile": profile, "server": label, "repeat": repeat, **asdict(figures)}
                for (profile, label), repeats in self.figures.items()
                for repeat, figures in enumerate(repeats)
            ],
        }


class ServerEndedError(Exception):
    """The server stopped, or never became ready."""


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def set_autogroup(process_id: int | str, nice: int | None) -> None:
    """Give a session of processes another share of the CPU than the machine's other sessions have (Linux, root)."""
    if nice is not None:
        Path(f"/proc/{process_id}/autogroup").write_text(str(nice))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def running(
    server: Server, launch: Launch, port: int, log_file: Path, nice: int | None
) -> Iterator[tuple[subprocess.Popen[bytes], float]]:
    """The server's process and its start-up seconds; ended with everything it started on leaving."""
    command = [part.replace("{port}", str(port)) for part in launch.command]
    say(f"$ {shlex.join(command)}")
    started = time.perf_counter()
    with log_file.open("ab") as log:
        process = subprocess.Popen(
            command,
            env={**os.environ, **server.environment},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        set_autogroup(process.pid, nice)
        wait_until_ready(process, port, started + START_TIMEOUT_S)
        yield process, time.perf_counter() - started
    finally:
        stop(process)


def wait_until_ready(process: subprocess.Popen[bytes], port: int, deadline: float) -> None:
    while time.perf_counter() < deadline:
        if process.poll() is not None:
            raise ServerEndedError(f"the server exited with {process.returncode}")
        # Refused, reset, or an error status: not ready yet.
        with suppress(OSError), urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as answer:
            if answer.status == 200:
                return
        time.sleep(0.05)
    raise ServerEndedError(f"not ready after {START_TIMEOUT_S:g} s")


def stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            say(f"process {process.pid} did not stop within {STOP_TIMEOUT_S:g} s of SIGTERM")
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


async def run_round(server: Server, port: int, profile: Profile, prompts: list[str]) -> list[Reply]:
    target = Target(host="127.0.0.1", port=port)
    bodies = []
    for prompt in prompts:
        body = completion_body(server.model, prompt, profile.output_tokens)
        bodies.append({name: value for name, value in body.items() if name not in server.omitted_fields})
    send = partial(stream_request, target, timeout_s=PROFILE_TIMEOUT_S)
    return await run_closed_loop(send, bodies, profile.concurrency)


def measure_profile(
    server: Server, process: subprocess.Popen[bytes], port: int, profile: Profile, writer: PromptWriter
) -> list[Figures]:
    """Figures of each round."""
    rounds = []
    for prompts in writer.rounds(profile):
        meter = CpuMeter(process.pid)
        replies = uvloop.run(run_round(server, port, profile, prompts))
        share = meter.read()
        figures = replace(
            summarize(replies),
            foreign_cpu_percent=share.foreign_percent,
            server_cpu_s=share.server_s,
            client_cpu_s=share.client_s,
            pss_mb=measure_process_tree(process.pid).pss_mb,
        )
        expected = profile.shared_prefix_tokens + profile.prompt_tokens
        check_lengths(replies, expected, profile.output_tokens)
        rounds.append(figures)
        say(
            f"  {server.label:26} {profile.name:14} {figures.output_tokens_per_s:8.1f} tok/s  "
            f"TTFT {format_number(figures.ttft_p50_ms, 0):>6} ms  foreign CPU {share.foreign_percent:.1f} %"
            + (f"  FAILED {figures.failed}: {figures.errors[0]}" if figures.failed else "")
        )
    return rounds


def check_lengths(replies: list[Reply], prompt_tokens: int, output_tokens: int) -> None:
    """A server that reads or writes other lengths than the others is not comparable: say so."""
    for reply in replies:
        if reply.error is None and reply.completion_tokens != output_tokens:
            say(f"    note: {reply.completion_tokens} completion tokens instead of {output_tokens}")
            return
        # One more is a beginning-of-text token.
        if reply.prompt_tokens not in {0, prompt_tokens, prompt_tokens + 1}:
            say(f"    note: {reply.prompt_tokens} prompt tokens instead of {prompt_tokens}")
            return


def measure_server(
    server: Server, profiles: list[Profile], writer: PromptWriter, sitting: Sitting, log: Path, nice: int | None
) -> None:
    by_name = {profile.name: profile for profile in profiles}
    for number, (launch, names) in enumerate(server.launches_for(list(by_name))):
        sitting.bandwidth_gb_per_s.append(measure_read_bandwidth())
        port = free_port()
        with running(server, launch, port, log, nice) as (process, startup_s):
            if number == 0:
                sitting.startup_s.setdefault(server.label, []).append(startup_s)
            say(f"  {server.label:26} ready after {startup_s:.1f} s")
            for warm_up in WARM_UP:
                uvloop.run(run_round(server, port, warm_up, writer.rounds(warm_up)[0]))
            for name in names:
                profile = by_name[name]
                for index, figures in enumerate(measure_profile(server, process, port, profile, writer), 1):
                    title = profile.title if profile.rounds == 1 else f"{profile.title}, round {index}"
                    sitting.figures.setdefault((title, server.label), []).append(figures)
            sitting.memory.setdefault(server.label, []).append(measure_process_tree(process.pid))


def print_report(sitting: Sitting, ours: list[Server], peers: list[Server]) -> None:
    servers = [*ours, *peers]
    titles = list(dict.fromkeys(title for title, _ in sitting.figures))
    ordered = {
        (title, server.label): sitting.figures[title, server.label]
        for title in titles
        for server in servers
        if (title, server.label) in sitting.figures
    }
    bandwidth = sitting.bandwidth_gb_per_s
    print(f"\n{_processor_name()}, {os.cpu_count()} cores, Python {platform.python_version()}, commit {_commit()}")
    print(f"DRAM read bandwidth beside the runs: {min(bandwidth):.0f} to {max(bandwidth):.0f} GB/s\n")
    print(figures_table(ordered), end="\n\n")
    rows = [
        [
            server.label,
            format_number(median_of(sitting.startup_s.get(server.label, [])), 1),
            format_number(median_of(usage.pss_mb for usage in sitting.memory.get(server.label, [])), 0),
            format_number(median_of(usage.rss_mb for usage in sitting.memory.get(server.label, [])), 0),
            str(max((usage.num_processes for usage in sitting.memory.get(server.label, [])), default=0)),
        ]
        for server in servers
    ]
    print(markdown_table(["server", "start to ready s", "PSS MB", "RSS MB", "processes"], rows), end="\n\n")
    for server in ours if peers else ():
        print(ratio_table(sitting.figures, server.label, [peer.label for peer in peers]), end="\n\n")


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _commit() -> str:
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return described.stdout.strip() or "unknown"


def fetch_model(reference: str | None) -> Path:
    """The GGUF file that everything is made from, downloaded if it is not here yet."""
    settings = resolve(["--model-id", reference] if reference else [], os.environ)
    path = fetch(settings.model_id, settings).path
    if path.suffix != ".gguf":
        raise SystemExit("--model: a GGUF file is needed, because every server's form of the model is made from one")
    return path


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure Weft, alone or beside other servers")
    parser.add_argument("--model", help="reference of a GGUF file; the default model when absent")
    parser.add_argument("--peers", action="store_true", help="also measure transformers serve and llama.cpp")
    parser.add_argument("--only", action="append", default=[], metavar="TEXT", help="servers whose label contains this")
    parser.add_argument("--repeats", type=int, default=1, help="how often each server is started and measured")
    parser.add_argument(
        "--profile", action="append", choices=sorted(PROFILES), help="repeatable; default: the usual six"
    )
    parser.add_argument("--scale", type=float, default=1.0, help="share of each profile's requests to send")
    parser.add_argument("--seed", type=int, default=None, help="of the prompts; new ones in every run when absent")
    parser.add_argument("--autogroup-nice", type=int, help="-20 to 19: CPU share on a shared Linux machine")
    parser.add_argument("--json", type=Path, help="where to write everything measured")
    return parser.parse_args()


def choose_servers(arguments: argparse.Namespace, gguf: Path) -> tuple[list[Server], list[Server]]:
    """Ours and the peers. Alone we serve the file as it is; beside peers also in the precision that they compute in."""
    ours = [weft("weft Q4_1", str(gguf))]
    peers: list[Server] = []
    if arguments.peers:
        make_peers_environment()
        forms = make_model_forms(gguf)
        ours.append(weft("weft bf16", str(forms.bfloat16_directory)))
        peers = all_peers(forms, frozenset(PROFILES))

    def is_wanted(server: Server) -> bool:
        return not arguments.only or any(text in server.label for text in arguments.only)

    return list(filter(is_wanted, ours)), list(filter(is_wanted, peers))


def main() -> None:
    arguments = parse_arguments()
    # Leave through `finally`, so that no server outlives its measurement.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    set_autogroup("self", arguments.autogroup_nice)
    profiles = [PROFILES[name].scaled(arguments.scale) for name in arguments.profile or DEFAULT_PROFILES]
    gguf = fetch_model(arguments.model)
    ours, peers = choose_servers(arguments, gguf)
    vocabulary = GGUFReader(gguf).fields[Keys.Tokenizer.LIST].contents()
    writer = PromptWriter(single_token_words(vocabulary), arguments.seed or time.time_ns())
    sitting = Sitting()
    log = Path(tempfile.mkstemp(prefix="weft-bench-", suffix=".log")[1])
    say(f"server output: {log}")
    try:
        for _ in range(arguments.repeats):
            for server in [*ours, *peers]:
                try:
                    measure_server(server, profiles, writer, sitting, log, arguments.autogroup_nice)
                except ServerEndedError as error:
                    say(f"  {server.label}: {error}; see {log}")
    finally:
        set_autogroup("self", None if arguments.autogroup_nice is None else 0)
        if arguments.json:
            arguments.json.write_text(json.dumps(sitting.as_json(), indent=1) + "\n")
    print_report(sitting, ours, peers)


if __name__ == "__main__":
    main()
