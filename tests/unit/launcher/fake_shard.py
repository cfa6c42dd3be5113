"""A shard for launcher tests: loads in no time and then does what FAKE_SHARD says.

ready          serve until told to stop
exit:N         end with code N while loading
crash-once     die by SIGKILL after being ready, but only the first time
crash          die by SIGKILL after being ready, every time
"""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

RECORD = Path(os.environ["FAKE_RECORD"])


def record(**entry: object) -> None:
    with RECORD.open("a") as stream:
        stream.write(json.dumps({"who": "shard", "pid": os.getpid(), **entry}) + "\n")


def log(event: str, **fields: object) -> None:
    sys.stderr.write(json.dumps({"event": event, "level": "info", "process": "shard", **fields}) + "\n")


def main() -> None:
    behaviour = os.environ.get("FAKE_SHARD", "ready")
    run_dir = Path(sys.argv[sys.argv.index("--run-dir") + 1])
    rank = int(sys.argv[sys.argv.index("--rank") + 1])
    settings = json.loads((run_dir / "settings.json").read_text())
    is_second_start = f'"rank": {rank}' in (RECORD.read_text() if RECORD.exists() else "")
    stopping = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    record(event="started", rank=rank, model_path=settings["model_path"], environ=dict(os.environ))
    sys.stderr.write("a native library says hello\n")
    if behaviour.startswith("exit:"):
        log("startup.failed", level="error", code="a_code", message="there are no weights")
        sys.exit(int(behaviour.removeprefix("exit:")))
    if behaviour == "grandchild":
        process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        record(event="grandchild", grandchild=process.pid)
    log("startup.progress", phase="kernels", percent=0, message="compiling kernels")
    log("startup.progress", phase="weights", percent=50)
    (run_dir / f"shard-{rank}.sock").touch()
    log("startup.ready", weights_bytes=2**20, kv_pool_bytes=2**21, max_total_tokens=8192, phases=[["weights", 0.01]])
    if behaviour == "crash" or (behaviour == "crash-once" and not is_second_start and rank == 0):
        sys.stderr.write("Traceback: the last words\n")
        stopping.wait(0.2)
        os.kill(os.getpid(), signal.SIGKILL)
    stopping.wait()
    record(event="stopped", rank=rank)


main()
