"""Commands, their names in TGI, and how failures end."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from weft import __version__, cli


def called(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Run the entry point of `words[0]` in this process; (exit code, output, errors)."""
    entry = {
        "weft": cli.main, "text-generation-launcher": cli.launcher_main, "text-generation-router": cli.router_main,
        "text-generation-server": cli.server_main, "text-generation-benchmark": cli.benchmark_main,
    }[words[0]]  # fmt: skip
    monkeypatch.setattr(sys, "argv", list(words))
    status = entry()
    output = capsys.readouterr()
    return status, output.out, output.err


@pytest.mark.parametrize("words", [("weft", "--version"), ("weft", "-V"), ("text-generation-launcher", "--version"),
                                   ("text-generation-router", "-V"), ("weft", "serve", "--version"),
                                   ("text-generation-server", "--version")])  # fmt: skip
def test_every_command_says_its_version(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
) -> None:
    assert called(monkeypatch, capsys, *words) == (0, f"weft {__version__}\n", "")


@pytest.mark.parametrize("words", [("weft",), ("weft", "--help"), ("weft", "help")])
def test_the_overview_lists_all_commands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
) -> None:
    status, output, _ = called(monkeypatch, capsys, *words)

    assert status == 0
    assert all(f"\n  {name} " in output for name in cli.COMMANDS)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("weft", "config", "show", "--help"), "weft config show --config weft.toml"),
        (("weft", "config", "-h"), "usage: weft config show"),
        (("weft", "router", "--help"), "--master-shard-uds-path PATH"),
        (("text-generation-router", "-h"), "--tokenizer-name MODEL"),
        (("weft", "shard", "--help"), "--uds-path PREFIX"),
        (("text-generation-server", "serve", "--help"), "--logger-level LEVEL"),
        (("text-generation-server", "--help"), "download-weights MODEL"),
        (("text-generation-server",), "serve MODEL"),
        (("text-generation-server", "download-weights", "--help"), "usage: weft download"),
        (("text-generation-launcher", "--help"), "--max-total-tokens"),
        (("weft", "serve", "--help-all"), "--otlp-endpoint"),
    ],
)
def test_help_explains_what_a_user_may_type_and_not_what_the_launcher_types(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], named: str
) -> None:
    status, output, errors = called(monkeypatch, capsys, *words)

    assert (status, errors) == (0, "")
    assert named in output
    assert "--run-dir" not in output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("weft", "sevre"), "no command 'sevre'"),
        (("weft", "serve", "--prot", "1"), "--prot: no such flag. Did you mean --port?"),
        (("weft", "config"), "usage: weft config show"),
        (("weft", "router", "--master-shard-uds-path", "/nobody"), "no shard answers at '/nobody'"),
        (("weft", "shard", "--rank", "0"), "--rank: no such flag"),
        (("text-generation-launcher", "--quantize", "awq"), "not supported yet"),
        (
            ("text-generation-router", "--tokenizer-name", "x", "--master-shard-uds-path", "/nobody"),
            "or start everything with text-generation-launcher",
        ),
        (("text-generation-server", "quantize"), "not supported yet; `weft serve --quantize int8`"),
        (("text-generation-server", "serv"), "no command 'serv'. Commands: serve, download-weights"),
        (("text-generation-server", "serve", "model", "--sharded"), "through text-generation-launcher"),
        (
            ("text-generation-server", "download-weights", "m", "--extension", ".bin"),
            "--extension: '.bin' is not",
        ),
        (("weft", "download", "m", "--extension"), "--extension: needs an ending of names"),
        (("text-generation-benchmark", "-t", "x", "-m", "socket"), "use --url instead of -m"),
    ],
)
def test_a_wrong_command_line_ends_with_code_2_and_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    status, output, errors = called(monkeypatch, capsys, *words)

    assert (status, output) == (2, "")
    assert errors.startswith("Error: ")
    assert message in errors


def test_a_model_that_is_not_there_ends_with_code_3(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    status, _, errors = called(
        monkeypatch, capsys, "weft", "serve", "/no/such/model", "--hostname", "127.0.0.1", "--port", "39871",
        "--shard-uds-path", str(tmp_path / "s"),
    )  # fmt: skip

    assert status == 3
    assert "there is no file or directory '/no/such/model'" in errors
    assert list(tmp_path.iterdir()) == []


def test_tgis_download_command_takes_its_own_options(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text("{}")

    status, output, _ = called(
        monkeypatch, capsys, "text-generation-server", "download-weights", str(tmp_path), "--extension", ".safetensors",
        "--logger-level", "INFO", "--json-output", "--merge-lora",
    )  # fmt: skip

    assert (status, output) == (0, f"{tmp_path}\n")


def test_config_show_gives_every_setting_its_value_and_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MAX_BEST_OF", "3")
    monkeypatch.setenv("API_KEY", "hush-hush")
    monkeypatch.setenv("PORT", "80")

    _, output, _ = called(monkeypatch, capsys, "weft", "config", "show", "--port", "3001")

    rows = {line.split()[0]: line.split()[1:] for line in output.splitlines()}
    assert rows["port"] == ["3001", "--port", "beats", "$PORT"]
    assert rows["max_best_of"] == ["3", "$MAX_BEST_OF"]
    assert rows["api_key"] == ["***", "$API_KEY"]
    assert rows["payload_limit"] == ["2000000", "default"]
    assert rows["block_size_tokens"] == ["auto", "default", "32", "on", "CPU,", "64", "on", "GPU"]
    assert rows["num_shard"][1:] == ["this", "machine", "one", "per", "visible", "GPU;", "1", "on", "CPU"]
    assert "model_path" not in rows
    assert "hush-hush" not in output


def test_config_show_says_what_serve_would_say_about_the_settings(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("weft", "config", "show", "--max-model-len", "4K", "--prometheus-port", "9100", "--device", "cpu",
             "--gpu-memory-utilization", "0.5")  # fmt: skip

    status, output, errors = called(monkeypatch, capsys, *words)

    assert status == 0
    assert "max_total_tokens" in output
    assert [line.split(": ", 1)[1].split(" ")[0] for line in errors.splitlines()] == [
        "--max-model-len", "--gpu-memory-utilization", "--prometheus-port", "--cuda-memory-fraction",
    ]  # fmt: skip


def test_the_routers_schema_is_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    status, output, _ = called(monkeypatch, capsys, "text-generation-router", "print-schema")

    assert status == 0
    assert "/generate" in json.loads(output)["paths"]


def test_a_reader_that_leaves_early_is_no_error() -> None:
    program = Path(sys.executable).parent / "weft"

    done = subprocess.run(
        f"{program} serve --help-all | head -1", shell=True, capture_output=True, text=True, check=False,
        executable="/bin/sh",
    )  # fmt: skip

    assert done.stderr == ""


@pytest.mark.parametrize(
    ("words", "environ", "errors"),
    [
        ("config show > /dev/full", {}, "Error: there is no room left where the output goes"),
        ("serve --help-all", {"PYTHONIOENCODING": "ascii"}, ""),
        ("config show $(printf '\\377')", {"PYTHONIOENCODING": "utf-8"}, ""),
    ],
)
def test_output_that_cannot_be_written_as_it_is_needs_no_trace(
    words: str, environ: dict[str, str], errors: str
) -> None:
    program = Path(sys.executable).parent / "weft"

    done = subprocess.run(
        f"{program} {words}", shell=True, capture_output=True, text=True, check=False, executable="/bin/sh",
        env={**os.environ, **environ},
    )  # fmt: skip

    assert done.stderr.startswith(errors) if errors else not done.stderr
    assert done.returncode == (1 if errors else 0)
