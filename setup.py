"""Compiles the CPU kernels while the package is built or installed; everything else stands in pyproject.toml.

Without a compiler the package installs all the same: operations then run in PyTorch, and the server says so.
"""

import runpy
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.dist import Distribution

KERNELS = Path("src/weft/kernels/cpu")


class BuildWithKernels(build_py):
    """`build_py`, after the shared library has been put beside its sources, where package data is collected."""

    def run(self) -> None:
        """Build the library if this machine can, then the package."""
        kernels = runpy.run_path(str(KERNELS / "build.py"))
        try:
            kernels["build"](KERNELS.resolve())
        except kernels["BuildError"] as error:
            self.warn(f"CPU kernels not built, operations will run in PyTorch: {error}")
        super().run()


class PlatformDistribution(Distribution):
    """A distribution whose wheel is tied to the machine, because it holds a compiled library."""

    def has_ext_modules(self) -> bool:
        """Say that there is native code."""
        return True


setup(cmdclass={"build_py": BuildWithKernels}, distclass=PlatformDistribution)
