"""`make replay`: the default model answers a thousand requests, and must answer them again under other conditions.

Each rounding of the weights serves random requests over HTTP and records them; then `weft verify` asks them again of
new servers with other chunk sizes, threads, memory and numbers of neighbours, in other orders. Ends with 1 when a bit
differs. Takes some minutes per rounding.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.e2e.harness import RunningServer, run_command, serving
from tests.e2e.recorded_load import send_random_requests

from weft.config import DEFAULT_MODEL

FORMS: dict[str, tuple[str, ...]] = {
    "bfloat16": ("--dtype", "bfloat16"),
    "int8": ("--quantize", "int8"),
    "int4": ("--quantize", "int4"),
    "packed": ("--gguf-compute", "packed"),
    "int8 cache": ("--kv-cache-dtype", "int8"),
}
CONDITIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "one by one, one thread": ("1", ("--threads", "1")),
    "64 at once": ("64", ()),
    "small chunks": ("16", ("--max-batch-prefill-tokens", "32", "--inter-token-target-ms", "1")),
    "no prefix cache": ("48", ("--no-prefix-caching",)),
    "little memory": ("32", ("--max-batch-total-tokens", "320", "--max-total-tokens", "304")),
}
"""Name → (requests at once, flags)."""
PREEMPTS = "little memory"
"""The condition that proves nothing unless sequences lose their memory and are computed again."""


def main() -> int:
    """Returns 1 when any replay differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1000, help="per rounding; default: 1000")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of requests and orders; default: the time")
    parser.add_argument("--form", action="append", choices=FORMS, help="only this rounding; may be repeated")
    parser.add_argument("--condition", action="append", choices=CONDITIONS, help="only this one; may be repeated")
    arguments = parser.parse_args()
    _say(f"--seed {arguments.seed}")
    is_good = True
    for form in arguments.form or FORMS:
        with tempfile.TemporaryDirectory() as directory:
            recording = Path(directory) / "recording.jsonl"
            _record(form, recording, arguments.requests, arguments.seed)
            for name in arguments.condition or CONDITIONS:
                is_good &= _verify(form, name, recording, arguments.seed)
    return 0 if is_good else 1


def _record(form: str, recording: Path, count: int, seed: int) -> None:
    with serving(DEFAULT_MODEL, *FORMS[form], "--record", str(recording)) as server:
        num_sequences = send_random_requests(server, count, seed, max_new_tokens=96)
        wait_recorded(server, num_sequences)
    _say(f"{form}: {num_sequences:,} sequences recorded")


def wait_recorded(server: RunningServer, num_sequences: int) -> None:
    """Until every sequence has its line; the server's own stands before them."""
    server.wait_until(
        lambda: server.metrics().value("weft_recorded_lines", outcome="written") == num_sequences + 1, "all recorded"
    )


def _verify(form: str, condition: str, recording: Path, seed: int) -> bool:
    concurrency, flags = CONDITIONS[condition]
    words = ["--concurrency", concurrency, "--seed", str(seed)]
    begun = time.monotonic()
    with serving(DEFAULT_MODEL, *FORMS[form], *flags) as server:
        command = [sys.executable, "-m", "weft", "verify", str(recording), "--url", server.base_url, *words]
        ended = run_command(command, timeout_s=3600)
        num_preemptions = int(server.metrics().value("weft_engine_preemptions"))
    outcome = f"{ended.stdout.strip() or ended.stderr.strip()} {num_preemptions:,} preemptions"
    _say(f"{form}, {condition}: {time.monotonic() - begun:.0f} s, {outcome}")
    return ended.returncode == 0 and (num_preemptions > 0 or condition != PREEMPTS)


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
