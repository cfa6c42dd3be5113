"""Measures what rounding costs the default model, and writes the receipts that the package brings.

    python benchmark/quality.py            # a table
    python benchmark/quality.py --write    # also src/weft/server/quality_receipts.json

Each row compares a numeric configuration with the same weights unrounded, on the text of `weft.server.quality`. Run it
again when a scheme's arithmetic or the text changes; `tests/numerics/test_quality.py` notices when that was forgotten.
"""

import argparse
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

from weft.config import DEFAULT_MODEL, resolve
from weft.launcher.download import fetch
from weft.server import quality
from weft.server.startup import measure_quality

RECEIPTS = Path(quality.__file__).with_name("quality_receipts.json")
CONFIGURATIONS: tuple[tuple[str, ...], ...] = (
    ("--quantize", "int8"),
    ("--quantize", "int4"),
    ("--quantize", "int4", "--quantize-group-size", "64"),
    ("--quantize", "int4", "--quantize-group-size", "128"),
    ("--gguf-compute", "packed"),
    ("--kv-cache-dtype", "int8"),
    ("--quantize", "int8", "--kv-cache-dtype", "int8"),
    ("--quantize", "int4", "--kv-cache-dtype", "int8"),
    ("--gguf-compute", "packed", "--kv-cache-dtype", "int8"),
)
DTYPES = ("bfloat16", "float32")


def main() -> int:
    """Measure every configuration; one line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="replace the package's receipts")
    is_kept = parser.parse_args().write
    entries = [_measure((*flags, "--dtype", dtype)) for dtype in DTYPES for flags in CONFIGURATIONS]
    if is_kept:
        RECEIPTS.write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
    return 0


def _measure(flags: tuple[str, ...]) -> dict[str, str | float]:
    settings = resolve(("--max-total-tokens", "2048", *flags), os.environ)
    settings = replace(settings, model_path=str(fetch(DEFAULT_MODEL, settings).path))
    digest, configuration, receipt = measure_quality(settings)
    key = quality.receipt_key(configuration)
    sys.stdout.write(
        f"{key['weights']:20} {key['kv_cache']:9} {key['dtype']:9} {receipt.top1_agreement:7.2%} {receipt.kl_nats:8.4f}"
        f" {receipt.num_tokens:6,}\n"
    )
    return {"weights_digest": digest, **key, **quality.to_json(receipt)}


if __name__ == "__main__":
    sys.exit(main())
