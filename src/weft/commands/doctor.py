"""`weft doctor`: is this machine fit to serve, and do its kernels compute what they should?"""

import argparse
import contextlib
import errno
import json
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from importlib import metadata
from pathlib import Path

import httpx2
from rich.console import Console
from rich.markup import escape

from weft import __version__
from weft.commands.arguments import CommandParser
from weft.config import Settings, resolve
from weft.kernels import processor
from weft.launcher.layout import count_visible_gpus
from weft.runner import host_memory

_MIN_PYTHON = (3, 11)
_MIN_TORCH = (2, 11)
_PACKAGES = ("torch", "tokenizers", "safetensors", "grpcio", "protobuf", "huggingface-hub", "uvicorn", "starlette")
_MIN_MEMORY_BYTES = 2**30
_MIN_DISK_BYTES = 2 * 2**30
_MIN_SHARED_MEMORY_BYTES = 64 * 2**20
_MIN_OPEN_FILES = 1024
_SELF_TEST_TIMEOUT_S = 600.0
_GIB = 2**30


class Status(StrEnum):
    """How a check went."""

    GOOD = "good"
    WARNING = "warning"
    BAD = "bad"


@dataclass(frozen=True, slots=True)
class Finding:
    """One check."""

    name: str
    status: Status
    text: str
    remedy: str = ""
    """What to do; empty when it is good."""


Check = Callable[[Settings, Mapping[str, str]], Iterator[Finding]]


