"""The names that `model` may have on `/v1`, and the head that every answer repeats."""

import time

from weft.errors import ModelNotServedError
from weft.router.choices import AnswerHead
from weft.router.context import RouterContext
from weft.router.exchange import new_request_id
from weft.router.recording import system_fingerprint
from weft.router.served import ServedModel

PLACEHOLDER_NAMES = ("", "tgi", "dummy")
"""What clients of TGI call whatever is served: `tgi` by its documentation, `dummy` by huggingface_hub."""


def shown_names(context: RouterContext) -> list[str]:
    """Names of the model that are shown, the preferred one first. The reference it was loaded by may be a path."""
    settings = context.settings
    return list(dict.fromkeys((settings.shown_model_name, *settings.served_model_name)))


def is_served(name: str, context: RouterContext) -> bool:
    """Whether a name is one of the model's, shown or not."""
    return name in shown_names(context) or name == context.settings.model_id


def unknown_model(name: str, context: RouterContext) -> ModelNotServedError:
    """The error for a name that nobody here has."""
    return ModelNotServedError(
        f"The model `{name[:128]}` does not exist here. This server has `{shown_names(context)[0]}` (GET /v1/models)",
        field="model",
    )


def answering_name(asked: str | None, context: RouterContext) -> str:
    """The name that the answer carries. Raises ModelNotServedError."""
    names = shown_names(context)
    is_any = asked is None or asked in PLACEHOLDER_NAMES or context.settings.any_model_name
    if asked is not None and not is_any and not is_served(asked, context):
        raise unknown_model(asked, context)
    return asked if asked is not None and asked in names else names[0]


def answer_head(prefix: str, asked: str | None, context: RouterContext, model: ServedModel) -> AnswerHead:
    """A new head. Raises ModelNotServedError."""
    return AnswerHead(
        id=f"{prefix}{new_request_id()}",
        created=int(time.time()),
        model=answering_name(asked, context),
        system_fingerprint=system_fingerprint(model.info, context.version),
    )
