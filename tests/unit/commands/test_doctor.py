import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from weft.commands import doctor as doctor_module
from weft.commands.doctor import (
    Status,
    check_cache,
    check_hub,
    check_kernels,
    check_memory,
    check_packages,
    check_ports,
    check_processor,
    doctor,
)
from weft.config import resolve
from weft.errors import UsageError


def settings(tmp_path, *flags):
    return resolve(["--cache-dir", str(tmp_path / "cache"), "--hostname", "127.0.0.1", *flags], {})


def findings(check, tmp_path, *flags):
    return list(check(settings(tmp_path, *flags), {}))


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def fake_self_test(monkeypatch, code):
    """Run this program instead of the self-test."""

    def run(command, **options):
        del command
        return real([sys.executable, "-c", code], **options)

    real = subprocess.run
    monkeypatch.setattr(doctor_module.subprocess, "run", run)


def report(**changes):
    operation = {
        "kernel_set": "avx2",
        "operation": "linear",
        "dtype": "float32",
        "implementation": "compiled",
        "error": 1e-7,
        "limit": 1e-4,
        "is_good": True,
    }
    return {"kernel_set": "cpu: avx2", "notice": "", "operations": [operation | changes]}


def test_a_healthy_machine_is_fit(tmp_path, capsys):
    flags = ["--no-self-test", "--json", "--cache-dir", str(tmp_path), "--port", str(free_port())]
    assert doctor([*flags, "--hostname", "127.0.0.1"], {"HOME": str(tmp_path)}) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["is_fit"] is True
    assert {finding["name"] for finding in shown["findings"]} >= {"python", "packages", "memory", "cache"}


def test_one_bad_finding_is_the_exit_code_and_comes_with_a_remedy(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert doctor(["--no-self-test", "--cache-dir", str(tmp_path / "file" / "x"), "--hostname", "127.0.0.1"], {}) == 1
    shown = capsys.readouterr().out
    assert "Choose another: --cache-dir." in shown
    assert "1 of" in shown


def test_the_cache_is_tried_by_writing(tmp_path):
    assert findings(check_cache, tmp_path)[0].status is Status.GOOD
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_port_in_use_is_a_warning_because_it_may_be_our_own_server(tmp_path):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        assert findings(check_ports, tmp_path, "--port", str(port))[0].status is Status.WARNING
    assert findings(check_ports, tmp_path, "--port", str(free_port()))[0].status is Status.GOOD


def test_a_missing_or_old_package_is_bad(tmp_path, monkeypatch):
    real = doctor_module.metadata.version

    def version(name):
        if name == "uvicorn":
            raise doctor_module.metadata.PackageNotFoundError(name)
        return "2.10.1+cpu" if name == "torch" else real(name)

    monkeypatch.setattr(doctor_module.metadata, "version", version)
    found = findings(check_packages, tmp_path)
    assert [finding.status for finding in found] == [Status.BAD, Status.BAD]
    assert found[0].remedy == "pip install uvicorn"
    assert "too old" in found[1].remedy


def test_little_memory_is_a_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor_module.host_memory, "available_bytes", lambda: 2**20)
    assert findings(check_memory, tmp_path)[0].status is Status.WARNING


@pytest.mark.parametrize(
    ("content", "expected"), [("max 100000", None), ("150000 100000", 1.5), ("rubbish", None), (None, None)]
)
def test_the_containers_share_of_the_cores_is_read(tmp_path, content, expected):
    if content is not None:
        (tmp_path / "cpu.max").write_text(content)
    assert doctor_module._cpu_quota(tmp_path) == expected


def test_more_threads_than_the_quota_are_warned_of(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor_module, "_cpu_quota", lambda: 0.5)
    found = findings(check_processor, tmp_path)[0]
    assert (found.status, "--threads 1" in found.remedy) == (Status.WARNING, True)


def test_a_hub_that_does_not_answer_is_bad_with_its_remedy(tmp_path):
    found = findings(check_hub, tmp_path, "--hub-endpoint", f"http://127.0.0.1:{free_port()}")[0]
    assert (found.status, "HF_ENDPOINT" in found.remedy) == (Status.BAD, True)


def test_kernels_that_agree_are_good(tmp_path, monkeypatch):
    fake_self_test(monkeypatch, f"print({json.dumps(report())!r})")
    assert [finding.status for finding in findings(check_kernels, tmp_path)] == [Status.GOOD, Status.GOOD]


@pytest.mark.parametrize(("error", "shown"), [(0.5, "error 0.5, allowed 0.0001"), (None, "error no number")])
def test_a_wrong_kernel_is_named_with_its_error(tmp_path, monkeypatch, error, shown):
    fake_self_test(monkeypatch, f"print({json.dumps(report(error=error, is_good=False))!r})")
    found = findings(check_kernels, tmp_path)[-1]
    assert (found.status, shown in found.text) == (Status.BAD, True)
    assert "linear in float32 (avx2)" in found.text
    assert "--kernels reference" in found.remedy


def test_missing_kernels_are_a_warning_with_the_reason(tmp_path, monkeypatch):
    fake_self_test(monkeypatch, f"print({json.dumps(report() | {'notice': 'no compiler'})!r})")
    found = findings(check_kernels, tmp_path)[0]
    assert (found.status, "no compiler" in found.text) == (Status.WARNING, True)


@pytest.mark.parametrize(
    ("code", "shown"),
    [
        ("import os; os.kill(os.getpid(), 4)", "killed by signal 4"),
        ("raise SystemError('bang')", "SystemError: bang"),
        ("pass", "no output"),
    ],
)
def test_a_self_test_that_dies_is_told(tmp_path, monkeypatch, code, shown):
    fake_self_test(monkeypatch, code)
    found = findings(check_kernels, tmp_path)[0]
    assert (found.status, shown in found.text) == (Status.BAD, True)


def test_wrong_flags_are_named():
    with pytest.raises(UsageError, match="--selftest"):
        doctor(["--selftest"], {"HOME": str(Path.home())})
