"""The documentation page in a browser: it is made by its script from the document, without any other host."""

import json
import re
import shutil
import subprocess
import urllib.request
from pathlib import Path

import pytest
from tests.e2e.harness import RunningServer

BROWSER = shutil.which("chromium")

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(BROWSER is None, reason="needs chromium")]


def test_every_operation_has_a_card_and_a_link_opens_it(running_server: RunningServer, tmp_path: Path) -> None:
    with urllib.request.urlopen(f"{running_server.base_url}/openapi.json") as answer:
        paths = json.load(answer)["paths"]
    names = {operation["operationId"] for methods in paths.values() for operation in methods.values()}

    page = subprocess.run(
        [
            str(BROWSER),
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={tmp_path}",
            "--virtual-time-budget=8000",
            "--dump-dom",
            f"{running_server.base_url}/docs#post_v1_chat_completions",
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout

    cards = re.findall(r'<details class="route" id="([^"]+)"', page)
    assert sorted(cards) == sorted(names)
    opened = re.findall(r'<details class="route" id="([^"]+)" open=""', page)
    assert opened == ["post_v1_chat_completions"]
    for heading in ("Body", "Answer", "Events of a stream", "Errors", "Try it"):
        assert f"<h3>{heading}</h3>" in page
