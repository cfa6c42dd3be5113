"""What a rank says while it starts."""

from structlog.testing import capture_logs

from weft.server.startup import PhaseTimer


def test_a_phase_is_announced_with_the_reason_why_it_takes_long() -> None:
    timer = PhaseTimer()

    with capture_logs() as events:
        with timer.phase("kernels", "compiling"):
            pass
        with timer.phase("load"):
            timer.progress("load", 5.0)
            timer.progress("load", 50.0)

    shown = [(event["phase"], event["percent"], event.get("message")) for event in events]
    assert shown == [("kernels", 0.0, "compiling"), ("load", 0.0, None), ("load", 50.0, None)]
    assert [name for name, _ in timer.seconds] == ["kernels", "load"]
