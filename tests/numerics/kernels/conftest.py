"""Every test of a kernel runs once per kernel set that this machine has."""

from collections.abc import Iterator

import pytest

from weft.kernels import registry
from weft.kernels.cpu import library


@pytest.fixture(params=library.INSTRUCTION_SETS)
def compiled(request: pytest.FixtureRequest) -> Iterator[str]:
    """Forces one instruction set of the compiled kernels; skips where it is missing."""
    name: str = request.param
    if name not in registry.kernel_sets():
        pytest.skip(f"{name} is not available here: {registry.notice() or 'the CPU lacks it'}")
    with registry.force(name):
        yield name


@pytest.fixture(params=("reference", *library.INSTRUCTION_SETS))
def kernel_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """As `compiled`, and the reference itself, which must keep its own promises."""
    name: str = request.param
    if name not in registry.kernel_sets():
        pytest.skip(f"{name} is not available here: {registry.notice() or 'the CPU lacks it'}")
    with registry.force(name):
        yield name


@pytest.fixture(autouse=True)
def _threads_stay_as_they_were() -> Iterator[None]:
    loaded = library.load().library
    before = loaded.weft_threads() if loaded is not None else 1
    yield
    if loaded is not None:
        loaded.weft_set_threads(before)


@pytest.fixture
def without_compiled_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A machine where the library could not be built; gives the notice."""
    notice = "no C++ compiler found"
    monkeypatch.setattr(library._Process, "loaded", library.Loaded(None, notice))
    caches = (registry._rows, registry.kernel_sets, registry.find)
    for cached in caches:
        cached.cache_clear()
    yield notice
    for cached in caches:
        cached.cache_clear()
