"""The router process: what it derives before it serves."""

import pytest

from weft.core.info import EngineInfo
from weft.router.main import compute_type


@pytest.mark.parametrize(
    ("device_type", "device_name", "world_size", "shown"),
    [
        ("cuda", "NVIDIA H200", 2, "2-nvidia-h200"),
        ("cpu", "", 1, "1-cpu"),
        ("cpu", "Intel(R) Xeon(R)  CPU\t@ 2 GHz", 1, "1-intel(r)-xeon(r)-cpu-@-2-ghz"),
        ("cpu", "Prozessor™ ä", 1, "1-prozessor-"),
    ],
)
def test_the_compute_type_is_tgis_number_of_shards_and_name_of_the_device(
    device_type: str, device_name: str, world_size: int, shown: str
):
    """It becomes a header: ASCII without spaces."""
    info = EngineInfo(
        model_id="m",
        vocab_size=1,
        max_total_tokens=2,
        device_type=device_type,
        device_name=device_name,
        world_size=world_size,
    )

    assert compute_type(info) == shown
