"""The kernels under the compiler's sanitizers, called from C++: `exercise.cpp` says what it calls."""

import shutil
import subprocess
from pathlib import Path

import pytest

from weft.kernels.cpu import build

pytestmark = [pytest.mark.numerics, pytest.mark.slow]


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
@pytest.mark.parametrize("sanitizer", build.SANITIZERS)
def test_no_sanitizer_complains_about_the_kernels(sanitizer: str, tmp_path: Path) -> None:
    options = build.BuildOptions(compiler="g++", sanitizer=sanitizer)
    program = build.build_program(Path(__file__).with_name("exercise.cpp"), tmp_path, options)

    done = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[:4000]
