"""Answers of `/v1/responses`, kept in SQLite: bounded in age, number and bytes, and never on the event loop.

One thread owns the connection; every method hands it one piece of work and waits. Rows belong to a tenant and are
found by that tenant only. The file is readable by its owner alone. Several router processes may share it.

Durability is that of a cache of conversations: a commit survives the end of the process, and a loss of power may cost
the newest rows but not the file (write-ahead log, synchronous = NORMAL).
"""

import asyncio
import functools
import os
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self, TypeVar

import psutil
import structlog

from weft.config import Settings
from weft.errors import InternalError
from weft.limits import LIMITS

log = structlog.get_logger("weft.responses")

_T = TypeVar("_T")

IN_MEMORY = "memory"
SWITCHED_OFF = "off"
_FILE = "responses-1.sqlite"
"""The number is that of the tables below: another layout is another file."""

_TABLES = """
CREATE TABLE IF NOT EXISTS responses (
    id TEXT PRIMARY KEY, tenant TEXT NOT NULL, previous_id TEXT, owner TEXT NOT NULL, created_s REAL NOT NULL,
    expires_s REAL NOT NULL, num_bytes INTEGER NOT NULL, is_final INTEGER NOT NULL,
    response BLOB NOT NULL, items BLOB NOT NULL, delta_chars BLOB
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS by_expiry ON responses (expires_s);
CREATE INDEX IF NOT EXISTS by_age ON responses (created_s);
CREATE TABLE IF NOT EXISTS totals (num_responses INTEGER NOT NULL, num_bytes INTEGER NOT NULL);
INSERT INTO totals SELECT 0, 0 WHERE NOT EXISTS (SELECT 1 FROM totals);
CREATE TRIGGER IF NOT EXISTS added AFTER INSERT ON responses BEGIN
    UPDATE totals SET num_responses = num_responses + 1, num_bytes = num_bytes + NEW.num_bytes;
END;
CREATE TRIGGER IF NOT EXISTS removed AFTER DELETE ON responses BEGIN
    UPDATE totals SET num_responses = num_responses - 1, num_bytes = num_bytes - OLD.num_bytes;
END;
"""
_COLUMNS = "id, tenant, previous_id, owner, is_final, response, items, delta_chars"
_PUT = f"""INSERT INTO responses ({_COLUMNS}, created_s, expires_s, num_bytes)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"""  # noqa: S608 - constants
_GET = f"SELECT {_COLUMNS} FROM responses WHERE id = ? AND tenant = ? AND expires_s > ?"  # noqa: S608 - constants


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredResponse:
    """One row."""

    id: str
    tenant: str
    previous_id: str | None
    owner: str
    """The process that made it; see `this_process`."""
    is_final: bool
    response: bytes
    """JSON of `schemas_responses.Response`."""
    items: bytes
    """JSON array of the items that this turn brought in; those of earlier turns stand in their own rows."""
    delta_chars: bytes | None = None
    """JSON array: characters of each text delta, for replays of a background stream. None: it had none."""


class LiveResponse(Protocol):
    """A response that is being generated in this process."""

    tenant: str

    def stored(self) -> StoredResponse:
        """How it would be stored now."""
        ...


def this_process() -> str:
    """Names this process so that nobody takes a later one with the same number for it."""
    return f"{os.getpid()}:{psutil.Process().create_time()}"


def is_alive(owner: str) -> bool:
    """Whether the process that `this_process` named still runs on this machine."""
    number, _, created = owner.partition(":")
    try:
        return str(psutil.Process(int(number)).create_time()) == created
    except psutil.NoSuchProcess:
        return False


