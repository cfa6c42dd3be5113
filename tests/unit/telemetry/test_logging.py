"""Log events: one line each, nothing secret, nothing forged."""

import io
import json
import logging

import pytest
import structlog

from weft.telemetry import logging as weft_logging


def configured(**options: object) -> io.StringIO:
    stream = io.StringIO()
    weft_logging.configure(process="router", stream=stream, **options)
    return stream


@pytest.mark.parametrize("json_output", [True, False])
def test_an_event_is_one_line_whatever_clients_put_into_it(json_output: bool):
    stream = configured(json_output=json_output)

    structlog.get_logger().info("request.finished", route="/\n[info] forged\r\x1b[31m\x00")

    assert stream.getvalue().count("\n") == 1
    assert "\x1b" not in stream.getvalue()
    assert "\x00" not in stream.getvalue()


def test_json_events_have_name_level_time_and_process():
    stream = configured(json_output=True)

    structlog.get_logger().warning("engine.step_slow", rank=0)

    event = json.loads(stream.getvalue())
    assert (event["event"], event["level"], event["process"], event["rank"]) == (
        "engine.step_slow",
        "warning",
        "router",
        0,
    )
    assert event["timestamp"].endswith("Z")


@pytest.mark.parametrize("json_output", [True, False])
def test_secrets_do_not_appear(json_output: bool):
    stream = configured(json_output=json_output, secrets=["sk-secret"])

    structlog.get_logger().info("x", header="Bearer sk-secret", text="sk-secret")
    try:
        int("sk-secret")
    except ValueError:
        structlog.get_logger().exception("y")

    assert "sk-secret" not in stream.getvalue()
    assert weft_logging.REDACTED in stream.getvalue()


@pytest.mark.parametrize("json_output", [True, False])
def test_tracebacks_show_no_local_variables(json_output: bool):
    stream = configured(json_output=json_output)

    def handle(prompt: str) -> None:
        raise RuntimeError(f"{len(prompt)} characters")

    try:
        handle("a private " + "prompt")
    except RuntimeError:
        structlog.get_logger().exception("request.bug")

    assert "RuntimeError: 16 characters" in stream.getvalue()
    assert "a private prompt" not in stream.getvalue()


def test_levels_filter():
    stream = configured(level="warn", json_output=True)

    structlog.get_logger().info("quiet")
    structlog.get_logger().error("loud")

    assert [json.loads(line)["event"] for line in stream.getvalue().splitlines()] == ["loud"]


def test_an_unknown_level_is_info():
    stream = configured(level="nonsense", json_output=True)

    structlog.get_logger().debug("quiet")
    structlog.get_logger().info("loud")

    assert stream.getvalue().count("\n") == 1


def test_warnings_of_libraries_take_the_same_way():
    stream = configured(json_output=True)

    logging.getLogger("some.library").info("quiet")
    logging.getLogger("some.library").warning("loud %d", 1)

    assert [json.loads(line)["event"] for line in stream.getvalue().splitlines()] == ["loud 1"]


def test_values_bound_to_the_context_are_in_every_event():
    stream = configured(json_output=True)

    with structlog.contextvars.bound_contextvars(request_id="r1"):
        structlog.get_logger().info("x")

    assert json.loads(stream.getvalue())["request_id"] == "r1"
