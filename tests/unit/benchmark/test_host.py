"""What a server's processes use is added up over the whole tree."""

import os
import subprocess
import sys
import time

from weft.benchmark.host import CpuMeter, control_plane_s, measure_process_tree, measure_read_bandwidth, thread_cpu_s

SPAWN_CHILD = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "print('up', flush=True); input()"], stdin=subprocess.PIPE)
input()
child.communicate(b"\\n")
"""


def test_a_process_tree_includes_grandchildren() -> None:
    process = subprocess.Popen([sys.executable, "-c", SPAWN_CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()

    usage = measure_process_tree(process.pid)
    process.communicate(b"\n")

    assert usage.num_processes == 2
    assert usage.rss_mb > 10


def test_a_process_that_is_gone_uses_nothing() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()

    assert measure_process_tree(process.pid).num_processes == 0


def test_cpu_time_of_the_client_is_not_called_foreign() -> None:
    bystander = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    meter = CpuMeter(bystander.pid)
    started = time.process_time()
    while time.process_time() - started < 0.06:
        pass

    share = meter.read()
    bystander.communicate(b"\n")

    assert share.client_s >= 0.04
    assert share.server_s <= share.client_s
    assert 0.0 <= share.foreign_percent <= 100.0


def test_memory_bandwidth_is_a_plausible_number() -> None:
    assert 0.1 < measure_read_bandwidth(num_bytes=16 * 2**20, duration_s=0.02) < 10_000


def test_the_control_plane_is_what_kernels_did_not_use() -> None:
    before = {1: 1.0, 2: 1.0, 3: 0.5}
    after = {1: 11.0, 2: 10.0, 3: 0.75, 4: 0.25}

    # Thread 1 runs the models' kernels for 9 of its 10 seconds, thread 2 only kernels.
    assert control_plane_s(before, after, num_kernel_threads=2, model_s=9.0) == 1.0 + 0.25 + 0.25


def test_a_model_that_says_more_than_its_thread_used_takes_nothing_from_others() -> None:
    assert control_plane_s({}, {1: 1.0, 2: 0.5}, num_kernel_threads=1, model_s=5.0) == 0.5


def test_threads_of_this_process_have_used_time() -> None:
    assert sum(thread_cpu_s(os.getpid()).values()) > 0
