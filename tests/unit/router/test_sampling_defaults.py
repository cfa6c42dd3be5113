"""What /v1 samples with when a request says nothing about it."""

from dataclasses import replace

import pytest

from weft.config import Settings, resolve
from weft.errors import UsageError
from weft.router.served import SamplingDefaults

SOME_MODEL = Settings(model_id="some/model")
RECOMMENDED = {"temperature": 0.6, "top_p": 0.95, "top_k": 20.0}


def test_the_default_model_is_greedy():
    assert SamplingDefaults.choose(Settings(), {}) == SamplingDefaults(temperature=0.0)


def test_auto_takes_what_the_models_authors_recommend():
    assert SamplingDefaults.choose(SOME_MODEL, RECOMMENDED) == SamplingDefaults(temperature=0.6, top_p=0.95, top_k=20)


def test_a_model_without_recommendations_gets_openais_values():
    assert SamplingDefaults.choose(SOME_MODEL, {}) == SamplingDefaults()


def test_none_ignores_recommendations():
    assert SamplingDefaults.choose(replace(SOME_MODEL, default_sampling="none"), RECOMMENDED) == SamplingDefaults()


def test_given_values_replace_recommendations():
    settings = replace(SOME_MODEL, default_sampling="temperature=0,min_p=0.05")

    assert SamplingDefaults.choose(settings, RECOMMENDED) == SamplingDefaults(temperature=0.0, min_p=0.05)


def test_recommendations_out_of_range_count_as_none():
    """Requests that say nothing must not fail because of a model's file."""
    broken = {"temperature": 50.0, "top_p": 7.0, "min_p": 3.0, "repetition_penalty": 0.0}

    assert SamplingDefaults.choose(SOME_MODEL, broken) == SamplingDefaults(temperature=2.0)


@pytest.mark.parametrize(
    "text", ["", "hot", "temperature", "temperature=-1", "top_k=1.5", "top_p=1,top_p=0.5", "seed=1"]
)
def test_other_texts_are_refused_by_name(text: str):
    with pytest.raises(UsageError, match="--default-sampling"):
        resolve([f"--default-sampling={text}"], {})
