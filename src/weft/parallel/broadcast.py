"""How a step plan reaches the other ranks: a ring in shared memory, a socket as doorbell.

Theory of operation. Rank 0 owns a nameless file that every rank maps: one counter per receiver, then a ring of
cells, each a header (sequence number, length, checksum, whether the message goes on) and a payload. A plan is one
msgpack message; one larger than a cell goes through the ring in pieces. The sender fills a cell once every receiver
has read what stood there, then sends one byte down each receiver's socket. A receiver looks at the sequence number
for a moment, then sleeps in the socket until a byte comes. Header and payload are written without fences, so the
checksum says whether a cell is complete; the doorbell's system call orders what is still under way.

The socket also tells who is gone: it breaks when the process at the other end ends, however it ends. A sender that
leaves in order says so with an empty message. The file has no name and the socket's name is unlinked as soon as
every rank has come, so nothing is left behind. Only data crosses: receivers decode typed msgpack, never code.
"""

import contextlib
import mmap
import os
import select
import socket
import struct
import tempfile
import time
import zlib
from pathlib import Path

import msgspec

from weft.core.plan import StepPlan
from weft.errors import EngineFatal

NUM_CELLS = 16
CELL_BYTES = 256 * 1024
"""Together the bound on what is under way. A plan of 256 decode rows is 3 KB, a prompt of 100,000 tokens 0.4 MB."""

_SOCKET_NAME = "plans.sock"
_COUNTER = struct.Struct("<Q")
_HEADER = struct.Struct("<QIIB")
_LINE_BYTES = 64
"""Headers and counters have a cache line each."""
_PAYLOAD_BYTES = CELL_BYTES - _LINE_BYTES
_SPIN_NS = 50_000
"""How long a receiver looks before it sleeps: about what waking up costs."""
_RETRY_S = 0.01
_FAREWELL_S = 2.0
"""How long a sender that leaves waits for receivers that are behind."""
_TORN_CELL_S = 5.0
"""After this long an incomplete cell is damage, not delay."""


class _Ring:
    """Counters and cells in the mapped file; knows their places and nothing of waiting."""

    def __init__(self, descriptor: int, num_receivers: int) -> None:
        self._cells_start = num_receivers * _LINE_BYTES
        self._memory = mmap.mmap(descriptor, self.size(num_receivers))

    @staticmethod
    def size(num_receivers: int) -> int:
        """Bytes of the file."""
        return num_receivers * _LINE_BYTES + NUM_CELLS * CELL_BYTES

    def num_read(self, receiver: int) -> int:
        """Cells that a receiver has read since the start."""
        count: int = _COUNTER.unpack_from(self._memory, receiver * _LINE_BYTES)[0]
        return count

    def set_num_read(self, receiver: int, count: int) -> None:
        _COUNTER.pack_into(self._memory, receiver * _LINE_BYTES, count)

    def write(self, number: int, piece: memoryview, *, goes_on: bool) -> None:
        """Fill the cell of the number-th piece, counted from 1."""
        start = self._start_of(number)
        self._memory[start + _LINE_BYTES : start + _LINE_BYTES + len(piece)] = piece
        _HEADER.pack_into(self._memory, start, number, len(piece), zlib.crc32(piece), goes_on)

    def has(self, number: int) -> bool:
        """Whether the number-th piece has begun to arrive."""
        found: int = _COUNTER.unpack_from(self._memory, self._start_of(number))[0]
        return found == number

    def read(self, number: int) -> tuple[bytes, bool] | None:
        """(piece, whether the message goes on), or None while the cell is incomplete."""
        start = self._start_of(number)
        found, length, checksum, goes_on = _HEADER.unpack_from(self._memory, start)
        if found != number or length > _PAYLOAD_BYTES:
            return None
        piece = self._memory[start + _LINE_BYTES : start + _LINE_BYTES + length]
        return (piece, bool(goes_on)) if zlib.crc32(piece) == checksum else None

    def close(self) -> None:
        self._memory.close()

    def _start_of(self, number: int) -> int:
        return self._cells_start + (number % NUM_CELLS) * CELL_BYTES


