"""Fields of OpenAI's bodies that change no token: accepted for a reason, or refused by name. Nothing is ignored.

    user, safety_identifier        name a user of the caller's; nothing is kept about them
    prompt_cache_key, …_retention, hints for a cache that finds shared prefixes without them
    …_options
    service_tier                   there is one tier, and the answer says so: `default`
    prediction                     makes the same answer come sooner; here nothing is predicted
    reasoning_effort               for templates that read it, and a hint to nobody otherwise
    verbosity                      a hint to models that were trained on it
    parallel_tool_calls            without tools there is nothing to call
    metadata, store                belong to stored completions, which only `/v1/responses` has: `store` true is refused

Source: OpenAI API reference, chat completions and responses
"""

from collections.abc import Mapping

import msgspec

from weft.errors import NotSupportedError, ValidationError
from weft.router.json_values import is_given
from weft.router.schemas_openai import ChatRequest, PromptCacheOptions, SamplingFields

REASONING_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
VERBOSITIES = ("low", "medium", "high")
SERVICE_TIERS = ("auto", "default", "flex", "scale", "priority", "fast")
_CACHE_RETENTIONS = ("in_memory", "24h")
_CACHE_MODES = ("implicit", "explicit")
ONLY_TIER = "default"

_MAX_METADATA_ENTRIES = 16
_MAX_METADATA_KEY_CHARS = 64
_MAX_METADATA_VALUE_CHARS = 512
_NOT_YET = ("guided_json", "guided_regex", "structured_outputs")
_IDLE_CHOICES = (b'"none"', b'"auto"')
"""What a choice among tools says when there are none."""


def check_chat_fields(body: ChatRequest) -> None:
    """Raises ValidationError, NotSupportedError."""
    refuse_unknown_masks(body)
    _refuse_tools(body)
    _refuse_other_modalities(body)
    if body.chat_template is not None:
        raise NotSupportedError(
            "`chat_template` is not accepted from requests: templates come with the model", field="chat_template"
        )
    if is_given(body.response_format) and not _is_text_format(body.response_format):
        raise NotSupportedError(
            '`response_format` other than {"type": "text"} is not supported yet; leave it out', field="response_format"
        )
    if body.store:
        raise NotSupportedError(
            "`store` true is not supported here; leave it out, or send the conversation to /v1/responses, which stores",
            field="store",
        )
    check_choice("service_tier", body.service_tier, SERVICE_TIERS)
    check_choice("reasoning_effort", body.reasoning_effort, REASONING_EFFORTS)
    check_choice("verbosity", body.verbosity, VERBOSITIES)
    check_cache_hints(body.prompt_cache_retention, body.prompt_cache_options)
    if body.prediction is not None:
        check_choice("prediction.type", body.prediction.type, ("content",))
    check_metadata(body.metadata or {})


def refuse_unknown_masks(body: SamplingFields) -> None:
    """Raises NotSupportedError for what would shape the text."""
    for name in _NOT_YET:
        if is_given(getattr(body, name)):
            raise NotSupportedError(f"`{name}` is not supported yet; leave it out", field=name)


def is_idle_choice(choice: msgspec.Raw) -> bool:
    """Whether a choice among tools asks for nothing that a server without them could not do."""
    return not is_given(choice) or bytes(choice) in _IDLE_CHOICES


def check_choice(field: str, value: str | None, choices: tuple[str, ...]) -> None:
    """Raises ValidationError that names what may be chosen."""
    if value is not None and value not in choices:
        raise ValidationError(f"`{field}` must be one of {', '.join(choices)}. Given: {value[:64]!r}", field=field)


def check_cache_hints(retention: str | None, options: PromptCacheOptions | None) -> None:
    """Raises ValidationError, NotSupportedError for what is more than a hint."""
    check_choice("prompt_cache_retention", retention, _CACHE_RETENTIONS)
    if options is None:
        return
    check_choice("prompt_cache_options.mode", options.mode, _CACHE_MODES)
    for name in ("prewarm", "comparison_response_id"):
        if getattr(options, name):
            raise NotSupportedError(
                f"`prompt_cache_options.{name}` is not supported; leave it out", field="prompt_cache_options"
            )


def check_metadata(metadata: Mapping[str, str]) -> None:
    """Raises ValidationError for too much of it."""
    if len(metadata) > _MAX_METADATA_ENTRIES:
        raise ValidationError(
            f"`metadata` must have at most {_MAX_METADATA_ENTRIES} entries. Given: {len(metadata)}", field="metadata"
        )
    for key, value in metadata.items():
        if len(key) > _MAX_METADATA_KEY_CHARS or len(value) > _MAX_METADATA_VALUE_CHARS:
            raise ValidationError(
                f"`metadata` keys must have at most {_MAX_METADATA_KEY_CHARS} characters and values "
                f"{_MAX_METADATA_VALUE_CHARS}. Given: {len(key)} and {len(value)}",
                field="metadata",
            )


def _refuse_tools(body: ChatRequest) -> None:
    for name in ("tools", "functions"):
        if getattr(body, name):
            raise NotSupportedError(f"`{name}` is not supported yet; leave it out", field=name)
    for name in ("tool_choice", "function_call"):
        if not is_idle_choice(getattr(body, name)):
            raise NotSupportedError(f'`{name}` other than "none" or "auto" is not supported yet', field=name)


def _refuse_other_modalities(body: ChatRequest) -> None:
    for name in ("audio", "web_search_options", "moderation"):
        if is_given(getattr(body, name)):
            raise NotSupportedError(f"`{name}` is not supported; leave it out", field=name)
    if body.modalities and body.modalities != ["text"]:
        raise NotSupportedError('`modalities` other than ["text"] is not supported', field="modalities")


def _is_text_format(raw: msgspec.Raw) -> bool:
    return b"".join(bytes(raw).split()) == b'{"type":"text"}'
