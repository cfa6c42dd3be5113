"""What a user reads when the server is ready."""

import json
import shlex

import pytest

from weft.config import Settings
from weft.launcher import banner

READY = {
    "num_parameters": 134_515_008, "model_type": "llama", "dtype": "bfloat16", "device_name": "CPU",
    "kernel_set": "avx2", "weights_bytes": 270 * 2**20, "kv_pool_bytes": 4 * 2**30, "activation_bytes": 2**20,
    "free_bytes": 8 * 2**30,
    "max_total_tokens": 8192, "max_batch_total_tokens": 186_400, "max_num_sequences": 128, "batch_invariant": True,
    "phases": [["load", 0.7], ["warmup", 0.5]],
}  # fmt: skip


def test_phases_add_up_to_the_whole_start() -> None:
    phases = banner.all_phases([("launch", 0.2), ("download", 0.0), ("import", 1.1)], READY, 3.0)

    assert sum(seconds for _, seconds in phases) == pytest.approx(3.0)
    assert [name for name, _ in phases] == ["launch", "import", "load", "warmup", "other"]


def test_the_banner_has_the_numbers_that_matter_in_at_most_15_lines() -> None:
    settings = Settings(num_shard=2, threads=1, model_id="org/model", api_key="hush")

    lines = banner.banner(settings, READY, [("load", 1.0)])

    text = "\n".join(lines)
    assert len(lines) <= 15
    for part in ("org/model", "135M parameters", "bfloat16", "avx2", "2 shards × 1 thread", "weights 270.0 MiB",
                 "KV pool 4.0 GiB", "free 8.0 GiB", "8,192", "186,400", "batch-invariant", "http://localhost:3000/docs",
                 "1.0 s = load 1.0"):  # fmt: skip
        assert part in text
    assert "hush" not in text


def test_the_banner_says_what_few_bits_cost_where_that_is_known() -> None:
    receipt = {"reference": "bfloat16", "top1_agreement": 0.91174, "kl_nats": 0.01384, "num_tokens": 2538}

    def rows(quality: object) -> list[str]:
        return [line for line in banner.banner(Settings(), {**READY, "quality": quality}, []) if "quality" in line]

    (row,) = rows(receipt)
    assert "keeps 91.2% of bfloat16's most likely tokens, KL 0.0138 nats, on 2,538 tokens" in row
    assert rows(None) == []


@pytest.mark.parametrize("reference", ["org/model", "/models/it's here/m", 'quo"te'])
def test_the_request_can_be_pasted_into_a_shell(reference: str) -> None:
    words = shlex.split(banner.curl(Settings(model_id=reference)))

    assert json.loads(words[words.index("-d") + 1])["model"] == reference


@pytest.mark.parametrize(
    ("hostname", "url"),
    [("0.0.0.0", "http://localhost:3000"), ("::", "http://localhost:3000"), ("::1", "http://[::1]:3000"),
     ("10.0.0.7", "http://10.0.0.7:3000")],
)  # fmt: skip
def test_the_url_works_on_this_machine(hostname: str, url: str) -> None:
    assert banner.base_url(Settings(hostname=hostname)) == url