class PlanSender:
    """Rank 0's end. Listens in the run directory from the moment it is made; receivers may come later."""

    def __init__(self, run_dir: Path, num_receivers: int, *, timeout_s: float = 120.0) -> None:
        self._num_receivers = num_receivers
        self._timeout_s = timeout_s
        self._encoder = msgspec.msgpack.Encoder()
        self._num_written = 0
        self._descriptor = _nameless_file(run_dir, _Ring.size(num_receivers))
        self._ring = _Ring(self._descriptor, num_receivers)
        self._socket_path = run_dir / _SOCKET_NAME
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # A rank 0 that was killed before its receivers came has left its name; the directory is this group's alone.
        self._socket_path.unlink(missing_ok=True)
        self._listener.bind(str(self._socket_path))
        self._listener.listen(num_receivers)
        self._doorbells: list[socket.socket] = []

    def wait_for_receivers(self) -> None:
        """Let every receiver in; returns when the last one has come.

        Raises   EngineFatal: one did not come in time
        """
        self._listener.settimeout(self._timeout_s)
        while len(self._doorbells) < self._num_receivers:
            try:
                doorbell, _ = self._listener.accept()
            except TimeoutError:
                missing = self._num_receivers - len(self._doorbells)
                raise EngineFatal(f"{missing} of {self._num_receivers} ranks did not come for plans") from None
            greeting = bytes([len(self._doorbells), self._num_receivers])
            socket.send_fds(doorbell, [greeting], [self._descriptor])
            doorbell.setblocking(False)
            self._doorbells.append(doorbell)
        self._socket_path.unlink(missing_ok=True)

    def send(self, plan: StepPlan) -> None:
        """Hand a plan to every receiver. Waits only while the slowest one is a whole ring behind.

        Raises   EngineFatal: a receiver is gone, or does not read
        """
        self.wait_for_receivers()
        message = memoryview(self._encoder.encode(plan))
        for start in range(0, len(message), _PAYLOAD_BYTES):
            end = start + _PAYLOAD_BYTES
            self._wait_for_free_cell(self._timeout_s)
            self._write(message[start:end], goes_on=end < len(message))

    def close(self) -> None:
        """Take leave. Receivers that have read everything return from `receive` with None."""
        if self._listener.fileno() < 0:
            return
        if len(self._doorbells) == self._num_receivers:
            with contextlib.suppress(EngineFatal):  # a receiver that is gone, or reads no more, needs no farewell
                self._wait_for_free_cell(min(self._timeout_s, _FAREWELL_S))
                self._write(memoryview(b""), goes_on=False)
        for doorbell in (*self._doorbells, self._listener):
            doorbell.close()
        self._socket_path.unlink(missing_ok=True)
        self._ring.close()
        os.close(self._descriptor)

    def _write(self, piece: memoryview, *, goes_on: bool) -> None:
        self._num_written += 1
        self._ring.write(self._num_written, piece, goes_on=goes_on)
        for receiver, doorbell in enumerate(self._doorbells):
            try:
                doorbell.send(b"\0")
            except BlockingIOError:
                pass  # earlier bytes wait there: they wake the receiver as well
            except OSError:
                raise EngineFatal(f"rank {receiver + 1} of the group is gone") from None

    def _has_free_cell(self) -> bool:
        slowest = min((self._ring.num_read(receiver) for receiver in range(self._num_receivers)), default=0)
        return self._num_written - slowest < NUM_CELLS

    def _wait_for_free_cell(self, timeout_s: float) -> None:
        """Poll: a ring is full only for a plan of many cells, and then for as long as a copy takes."""
        deadline = time.monotonic() + timeout_s
        while not self._has_free_cell():
            gone, _, _ = select.select(self._doorbells, [], [], _RETRY_S / 10)
            if gone:  # receivers never send: a readable doorbell is a closed one
                raise EngineFatal("a rank of the group is gone")
            if time.monotonic() > deadline:
                raise EngineFatal(f"a rank of the group read no plan for {timeout_s:.0f} s")


