"""Starts the real launcher with fake children: `python -m tests.unit.launcher.fake_launch FLAG …`."""

import os
import sys
import time

from weft.config import resolve
from weft.errors import StartupError
from weft.launcher.launcher import Programs, launch

FAKES = "tests.unit.launcher."


def main() -> int:
    programs = Programs(router=FAKES + "fake_router", shard=FAKES + "fake_shard")
    try:
        return launch(resolve(sys.argv[1:], os.environ), os.environ, time.monotonic(), programs)
    except StartupError as error:
        sys.stderr.write(error.message + "\n")
        return error.exit_code


sys.exit(main())
