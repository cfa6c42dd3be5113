"""The machine beside the measurement: memory and CPU time of a server's processes, what others used, DRAM speed.

A figure from a shared or throttled machine says little without these next to it.
"""

import ctypes
import mmap
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import psutil

BYTES_PER_MB = 10**6


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessTreeUsage:
    """A process and all its descendants at one moment."""

    num_processes: int
    rss_mb: float
    """Resident memory; pages shared between the processes count once for each."""
    pss_mb: float
    """Proportional set size: shared pages are divided among those who map them. 0 where the system has none."""
    cpu_s: float
    """User and system time since the processes started, ended children not included."""


def measure_process_tree(pid: int) -> ProcessTreeUsage:
    """Add up what the process and its descendants use. Processes that end meanwhile are left out."""
    num_processes = 0
    rss = pss = cpu_s = 0.0
    for process in process_tree(pid):
        try:
            times = process.cpu_times()
            memory = process.memory_full_info()
        except psutil.NoSuchProcess:
            continue
        num_processes += 1
        cpu_s += times.user + times.system
        rss += memory.rss
        pss += getattr(memory, "pss", 0)
    return ProcessTreeUsage(
        num_processes=num_processes, rss_mb=rss / BYTES_PER_MB, pss_mb=pss / BYTES_PER_MB, cpu_s=cpu_s
    )


def process_tree(pid: int) -> list[psutil.Process]:
    """The process and all its descendants; empty when it is gone."""
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def thread_cpu_s(pid: int) -> dict[int, float]:
    """User and system seconds of every thread of a process tree."""
    seconds: dict[int, float] = {}
    for process in process_tree(pid):
        try:
            seconds.update({thread.id: thread.user_time + thread.system_time for thread in process.threads()})
        except psutil.Error:
            continue
    return seconds


def control_plane_s(
    before: Mapping[int, float], after: Mapping[int, float], num_kernel_threads: int, model_s: float
) -> float:
    """CPU seconds between two readings that did not go into the model: HTTP, text, wire, scheduling, making batches.

    The busiest threads are the kernels'; the busiest of all also runs the steps' Python, so what it spent beyond the
    `model_s` seconds inside models counts.
    """
    spent = sorted((seconds - before.get(thread, 0.0) for thread, seconds in after.items()), reverse=True)
    beside_models = max(0.0, spent[0] - model_s) if spent else 0.0
    return sum(spent[num_kernel_threads:]) + beside_models


def _machine_busy_s() -> float:
    times = psutil.cpu_times()
    # Guest time is part of user time already.
    idle = times.idle + getattr(times, "iowait", 0.0)
    guest = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)
    return float(sum(times) - idle - guest)


def _own_cpu_s() -> float:
    times = psutil.Process().cpu_times()
    return times.user + times.system


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuShare:
    """Who used the CPU while something ran."""

    wall_s: float
    server_s: float
    client_s: float
    foreign_percent: float
    """Share of the whole machine that neither server nor client used, stolen time included."""


class CpuMeter:
    """Measures between its creation and `read` who used the CPU: the server's processes, this one, others."""

    def __init__(self, server_pid: int) -> None:
        self._server_pid = server_pid
        self._start = self._sample()

    def _sample(self) -> tuple[float, float, float, float]:
        server_s = measure_process_tree(self._server_pid).cpu_s
        return time.perf_counter(), _machine_busy_s(), server_s, _own_cpu_s()

    def read(self) -> CpuShare:
        """Shares since the meter was made."""
        wall_s, busy_s, server_s, client_s = (
            end - start for start, end in zip(self._start, self._sample(), strict=True)
        )
        foreign_s = max(0.0, busy_s - server_s - client_s)
        return CpuShare(
            wall_s=wall_s,
            server_s=server_s,
            client_s=client_s,
            # Busy time is counted in ticks, so short spans can seem fuller than full.
            foreign_percent=min(100.0, 100.0 * foreign_s / (wall_s * (psutil.cpu_count() or 1))),
        )


def measure_read_bandwidth(num_bytes: int = 256 * 2**20, duration_s: float = 0.4) -> float:
    """GB/s of sequential reads from DRAM on all cores together.

    On some virtual machines it flips between two levels within minutes, and everything that is bound by memory with
    it. `memchr` looks for a byte that is not there: the C library reads with its widest loads, and ctypes releases
    the interpreter lock. The buffer is larger than any cache.
    """
    memchr: Callable[[int, int, int], int | None] = ctypes.CDLL(None).memchr
    memchr.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)  # type: ignore[attr-defined]
    memchr.restype = ctypes.c_void_p  # type: ignore[attr-defined]
    num_threads = len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else 1
    part = num_bytes // num_threads
    passes = [0] * num_threads
    with mmap.mmap(-1, part * num_threads) as memory:
        for offset in range(0, len(memory), mmap.PAGESIZE):
            memory[offset] = 1  # a page that was never written is the one shared zero page
        buffer = (ctypes.c_char * len(memory)).from_buffer(memory)
        base = ctypes.addressof(buffer)
        deadline = time.perf_counter() + duration_s

        def read_part(index: int) -> None:
            while time.perf_counter() < deadline:
                memchr(base + index * part, 2, part)
                passes[index] += 1

        threads = [threading.Thread(target=read_part, args=(index,)) for index in range(num_threads)]
        start = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        elapsed_s = time.perf_counter() - start
        del buffer
    return sum(passes) * part / elapsed_s / 1e9
