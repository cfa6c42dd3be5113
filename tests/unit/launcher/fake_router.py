"""A router for launcher tests: writes down each state it is told, drains when asked, does what FAKE_ROUTER says."""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

RECORD = Path(os.environ["FAKE_RECORD"])


def record(**entry: object) -> None:
    with RECORD.open("a") as stream:
        stream.write(json.dumps({"who": "router", "pid": os.getpid(), **entry}) + "\n")


def main() -> None:
    draining = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: draining.set())
    record(event="started", argv=sys.argv[1:], environ=sorted(os.environ))
    if os.environ.get("FAKE_ROUTER", "").startswith("exit:"):
        sys.exit(int(os.environ["FAKE_ROUTER"].removeprefix("exit:")))

    def read_states() -> None:
        for line in sys.stdin:
            record(event="state", **json.loads(line))
        record(event="end of file")
        os._exit(0)

    threading.Thread(target=read_states, daemon=True).start()
    draining.wait()
    record(event="draining")
    time.sleep(float(os.environ.get("FAKE_DRAIN_S", "0")))
    record(event="stopped")


main()
