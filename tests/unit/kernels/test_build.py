"""Building the compiled kernels: names, refusals, what is left behind."""

import shutil
from pathlib import Path

import pytest

from weft.kernels.cpu import build, library
from weft.kernels.cpu.build import BuildError, BuildOptions


def test_another_sanitizer_is_another_library() -> None:
    names = {build.library_name(BuildOptions(sanitizer=name)) for name in ("", *build.SANITIZERS)}

    assert len(names) == 4
    assert build.library_name() in names


def test_a_change_of_any_source_changes_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in build.SOURCE_DIR.iterdir():
        if path.suffix in {".cpp", ".h", ".inl"}:
            shutil.copy(path, tmp_path)
    before = build.library_name()
    monkeypatch.setattr(build, "SOURCE_DIR", tmp_path)

    assert build.library_name() == before
    for path in sorted(tmp_path.iterdir()):
        path.write_text(path.read_text() + "\n")
        assert build.library_name() != before
        before = build.library_name()


def test_every_source_is_a_unit() -> None:
    assert {path.name for path in build.SOURCE_DIR.glob("*.cpp")} == set(build.UNITS)


def test_a_missing_compiler_is_one_line_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"no C\+\+ compiler found \(tried no-such-compiler\): install g\+\+ 12"):
        build.build(tmp_path, BuildOptions(compiler="no-such-compiler"))


def test_a_machine_of_another_kind_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build.platform, "machine", lambda: "aarch64")

    with pytest.raises(BuildError, match="C\\+\\+ kernels exist for x86-64 Linux, this is aarch64"):
        build.find_compiler(BuildOptions())


def test_a_compiler_that_fails_is_reported_and_leaves_nothing(tmp_path: Path) -> None:
    compiler = tmp_path / "broken"
    compiler.write_text("#!/bin/sh\necho 'fatal error: no such flag' >&2\nexit 1\n")
    compiler.chmod(0o755)
    output = tmp_path / "out"

    with pytest.raises(BuildError, match="broken failed: fatal error: no such flag"):
        build.build(output, BuildOptions(compiler=str(compiler)))
    assert list(output.iterdir()) == []


def test_a_place_that_cannot_be_written_to_is_named_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(BuildError, match=r"cannot be kept in .*file/kernels: Not a directory\. Make room there"):
        build.build(tmp_path / "file" / "kernels", BuildOptions(compiler="true"))


def an_elf_file() -> bytes:
    """A header that says that one section of 64 bytes is described behind it, and that description."""
    header = bytearray(64)
    header[:6] = b"\x7fELF\x02\x01"
    header[40:48] = (64).to_bytes(8, "little")
    header[58:60], header[60:62] = (64).to_bytes(2, "little"), (1).to_bytes(2, "little")
    return bytes(header) + bytes(64)


def test_a_library_that_is_there_is_not_built_again(tmp_path: Path) -> None:
    library = tmp_path / build.library_name()
    library.write_bytes(an_elf_file())

    assert build.build(tmp_path, BuildOptions(compiler="no-such-compiler")) == library


@pytest.mark.parametrize("num_bytes", [0, 10, 64, 127])
def test_a_library_that_a_crash_cut_short_is_built_again(tmp_path: Path, num_bytes: int) -> None:
    (tmp_path / build.library_name()).write_bytes(an_elf_file()[:num_bytes])

    with pytest.raises(BuildError, match="no-such-compiler"):
        build.build(tmp_path, BuildOptions(compiler="no-such-compiler"))


def test_what_is_no_library_at_all_is_built_again(tmp_path: Path) -> None:
    path = tmp_path / "library.so"
    path.write_bytes(b"hello" * 100)

    assert not build.is_whole(path)
    assert not build.is_whole(tmp_path / "missing.so")


def test_the_library_in_use_is_whole_and_all_but_its_end_is_not(tmp_path: Path) -> None:
    found = library._find()
    if found is None:
        pytest.skip("nothing is compiled here")
    cut = tmp_path / "cut.so"
    cut.write_bytes(found.read_bytes()[:-1])

    assert build.is_whole(found)
    assert not build.is_whole(cut)


def test_units_that_run_everywhere_use_the_oldest_instructions_only() -> None:
    assert all(build.UNITS[unit] == () for unit in ("thread_pool.cpp", "operations.cpp", "interface.cpp"))


def test_whether_the_first_use_compiles_is_known_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = build.library_name()
    cache = tmp_path / "cache"
    cache.mkdir()
    monkeypatch.setattr(library, "library_name", lambda: name)
    monkeypatch.setattr(library, "SOURCE_DIR", tmp_path)
    monkeypatch.setattr(library, "_cache_directory", lambda: cache)
    monkeypatch.setattr(library._Process, "loaded", None)

    assert not library.is_compiled()
    (cache / name).write_bytes(an_elf_file())
    assert library.is_compiled()
