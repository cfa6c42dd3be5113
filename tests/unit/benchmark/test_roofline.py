"""The limit of a load: bytes and operations of known shapes, added up by hand."""

from dataclasses import replace

import pytest

from weft.benchmark.profiles import PROFILES, Profile
from weft.benchmark.roofline import (
    WEIGHT_FORMATS,
    Machine,
    ModelShape,
    decode_step,
    load_limit,
    prompt,
    weight_bytes,
)

TINY = ModelShape(num_layers=2, hidden=8, feed_forward=16, query_heads=4, kv_heads=2, head_size=2, vocabulary=10)
SMOLLM2 = ModelShape(
    num_layers=30, hidden=576, feed_forward=1536, query_heads=9, kv_heads=3, head_size=64, vocabulary=49152
)
BF16, INT8 = WEIGHT_FORMATS["bf16"], WEIGHT_FORMATS["int8"]
MACHINE = Machine(bytes_per_s=50e9, peaks={"bf16": 1e12, "int8": 2e12})


def make_profile(**changes: object) -> Profile:
    profile = Profile(name="x", title="x", concurrency=1, num_requests=1, prompt_tokens=128, output_tokens=128)
    return replace(profile, **changes)  # type: ignore[arg-type]


def test_weights_and_cache_of_a_tiny_model_are_as_counted_by_hand() -> None:
    # Per layer: q 8×8, k and v 8×4 each, output 8×8, and three matrices of 8×16.
    assert TINY.layer_weights == 2 * (64 + 32 + 32 + 64 + 3 * 128)
    assert TINY.output_weights == 80
    assert TINY.kv_bytes_per_token == 2 * 2 * 2 * 2 * 2


def test_a_default_model_has_the_bytes_of_its_checkpoint() -> None:
    assert weight_bytes(SMOLLM2, BF16) == pytest.approx(269e6, rel=0.01)
    assert weight_bytes(SMOLLM2, INT8) == pytest.approx(134.5e6, rel=0.01)
    assert SMOLLM2.kv_bytes_per_token == 23_040


def test_shapes_are_read_from_a_configuration() -> None:
    config = {
        "num_hidden_layers": 2,
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 10,
    }

    assert ModelShape.from_config(config) == TINY
    assert ModelShape.from_config({**config, "head_dim": 32}).head_size == 32


def test_a_step_reads_weights_once_and_every_sequence_s_cache() -> None:
    one, many = (decode_step(TINY, BF16, rows, context=10) for rows in (1, 5))

    assert many.num_bytes - one.num_bytes == 4 * 10 * TINY.kv_bytes_per_token
    assert many.operations["bf16"] == 5 * one.operations["bf16"]


def test_attention_is_held_against_the_bfloat16_peak_whatever_the_weights_are() -> None:
    work = decode_step(TINY, INT8, rows=1, context=10)

    assert work.operations == {
        "int8": 2 * (TINY.layer_weights + TINY.output_weights),
        "bf16": TINY.attention_operations(10),
    }


def test_a_prompt_attends_to_what_comes_before_and_samples_once() -> None:
    work = prompt(TINY, INT8, new_tokens=3, cached_tokens=4)

    assert work.operations["int8"] == 2 * (3 * TINY.layer_weights + TINY.output_weights)
    assert work.operations["bf16"] == TINY.attention_operations(5 + 6 + 7)


def test_one_stream_is_bound_by_the_sum_of_its_parts() -> None:
    profile = make_profile()
    step_s = (weight_bytes(SMOLLM2, BF16) + 192 * SMOLLM2.kv_bytes_per_token) / MACHINE.bytes_per_s
    prompt_s = prompt(SMOLLM2, BF16, 128).seconds_of_operations(MACHINE)

    limit = load_limit(SMOLLM2, BF16, profile, MACHINE)

    assert limit.seconds == pytest.approx(127 * step_s + prompt_s)
    assert limit.cause == "bytes"


def test_many_streams_are_bound_by_operations_and_few_bits_by_fewer_seconds() -> None:
    profile = PROFILES["streams-64"]

    exact, rounded = (load_limit(SMOLLM2, form, profile, MACHINE) for form in (BF16, INT8))

    assert exact.cause == "operations"
    assert rounded.seconds < exact.seconds


def test_streams_that_share_a_step_take_less_than_one_after_the_other() -> None:
    alone = load_limit(SMOLLM2, BF16, make_profile(num_requests=16), MACHINE)
    together = load_limit(SMOLLM2, BF16, make_profile(num_requests=16, concurrency=16), MACHINE)

    assert together.seconds < alone.seconds / 2


def test_a_cached_prefix_is_not_computed_again() -> None:
    profile = PROFILES["shared-prefix"]

    first = load_limit(SMOLLM2, BF16, profile, MACHINE)
    second = load_limit(SMOLLM2, BF16, profile, MACHINE, is_prefix_cached=True)

    prefix_s = prompt(SMOLLM2, BF16, profile.shared_prefix_tokens).seconds_of_operations(MACHINE)
    assert first.seconds - second.seconds == pytest.approx(prefix_s, rel=0.3)


def test_the_share_is_one_at_the_limit() -> None:
    limit = load_limit(SMOLLM2, BF16, make_profile(), MACHINE)

    assert limit.share(limit.seconds) == 1.0
    assert limit.share(2 * limit.seconds) == 0.5
