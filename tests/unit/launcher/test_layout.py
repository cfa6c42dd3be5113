"""Who runs where."""

import os
import socket
import stat
from pathlib import Path

import pytest

from weft.config import Settings
from weft.errors import PortInUseError, UsageError
from weft.launcher import layout


@pytest.mark.parametrize(
    ("sharded", "num_shard", "device", "num_gpus", "expected"),
    [
        (None, None, "auto", 0, 1),
        (None, None, "cpu", 4, 1),
        (None, None, "cuda", 4, 4),
        (None, None, "cuda", 0, 1),
        (None, 2, "auto", 0, 2),
        (False, None, "cuda", 4, 1),
        (False, 2, "cuda", 4, 1),
        (True, 2, "cpu", 0, 2),
        (True, None, "cuda", 2, 2),
    ],
)
def test_the_number_of_shards_follows_tgis_table(
    sharded: bool | None, num_shard: int | None, device: str, num_gpus: int, expected: int
) -> None:
    settings = Settings(sharded=sharded, num_shard=num_shard, device=device)

    assert layout.settle(settings, {}, num_gpus=num_gpus).num_shard == expected


@pytest.mark.parametrize(("device", "num_gpus"), [("cpu", 8), ("cuda", 1), ("auto", 0)])
def test_sharding_one_device_is_refused(device: str, num_gpus: int) -> None:
    with pytest.raises(UsageError, match="--sharded true needs at least two devices"):
        layout.settle(Settings(sharded=True, device=device), {}, num_gpus=num_gpus)


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"CUDA_VISIBLE_DEVICES": "0,1,2"}, 3),
        ({"CUDA_VISIBLE_DEVICES": ""}, 0),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, 0),
        ({"NVIDIA_VISIBLE_DEVICES": "GPU-a,GPU-b"}, 2),
        ({"NVIDIA_VISIBLE_DEVICES": "all"}, 2),
        ({"NVIDIA_VISIBLE_DEVICES": "none"}, 0),
        ({}, 2),
    ],
)
def test_visible_gpus_are_counted(tmp_path: Path, environ: dict[str, str], expected: int) -> None:
    (tmp_path / "0000:01").mkdir()
    (tmp_path / "0000:02").mkdir()

    assert layout.count_visible_gpus(environ, tmp_path) == expected


def test_ranks_share_the_cores_and_meet_at_a_free_port() -> None:
    cores = len(os.sched_getaffinity(0))

    alone, pair = layout.settle(Settings(), {}), layout.settle(Settings(num_shard=2), {})

    assert alone.threads == cores
    assert pair.threads == max(1, cores // 2)
    assert alone.master_port
    assert layout.settle(Settings(master_port=29500, threads=7), {}).master_port == 29500


def test_a_port_that_is_taken_is_refused() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(PortInUseError, match=f"{port} is in use"):
            layout.check_port("127.0.0.1", port)


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(PortInUseError, match="--hostname: cannot listen on"):
        layout.check_port("203.0.113.1", 3000)


def test_the_private_directory_is_private_and_goes_away(tmp_path: Path) -> None:
    settings = Settings(shard_uds_path=str(tmp_path / "weft"))

    with layout.private_directory(settings) as directory:
        assert directory.name.startswith("weft-")
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700

    assert not directory.exists()


def test_only_directories_that_nobody_uses_are_cleaned_up(tmp_path: Path) -> None:
    settings = Settings(shard_uds_path=str(tmp_path / "weft"))
    abandoned = tmp_path / "weft-abandoned"
    abandoned.mkdir()
    (abandoned / "launcher.lock").touch()
    foreign = tmp_path / "weft-foreign"
    foreign.mkdir()

    with layout.private_directory(settings) as first, layout.private_directory(settings):
        assert first.exists()
        assert not abandoned.exists()
        assert foreign.exists()


def test_children_do_not_see_settings_in_their_environment() -> None:
    environ = {"API_KEY": "k", "WEFT_API_KEY": "k", "HF_TOKEN": "t", "PORT": "1", "PATH": "/bin", "HOME": "/h"}

    assert layout.child_environment(environ) == {"PATH": "/bin", "HOME": "/h", "PYTHONUNBUFFERED": "1"}
    assert layout.shard_environment(Settings(threads=3), environ)["OMP_NUM_THREADS"] == "3"


def test_where_no_directory_can_be_made_the_flag_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    settings = Settings(shard_uds_path=str(tmp_path / "file" / "weft"))

    with pytest.raises(UsageError, match="--shard-uds-path: cannot make a directory in"):
        layout.private_directory(settings).__enter__()


@pytest.mark.parametrize(
    ("settings", "visible", "count"),
    [
        (Settings(), "", 0),
        (Settings(cuda_memory_fraction=0.5), "", 1),
        (Settings(cuda_memory_fraction=0.5, device="cpu"), "0", 1),
        (Settings(cuda_memory_fraction=0.5), "0", 0),
    ],
)
def test_what_belongs_to_gpus_is_said_to_be_idle_without_them(settings: Settings, visible: str, count: int) -> None:
    said = list(layout.settings_without_effect(settings, {"CUDA_VISIBLE_DEVICES": visible}))

    assert len(said) == count
    assert all(text.startswith("--cuda-memory-fraction has no effect") for text in said)
