"""Measure servers over HTTP: ours alone, or ours and its peers, in turns cell by cell.

    python benchmark/serving.py                          # ours: bf16, int8, int4 and packed GGUF
    python benchmark/serving.py --servers int8 --only W1,W2
    python benchmark/serving.py --peers --quick          # ours and the peers in one sitting

Servers of one precision and model are alive together, and all but the one that is measured are stopped where they are
(SIGSTOP): they keep their memory and use no processor. So every workload goes round all servers, minutes apart at most,
with the same prompts. Beside each cell stand the memory bandwidth of the moment and the share of the machine's limit.

After every cell all that is known is written: JSON, a page of Markdown with the goals, and a plot.
"""

import argparse
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import uvloop
from gguf import GGUFReader, Keys
from live_server import LiveServer, ServerEndedError, say, set_autogroup
from model_forms import ModelForms, make_large_forms, make_q4_0_gguf, make_small_forms
from peer_environments import CannotInstallError, make_llamacpp
from peers import Server, peer_servers, weft_servers

from weft.benchmark import page, plot
from weft.benchmark.host import (
    BYTES_PER_MB,
    CpuMeter,
    control_plane_s,
    measure_process_tree,
    measure_read_bandwidth,
    thread_cpu_s,
)
from weft.benchmark.load import (
    Reply,
    Target,
    arrival_gaps_s,
    gaps_beside_newcomer,
    run_closed_loop,
    run_open_loop,
    run_stream_and_newcomer,
    stream_request,
    sum_of_metric,
)
from weft.benchmark.profiles import (
    USUAL_PROFILES,
    WARM_UP,
    Profile,
    PromptWriter,
    completion_body,
    find_profiles,
    single_token_words,
)
from weft.benchmark.records import Cell, Sitting, Start
from weft.benchmark.report import NS_PER_MS, format_number, percentile, summarize
from weft.benchmark.roofline import WEIGHT_FORMATS, Limit, Machine, ModelShape, load_limit
from weft.config import resolve
from weft.launcher.download import fetch

