"""Prints what the router needs: every dependency of the package but torch, which only shards load."""

import re
import sys
import tomllib
from pathlib import Path

ONLY_FOR_SHARDS = {"torch", "safetensors"}


def requirements(project: Path) -> list[str]:
    """Lines for pip."""
    dependencies: list[str] = tomllib.loads(project.read_text(encoding="utf-8"))["project"]["dependencies"]
    return [line for line in dependencies if re.split(r"[<>=~!;\[ ]", line)[0] not in ONLY_FOR_SHARDS]


if __name__ == "__main__":
    sys.stdout.write("\n".join(requirements(Path("pyproject.toml"))) + "\n")
