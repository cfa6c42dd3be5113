"""HTML for people: a small page at / and the documentation at /docs. Everything comes from this package."""

import html
from functools import cache
from importlib import resources
from string import Template

from weft.router.context import RouterContext
from weft.router.lifecycle import ServerState


@cache
def static_file(name: str) -> bytes:
    """A file of `router/static`."""
    return resources.files("weft.router").joinpath("static", name).read_bytes()


def landing_page(context: RouterContext) -> bytes:
    """What is served here, or how far the start has come; reloads itself until it is ready."""
    progress = context.lifecycle.progress
    is_ready = progress.state is ServerState.READY
    sentence = "Ready." if is_ready else f"{progress.state.capitalize()}: {progress.phase}, {progress.percent} %."
    template = Template(static_file("landing.html").decode())
    return template.substitute(
        model=html.escape(context.settings.shown_model_name),
        version=html.escape(context.version),
        state=html.escape(progress.state),
        sentence=html.escape(sentence),
        percent=100 if is_ready else progress.percent,
        message=html.escape(progress.message),
        refresh="" if is_ready else '<meta http-equiv="refresh" content="2">',
    ).encode()
