"""Compiles the C++ kernels into one shared library. Standard library only: `setup.py` runs this file before torch,
or anything else, is installed.

    python -m weft.kernels.cpu.build                       # next to the sources
    python -m weft.kernels.cpu.build --output-dir DIR --compiler clang++
    python -m weft.kernels.cpu.build --output-dir DIR --sanitize thread --program FILE.cpp    # also: address, undefined
"""

import argparse
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

SOURCE_DIR = Path(__file__).parent
COMPILERS = ("g++", "clang++", "c++")
SANITIZERS = ("address", "undefined", "thread")

# No -ffast-math: sums keep the order written, NaN stays NaN. No contraction: `a * b + c` is two roundings everywhere
# and one where `fma` is written, whatever the compiler. Undefined-value warnings are off because GCC 12 raises
# hundreds about its own AVX-512 headers.
COMMON_FLAGS = (
    "-std=c++17",
    "-O3",
    "-fno-math-errno",
    "-ffp-contract=off",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
    "-pthread",
)
# Kernels throw nothing; without exception tables they share no symbol with other units.
_AVX2 = ("-mavx2", "-mfma", "-fno-exceptions")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
UNITS = {
    "thread_pool.cpp": (),
    "operations.cpp": (),
    "layouts.cpp": (),
    "prefixes.cpp": (),
    "program.cpp": (),
    "interface.cpp": (),
    "quantized_operations.cpp": (),
    "quantized_interface.cpp": (),
    "quantized_avx2.cpp": (*_AVX2, "-mf16c"),
    "quantized_avx_vnni.cpp": (*_AVX2, "-mf16c", "-mavxvnni"),
    "quantized_avx512.cpp": (*_AVX512, "-mf16c"),
    "quantized_avx512_vnni.cpp": (*_AVX512, "-mf16c", "-mavx512vnni"),
    "kernels_avx2.cpp": _AVX2,
    "kernels_avx512.cpp": _AVX512,
    "kernels_avx512_bf16.cpp": (*_AVX512, "-mavx512bf16", "-mavx512vnni"),
}
"""Translation unit → flags of its instruction set. Those without flags run everywhere."""


_ELF_HEADER_BYTES = 64