class PlanReceiver:
    """The end of every other rank. Waits up to `timeout_s` for rank 0 to listen.

    Raises   EngineFatal: it does not
    """

    def __init__(self, run_dir: Path, *, timeout_s: float = 120.0) -> None:
        self._decoder = msgspec.msgpack.Decoder(StepPlan)
        self._num_read = 0
        self._doorbell = _connect(run_dir / _SOCKET_NAME, timeout_s)
        greeting, descriptor = _greeting(self._doorbell, timeout_s)
        self._doorbell.settimeout(None)
        self._index, num_receivers = greeting
        self._ring = _Ring(descriptor, num_receivers)
        os.close(descriptor)

    def receive(self) -> StepPlan | None:
        """The next plan, in order; blocks until there is one. None: the sender took leave.

        Raises   EngineFatal: rank 0 is gone without leave, or what it sent is damaged
        """
        pieces: list[bytes] = []
        while True:
            piece, goes_on = self._next_piece()
            if not piece:
                return None
            pieces.append(piece)
            if not goes_on:
                break
        try:
            return self._decoder.decode(b"".join(pieces))
        except msgspec.MsgspecError as error:
            raise EngineFatal(f"a plan from rank 0 cannot be read: {error}") from error

    def close(self) -> None:
        """Leave: the sender's next plan fails."""
        self._doorbell.close()
        self._ring.close()

    def _next_piece(self) -> tuple[bytes, bool]:
        number = self._num_read + 1
        self._wait_for(number)
        deadline = time.monotonic() + _TORN_CELL_S
        while (found := self._ring.read(number)) is None:
            if time.monotonic() > deadline:
                raise EngineFatal(f"piece {number} of the plans from rank 0 is damaged")
        self._num_read = number
        self._ring.set_num_read(self._index, number)
        return found

    def _wait_for(self, number: int) -> None:
        """Look for a moment, then sleep until the doorbell rings."""
        spin_until_ns = time.perf_counter_ns() + _SPIN_NS
        while time.perf_counter_ns() < spin_until_ns:
            if self._ring.has(number):
                return
        while not self._ring.has(number):
            # Many rings may have gathered; what matters is whether the cell is there.
            if not self._doorbell.recv(4096) and not self._ring.has(number):
                raise EngineFatal("rank 0 is gone")


def _nameless_file(run_dir: Path, num_bytes: int) -> int:
    """Descriptor of a file in memory where the system has such files, otherwise of an unlinked one."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("weft-plans", os.MFD_CLOEXEC)
    else:
        with tempfile.TemporaryFile(dir=run_dir) as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, num_bytes)
    return descriptor


def _connect(path: Path, timeout_s: float) -> socket.socket:
    deadline = time.monotonic() + timeout_s
    while True:
        doorbell = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        doorbell.settimeout(max(deadline - time.monotonic(), _RETRY_S))
        try:
            doorbell.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError, TimeoutError):
            doorbell.close()
            if time.monotonic() > deadline:
                raise EngineFatal(f"rank 0 sent no plans within {timeout_s:.0f} s") from None
            time.sleep(_RETRY_S)
        else:
            return doorbell


def _greeting(doorbell: socket.socket, timeout_s: float) -> tuple[bytes, int]:
    """What rank 0 says first: this receiver's place and the number of receivers, with the ring's descriptor."""
    try:
        greeting, descriptors, _, _ = socket.recv_fds(doorbell, 2, 1)
    except TimeoutError:
        doorbell.close()
        raise EngineFatal(f"rank 0 did not greet this rank within {timeout_s:.0f} s") from None
    except ConnectionResetError:
        greeting, descriptors = b"", []
    if len(greeting) < 2 or len(descriptors) != 1:
        doorbell.close()
        raise EngineFatal("rank 0 closed before it had greeted this rank")
    return greeting, descriptors[0]
