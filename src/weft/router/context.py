"""What every handler of one router process shares."""

from collections.abc import Callable
from dataclasses import dataclass, field

import weft
from weft.config import Settings
from weft.core.clock import Clock
from weft.router.admission import Admission
from weft.router.backend import Backend, BackendProbe
from weft.router.exchange import Exchange
from weft.router.lifecycle import Lifecycle
from weft.router.recording import Recorder
from weft.router.served import ServedModel
from weft.router.store import LiveResponse, ResponseStore
from weft.router.stream import StreamWatch
from weft.telemetry.metrics import Registry
from weft.telemetry.tracing import Tracing


@dataclass(slots=True, kw_only=True)
class RouterContext:
    """The parts of a running router. `model` appears when the shards are ready."""

    settings: Settings
    backend: Backend
    clock: Clock
    metrics: Registry = field(default_factory=Registry)
    tracing: Tracing | None = None
    lifecycle: Lifecycle = field(default_factory=Lifecycle)
    admission: Admission = field(init=False)
    streams: StreamWatch = field(init=False)
    probe: BackendProbe = field(init=False)
    model: ServedModel | None = None
    compute_type: str = "cpu"
    """Header x-compute-type."""
    version: str = weft.__version__
    openapi: Callable[[], bytes] = bytes
    """The OpenAPI document; `build_app` says how it is made."""
    account: Callable[[Exchange], None] = field(init=False)
    """Counts a generation that outlived its request; `build_app` sets it."""
    live_responses: dict[str, LiveResponse] = field(default_factory=dict)
    """Responses that are being generated here and can be asked for, by id."""
    responses: ResponseStore | None = field(init=False)
    """Where they are kept; None: nowhere."""
    recorder: Recorder | None = None
    """Where finished requests are written down; None: nowhere."""
    num_connections: Callable[[], int] = lambda: 0
    """Open HTTP connections, as the server counts them."""

    def __post_init__(self) -> None:
        """Sizes follow the settings."""
        self.admission = Admission(self.settings.max_concurrent_requests)
        self.probe = BackendProbe(self.backend, self.clock)
        self.streams = StreamWatch(self.clock, self.metrics)
        self.responses = ResponseStore.from_settings(self.settings)

    def known_model(self) -> ServedModel:
        """The model, also while its shards restart or the server drains. Raises NotReadyError before it is known."""
        if self.model is None:
            raise self.lifecycle.not_ready()
        return self.model

    def require_model(self) -> ServedModel:
        """The model, when generation requests are welcome. Raises NotReadyError."""
        self.lifecycle.require_ready()
        return self.known_model()
