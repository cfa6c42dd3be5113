"""TGI's single processes: their flags, and the socket between them."""

import os
import socket
import stat
from pathlib import Path

import pytest

from weft.commands import standalone
from weft.commands.arguments import renamed, take_flag
from weft.commands.standalone import is_answered, run_router, run_shard
from weft.config import load_settings
from weft.errors import ModelNotFoundError, PortInUseError, UsageError


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    return directory


class FakeModule:
    """Stands in for a process: looks at its run directory."""

    def __init__(self) -> None:
        self.settings = None
        self.error = None
        self.link = None
        self.said = b""
        self.public_target = None

    def main(self, argv: list[str], *, is_alone: bool) -> int:
        assert is_alone
        if self.error is not None:
            raise self.error
        run_dir = Path(argv[argv.index("--run-dir") + 1])
        assert stat.S_IMODE(run_dir.stat().st_mode) == 0o700
        self.settings = load_settings(run_dir)
        link = run_dir / "shard-0.sock"
        self.link = link.readlink() if link.is_symlink() else None
        public = Path(self.settings.shard_uds_path + "-0")
        self.public_target = public.readlink() if public.is_symlink() else None
        self.said = os.read(0, 1000) if self.link else b""
        return 7


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> FakeModule:
    module = FakeModule()
    monkeypatch.setattr(standalone.importlib, "import_module", lambda _name: module)
    return module


@pytest.fixture(autouse=True)
def own_standard_input() -> None:
    """The router replaces its standard input; the tests' own comes back afterwards."""
    saved = os.dup(0)
    yield
    os.dup2(saved, 0)
    os.close(saved)


def environment(tmp_path: Path) -> dict[str, str]:
    return {"HOME": str(tmp_path)}


def test_a_router_without_a_shard_says_how_to_start_one(tmp_path: Path, model: Path) -> None:
    with pytest.raises(UsageError, match=r"no shard answers at '.*nobody'; start one with `text-generation-server"):
        run_router(
            ["--tokenizer-name", str(model), "--master-shard-uds-path", str(tmp_path / "nobody")],
            environment(tmp_path),
        )


def test_a_router_finds_the_shard_and_is_told_that_it_is_ready(tmp_path: Path, model: Path, module: FakeModule) -> None:
    name = tmp_path / "tgi-0"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(name))
        listener.listen()
        arguments = ["--tokenizer-name", str(model), f"--master-shard-uds-path={name}", "--port", "3999",
                     "--shard-uds-path", str(tmp_path / "run")]  # fmt: skip

        status = run_router(arguments, environment(tmp_path))

    assert status == 7
    assert module.link == name
    assert module.settings.model_path == str(model)
    assert module.settings.port == 3999
    assert b'"state": "ready"' in module.said
    assert list(tmp_path.glob("run-*")) == []


def test_a_shard_makes_its_socket_known_while_it_runs(
    tmp_path: Path, model: Path, module: FakeModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(standalone.os, "environ", {})
    prefix = tmp_path / "tgi"
    Path(f"{prefix}-0").symlink_to(tmp_path / "gone")  # left behind by a shard that was killed

    status = run_shard(
        [str(model), "--uds-path", str(prefix), "--logger-level", "INFO", "--no-sharded", "--json-output"],
        environment(tmp_path),
    )

    assert status == 7
    assert module.public_target.name == "shard-0.sock"
    assert module.settings.num_shard == 1
    assert module.settings.log_level == "info"
    assert list(tmp_path.glob("tgi*")) == []


def test_a_prefix_that_is_in_use_is_refused(tmp_path: Path, model: Path, module: FakeModule) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "tgi-0"))
        listener.listen()

        with pytest.raises(PortInUseError, match="a shard answers at"):
            run_shard([str(model), "--uds-path", str(tmp_path / "tgi")], environment(tmp_path))

    assert module.settings is None


@pytest.mark.parametrize("words", [["--sharded"], ["--num-shard", "2"]])
def test_several_ranks_need_a_launcher(tmp_path: Path, model: Path, words: list[str]) -> None:
    with pytest.raises(UsageError, match="text-generation-launcher"):
        run_shard([str(model), *words], environment(tmp_path))


def test_flags_are_translated_in_both_spellings() -> None:
    assert renamed(["--a", "1", "--a=2", "--b"], {"--a": "--c"}) == ["--c", "1", "--c=2", "--b"]
    assert take_flag(["--x", "--s", "p", "--y"], "--s", "a path") == (["--x", "--y"], "p")
    assert take_flag(["--s=p"], "--s", "a path") == ([], "p")
    with pytest.raises(UsageError, match="--s: needs a path"):
        take_flag(["--s"], "--s", "a path")


def test_a_file_is_no_shard(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    assert not is_answered(tmp_path / "file")


def test_a_model_that_cannot_be_read_is_named_with_its_flag(
    tmp_path: Path, model: Path, module: FakeModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(standalone.os, "environ", {})
    module.error = ModelNotFoundError("there are no weights")

    with pytest.raises(ModelNotFoundError, match=f"^--model-id {model}: there are no weights$"):
        run_shard([str(model), "--uds-path", str(tmp_path / "tgi")], environment(tmp_path))

    assert list(tmp_path.glob("tgi*")) == []
