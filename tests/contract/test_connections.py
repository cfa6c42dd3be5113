"""Bytes on a real socket: limits of headers and bodies, disconnects, half requests, smuggling, keep-alive."""

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator

import pytest
from tests.contract.house import build_house, say
from tests.contract.live import Live, post, read_all, serve

from weft.limits import LIMITS
from weft.router import body as body_module
from weft.router import protocol

GENERATE = post("/generate", {"inputs": "a"})
HEAD = b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with serve() as server:
        yield server


@pytest.fixture
def short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time limits of a tenth of a second."""
    limits = dataclasses.replace(LIMITS, header_timeout_s=0.1)
    monkeypatch.setattr(protocol, "LIMITS", limits)
    monkeypatch.setattr(body_module, "LIMITS", limits)


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def body_of(answer: bytes) -> dict[str, object]:
    return json.loads(answer.partition(b"\r\n\r\n")[2])


def test_an_answer_names_no_server_and_has_an_id(live: Live):
    answer = live.exchange(GENERATE)

    assert status_of(answer) == 200
    assert b"x-request-id: " in answer
    assert b"server:" not in answer.lower()


def test_a_connection_serves_many_requests(live: Live):
    request = GENERATE.replace(b"connection: close\r\n", b"")
    with live.connect() as connection:
        for _ in range(3):
            connection.sendall(request)
            answer = connection.recv(1 << 16)
            while b'{"generated_text":"hello"}' not in answer:
                answer += connection.recv(1 << 16)
            assert status_of(answer) == 200


def test_a_stream_arrives_in_chunks(live: Live):
    answer = live.exchange(post("/generate_stream", {"inputs": "a"}))

    assert b"transfer-encoding: chunked" in answer
    assert answer.count(b"data: ") == 6
    assert answer.endswith(b"0\r\n\r\n")


class TestHeaders:
    def test_a_hundred_headers_pass_and_one_more_does_not(self, live: Live):
        own = GENERATE.count(b"\r\n") - 2
        fits = [b"x-%d: y" % index for index in range(LIMITS.max_headers - own)]

        assert status_of(live.exchange(post("/generate", {"inputs": "a"}, *fits))) == 200
        assert status_of(live.exchange(post("/generate", {"inputs": "a"}, *fits, b"one: more"))) == 431

    @pytest.mark.parametrize("size", [LIMITS.max_header_bytes + 1, 1_000_000])
    def test_one_long_header_is_431(self, live: Live, size: int):
        answer = live.exchange(post("/generate", {"inputs": "a"}, b"x: " + b"y" * size))

        assert status_of(answer) == 431
        assert b"x-request-id" in answer
        assert "headers" in str(body_of(answer)["error"])

    def test_an_endless_header_is_cut_off_and_not_kept(self, live: Live):
        """48 MB in one header made the plain server grow by as much."""
        with live.connect() as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\nx: ")
            sent = 0
            with contextlib.suppress(ConnectionError):
                while sent < 4 * LIMITS.max_header_bytes * 32:
                    sent += connection.send(b"y" * 65536)
            assert sent < 4 * LIMITS.max_header_bytes * 32

    def test_a_long_url_is_refused(self, live: Live):
        answer = live.exchange(b"GET /%b HTTP/1.1\r\nhost: x\r\n\r\n" % (b"a" * (LIMITS.max_url_bytes + 1)))

        assert status_of(answer) == 431

    @pytest.mark.usefixtures("short_times")
    @pytest.mark.parametrize("sent", [b"", b"G", b"GET /health HTTP/1.1\r\nhost: x\r\n"])
    def test_headers_that_never_end_are_given_up(self, sent: bytes):
        with serve() as live, live.connect() as connection:
            connection.sendall(sent)
            answer = read_all(connection)

        assert answer == b"" if sent == b"" else status_of(answer) == 408

    @pytest.mark.usefixtures("short_times")
    def test_a_connection_that_waits_between_requests_is_no_slow_one(self):
        with serve() as live, live.connect() as connection:
            request = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"
            connection.sendall(request)
            assert status_of(connection.recv(1 << 16)) == 200
            time.sleep(0.3)
            connection.sendall(request)
            assert status_of(connection.recv(1 << 16)) == 200


class TestBodies:
    def test_a_declared_size_over_the_limit_is_refused_before_the_body_comes(self, live: Live):
        head = (
            b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 99999999\r\n\r\n"
        )

        assert status_of(live.exchange(head)) == 413

    def test_a_chunked_body_over_the_limit_is_cut_off(self, live: Live):
        head = HEAD + b"transfer-encoding: chunked\r\n\r\n"
        chunk = b"10000\r\n" + b"a" * 65536 + b"\r\n"
        with live.connect() as connection:
            connection.sendall(head)
            with contextlib.suppress(ConnectionError):
                for _ in range(100):
                    connection.sendall(chunk)
            with contextlib.suppress(ConnectionError):
                assert status_of(connection.recv(1 << 16)) == 413

    @pytest.mark.parametrize(
        ("head", "status"),
        [
            (HEAD, 413),
            (HEAD.replace(b"application/json", b"text/plain"), 415),
            (HEAD.replace(b"/generate", b"/nothing"), 404),
            (HEAD.replace(b"/generate", b"/health"), 405),
        ],
    )
    @pytest.mark.parametrize("is_chunked", [False, True])
    def test_who_sends_a_large_body_to_its_end_sees_why_it_was_refused(
        self, live: Live, head: bytes, status: int, is_chunked: bool
    ):
        """A connection closed with unread bytes is reset, and common clients then report the reset alone."""
        size = 8_000_000
        if is_chunked:
            body = b"transfer-encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (size, b"a" * size)
        else:
            body = b"content-length: %d\r\n\r\n%b" % (size, b"a" * size)
        with live.connect() as connection:
            connection.sendall(head + body)
            answer = read_all(connection)

        assert status_of(answer) == status
        assert b"connection: close" in answer

    def test_a_refused_body_that_never_comes_holds_its_connection_for_a_moment_only(self, live: Live):
        started = time.monotonic()

        assert status_of(live.exchange(HEAD + b"content-length: 99999999\r\n\r\n")) == 413

        assert time.monotonic() - started < LIMITS.linger_s / 2

    @pytest.mark.usefixtures("short_times")
    def test_a_body_that_drips_is_given_up(self):
        head = HEAD + b"content-length: 100\r\n\r\n"
        with serve() as live:
            assert status_of(live.exchange(head + b"{")) == 408


class TestSmuggling:
    """What two servers could read differently is read by none."""

    @pytest.mark.parametrize(
        "head",
        [
            b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
            b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\n{}",
            b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n",
            b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: +2\r\n\r\n{}",
            b"POST /generate HTTP/1.1\r\nhost: x\r\ntransfer-encoding: identity, chunked, x\r\n\r\n",
            b"GET /health HTTP/1.1\r\nhost : x\r\n\r\n",
            b"GET /health HTTP/1.1\r\nx: a\r\n b\r\n\r\n",
            b"GET /health HTTP/1.1\r\nx: a\x00b\r\n\r\n",
            b"GET /health HTTP/9.9\r\n\r\n",
            b"GET /health\r\n\r\n",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        ],
    )
    def test_an_ambiguous_request_is_refused_and_the_connection_closed(self, live: Live, head: bytes):
        answer = live.exchange(head + b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n")

        assert answer == b"" or status_of(answer) in (400, 408, 415)
        assert b"tgi_request_count" not in answer


class TestDisconnects:
    @pytest.mark.parametrize("path", ["/generate", "/generate_stream", "/v1/completions"])
    def test_closing_the_socket_aborts_the_request(self, path: str):
        import asyncio

        steps: list[asyncio.Semaphore] = []

        def make_house():
            steps.append(asyncio.Semaphore(2))
            return build_house(say("hello" * 5), steps=steps[0])

        with serve(make_house) as live:
            with live.connect() as connection:
                connection.sendall(post(path, {"inputs": "a", "prompt": "a"}))
                _until(lambda: live.house.backend.requests)
            _until(lambda: live.house.backend.aborted)

            assert live.house.context.admission.used == 0

    def test_a_reader_that_stops_reading_does_not_stop_others(self):
        long_text = "x" * 4000

        def make_house():
            return build_house(say(long_text), max_total_tokens=5000)

        with serve(make_house) as live, live.connect() as lazy:
            lazy.sendall(post("/generate_stream", {"inputs": "a", "parameters": {"top_n_tokens": 5}}))
            _until(lambda: live.house.backend.requests)

            assert status_of(live.exchange(post("/generate", {"inputs": "a"}))) == 200


def _until(condition) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
