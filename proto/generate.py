"""Writes the Python stubs of `weft/v1/generate.proto` into the package: `make proto`; `--check` only compares.

The file is compiled under the path it has inside the package, so that the stubs import each other as
`weft.proto.v1`.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "proto/weft/v1/generate.proto"
TARGET = ROOT / "src/weft/proto/v1"
NAMES = ("generate_pb2.py", "generate_pb2.pyi", "generate_pb2_grpc.py", "generate_pb2_grpc.pyi")


def main() -> int:
    """Returns 1 when `--check` finds a stub that differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    is_check = parser.parse_args().check
    with tempfile.TemporaryDirectory() as directory:
        generated = generate(Path(directory))
        stale = [name for name in NAMES if (generated / name).read_text() != (TARGET / name).read_text()]
        if is_check and stale:
            sys.stderr.write(f"{', '.join(stale)}: not what {SOURCE.name} says; run `make proto`\n")
            return 1
        for name in () if is_check else stale:
            shutil.copy(generated / name, TARGET / name)
    return 0


def generate(directory: Path) -> Path:
    """Compile in `directory`; returns where the stubs are."""
    inside = directory / "weft/proto/v1"
    inside.mkdir(parents=True)
    shutil.copy(SOURCE, inside)
    outputs = [f"--{kind}_out={directory}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")]
    plugins = Path(sys.executable).parent
    subprocess.run(  # noqa: S603 (our own compiler on our own file)
        [
            sys.executable, "-m", "grpc_tools.protoc", f"-I{directory}", *outputs,
            f"--plugin=protoc-gen-mypy={plugins / 'protoc-gen-mypy'}",
            f"--plugin=protoc-gen-mypy_grpc={plugins / 'protoc-gen-mypy_grpc'}",
            str(inside / SOURCE.name),
        ],
        check=True,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    return inside


if __name__ == "__main__":
    sys.exit(main())
