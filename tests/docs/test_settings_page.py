"""The pages that are tables of the code say what the code says."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from weft.config import options

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_docs", ROOT / "docs/generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", ["settings.md", "cli.md"])
def test_a_generated_page_is_current(generator: ModuleType, page: str) -> None:
    assert generator.is_current(page), "run `make docs`"


def test_every_flag_and_variable_is_on_the_settings_page() -> None:
    page = (ROOT / "docs/reference/settings.md").read_text()

    for option in options().values():
        if not option.is_internal:
            assert option.flag is None or f"`{option.flag}`" in page
            assert all(f"`{variable}`" in page for variable in option.env)


def test_every_dependency_has_its_reason_on_the_dependencies_page() -> None:
    page = (ROOT / "docs/reference/dependencies.md").read_text()
    project = (ROOT / "pyproject.toml").read_text()
    required = re.findall(r'^  "([\w-]+)(?:\[\w+\])?>=?', project.split("[project.scripts]")[0], re.MULTILINE)

    missing = [name for name in required if f"| {name} |" not in page]

    assert len(required) > 20
    assert missing == []


def test_constraints_pin_every_dependency_exactly() -> None:
    project = (ROOT / "pyproject.toml").read_text().split("[project.scripts]")[0]
    pinned = {
        line.partition("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    }
    required = {name.lower() for name in re.findall(r'^  "([\w-]+)', project, re.MULTILINE)} - {"private"}

    assert required - pinned == set()
    assert all("+" not in line for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)


@pytest.mark.parametrize("arguments", [["--help"], ["serve", "--help"], ["serve", "--help-all"], ["config", "show"]])
def test_help_is_given_without_loading_what_takes_long(arguments: list[str]) -> None:
    script = (
        "import sys; from weft import cli; sys.argv = ['weft', *sys.argv[1:]]; status = cli.main();"
        "heavy = {'torch', 'transformers', 'grpc', 'huggingface_hub', 'numpy', 'asyncio'} & set(sys.modules);"
        "sys.exit(f'loaded: {heavy}' if heavy else status)"
    )

    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) > 5


def test_plain_help_is_short_and_full_help_is_complete() -> None:
    def shown(flag: str) -> str:
        command = [sys.executable, "-m", "weft", "serve", flag]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    short, full = shown("--help"), shown("--help-all")

    assert len(re.findall(r"^  (?:-\w, )?--", short, re.MULTILINE)) <= 14
    assert all(option.flag is None or f"{option.flag}" in full for option in options().values())
    assert max(map(len, full.splitlines())) <= 100


@pytest.mark.parametrize("command", ["text-generation-launcher", "text-generation-router", "text-generation-server"])
def test_tgis_commands_exist(command: str) -> None:
    path = Path(sys.executable).parent / command

    done = subprocess.run(
        [path, "--version" if "server" not in command else "nonsense"], capture_output=True, check=False
    )

    assert done.returncode == (2 if "server" in command else 0)
