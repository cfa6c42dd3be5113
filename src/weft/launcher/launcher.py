"""One command → a server: start in order, keep alive, stop in order.

The router starts first, so that the port answers from the first second and says how far loading is; then the
download, then the shards. Two keepers run side by side and know nothing of each other: one restarts a dead router
without touching the shards, the other restarts the whole shard group without touching the router. Whoever gives up
ends the launcher. Loads no model and answers no HTTP.
"""

import asyncio
import contextlib
import dataclasses
import json
import signal
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import setproctitle
import structlog

from weft.config import Settings, save_settings
from weft.errors import ModelNotFoundError, StartupError
from weft.launcher import banner, layout
from weft.launcher.download import find_present
from weft.launcher.fetched import FetchedModel, fault_of_model
from weft.launcher.relay import ENVELOPE_FIELDS, Event, LogRelay, parse_event
from weft.launcher.supervise import Child, ChildSpec, RestartPolicy
from weft.telemetry import logging as weft_logging

_STARTUP_EXIT_CODES = {cls.exit_code for cls in StartupError.__subclasses__()}
_SHARD_STOP_S = 5.0
_ROUTER_READY_S = 10.0
_SECONDS_BETWEEN_PROGRESS_LINES = 3.0


@dataclass(frozen=True, slots=True)
class Programs:
    """Modules that the children run, by name: the launcher imports neither (tests name others)."""

    router: str = "weft.router.main"
    shard: str = "weft.server.main"
    download: str = "weft.launcher.download"


