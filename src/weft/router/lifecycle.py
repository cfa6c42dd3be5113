"""Where the server stands: loading, ready, draining or failed. The launcher says so; health routes repeat it."""

import asyncio
from dataclasses import dataclass
from enum import StrEnum

from weft.errors import NotReadyError


class ServerState(StrEnum):
    """The states of ARCHITECTURE.md, launcher ↔ router."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Progress:
    """One line of the launcher's."""

    state: ServerState
    phase: str = "start"
    percent: int = 0
    message: str = ""


_RETRY_AFTER_S = {
    ServerState.LOADING: 2.0,
    ServerState.READY: 1.0,
    ServerState.DRAINING: 10.0,
    ServerState.FAILED: 30.0,
}


class Lifecycle:
    """The current state and the requests that must end before the process may."""

    def __init__(self) -> None:
        self.progress = Progress(ServerState.LOADING)
        self.num_generating = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def state(self) -> ServerState:
        """Current state."""
        return self.progress.state

    def become(self, progress: Progress) -> None:
        """Take over a state; a server that drains never goes back."""
        if self.state is not ServerState.DRAINING:
            self.progress = progress

    def require_ready(self) -> None:
        """Raises NotReadyError unless generation requests are welcome."""
        if self.state is not ServerState.READY:
            raise self.not_ready()

    def not_ready(self) -> NotReadyError:
        """The error of the current state, with phase and percent in words."""
        progress = self.progress
        text = {
            ServerState.LOADING: f"The model is loading: {progress.phase}, {progress.percent} %",
            ServerState.READY: "The model server does not answer",
            ServerState.DRAINING: "The server is shutting down and takes no new requests",
            ServerState.FAILED: f"The model could not be loaded: {progress.phase}",
        }[progress.state]
        return NotReadyError(f"{text}. Try again later.", retry_after_s=_RETRY_AFTER_S[progress.state])

    def generation_started(self) -> None:
        """One more request that a shutdown waits for."""
        self.num_generating += 1
        self._idle.clear()

    def generation_ended(self) -> None:
        """One less."""
        self.num_generating -= 1
        if self.num_generating == 0:
            self._idle.set()

    async def wait_idle(self) -> None:
        """Until no generation is running."""
        await self._idle.wait()
