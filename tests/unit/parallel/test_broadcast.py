"""Plans reach every rank, in order and whole; who is gone is noticed."""

import multiprocessing
import os
import random
import select
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from weft.core.plan import SequenceStart, StepPlan
from weft.core.request import (
    MAX_SEED,
    LogprobStyle,
    PenaltyStyle,
    RequestId,
    SamplingParams,
    Slot,
    StopConditions,
)
from weft.errors import EngineFatal
from weft.parallel import broadcast
from weft.parallel.broadcast import PlanReceiver, PlanSender

TIMEOUT_S = 20.0


def make_plan(step_id: int, *, prompt_tokens: int = 5) -> StepPlan:
    draw = random.Random(step_id)
    start = SequenceStart(
        slot=Slot(3),
        request_id=RequestId(draw.getrandbits(64)),
        token_ids=tuple(draw.randrange(200_000) for _ in range(prompt_tokens)),
        num_prompt_tokens=prompt_tokens,
        sampling=SamplingParams(
            seed=MAX_SEED,
            top_p=0.5,
            logit_bias=((1, -2.5), (7, 100.0)),
            penalty_style=PenaltyStyle.OPENAI,
            logprob_style=LogprobStyle.RAW,
        ),
        stop=StopConditions(max_new_tokens=9, eos_token_ids=(2, 5)),
    )
    return StepPlan(
        step_id=step_id,
        starts=(start,),
        slots=[3, 1],
        first_positions=[0, 77],
        num_tokens=[prompt_tokens, 1],
        samples=[True, False],
        new_block_slots=[3],
        new_block_ids=[12],
    )


Connect = Callable[..., tuple[PlanSender, list[PlanReceiver]]]


@pytest.fixture
def connect(tmp_path: Path) -> Iterator[Connect]:
    """Makes a sender with receivers that have come; closes them all at the end."""
    with ExitStack() as open_ends:

        def make(count: int = 1, *, timeout_s: float = TIMEOUT_S) -> tuple[PlanSender, list[PlanReceiver]]:
            sender = open_ends.enter_context(closing(PlanSender(tmp_path, count, timeout_s=timeout_s)))
            with ThreadPoolExecutor(count + 1) as threads:
                waiting = threads.submit(sender.wait_for_receivers)
                receivers = list(threads.map(lambda _: PlanReceiver(tmp_path, timeout_s=TIMEOUT_S), range(count)))
                waiting.result()
            for receiver in receivers:
                open_ends.enter_context(closing(receiver))
            return sender, receivers

        yield make


def as_lists(plan: StepPlan | None) -> dict[str, object]:
    assert plan is not None
    return {name: getattr(plan, name) for name in StepPlan.__struct_fields__} | {
        name: list(getattr(plan, name)) for name in ("new_block_slots", "new_block_ids")
    }


def test_a_plan_arrives_as_it_was_sent(connect: Connect) -> None:
    sender, [receiver] = connect()
    plans = [
        make_plan(1),
        StepPlan(step_id=-2, slots=[], first_positions=(), num_tokens=[], samples=[]),
        make_plan(2**40),
    ]
    for plan in plans:
        sender.send(plan)

    for plan in plans:
        got, wanted = as_lists(receiver.receive()), as_lists(plan)
        wanted["first_positions"] = list(plan.first_positions)
        assert got == wanted


def test_every_receiver_gets_every_plan_in_order(connect: Connect) -> None:
    sender, receivers = connect(3)
    num_plans = 20 * broadcast.NUM_CELLS

    def read(receiver: PlanReceiver) -> list[int]:
        steps = []
        while (plan := receiver.receive()) is not None:
            assert as_lists(plan) == as_lists(make_plan(plan.step_id))
            steps.append(plan.step_id)
        return steps

    with ThreadPoolExecutor(3) as threads:
        readers = [threads.submit(read, receiver) for receiver in receivers]
        for step_id in range(num_plans):
            sender.send(make_plan(step_id))
        sender.close()

        assert [reader.result(TIMEOUT_S) for reader in readers] == [list(range(num_plans))] * 3


