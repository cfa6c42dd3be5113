"""First code of every child: die with the launcher, be named, then become the module that was asked for.

`python -m weft.launcher.child PARENT_PID TITLE MODULE [ARGUMENT …]`. A launcher that is killed cannot stop anybody,
so each child asks the kernel to be killed with it; where the kernel has no such service, a thread watches. This is
not done between fork and exec, because code there would cost Python the fast vfork path.
"""

import ctypes
import os
import runpy
import signal
import sys
import threading
import time

import setproctitle

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent_pid: int) -> None:
    """Have this process killed when its parent ends, even if that has happened already."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    else:
        threading.Thread(target=_watch_parent, args=(parent_pid,), daemon=True).start()
    if os.getppid() != parent_pid:
        os._exit(1)


def _watch_parent(parent_pid: int) -> None:
    while os.getppid() == parent_pid:
        time.sleep(0.5)
    os._exit(1)


def main() -> None:
    """Turn into `sys.argv[3]`, run as a program with the remaining arguments."""
    parent_pid, title, module = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    die_with_parent(parent_pid)
    setproctitle.setproctitle(title)
    sys.argv = sys.argv[3:]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