def doctor(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """Print every finding; 0 when nothing is bad, else 1."""
    arguments, rest = _parse(argv)
    settings = resolve(rest, environ)
    console = Console(soft_wrap=True)
    findings: list[Finding] = []
    for check in _checks(arguments):
        for finding in check(settings, environ):
            findings.append(finding)
            if not arguments.json:
                _show(finding, console)
    num_bad = sum(finding.status is Status.BAD for finding in findings)
    if arguments.json:
        sys.stdout.write(json.dumps({"is_fit": num_bad == 0, "findings": [*map(asdict, findings)]}, indent=2) + "\n")
    else:
        console.print(f"\n{num_bad} of {len(findings)} checks are bad." if num_bad else "\nFit to serve.")
    return 1 if num_bad else 0


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = CommandParser(
        "weft doctor",
        "Check this machine, and every kernel against its reference.",
        "Other flags are those of `weft serve`: --port, --cache-dir … are checked as they would be used.",
    )
    parser.add_argument("--hub", action="store_true", help="also ask whether the model hub can be reached")
    parser.add_argument("--no-self-test", action="store_true", help="leave out the kernels (they need some seconds)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_known_args(argv)


def _checks(arguments: argparse.Namespace) -> Iterator[Check]:
    yield from (check_python, check_packages, check_processor, check_memory, check_shared_memory, check_open_files)
    yield from (check_cache, check_ports)
    if arguments.hub:
        yield check_hub
    if not arguments.no_self_test:
        yield check_kernels


def _show(finding: Finding, console: Console) -> None:
    marks = {Status.GOOD: "[green]good   [/]", Status.WARNING: "[yellow]warning[/]", Status.BAD: "[red]bad    [/]"}
    console.print(f"{marks[finding.status]} {finding.name:14} {escape(finding.text)}", highlight=False)
    if finding.remedy:
        console.print(f"{'':22} {escape(finding.remedy)}", highlight=False)


def check_python(_settings: Settings, _environ: Mapping[str, str]) -> Iterator[Finding]:
    """Interpreter and system."""
    text = f"{platform.python_version()} on {platform.platform()}, Weft {__version__}"
    if sys.version_info < _MIN_PYTHON:
        yield Finding("python", Status.BAD, text, "Use Python 3.11 or newer.")
    else:
        yield Finding("python", Status.GOOD, text)
    if sys.platform != "linux":
        yield Finding("system", Status.WARNING, f"{sys.platform} is not tested", "Serve on Linux.")


def check_packages(_settings: Settings, _environ: Mapping[str, str]) -> Iterator[Finding]:
    """What is installed, read without importing any of it."""
    versions: dict[str, str] = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            yield Finding("packages", Status.BAD, f"{package} is missing", f"pip install {package}")
    text = ", ".join(f"{package} {version}" for package, version in versions.items())
    numbers = [int(part) for part in versions.get("torch", "0").split("+")[0].split(".")[:2] if part.isdigit()]
    if "torch" in versions and tuple(numbers) < _MIN_TORCH:
        yield Finding("packages", Status.BAD, text, "torch is too old: pip install 'torch>=2.11'")
    else:
        yield Finding("packages", Status.GOOD, text)


def check_processor(_settings: Settings, environ: Mapping[str, str]) -> Iterator[Finding]:
    """Cores this process may use, and instructions that matter."""
    features = processor.features()
    names = [name for name in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16") if name in features]
    cores = len(os.sched_getaffinity(0))
    quota = _cpu_quota()
    text = f"{cores} cores, {' '.join(names) or platform.machine()}, {count_visible_gpus(environ)} GPUs"
    if quota is not None:
        text += f", quota of {quota:g} cores"
    if quota is not None and quota < cores:
        remedy = f"Threads beyond the quota are throttled: --threads {max(1, int(quota))}, or raise the quota."
        yield Finding("processor", Status.WARNING, text, remedy)
    elif features and "avx2" not in features and platform.machine() == "x86_64":
        yield Finding("processor", Status.WARNING, text, "Without AVX2 everything runs in PyTorch, slowly.")
    else:
        yield Finding("processor", Status.GOOD, text)


def _cpu_quota(root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """Cores that the container may use; None without a limit. Source: Linux cgroup-v2.rst, `cpu.max`."""
    with contextlib.suppress(OSError, ValueError):
        quota, period = (root / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    return None


def check_memory(_settings: Settings, _environ: Mapping[str, str]) -> Iterator[Finding]:
    """What may still be taken, the limits of control groups included."""
    available = host_memory.available_bytes()
    limits = host_memory.control_group_bytes_left()
    text = f"{available / _GIB:.1f} GiB may be taken" + (", limited by a control group" if limits else "")
    if available < _MIN_MEMORY_BYTES:
        yield Finding("memory", Status.WARNING, text, "Even small models want 1 GiB: stop others, or raise the limit.")
    else:
        yield Finding("memory", Status.GOOD, text)


def check_shared_memory(_settings: Settings, _environ: Mapping[str, str]) -> Iterator[Finding]:
    """Plans travel to the other ranks through /dev/shm, which containers make small."""
    try:
        free = shutil.disk_usage("/dev/shm").free  # noqa: S108 - looked at, not written
    except OSError:
        yield Finding(
            "shared memory", Status.WARNING, "there is no /dev/shm", "More than one shard needs it: --shm-size 1g."
        )
        return
    text = f"{free / 2**20:,.0f} MiB free in /dev/shm"
    if free < _MIN_SHARED_MEMORY_BYTES:
        yield Finding("shared memory", Status.WARNING, text, "For more than one shard: docker run --shm-size 1g.")
    else:
        yield Finding("shared memory", Status.GOOD, text)


def check_open_files(_settings: Settings, _environ: Mapping[str, str]) -> Iterator[Finding]:
    """Each connection is an open file."""
    soft, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < _MIN_OPEN_FILES:
        yield Finding(
            "open files", Status.WARNING, f"at most {soft}", f"Each client needs one: ulimit -n {_MIN_OPEN_FILES}"
        )
    else:
        yield Finding("open files", Status.GOOD, f"at most {'any number' if soft == resource.RLIM_INFINITY else soft}")


def check_cache(settings: Settings, _environ: Mapping[str, str]) -> Iterator[Finding]:
    """Downloads, converted tokenizers and sockets need places that can be written."""
    cache = Path(settings.cache_dir)
    places = [
        ("cache", cache, "--cache-dir"),
        ("run directory", Path(settings.shard_uds_path).parent, "--shard-uds-path"),
    ]
    for name, path, flag in places:
        try:
            if name == "cache":
                path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path):
                free = shutil.disk_usage(path).free
        except OSError as error:
            yield Finding(name, Status.BAD, f"{path} cannot be written ({error.strerror})", f"Choose another: {flag}.")
            continue
        text = f"{path}, {free / _GIB:.1f} GiB free"
        if name == "cache" and free < _MIN_DISK_BYTES:
            yield Finding(
                name, Status.WARNING, text, f"Models are large: make room, or choose another place with {flag}."
            )
        else:
            yield Finding(name, Status.GOOD, text)


def check_ports(settings: Settings, _environ: Mapping[str, str]) -> Iterator[Finding]:
    """Whether a server could listen where it would."""
    address = (settings.hostname.strip("[]"), settings.port)
    name = f"port {settings.port}"
    try:
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        with socket.socket(family) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            yield Finding(name, Status.WARNING, "in use, perhaps by a server of yours", "Serve on another: --port.")
        else:
            yield Finding(name, Status.BAD, f"not allowed ({error.strerror})", "Choose another: --port, --hostname.")
        return
    yield Finding(name, Status.GOOD, "free")


def check_hub(settings: Settings, _environ: Mapping[str, str]) -> Iterator[Finding]:
    """One request to the model hub."""
    try:
        answer = httpx2.get(f"{settings.hub_endpoint}/api/models?limit=1", timeout=10.0, follow_redirects=True)
    except (httpx2.TransportError, httpx2.InvalidURL) as error:
        remedy = "Check network and proxy, set HF_ENDPOINT to a mirror, or serve local files with --offline."
        yield Finding("hub", Status.BAD, f"{settings.hub_endpoint}: {type(error).__name__}", remedy)
        return
    text = f"{settings.hub_endpoint} answered {answer.status_code}"
    if answer.status_code >= 500:
        yield Finding("hub", Status.WARNING, text, "Try again later; models in the cache can be served with --offline.")
    else:
        yield Finding("hub", Status.GOOD, text)


def check_kernels(_settings: Settings, environ: Mapping[str, str]) -> Iterator[Finding]:
    """Every operation against its reference, in a process that may die of it."""
    command = [sys.executable, "-m", "weft.commands.self_test"]
    try:
        answer = subprocess.run(  # noqa: S603 - ourselves
            command, capture_output=True, text=True, timeout=_SELF_TEST_TIMEOUT_S, env=dict(environ), check=False
        )
    except subprocess.TimeoutExpired:
        yield Finding("kernels", Status.BAD, f"no result within {_SELF_TEST_TIMEOUT_S:g} s", _REPORT_IT)
        return
    if answer.returncode < 0:
        text = f"the self-test was killed by signal {-answer.returncode}"
        yield Finding("kernels", Status.BAD, text, f"Serve with --kernels reference. {_REPORT_IT}")
        return
    try:
        report = json.loads(answer.stdout)
    except ValueError:
        words = answer.stderr.strip().splitlines() or ["no output"]
        yield Finding("kernels", Status.BAD, f"the self-test failed: {words[-1][:300]}", _REPORT_IT)
        return
    yield from _kernel_findings(report)


_REPORT_IT = "Please report it, with the output of `weft doctor --json`."


def _kernel_findings(report: dict[str, object]) -> Iterator[Finding]:
    notice = str(report["notice"])
    if notice:
        remedy = "Install a C++ compiler (g++ or clang++) and start again; until then PyTorch computes, slower."
        yield Finding("kernels", Status.WARNING, f"no compiled kernels: {notice}", remedy)
    else:
        yield Finding("kernels", Status.GOOD, str(report["kernel_set"]))
    operations = report["operations"]
    assert isinstance(operations, list)  # noqa: S101 - written by our own program
    wrong = [operation for operation in operations if not operation["is_good"]]
    if not wrong:
        yield Finding("self-test", Status.GOOD, f"{len(operations)} operations agree with their references")
    for operation in wrong:
        error = "no number" if operation["error"] is None else f"{operation['error']:.2g}"
        text = (
            f"{operation['operation']} in {operation['dtype']} ({operation['kernel_set']}): error {error}, "
            f"allowed {operation['limit']:.2g}"
        )
        yield Finding("self-test", Status.BAD, text, f"Serve with --kernels reference. {_REPORT_IT}")
