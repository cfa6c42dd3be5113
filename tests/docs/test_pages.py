"""Pages name only what exists: files, make targets, flags."""

import re
import subprocess
from pathlib import Path

import pytest

from weft.config import options

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    ROOT / name
    for name in subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.splitlines()
    if (ROOT / name).is_file()
)  # fmt: skip
FLAGS_OF_OTHERS = {
    # pages that speak of other programs, and of our tools that are no settings
    "--cached", "--check", "--config", "--fail-with-body", "--help", "--help-all", "--no-deps", "--peers", "--quick",
    "--rank", "--repeats", "--run-dir", "--sanitize", "--seed", "--seeds", "--version", "--world-size", "--json",
}  # fmt: skip


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text(encoding="utf-8"))

    assert [target for target in targets if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "ARCHITECTURE.md"])
def test_make_targets_and_flags_exist(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    flags = {spelling for option in options().values() for spelling in (option.flag, *option.aliases) if spelling}
    flags |= {"--no-" + flag.removeprefix("--") for flag in flags} | FLAGS_OF_OTHERS

    assert set(re.findall(r"(?:`|\$ )make ([a-z0-9]+)", text)) - targets == set()
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+[a-z]", text)) - flags == set()


def test_the_map_in_the_readme_is_the_tree() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([a-z_]+(?:/|\.py))`", text.split("| in `src/weft` |")[1]))
    present = {path.name + "/" for path in (ROOT / "src/weft").iterdir() if (path / "__init__.py").is_file()}

    assert {name for name in named if not (ROOT / "src/weft" / name).exists()} == set()
    assert present - named <= {"proto/", "telemetry/", "benchmark/", "commands/"}


def test_no_page_and_no_source_is_without_its_last_newline() -> None:
    assert [page.name for page in PAGES if not page.read_text(encoding="utf-8").endswith("\n")] == []
