"""A router for launcher tests: writes down each state it is told, drains when asked, does what FAKE_ROUTER says."""

import json
import os
import select
import signal
import sys
import time
from pathlib import Path

RECORD = Path(os.environ["FAKE_RECORD"])
STDIN = 0


def record(**entry: object) -> None:
    with RECORD.open("a") as stream:
        stream.write(json.dumps({"who": "router", "pid": os.getpid(), **entry}) + "\n")


def read_states() -> None:
    """Take down what is in the pipe now; every line was written at once."""
    text = os.read(STDIN, 65536).decode()
    for line in text.splitlines():
        state = json.loads(line)
        record(event="state", **state)
        if state["state"] == "ready":
            sys.stderr.write('{"event": "router.ready", "level": "info"}\n')
    if not text:
        record(event="end of file")
        sys.exit(0)


def main() -> None:
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGTERM, lambda *_: None)
    record(event="started", argv=sys.argv[1:], environ=sorted(os.environ))
    if os.environ.get("FAKE_ROUTER", "").startswith("exit:"):
        sys.exit(int(os.environ["FAKE_ROUTER"].removeprefix("exit:")))
    while True:
        readable, _, _ = select.select([STDIN, woken], [], [])
        if STDIN in readable:
            read_states()
        elif woken in readable:
            break
    record(event="draining")
    time.sleep(float(os.environ.get("FAKE_DRAIN_S", "0")))
    record(event="stopped")


main()
