"""Lets somebody watch which operations run, with which tensors: how a program is recorded from a model.

Operations are called one by one as always; a recorder sees each call behind its implementation. Watching is bound to
the context (thread or task) that asks for it, so that other models in this process are not recorded by accident.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, Protocol


class Implementation(Protocol):
    """What a recorder is told about an implementation (`registry.Implementation`)."""

    @property
    def operation(self) -> str: ...  # noqa: D102
    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def function(self) -> Callable[..., Any]: ...  # noqa: D102


class Recorder(Protocol):
    """Told of every operation, in order, after it ran."""

    def record(
        self,
        implementation: Implementation,
        arguments: tuple[object, ...],
        options: dict[str, object],
        result: object,
    ) -> None:
        """`arguments` and `options` are what the implementation got, with whatever it changed in them."""
        ...


_watching: ContextVar[Recorder | None] = ContextVar("recorder", default=None)


@contextmanager
def watch(recorder: Recorder) -> Iterator[None]:
    """Tell `recorder` of the operations that this context calls."""
    token = _watching.set(recorder)
    try:
        yield
    finally:
        _watching.reset(token)


def observed(implementation: Implementation) -> Callable[..., Any]:
    """The function of an implementation, or one that also tells whoever watches."""
    recorder = _watching.get()
    return implementation.function if recorder is None else partial(_run_and_tell, recorder, implementation)


def _run_and_tell(recorder: Recorder, implementation: Implementation, *arguments: object, **options: object) -> object:
    result = implementation.function(*arguments, **options)
    recorder.record(implementation, arguments, options, result)
    return result