class ResponseStore:
    """Keeps responses. `path` None keeps them in memory. Nothing happens before the first use."""

    def __init__(
        self,
        path: Path | None,
        *,
        ttl_s: float,
        max_responses: int = LIMITS.max_stored_responses,
        max_bytes: int = LIMITS.max_stored_response_bytes,
        now_s: Callable[[], float] = time.time,
    ) -> None:
        self._path = path
        self._ttl_s = ttl_s
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._now_s = now_s
        self._database: sqlite3.Connection | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="response-store")

    @classmethod
    def from_settings(cls, settings: Settings) -> Self | None:
        """The store that `--response-store` asks for; None when it is off."""
        place = settings.response_store
        if place == SWITCHED_OFF:
            return None
        if place is None and settings.cache_dir:
            place = str(Path(settings.cache_dir) / "responses" / _FILE)
        path = None if place in (None, IN_MEMORY) else Path(place)
        return cls(path, ttl_s=settings.response_ttl_s)

    async def put(self, record: StoredResponse) -> bool:
        """Add or replace a row, and drop what is too old or too much. False: it could not be written (logged)."""
        try:
            await self._call(self._put, record)
        except (sqlite3.Error, OSError) as error:
            log.error("response_store.write_failed", problem=type(error).__name__)  # noqa: TRY400 - may name a path
            return False
        return True

    async def get(self, response_id: str, tenant: str) -> StoredResponse | None:
        """A row that is there and not too old. Raises InternalError."""
        return await self._read(self._get, response_id, tenant)

    async def chain(self, response_id: str, tenant: str, max_length: int) -> list[StoredResponse] | str:
        """The row and those before it, oldest first; or the id of the first one that is missing.

        A chain longer than `max_length` rows is cut there: that many turns exceed any bound on messages.
        """
        return await self._read(self._chain, response_id, tenant, max_length)

    async def delete(self, response_id: str, tenant: str) -> bool:
        """Whether there was something to delete. Raises InternalError."""
        return await self._read(self._delete, response_id, tenant)

    async def close(self) -> None:
        """Write what is under way and let go of the file."""
        await self._call(self._close)
        self._thread.shutdown()

    async def _read(self, work: Callable[..., _T], *arguments: object) -> _T:
        try:
            return await self._call(work, *arguments)
        except (sqlite3.Error, OSError) as error:
            log.error("response_store.read_failed", problem=type(error).__name__)  # noqa: TRY400 - may name a path
            raise InternalError(
                "The store of responses cannot be read; the operator finds the reason in the log. Send the whole "
                "conversation in `input` instead"
            ) from None

    async def _call(self, work: Callable[..., _T], *arguments: object) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, functools.partial(work, *arguments))

    # --- on the thread --------------------------------------------------------------------------------------------

    def _open(self) -> sqlite3.Connection:
        if self._database is not None:
            return self._database
        if self._path is not None:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            # Made here, because SQLite would make it readable by others; its log files take over this mode.
            os.close(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600))
        database = sqlite3.connect(self._path or ":memory:", isolation_level=None)
        try:
            database.execute("PRAGMA journal_mode = WAL")
            database.execute("PRAGMA synchronous = NORMAL")
            database.execute("PRAGMA secure_delete = ON")
            database.executescript(_TABLES)
        except sqlite3.Error:
            database.close()
            raise
        self._database = database
        return database

    def _put(self, record: StoredResponse) -> None:
        database, now_s = self._open(), self._now_s()
        num_bytes = len(record.response) + len(record.items) + len(record.delta_chars or b"")
        with _transaction(database):
            # Not INSERT OR REPLACE: that would run no trigger for the row it replaces.
            database.execute("DELETE FROM responses WHERE id = ? OR expires_s <= ?", (record.id, now_s))
            database.execute(
                _PUT,
                (
                    record.id,
                    record.tenant,
                    record.previous_id,
                    record.owner,
                    record.is_final,
                    record.response,
                    record.items,
                    record.delta_chars,
                    now_s,
                    now_s + self._ttl_s,
                    num_bytes,
                ),
            )
            self._evict(database, record.id)

    def _evict(self, database: sqlite3.Connection, newest_id: str) -> None:
        while True:
            num_responses, num_bytes = database.execute("SELECT num_responses, num_bytes FROM totals").fetchone()
            if num_responses <= self._max_responses and num_bytes <= self._max_bytes:
                return
            oldest = database.execute(
                "SELECT id FROM responses WHERE id <> ? ORDER BY created_s LIMIT 1", (newest_id,)
            ).fetchone()
            if oldest is None:
                return
            database.execute("DELETE FROM responses WHERE id = ?", oldest)

    def _get(self, response_id: str, tenant: str) -> StoredResponse | None:
        row = self._open().execute(_GET, (response_id, tenant, self._now_s())).fetchone()
        if row is None:
            return None
        found_id, found_tenant, previous_id, owner, is_final, response, items, delta_chars = row
        return StoredResponse(
            id=found_id,
            tenant=found_tenant,
            previous_id=previous_id,
            owner=owner,
            is_final=bool(is_final),
            response=response,
            items=items,
            delta_chars=delta_chars,
        )

    def _chain(self, response_id: str, tenant: str, max_length: int) -> list[StoredResponse] | str:
        found: list[StoredResponse] = []
        wanted: str | None = response_id
        while wanted is not None and len(found) < max_length:
            record = self._get(wanted, tenant)
            if record is None:
                return wanted
            found.append(record)
            wanted = record.previous_id
        return found[::-1]

    def _delete(self, response_id: str, tenant: str) -> bool:
        cursor = self._open().execute(
            "DELETE FROM responses WHERE id = ? AND tenant = ? AND expires_s > ?",
            (response_id, tenant, self._now_s()),
        )
        return cursor.rowcount > 0

    def _close(self) -> None:
        if self._database is not None:
            self._database.close()
            self._database = None


class _transaction:  # noqa: N801 - reads as the statement it is
    """All or nothing. Takes the write lock at once, so that two processes wait for each other instead of failing."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self._database = database

    def __enter__(self) -> None:
        self._database.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._database.execute("COMMIT" if kind is None else "ROLLBACK")