def test_a_plan_larger_than_the_ring_passes_through_it(connect: Connect) -> None:
    sender, [receiver] = connect()
    plan = make_plan(5, prompt_tokens=broadcast.NUM_CELLS * broadcast.CELL_BYTES // 4)

    with ThreadPoolExecutor(1) as threads:
        received = threads.submit(receiver.receive)
        sender.send(plan)

        assert as_lists(received.result(TIMEOUT_S)) == as_lists(plan)


def test_a_sender_that_takes_leave_is_read_to_the_end(connect: Connect) -> None:
    sender, [receiver] = connect()
    sender.send(make_plan(1))
    sender.close()

    assert receiver.receive() is not None
    assert receiver.receive() is None


def test_a_receiver_that_is_gone_is_noticed(connect: Connect) -> None:
    sender, [receiver] = connect()
    receiver.close()

    with pytest.raises(EngineFatal, match="rank 1"):
        sender.send(make_plan(1))


def test_a_receiver_that_dies_while_the_ring_is_full_is_noticed(connect: Connect) -> None:
    sender, [receiver] = connect()
    for step_id in range(broadcast.NUM_CELLS):
        sender.send(make_plan(step_id))
    threading.Timer(0.05, receiver.close).start()

    with pytest.raises(EngineFatal, match="gone"):
        sender.send(make_plan(99))


def test_a_receiver_that_does_not_read_is_noticed(connect: Connect) -> None:
    sender, _ = connect(timeout_s=0.2)
    for step_id in range(broadcast.NUM_CELLS):
        sender.send(make_plan(step_id))

    with pytest.raises(EngineFatal, match="read no plan"):
        sender.send(make_plan(99))


def test_receivers_that_never_come_are_an_error(tmp_path: Path) -> None:
    with closing(PlanSender(tmp_path, 2, timeout_s=0.05)) as sender, pytest.raises(EngineFatal, match="2 of 2"):
        sender.send(make_plan(1))


def test_a_sender_that_never_listens_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(EngineFatal, match="no plans"):
        PlanReceiver(tmp_path, timeout_s=0.05)


@pytest.mark.parametrize("is_accepted", [True, False])
def test_a_sender_that_leaves_before_it_greets_is_an_error(tmp_path: Path, is_accepted: bool) -> None:
    with socket.socket(socket.AF_UNIX) as listener, ThreadPoolExecutor(1) as threads:
        listener.bind(str(tmp_path / "plans.sock"))
        listener.listen(1)
        waiting = threads.submit(PlanReceiver, tmp_path, timeout_s=TIMEOUT_S)
        select.select([listener], [], [], TIMEOUT_S)
        if is_accepted:
            listener.accept()[0].close()
        listener.close()

        with pytest.raises(EngineFatal, match="greeted"):
            waiting.result(TIMEOUT_S)


def test_a_sender_that_never_greets_is_an_error(tmp_path: Path) -> None:
    with closing(PlanSender(tmp_path, 1)), pytest.raises(EngineFatal, match="did not greet"):
        PlanReceiver(tmp_path, timeout_s=0.05)


def test_a_damaged_cell_is_never_decoded(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broadcast, "_TORN_CELL_S", 0.05)
    sender, [receiver] = connect()
    sender.send(make_plan(1))
    sender._ring._memory[sender._ring._start_of(1) + 100] ^= 1

    with pytest.raises(EngineFatal, match="damaged"):
        receiver.receive()


def test_a_message_that_is_no_plan_is_an_error(connect: Connect) -> None:
    sender, [receiver] = connect()
    sender._write(memoryview(b"\x81\xa4evil\x01"), goes_on=False)

    with pytest.raises(EngineFatal, match="cannot be read"):
        receiver.receive()


def test_nothing_is_left_in_the_run_directory(connect: Connect, tmp_path: Path) -> None:
    connect()

    assert list(tmp_path.iterdir()) == []


def test_a_group_restarts_where_a_killed_one_left_its_socket(tmp_path: Path, connect: Connect) -> None:
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(tmp_path / "plans.sock"))
    assert (tmp_path / "plans.sock").exists()

    sender, [receiver] = connect()
    sender.send(make_plan(1))

    assert receiver.receive() is not None


def _send_from_a_process(run_dir: Path) -> None:
    sender = PlanSender(run_dir, 1, timeout_s=TIMEOUT_S)
    sender.send(make_plan(1))
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_sender_is_noticed_after_its_last_plan(tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_send_from_a_process, args=(tmp_path,))
    process.start()
    receiver = PlanReceiver(tmp_path, timeout_s=TIMEOUT_S)

    assert as_lists(receiver.receive()) == as_lists(make_plan(1))
    with pytest.raises(EngineFatal, match="rank 0 is gone"):
        receiver.receive()
    process.join()
    receiver.close()
