"""Fingerprints: what changes which part of them, and what changes none."""

from dataclasses import replace
from pathlib import Path

import pytest

from weft.server.fingerprint import NumericConfiguration, digest_of_weights, fingerprint

CONFIGURATION = NumericConfiguration(
    dtype="bfloat16",
    weights="",
    kv_cache="bfloat16",
    block_size_tokens=32,
    world_size=1,
    is_long_context=False,
    watermark=(0.5, 2.0),
)
OTHER_CHOICES = {
    "dtype": "float32",
    "weights": "int8",
    "kv_cache": "int8",
    "block_size_tokens": 16,
    "world_size": 2,
    "is_long_context": True,
    "watermark": (0.25, 2.0),
}


def checkpoint(directory: Path, weights: bytes, config: str = "{}") -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(config)
    (directory / "model.safetensors").write_bytes(weights)
    return directory


@pytest.mark.parametrize("size", [1, 8, 4095, 4096, 4097, 3 * 2**20 + 5, 4 * 2**20 + 1])
def test_every_single_byte_of_the_weights_counts(tmp_path: Path, size: int) -> None:
    weights = bytes(range(256)) * (size // 256 + 1)
    original = digest_of_weights(checkpoint(tmp_path / "original", weights[:size]))

    for number, place in enumerate({0, size // 2, size - 1}):
        changed = bytearray(weights[:size])
        changed[place] ^= 1
        assert digest_of_weights(checkpoint(tmp_path / f"{number}", bytes(changed))) != original


def test_the_length_and_the_configuration_count_and_the_place_does_not(tmp_path: Path) -> None:
    original = digest_of_weights(checkpoint(tmp_path / "a", b"12345678"))

    assert digest_of_weights(checkpoint(tmp_path / "b", b"12345678")) == original
    assert digest_of_weights(checkpoint(tmp_path / "longer", b"12345678\0")) != original
    assert digest_of_weights(checkpoint(tmp_path / "other", b"12345678", '{"rope_theta": 1}')) != original
    # Parts that lie 4 KiB apart may not change places.
    pages = [bytes([value]) * 4096 for value in (1, 2)]
    assert digest_of_weights(checkpoint(tmp_path / "c", b"".join(pages))) != digest_of_weights(
        checkpoint(tmp_path / "d", b"".join(reversed(pages)))
    )


def test_every_numeric_choice_changes_the_part_in_the_middle_and_no_other() -> None:
    assert set(OTHER_CHOICES) == set(NumericConfiguration.__dataclass_fields__)
    weights, middle, kernels = fingerprint("ab" * 32, CONFIGURATION, "").split("-")
    assert weights == "abababab"

    for name, value in OTHER_CHOICES.items():
        other = fingerprint("ab" * 32, replace(CONFIGURATION, **{name: value}), "").split("-")
        assert (other[0], other[2]) == (weights, kernels)
        assert other[1] != middle, name


def test_kernels_have_a_part_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = fingerprint("ab" * 32, CONFIGURATION, "").split("-")
    monkeypatch.setattr("weft.server.fingerprint.source_hash", lambda: "other sources")

    other = fingerprint("ab" * 32, CONFIGURATION, "").split("-")

    assert other[:2] == mine[:2]
    assert other[2] != mine[2]


def test_rounding_is_known() -> None:
    assert not CONFIGURATION.is_rounded
    assert replace(CONFIGURATION, weights="int8").is_rounded
    assert replace(CONFIGURATION, kv_cache="int8").is_rounded
