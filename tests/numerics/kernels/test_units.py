"""What the compiler makes of the kernels, where it matters on machines that no test runs on."""

import shutil
import subprocess
from pathlib import Path

import pytest

from weft.kernels.cpu import build

pytestmark = pytest.mark.numerics


@pytest.mark.skipif(shutil.which("g++") is None or shutil.which("nm") is None, reason="no g++ or nm")
@pytest.mark.slow
@pytest.mark.parametrize("unit", [unit for unit, flags in build.UNITS.items() if flags])
def test_a_unit_of_a_newer_instruction_set_shares_no_function(unit: str, tmp_path: Path) -> None:
    """A function that two units define, the linker keeps once: were it this unit's, older machines would die of it."""
    target = tmp_path / "unit.o"
    flags = [*build.COMMON_FLAGS, *build.UNITS[unit], "-O0", "-c"]
    subprocess.run(["g++", *flags, str(build.SOURCE_DIR / unit), "-o", str(target)], check=True, capture_output=True)

    symbols = subprocess.run(["nm", "-C", str(target)], check=True, capture_output=True, text=True).stdout
    shared = [line for line in symbols.splitlines() if line[17:18] in {"W", "V", "u"}]
    assert shared == []