class ChildFailed(Exception):
    """A child ended and is not started again."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def launch(
    settings: Settings,
    environ: Mapping[str, str],
    started: float,
    programs: Programs = Programs(),
    *,
    notes: Sequence[str] = (),
    warnings: Sequence[str] = (),
) -> int:
    """Serve until told to stop; returns the exit code. `started` is when the process began (`time.monotonic`).

    `notes` and `warnings` are what there is to say about the settings as they were given.
    """
    weft_logging.configure(
        process="launcher",
        level=settings.log_level,
        json_output=settings.json_output,
        secrets=filter(None, [settings.api_key, settings.hub_token]),
        colors=settings.log_colorize,
    )
    if settings.api_key is not None:
        setproctitle.setproctitle("text-generation-launcher")  # the key may stand on our command line
    for note in notes:
        structlog.get_logger().info("settings.note", note=note)
    for warning in (*warnings, *layout.settings_without_effect(settings, environ)):
        structlog.get_logger().warning("settings.no_effect", note=warning)
    if settings.env:
        structlog.get_logger().info("launcher.environment", **layout.describe_machine(environ))
    settled = layout.settle(settings, environ)
    layout.check_port(settled.hostname, settled.port)
    present = find_present(settled.model_id, settled)
    with layout.private_directory(settled) as run_dir:
        launcher = Launcher(settled, environ, run_dir, started, programs)
        status = asyncio.run(launcher.run(present))
    if launcher.failure and not settings.json_output:
        sys.stderr.write(f"Error: {launcher.failure}\n")  # last, so that nobody has to search the log for it
    return status


class Launcher:
    """The processes of one server."""

    def __init__(
        self, settings: Settings, environ: Mapping[str, str], run_dir: Path, started: float, programs: Programs
    ) -> None:
        self._settings = settings
        self._programs = programs
        self._environ = environ
        self._run_dir = run_dir
        self._started = started
        self._relay = LogRelay(settings)
        self._log = structlog.get_logger()
        self._router: Child | None = None
        self._shards: list[Child] = []
        self._download: Child | None = None
        self._found: FetchedModel | None = None
        self._ready_events: dict[str, Event] = {}
        self._all_ready = asyncio.Event()
        self._first_word_at: float | None = None
        self._state: dict[str, object] = {}
        self._router_ready = asyncio.Event()
        self._progress_shown_at = started
        self._shown_phase = ""
        self._download_s = 0.0
        self._is_stopping = False
        self._startup_fault = ""
        self.failure = ""
        """Why the server ended, for a user; empty: it was told to."""
        self._stop_asked = asyncio.Event()
        self._hurry_asked = asyncio.Event()

    async def run(self, present: FetchedModel | None) -> int:
        """From nothing to ready to stopped. `present` is the model if no download is needed."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(number, self._on_signal)
        self._save_settings()
        self._become("loading", phase="start")
        stop = asyncio.create_task(self._stop_asked.wait())
        keepers = {asyncio.create_task(self._keep_router()), asyncio.create_task(self._keep_shards(present))}
        try:
            done, _ = await asyncio.wait({stop, *keepers}, return_when=asyncio.FIRST_COMPLETED)
            failed = next((task for task in done if task is not stop), None)
            if failed is None:
                await self._drain()
                return 0
            return self._explain(failed.exception())
        finally:
            self._is_stopping = True
            for task in (stop, *keepers):
                task.cancel()
            await self._stop_children()

    def _explain(self, failure: BaseException | None) -> int:
        """Tell user and router why the server ends; returns the exit code."""
        if isinstance(failure, ChildFailed):
            self.failure = self._startup_fault or str(failure)
            if failure.exit_code == ModelNotFoundError.exit_code:
                self.failure = fault_of_model(self._settings.model_id, self.failure)
            self._become("failed", message=str(failure))
            self._log.error("launcher.failed", reason=str(failure))
            return failure.exit_code
        if failure is not None:
            raise failure
        return 1

    def _on_signal(self) -> None:
        if self._stop_asked.is_set():
            self._hurry_asked.set()
        self._stop_asked.set()

    def _save_settings(self) -> None:
        """Write the settings for the children; they must report readiness even when a user wants warnings only."""
        level = "debug" if self._settings.log_level == "debug" else "info"
        save_settings(self._run_dir, dataclasses.replace(self._settings, log_level=level))

    async def _keep_router(self) -> None:
        """Start the router, and again when it dies. Raises ChildFailed."""
        policy = RestartPolicy(self._settings.max_quick_failures)
        spec = ChildSpec(
            name="router",
            module=self._programs.router,
            arguments=("--run-dir", str(self._run_dir)),
            environment=layout.child_environment(self._environ),
        )
        while True:
            started = time.monotonic()
            self._router = await Child.start(spec, self._on_line)
            self._router.tell(json.dumps(self._state))
            status = await self._router.wait()
            if self._is_stopping:
                return
            await self._before_restart(self._router, status, policy, time.monotonic() - started)

    async def _keep_shards(self, present: FetchedModel | None) -> None:
        """Obtain the model, start the shard group, and start it again when a member dies. Raises ChildFailed."""
        model = present or await self._fetch()
        self._settings = dataclasses.replace(self._settings, model_path=str(model.path), model_sha=model.sha)
        self._save_settings()
        policy = RestartPolicy(self._settings.max_quick_failures)
        is_first_start = True
        while True:
            self._become("loading", phase="load")
            began = time.monotonic()
            await self._start_shards()
            dead = await self._first_dead(until=self._all_ready)
            ready_at = time.monotonic()
            if dead is None:
                # The banner must not promise what the next request finds untrue: it waits for the router.
                self._router_ready.clear()
                self._become("ready", phase="ready", percent=100)
                dead = await self._first_dead(until=self._router_ready, timeout_s=_ROUTER_READY_S)
            if dead is None:
                if is_first_start:
                    self._announce(began, time.monotonic())
                else:
                    self._log.info("server.ready_again", seconds=round(ready_at - began, 2))
                dead = await self._first_dead_or_stalled()
            status = dead.exit_status
            if self._is_stopping:
                return
            if is_first_start and not self._all_ready.is_set():
                raise self._failure(dead, status)
            is_first_start = False
            self._become("loading", phase="restart", message="a shard died and is being restarted")
            await self._kill_shards()
            await self._before_restart(dead, status, policy, time.monotonic() - ready_at)

    async def _fetch(self) -> FetchedModel:
        """Run the download process. Raises ChildFailed."""
        began = time.monotonic()
        self._become("loading", phase="download")
        self._log.info("startup.download", model=self._settings.shown_model_name)
        self._download = await Child.start(
            ChildSpec(
                name="download",
                module=self._programs.download,
                arguments=("--run-dir", str(self._run_dir)),
                environment=dict(self._environ),
            ),
            self._on_line,
        )
        status = await self._download.wait()
        self._download_s = time.monotonic() - began
        if self._found is None:
            if status not in _STARTUP_EXIT_CODES:
                self._relay.show_last_words("download", list(self._download.last_lines))
            raise ChildFailed(
                "The model could not be obtained.",
                status if status in _STARTUP_EXIT_CODES else ModelNotFoundError.exit_code,
            )
        return self._found

    async def _start_shards(self) -> None:
        self._ready_events.clear()
        self._all_ready.clear()
        world_size = self._settings.num_shard or 1
        for rank in range(world_size):
            (self._run_dir / f"shard-{rank}.sock").unlink(missing_ok=True)
        self._shards = [
            await Child.start(
                ChildSpec(
                    name=f"shard-{rank}",
                    module=self._programs.shard,
                    arguments=(
                        "--run-dir", str(self._run_dir), "--rank", str(rank), "--world-size", str(world_size),
                    ),
                    environment=layout.shard_environment(self._settings, self._environ),
                ),
                self._on_line,
            )
            for rank in range(world_size)
        ]  # fmt: skip

    async def _first_dead(self, until: asyncio.Event, timeout_s: float | None = None) -> Child | None:
        """The first shard to end; None when `until` comes first, or time is up."""
        deaths = {asyncio.create_task(shard.wait()): shard for shard in self._shards}
        event = asyncio.create_task(until.wait())
        try:
            done, _ = await asyncio.wait({*deaths, event}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (*deaths, event):
                task.cancel()
        return next((deaths[task] for task in done if task is not event), None)

    async def _first_dead_or_stalled(self) -> Child:
        """The shard because of which the group must be restarted."""
        stalled = asyncio.Event()
        watch = asyncio.create_task(self._watch(stalled))
        try:
            dead = await self._first_dead(until=stalled)
        finally:
            watch.cancel()
        return dead or self._shards[0]

    async def _watch(self, stalled: asyncio.Event) -> None:
        if self._settings.watchdog_timeout_s == 0:
            return
        from weft.launcher import watchdog  # late: gRPC takes a while to load, and nobody waits for it now

        seconds = await watchdog.wait_for_stall(self._run_dir / "shard-0.sock", self._settings.watchdog_timeout_s)
        self._log.error("shard.stalled", process="shard-0", seconds=round(seconds, 1))
        stalled.set()

    async def _kill_shards(self) -> None:
        """End the whole group: survivors of a dead rank wait for it in a collective operation."""
        for shard in self._shards:
            shard.kill()
        for shard in self._shards:
            await shard.wait()

    async def _before_restart(self, dead: Child, status: int | None, policy: RestartPolicy, served_s: float) -> None:
        """Show how a child ended and wait as the policy says. Raises ChildFailed when it may not start again."""
        self._log.error("child.died", process=dead.name, how=_how(status), served_s=round(served_s, 1))
        self._relay.show_last_words(dead.name, list(dead.last_lines))
        if status in _STARTUP_EXIT_CODES:
            raise ChildFailed(f"{dead.name} cannot start.", status or 1)
        delay_s = policy.note_death(served_s)
        if delay_s is None:
            raise ChildFailed(f"{dead.name} died {policy.num_quick_failures} times in a row.", 1)
        await asyncio.sleep(delay_s)

    def _failure(self, dead: Child, status: int | None) -> ChildFailed:
        """Why the first start failed."""
        if status in _STARTUP_EXIT_CODES:
            return ChildFailed(f"{dead.name} cannot start.", status or 1)
        self._relay.show_last_words(dead.name, list(dead.last_lines))
        return ChildFailed(f"{dead.name} died while loading: {_how(status)}.", 1)

    def _on_line(self, child: Child, line: str) -> None:
        event = parse_event(line)
        if child.name == "shard-0" and self._first_word_at is None:
            self._first_word_at = time.monotonic()
        rank = int(child.name.removeprefix("shard-")) if child.name.startswith("shard-") else None
        if event is None:
            child.last_lines.append(line)
            self._relay.show_text(child.name, line)
        elif event["event"] == "startup.progress":
            if not rank:
                self._on_progress(event)
        elif event["event"] == "startup.ready" and rank is not None:
            self._ready_events[child.name] = event
            if len(self._ready_events) == self._settings.num_shard:
                self._all_ready.set()
        elif event["event"] == "download.finished":
            sha = event.get("sha")
            self._found = FetchedModel(Path(str(event["path"])), str(sha) if sha else None)
        else:
            if event["event"] == "router.ready":
                self._router_ready.set()
            elif event["event"] == "startup.failed":
                fault = str(event.get("message", ""))
                if fault == self._startup_fault:
                    return  # every rank finds out the same
                self._startup_fault = fault
            self._relay.show_event(child.name, rank, line, event)

    def _on_progress(self, event: Event) -> None:
        phase, message = str(event.get("phase", "load")), str(event.get("message", ""))
        percent = event.get("percent", 0)
        percent = round(percent) if isinstance(percent, int | float) else 0
        self._become("loading", phase=phase, percent=percent, message=message)
        now = time.monotonic()
        is_news = bool(message) and phase != self._shown_phase
        if is_news or now - self._progress_shown_at > _SECONDS_BETWEEN_PROGRESS_LINES:
            self._progress_shown_at, self._shown_phase = now, phase
            fields = {"message": message} if message else {}
            self._log.info("startup.progress", phase=phase, percent=percent, **fields)

    def _become(self, state: str, *, phase: str = "", percent: int = 0, message: str = "") -> None:
        """Take a state and tell the router."""
        self._state = {"state": state, "phase": phase, "percent": percent, "message": message}
        if self._router is not None:
            self._router.tell(json.dumps(self._state))

    def _announce(self, shards_began: float, ready_at: float) -> None:
        """The banner; for machines one log line."""
        total_s = ready_at - self._started
        ready = self._ready_events["shard-0"]
        if self._settings.json_output:
            fields = {name: value for name, value in ready.items() if name not in ENVELOPE_FIELDS}
            self._log.info("server.ready", url=banner.base_url(self._settings), seconds=round(total_s, 2), **fields)
            return
        marks = [("launch", shards_began - self._started - self._download_s), ("download", self._download_s)]
        marks.append(("import", (self._first_word_at or ready_at) - shards_began))
        phases = banner.all_phases(marks, ready, total_s)
        sys.stdout.write("\n".join(banner.banner(self._settings, ready, phases)) + "\n")
        sys.stdout.flush()

    async def _drain(self) -> None:
        """Let running requests end, then the router; a second signal cuts it short."""
        self._is_stopping = True
        is_serving = self._state.get("state") == "ready"
        grace_s = self._settings.graceful_termination_timeout if is_serving else 1.0
        self._log.info("launcher.draining", seconds_at_most=grace_s)
        self._become("draining")
        if self._router is not None and self._router.is_alive:
            await self._unless_hurried(self._router.stop(grace_s))

    async def _stop_children(self) -> None:
        """End whatever still runs; returns when nothing does."""
        if self._router is not None and self._router.is_alive and not self._stop_asked.is_set():
            await self._unless_hurried(self._router.stop(1.0))
        # A shard that is still loading has nothing to say good-bye to.
        grace_s = _SHARD_STOP_S if self._all_ready.is_set() else 0.2
        await self._unless_hurried(_stop_all([shard for shard in self._shards if shard.is_alive], grace_s))
        everyone = [child for child in (self._router, self._download, *self._shards) if child is not None]
        for child in everyone:
            child.kill()
        for child in everyone:
            await child.wait()

    async def _unless_hurried(self, work: "asyncio._CoroutineLike[None]") -> None:
        """Await `work`, or give it up at the second signal."""
        hurry = asyncio.create_task(self._hurry_asked.wait())
        task = asyncio.create_task(work)
        await asyncio.wait({hurry, task}, return_when=asyncio.FIRST_COMPLETED)
        for unfinished in (hurry, task):
            unfinished.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def _stop_all(children: Iterable[Child], grace_s: float) -> None:
    await asyncio.gather(*(child.stop(grace_s) for child in children))


def _how(status: int | None) -> str:
    """An exit status in words."""
    if status is None:
        return "it stood still"
    if status >= 0:
        return f"exit code {status}"
    name = signal.Signals(-status).name
    hint = " (was memory short?)" if -status == signal.SIGKILL else ""
    return f"killed by {name}{hint}"
