"""The store keeps what it can, drops the oldest, and is found by its tenant only."""

import asyncio
import contextlib
import os
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from weft.config import Settings
from weft.errors import InternalError
from weft.router.store import ResponseStore, StoredResponse, is_alive, this_process


def record(name: str, *, tenant: str = "", previous: str | None = None, size: int = 10) -> StoredResponse:
    return StoredResponse(
        id=name,
        tenant=tenant,
        previous_id=previous,
        owner=this_process(),
        is_final=True,
        response=b"x" * size,
        items=b"",
    )


class FakeTime:
    now_s = 1_000.0

    def __call__(self) -> float:
        self.now_s += 0.001
        return self.now_s


@pytest.fixture
def time() -> FakeTime:
    return FakeTime()


@pytest.fixture
async def store(tmp_path: Path, time: FakeTime) -> AsyncIterator[ResponseStore]:
    opened = ResponseStore(tmp_path / "a" / "s.sqlite", ttl_s=60, max_responses=3, max_bytes=100, now_s=time)
    yield opened
    await opened.close()


async def names(store: ResponseStore, among: str) -> str:
    return "".join([name for name in among if await store.get(name, "") is not None])


async def test_what_is_put_is_there_and_may_be_replaced(store: ResponseStore):
    await store.put(record("a"))
    newer = record("a", size=20)

    await store.put(newer)

    assert await store.get("a", "") == newer
    assert await store.get("b", "") is None


async def test_the_oldest_goes_when_there_are_too_many(store: ResponseStore):
    for name in "abcde":
        await store.put(record(name))

    assert await names(store, "abcde") == "cde"


async def test_the_oldest_go_when_they_are_too_large(store: ResponseStore):
    for name in "abc":
        await store.put(record(name, size=30))

    await store.put(record("d", size=60))

    assert await names(store, "abcd") == "cd"


async def test_one_that_exceeds_every_bound_is_kept_alone(store: ResponseStore):
    await store.put(record("a"))

    await store.put(record("b", size=1_000))

    assert await names(store, "ab") == "b"


async def test_what_is_too_old_is_not_found_and_makes_room(store: ResponseStore, time: FakeTime):
    for name in "abc":
        await store.put(record(name))
    time.now_s += 61

    assert await names(store, "abc") == ""
    assert not await store.delete("a", "")
    await store.put(record("d"))
    time.now_s -= 61
    assert await names(store, "abcd") == "d"


async def test_deleting_tells_whether_there_was_something(store: ResponseStore):
    await store.put(record("a"))

    assert await store.delete("a", "")
    assert not await store.delete("a", "")


async def test_rows_belong_to_a_tenant(store: ResponseStore):
    await store.put(record("a", tenant="one"))

    assert await store.get("a", "two") is None
    assert not await store.delete("a", "two")
    assert await store.chain("a", "two", 10) == "a"
    assert await store.get("a", "one") is not None


async def test_a_chain_is_oldest_first_or_names_what_is_missing(store: ResponseStore):
    await store.put(record("a"))
    await store.put(record("b", previous="a"))
    await store.put(record("c", previous="b"))

    found = await store.chain("c", "", 10)
    cut = await store.chain("c", "", 2)
    await store.delete("a", "")

    assert [row.id for row in found if not isinstance(row, str)] == ["a", "b", "c"]
    assert [row.id for row in cut if not isinstance(row, str)] == ["b", "c"]
    assert await store.chain("c", "", 10) == "a"


async def test_a_file_is_private_and_outlives_its_store(tmp_path: Path):
    path = tmp_path / "new" / "s.sqlite"
    first = ResponseStore(path, ttl_s=60)
    await first.put(record("a"))
    modes = {file.name: file.stat().st_mode & 0o777 for file in path.parent.iterdir()}
    await first.close()

    second = ResponseStore(path, ttl_s=60)

    assert set(modes.values()) == {0o600}
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert await second.get("a", "") is not None
    await second.close()


async def test_age_and_bounds_count_over_a_restart(tmp_path: Path, time: FakeTime):
    path = tmp_path / "s.sqlite"
    first = ResponseStore(path, ttl_s=60, now_s=time)
    for name in "abc":
        await first.put(record(name))
        time.now_s += 10
    await first.close()
    time.now_s += 25

    second = ResponseStore(path, ttl_s=60, max_responses=2, now_s=time)
    before = await names(second, "abc")
    time.now_s += 10
    too_old = await names(second, "abc")
    await second.put(record("d"))

    assert (before, too_old) == ("abc", "bc")
    assert await names(second, "abcd") == "cd"
    await second.close()


async def test_two_processes_may_write_at_once(tmp_path: Path):
    stores = [ResponseStore(tmp_path / "s.sqlite", ttl_s=60) for _ in range(2)]

    written = await asyncio.gather(*(stores[index % 2].put(record(str(index))) for index in range(40)))

    assert all(written)
    with contextlib.closing(sqlite3.connect(tmp_path / "s.sqlite")) as database:
        [count] = database.execute("SELECT num_responses FROM totals").fetchone()
    assert count == 40
    for store in stores:
        await store.close()


async def test_a_broken_file_loses_no_answer_and_says_so_to_readers(tmp_path: Path):
    path = tmp_path / "s.sqlite"
    path.write_bytes(os.urandom(4096))
    store = ResponseStore(path, ttl_s=60)

    assert not await store.put(record("a"))
    with pytest.raises(InternalError, match="`input`") as caught:
        await store.get("a", "")

    assert str(tmp_path) not in str(caught.value)
    await store.close()


@pytest.mark.parametrize(("place", "is_there"), [("off", False), ("memory", True), (None, True)])
def test_settings_choose_the_place(place: str | None, *, is_there: bool, tmp_path: Path):
    store = ResponseStore.from_settings(Settings(response_store=place, cache_dir=str(tmp_path)))

    assert (store is not None) is is_there
    assert list(tmp_path.iterdir()) == []


def test_a_process_is_told_from_a_later_one_of_the_same_number():
    assert is_alive(this_process())
    assert not is_alive(f"{os.getpid()}:1.0")
    assert not is_alive("99999999:1.0")