class BuildError(Exception):
    """The library cannot be built here; the message is one line that says why and what would help."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildOptions:
    """What may differ between two builds of the same sources."""

    compiler: str = ""
    """Empty: the first of `COMPILERS` that is installed."""
    sanitizer: str = ""
    """Empty, or one of `SANITIZERS`."""

    def flags(self) -> tuple[str, ...]:
        """Flags of every translation unit."""
        if not self.sanitizer:
            return COMMON_FLAGS
        instrument = (f"-fsanitize={self.sanitizer}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")
        return (*COMMON_FLAGS, *instrument, "-g", "-O1")


def source_hash(options: BuildOptions | None = None) -> str:
    """Name of what a build would contain: sources and flags, not the compiler."""
    digest = hashlib.sha256()
    for path in sorted(SOURCE_DIR.iterdir()):
        if path.suffix in {".cpp", ".h", ".inl"}:
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    digest.update(repr((UNITS, (options or BuildOptions()).flags())).encode())
    return digest.hexdigest()[:16]


def library_name(options: BuildOptions | None = None) -> str:
    """File name of the library; a change of the sources changes it."""
    sanitizer = f"-{options.sanitizer}" if options and options.sanitizer else ""
    return f"libweft_cpu{sanitizer}-{source_hash(options)}.so"


def find_compiler(options: BuildOptions) -> str:
    """Path of the compiler. Raises BuildError when there is none for this machine."""
    machine = platform.machine().lower()
    if machine not in {"x86_64", "amd64"} or sys.platform != "linux":
        raise BuildError(f"C++ kernels exist for x86-64 Linux, this is {machine} {sys.platform}")
    names = (options.compiler,) if options.compiler else COMPILERS
    for name in names:
        found = shutil.which(name)
        if found:
            return found
    raise BuildError(
        f"no C++ compiler found (tried {', '.join(names)}): install g++ 12 or newer, or clang++ 14 or newer"
    )


def build(output_dir: Path, options: BuildOptions | None = None) -> Path:
    """The library in `output_dir`, compiled unless it is already there to its end.

    Concurrent builds wait for one another. Raises BuildError.
    """
    options = options or BuildOptions()
    library = output_dir / library_name(options)
    if is_whole(library):
        return library
    compiler = find_compiler(options)
    try:
        _build_once(compiler, library, options)
    except OSError as error:
        raise BuildError(
            f"compiled kernels cannot be kept in {output_dir}: {error.strerror}. Make room there, or run "
            f"`python -m weft.kernels.cpu.build` once as somebody who may write to {SOURCE_DIR}"
        ) from error
    return library


def _build_once(compiler: str, library: Path, options: BuildOptions) -> None:
    output_dir = library.parent
    output_dir.mkdir(parents=True, exist_ok=True)
    with _build_lock(output_dir):
        if not is_whole(library):
            with tempfile.TemporaryDirectory(dir=output_dir, prefix=".build-") as scratch:
                finished = _compile(compiler, Path(scratch), options)
                with finished.open("rb") as written:
                    os.fsync(written.fileno())
                finished.replace(library)
            _remove_stale(library)


def is_whole(library: Path) -> bool:
    """Whether a file is there and is a library to its end, where linkers write the table of sections.

    A crash of the machine or a full disk may leave less of it, and loading that can kill the process.
    """
    try:
        with library.open("rb") as file:
            header = file.read(_ELF_HEADER_BYTES)
            size = os.fstat(file.fileno()).st_size
    except OSError:
        return False
    if len(header) < _ELF_HEADER_BYTES or not header.startswith(b"\x7fELF\x02\x01"):  # 64 bits, little-endian
        return False
    sections = int.from_bytes(header[40:48], "little")
    entry_bytes, count = (int.from_bytes(header[place : place + 2], "little") for place in (58, 60))
    return sections + entry_bytes * count <= size


def build_program(program: Path, output_dir: Path, options: BuildOptions | None = None) -> Path:
    """An executable of the kernels and one file with a `main`, named as that file. Raises BuildError."""
    options = options or BuildOptions()
    compiler = find_compiler(options)
    output_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir, prefix=".build-") as scratch:
        objects = _compile_units(compiler, Path(scratch), options)
        executable = output_dir / program.stem
        _run([compiler, *options.flags(), f"-I{SOURCE_DIR}", str(program), *map(str, objects), "-o", str(executable)])
    return executable


def _compile(compiler: str, scratch: Path, options: BuildOptions) -> Path:
    objects = _compile_units(compiler, scratch, options)
    library = scratch / "library.so"
    _run([compiler, *options.flags(), "-shared", *map(str, objects), "-o", str(library)])
    return library


def _compile_units(compiler: str, scratch: Path, options: BuildOptions) -> list[Path]:
    define = f'-DWEFT_SOURCE_HASH="{source_hash(options)}"'

    def compile_unit(unit: str) -> Path:
        target = scratch / f"{unit}.o"
        _run([compiler, *options.flags(), *UNITS[unit], define, "-c", str(SOURCE_DIR / unit), "-o", str(target)])
        return target

    # The largest unit first, so that it does not run alone at the end.
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        return list(pool.map(compile_unit, reversed(UNITS)))


def _run(command: list[str]) -> None:
    # The command is ours: compiler path, fixed flags, files of this folder.
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode != 0:
        first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[:200])
        raise BuildError(f"{Path(command[0]).name} failed: {first}")


@contextmanager
def _build_lock(directory: Path) -> Iterator[None]:
    """Lets one process at a time build in a directory; the lock is on the directory itself and leaves no file."""
    import fcntl

    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _remove_stale(library: Path) -> None:
    prefix = library.name.rsplit("-", 1)[0]
    for other in library.parent.glob(f"{prefix}-????????????????.so"):
        if other != library:
            other.unlink(missing_ok=True)


def main() -> None:
    """Entry point of `python -m weft.kernels.cpu.build`."""
    parser = argparse.ArgumentParser(description="Compile the CPU kernels.")
    parser.add_argument("--output-dir", type=Path, default=SOURCE_DIR, help="default: next to the sources")
    parser.add_argument("--compiler", default="", help=f"default: the first of {', '.join(COMPILERS)}")
    parser.add_argument("--sanitize", default="", choices=("", *SANITIZERS))
    parser.add_argument("--program", type=Path, help="build an executable with this file instead of the library")
    arguments = parser.parse_args()
    options = BuildOptions(compiler=arguments.compiler, sanitizer=arguments.sanitize)
    try:
        if arguments.program:
            built = build_program(arguments.program, arguments.output_dir, options)
        else:
            built = build(arguments.output_dir, options)
    except BuildError as error:
        sys.exit(f"weft: CPU kernels not built: {error}")
    print(built)  # noqa: T201 - a command


if __name__ == "__main__":
    main()