PROFILE_TIMEOUT_S = 600.0
NEWCOMER_OUTPUT_TOKENS = 8
TOKENS_BEFORE_NEWCOMER = 32
STREAMS_FOR_CONTROL_PLANE = 16
LAB = Path(__file__).resolve().parent.parent / "docs" / "lab"


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Servers that are alive together, on one model."""

    servers: Sequence[Server]
    profiles: Sequence[Profile]
    shape: ModelShape


class OutOfTimeError(Exception):
    """The sitting has used up its minutes."""


@dataclass(slots=True, kw_only=True)
class Recorder:
    """The sitting so far, and where it is written after every cell."""

    sitting: Sitting
    path: Path
    deadline_s: float
    is_quick: bool
    log: Path
    nice: int | None
    bandwidth_gb_per_s: float = field(default_factory=measure_read_bandwidth)
    """As probed last."""

    def probe(self) -> float:
        """Probe again; the mean of this and of the last time, between which a cell ran."""
        last, self.bandwidth_gb_per_s = self.bandwidth_gb_per_s, measure_read_bandwidth()
        return (last + self.bandwidth_gb_per_s) / 2

    def check_time(self) -> None:
        """Raises OutOfTimeError."""
        if time.monotonic() > self.deadline_s:
            raise OutOfTimeError

    def write(self) -> None:
        """All that is known, in three files."""
        picture = self.path.with_suffix(".svg")
        picture.write_text(plot.draw(self.sitting))
        self.path.with_suffix(".json").write_bytes(self.sitting.to_json())
        title = f"# {self.path.name}\n\n"
        self.path.with_suffix(".md").write_text(title + page.render(self.sitting, picture.name))


class GroupRun:
    """The live servers of a group, started when a cell first needs them."""

    def __init__(self, group: Group, writer: PromptWriter, recorder: Recorder) -> None:
        self._group = group
        self._writer = writer
        self._recorder = recorder
        self._live: dict[str, tuple[LiveServer, int]] = {}
        """Label → the server and the place of its start in the sitting."""
        self._dead: set[str] = set()

    def run(self, repeats_of: Callable[[Profile], int]) -> None:
        """Every workload on every server, in turns."""
        try:
            for profile in self._group.profiles:
                for repeat in range(repeats_of(profile)):
                    rounds = self._writer.rounds(profile)
                    for server in self._group.servers:
                        self._run_cell(server, profile, repeat, rounds)
        finally:
            # Ours last: what it shares with a peer, such as torch's libraries, is then counted in full.
            for label in reversed(list(self._live)):
                self._end(label)
            self._recorder.write()

    def _run_cell(self, server: Server, profile: Profile, repeat: int, rounds: list[list[str]]) -> None:
        recorder = self._recorder
        recorder.check_time()
        reason = server.left_out_when_quick.get(profile.name)
        if server.label in self._dead or (recorder.is_quick and reason):
            recorder.sitting.absent.setdefault(f"{server.label}, {profile.title}", reason or "the server had failed")
            return
        try:
            live = self._resumed(server, profile)
            try:
                for number, prompts in enumerate(rounds):
                    self._measure(live, profile, repeat, number, prompts)
            finally:
                live.pause()
        except (ServerEndedError, OSError) as error:
            say(f"  {server.label}: {error}; see {recorder.log}")
            recorder.sitting.absent[f"{server.label}, {profile.title}"] = str(error)
            self._dead.add(server.label)
            self._end(server.label)
        recorder.write()

    def _resumed(self, server: Server, profile: Profile) -> LiveServer:
        launch = server.launch_for(profile)
        if server.label in self._live and self._live[server.label][0].launch != launch:
            self._end(server.label)
        if server.label in self._live:
            live = self._live[server.label][0]
            live.resume()
            return live
        recorder = self._recorder
        live = LiveServer(server, launch, recorder.log, recorder.nice)
        start = Start(
            server=server.label,
            precision=server.precision,
            is_peer=server.is_peer,
            is_large_model=profile.is_large_model,
            ready_s=live.ready_s,
        )
        self._live[server.label] = (live, len(recorder.sitting.starts))
        recorder.sitting.starts.append(start)
        program = server.label.rpartition(" ")[0] if server.is_peer else "weft"
        recorder.sitting.versions[program] = server.version
        say(f"  {server.label:26} ready after {live.ready_s:.1f} s")
        for warm_up in WARM_UP:
            run_round(live, warm_up, self._writer.rounds(warm_up)[0])
        return live

    def _end(self, label: str) -> None:
        """Note the memory, then stop it."""
        if label not in self._live:
            return
        live, place = self._live.pop(label)
        starts = self._recorder.sitting.starts
        try:
            usage = measure_process_tree(live.pid)
            pool_mb = 0.0
            if not live.server.is_peer:
                live.resume()
                with suppress(OSError):
                    pool_mb = touched_pool_bytes(live) / BYTES_PER_MB
            starts[place] = replace(
                starts[place], pss_mb=usage.pss_mb, kv_pool_mb=pool_mb, num_processes=usage.num_processes
            )
        finally:
            live.stop()

    def _measure(self, live: LiveServer, profile: Profile, repeat: int, number: int, prompts: list[str]) -> None:
        server = live.server
        threads, model_s = thread_cpu_s(live.pid), model_seconds(live, profile)
        meter = CpuMeter(live.pid)
        replies, gaps_ns = run_round(live, profile, prompts)
        share = meter.read()
        control_s = None
        if model_s is not None:
            spent_in_model_s = (model_seconds(live, profile) or 0.0) - model_s
            control_s = control_plane_s(threads, thread_cpu_s(live.pid), os.cpu_count() or 1, spent_in_model_s)
        figures = replace(
            summarize(replies),
            foreign_cpu_percent=share.foreign_percent,
            server_cpu_s=share.server_s,
            client_cpu_s=share.client_s,
            pss_mb=measure_process_tree(live.pid).pss_mb,
        )
        if gaps_ns is not None:
            gaps_ms = [gap / NS_PER_MS for gap in gaps_ns]
            figures = replace(figures, itl_p50_ms=percentile(gaps_ms, 50), itl_p99_ms=percentile(gaps_ms, 99))
        live.pause()
        bandwidth = self._recorder.probe()
        live.resume()
        limit = self._limit(server, profile, bandwidth, is_prefix_cached=number > 0)
        cell = Cell(
            profile=profile.name,
            title=profile.title if profile.rounds == 1 else f"{profile.title}, round {number + 1}",
            server=server.label,
            precision=server.precision,
            is_peer=server.is_peer,
            repeat=repeat,
            figures=figures,
            bandwidth_gb_per_s=bandwidth,
            limit_s=limit.seconds,
            limit_cause=limit.cause,
            control_us_per_token=control_s * 1e6 / figures.output_tokens
            if control_s is not None and figures.output_tokens
            else None,
        )
        self._recorder.sitting.cells.append(cell)
        report_cell(cell, profile, replies)

    def _limit(self, server: Server, profile: Profile, bandwidth: float, *, is_prefix_cached: bool) -> Limit:
        if profile.rate_per_s or profile.newcomer_prompt_tokens:
            return Limit(seconds=0.0, is_bytes=True)  # what is judged there is not a rate
        machine = Machine(bytes_per_s=bandwidth * 1e9, peaks=self._recorder.sitting.peaks)
        form = WEIGHT_FORMATS[server.weight_format]
        return load_limit(self._group.shape, form, profile, machine, is_prefix_cached=is_prefix_cached)


def run_round(live: LiveServer, profile: Profile, prompts: list[str]) -> tuple[list[Reply], list[int] | None]:
    """Replies, and the gaps that alone are judged where a newcomer interrupts a stream."""
    target = Target(host="127.0.0.1", port=live.port)
    bodies = []
    for prompt in prompts:
        body = completion_body(live.server.model, prompt, profile.output_tokens)
        bodies.append({name: value for name, value in body.items() if name not in live.server.omitted_fields})
    send = partial(stream_request, target, timeout_s=PROFILE_TIMEOUT_S)
    if profile.newcomer_prompt_tokens:
        newcomer = {**bodies[1], "max_tokens": NEWCOMER_OUTPUT_TOKENS}
        running, arrived = uvloop.run(
            run_stream_and_newcomer(
                target, bodies[0], newcomer, tokens_before=TOKENS_BEFORE_NEWCOMER, timeout_s=PROFILE_TIMEOUT_S
            )
        )
        return [running, arrived], gaps_beside_newcomer(running, arrived)
    if profile.rate_per_s:
        gaps = arrival_gaps_s(profile.rate_per_s, len(bodies), random.Random(len(bodies)))
        return uvloop.run(run_open_loop(send, bodies, gaps)), None
    return uvloop.run(run_closed_loop(send, bodies, profile.concurrency)), None


def touched_pool_bytes(live: LiveServer) -> float:
    """Memory of the blocks that hold something: pages of the KV pool are taken when they are first written."""
    metrics, info = live.get("/metrics").decode(), json.loads(live.get("/info"))
    blocks = sum(sum_of_metric(metrics, "weft_kv_blocks", state) for state in ('"used"', '"cached"'))
    return float(blocks * info["kv_pool_bytes"] / info["num_blocks"])


def model_seconds(live: LiveServer, profile: Profile) -> float | None:
    """How long our models have run; None: the server does not say, or too few streams share a step to count tokens."""
    if live.server.is_peer or profile.concurrency < STREAMS_FOR_CONTROL_PLANE:
        return None
    return sum_of_metric(live.get("/metrics").decode(), "tgi_batch_forward_duration_sum")


def report_cell(cell: Cell, profile: Profile, replies: list[Reply]) -> None:
    """A line of progress, and a note where a server did other work than it was asked for."""
    figures = cell.figures
    limit = f"{cell.limit_share:4.0%} of the limit" if cell.limit_share else " " * 17
    say(
        f"  {cell.server:26} {profile.code:3} {figures.output_tokens_per_s:8.1f} tok/s  {limit}  "
        f"TTFT {format_number(figures.ttft_p50_ms, 0):>6} ms  ITL p99 {format_number(figures.itl_p99_ms, 0):>5} ms  "
        f"{cell.bandwidth_gb_per_s:3.0f} GB/s  foreign CPU {figures.foreign_cpu_percent:.1f} %"
        + (f"  FAILED {figures.failed}: {figures.errors[0]}" if figures.failed else "")
    )
    if profile.newcomer_prompt_tokens:
        return
    expected = profile.shared_prefix_tokens + profile.prompt_tokens
    for reply in replies:
        if reply.error is None and reply.completion_tokens != profile.output_tokens:
            say(f"    note: {reply.completion_tokens} completion tokens instead of {profile.output_tokens}")
            return
        # One more is a beginning-of-text token.
        if reply.prompt_tokens not in {0, expected, expected + 1}:
            say(f"    note: {reply.prompt_tokens} prompt tokens instead of {expected}")
            return


def measure_peaks() -> dict[str, float]:
    """Operations per second of our own kernels, measured by a process of its own, which alone loads torch."""
    script = Path(__file__).with_name("kernel_peaks.py")
    output = subprocess.run([sys.executable, script], check=True, capture_output=True, text=True).stdout
    peaks: dict[str, float] = json.loads(output)
    return peaks


def make_groups(arguments: argparse.Namespace, sitting: Sitting, gguf: Path) -> list[Group]:
    """Which servers are alive together, and what they are asked; the most telling groups first."""

    def is_wanted(label: str) -> bool:
        return not arguments.servers or any(text.lower() in label.lower() for text in arguments.servers.split(","))

    profiles = chosen_profiles(arguments)
    small = make_small_forms(gguf)
    groups: list[Group] = []
    for is_large in (False, True):
        fitting = [profile for profile in profiles if profile.is_large_model == is_large]
        if not fitting:
            continue
        forms = make_large_forms(small) if is_large else small
        servers, absent = peer_servers(forms, is_wanted) if arguments.peers else ([], {})
        sitting.absent.update(absent)
        if is_wanted("weft Q4_0 packed"):
            make_packed_form(forms, sitting)
        servers = [*filter(lambda server: is_wanted(server.label), weft_servers(forms)), *servers]
        groups += group_by_precision(servers, fitting, forms)
    return groups


def make_packed_form(forms: ModelForms, sitting: Sitting) -> None:
    """Q4_0 as llama.cpp reads it, where its tool can be built; otherwise ours serves the original file."""
    try:
        make_q4_0_gguf(forms, make_llamacpp() / "llama-quantize")
    except CannotInstallError as error:
        sitting.absent["Q4_0, so our packed form is the original file"] = str(error)


def group_by_precision(servers: Iterable[Server], profiles: Sequence[Profile], forms: ModelForms) -> list[Group]:
    """Ours first in each group."""
    grouped: dict[str, list[Server]] = {}
    for server in servers:
        grouped.setdefault(server.precision, []).append(server)
    return [
        Group(servers=members, profiles=profiles, shape=forms.shape())
        for _, members in sorted(grouped.items(), key=lambda item: ("bf16", "int8", "int4").index(item[0]))
    ]


def chosen_profiles(arguments: argparse.Namespace) -> list[Profile]:
    try:
        profiles = find_profiles(arguments.only.split(",") if arguments.only else USUAL_PROFILES)
    except ValueError as error:
        raise SystemExit(f"--only: {error}") from error
    if arguments.quick:
        return [profile.quick for profile in profiles]
    return [profile.scaled(arguments.scale) for profile in profiles]


def fetch_model(reference: str | None) -> Path:
    """The GGUF file that everything is made from, downloaded if it is not here yet."""
    settings = resolve(["--model-id", reference] if reference else [], os.environ)
    path = fetch(settings.model_id, settings).path
    if path.suffix != ".gguf":
        raise SystemExit("--model: a GGUF file is needed, because every server's form of the model is made from one")
    return path


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


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure Weft, alone or in turns with other servers")
    parser.add_argument("--model", help="reference of a GGUF file; the default model when absent")
    parser.add_argument("--peers", action="store_true", help="also llama.cpp, OpenVINO GenAI, vLLM, transformers serve")
    parser.add_argument("--prepare", action="store_true", help="only install the peers and write the models' forms")
    parser.add_argument("--servers", metavar="TEXT,…", help="servers whose label contains one of these")
    parser.add_argument(
        "--only", metavar="CODE,…", help=f"workloads by code or name; default: {','.join(USUAL_PROFILES)}"
    )
    parser.add_argument(
        "--quick", action="store_true", help="few requests, and no cells of servers that are far behind"
    )
    parser.add_argument("--scale", type=float, default=1.0, help="share of each workload's requests to send")
    parser.add_argument("--rounds", type=int, help="how often each cell is measured, in turns")
    parser.add_argument("--minutes", type=float, default=24 * 60.0, help="start no cell after this time")
    parser.add_argument("--seed", type=int, default=None, help="of the prompts; new ones in every run when absent")
    parser.add_argument("--autogroup-nice", type=int, help="-20 to 19: CPU share on a shared Linux machine")
    parser.add_argument("--out", type=Path, help="path without suffix for .json, .md and .svg; default: under docs/lab")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    deadline_s = time.monotonic() + 60 * arguments.minutes
    # Leave through `finally`, so that no server outlives its measurement.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sitting = Sitting(
        when=time.strftime("%Y-%m-%d %H:%M"),
        machine=f"{_processor_name()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        commit=_commit(),
    )
    gguf = fetch_model(arguments.model)
    groups = make_groups(arguments, sitting, gguf)
    if arguments.prepare:
        say(
            "\n".join(f"{what}: {why}" for what, why in sitting.absent.items())
            or "all servers are ready to be measured"
        )
        return
    set_autogroup("self", arguments.autogroup_nice)
    sitting.peaks = measure_peaks()
    name = f"{time.strftime('%Y-%m-%d')}-{'beside-peers' if arguments.peers else 'ours'}"
    recorder = Recorder(
        sitting=sitting,
        path=arguments.out or LAB / name,
        deadline_s=deadline_s,
        is_quick=arguments.quick,
        log=Path(tempfile.mkstemp(prefix="weft-bench-", suffix=".log")[1]),
        nice=arguments.autogroup_nice,
    )
    say(f"server output: {recorder.log}")
    vocabulary = GGUFReader(gguf).fields[Keys.Tokenizer.LIST].contents()
    writer = PromptWriter(single_token_words(vocabulary), arguments.seed or time.time_ns())

    def repeats_of(profile: Profile) -> int:
        return int(arguments.rounds or (profile.quick_repeats if arguments.quick else 1))

    try:
        for group in groups:
            GroupRun(group, writer, recorder).run(repeats_of)
    except OutOfTimeError:
        sitting.absent["everything after the last cell"] = f"{arguments.minutes:g} minutes were up"
    finally:
        set_autogroup("self", None if arguments.autogroup_nice is None else 0)
        recorder.write()
    print(page.render(sitting))
    say(f"written: {recorder.path}.json, .md and .svg")


if __name__ == "__main__":
    main()
