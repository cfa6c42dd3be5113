"""A server that speaks like the model hub, with faults by schedule: what `HF_ENDPOINT` points to in tests."""

import hashlib
import json
import re
import socket
import threading
from collections import defaultdict
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" * 6 + "cafe"
LARGE_BYTES = 10_000
"""Files from this size on are kept by their sha256, as the hub does with large files."""


class LookalikeHub:
    """One repository, `organisation/model`, and what to do wrong with it.

    `faults[file]` is a list of things to do on the next downloads of that file, first to last: `503`, `429`,
    `truncate`, `reset`, `wrong` (right size, wrong bytes); when it is empty, all goes well. The file name `api` stands
    for the list of files.
    """

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.faults: dict[str, list[str]] = defaultdict(list)
        self.sent: dict[str, int] = defaultdict(int)
        self.ranges: list[str] = []
        self.retry_after_s = "0"
        self.required_token = ""
        self._lock = threading.Lock()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_GET(self) -> None:
                hub.answer(self)

            do_HEAD = do_GET  # noqa: N815 (the name that the standard library calls)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def etag(self, name: str) -> str:
        return self._etag(self.files[name])

    @staticmethod
    @cache
    def _etag(body: bytes) -> str:
        if len(body) >= LARGE_BYTES:
            return hashlib.sha256(body).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()

    def next_fault(self, name: str) -> str:
        with self._lock:
            return self.faults[name].pop(0) if self.faults[name] else ""

    def answer(self, to: BaseHTTPRequestHandler) -> None:
        path = unquote(urlsplit(to.path).path)
        if self.required_token and to.headers.get("Authorization") != f"Bearer {self.required_token}":
            self._reply(to, 401, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif re.fullmatch(rf"/api/models/organisation/model/revision/(main|{COMMIT})", path):
            self._list_files(to)
        elif found := re.fullmatch(rf"/organisation/model/resolve/(main|{COMMIT})/(.+)", path):
            self._send_file(to, found[2])
        elif path.startswith("/api/models/organisation/model/"):
            self._reply(to, 404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        else:
            self._reply(to, 404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def _list_files(self, to: BaseHTTPRequestHandler) -> None:
        fault = self.next_fault("api")
        if fault:
            self._reply(to, int(fault), b"{}", {"Retry-After": self.retry_after_s})
            return
        siblings = []
        for name, body in self.files.items():
            sibling: dict[str, object] = {"rfilename": name, "size": len(body), "blobId": self.etag(name)}
            if len(body) >= LARGE_BYTES:
                sibling["lfs"] = {"sha256": self.etag(name), "size": len(body), "pointerSize": 130}
            siblings.append(sibling)
        body = json.dumps({"id": "organisation/model", "sha": COMMIT, "siblings": siblings}).encode()
        self._reply(to, 200, body, {"Content-Type": "application/json"})

    def _send_file(self, to: BaseHTTPRequestHandler, name: str) -> None:
        if name not in self.files:
            self._reply(to, 404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        body = self.files[name]
        etag = self.etag(name)
        headers = {
            "ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes", "X-Linked-Etag": f'"{etag}"',
            "X-Linked-Size": str(len(body)),
        }  # fmt: skip
        if to.command == "HEAD":
            self._reply(to, 200, body, headers)
            return
        fault = self.next_fault(name)
        if fault.isdigit():
            self._reply(to, int(fault), b"", {"Retry-After": self.retry_after_s})
            return
        status, start = 200, 0
        wanted = re.fullmatch(r"bytes=(\d+)-", to.headers.get("Range") or "")
        if wanted:
            status, start = 206, int(wanted[1])
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
            self.ranges.append(name)
        part = body[start:]
        if fault == "wrong":
            part = bytes(byte ^ 1 for byte in part)
        self._reply(to, status, part, headers, cut=fault in {"truncate", "reset"}, is_reset=fault == "reset", name=name)

    def _reply(
        self,
        to: BaseHTTPRequestHandler,
        status: int,
        body: bytes,
        headers: dict[str, str],
        *,
        cut: bool = False,
        is_reset: bool = False,
        name: str = "",
    ) -> None:
        to.send_response(status)
        for key, value in headers.items():
            to.send_header(key, value)
        to.send_header("Content-Length", str(len(body)))
        to.end_headers()
        if to.command == "HEAD":
            return
        sent = body[: len(body) // 2] if cut else body
        to.wfile.write(sent)
        self.sent[name] += len(sent)
        if cut:
            to.wfile.flush()
            if is_reset:
                linger = b"\1\0\0\0\0\0\0\0"
                to.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            to.close_connection = True
