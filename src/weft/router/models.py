"""/v1/models and /v1/models/{id}: the names of the model served, as OpenAI's clients read them, or as Anthropic's do.

Both APIs have these paths. Anthropic's clients always send `anthropic-version`, and nobody else does.

Source: OpenAI API reference, models; Anthropic API reference, models, version 2023-06-01
"""

from datetime import UTC, datetime

from weft.errors import ValidationError
from weft.router.body import decode_query
from weft.router.context import RouterContext
from weft.router.error_replies import speaks_anthropic
from weft.router.exchange import Exchange
from weft.router.model_names import is_served, shown_names, unknown_model
from weft.router.schemas_anthropic import AnthropicModel, AnthropicModelList, AnthropicModelsQuery
from weft.router.schemas_openai import Model, ModelList
from weft.router.served import ServedModel
from weft.router.stream import encode_json

_PAGE_MODELS = 20
_MAX_PAGE_MODELS = 1000


async def list_models(context: RouterContext, exchange: Exchange) -> None:
    """GET /v1/models."""
    model = context.known_model()
    names, query = shown_names(context), decode_query(exchange, AnthropicModelsQuery)
    if speaks_anthropic(exchange):
        await exchange.reply(200, encode_json(_page(names, query, model)))
        return
    await exchange.reply(200, encode_json(ModelList(data=[_model(name, context, model) for name in names])))


async def model_by_id(context: RouterContext, exchange: Exchange) -> None:
    """GET /v1/models/{id}; an id may hold slashes."""
    model = context.known_model()
    name = exchange.path_params["model_id"]
    if not is_served(name, context):
        raise unknown_model(name, context)
    shown = _anthropic_model(name, model) if speaks_anthropic(exchange) else _model(name, context, model)
    await exchange.reply(200, encode_json(shown))


def _model(name: str, context: RouterContext, model: ServedModel) -> Model:
    return Model(
        id=name,
        created=model.created_s,
        owned_by=context.settings.shown_model_name,
        root=context.settings.shown_model_name,
        max_model_len=model.max_total_tokens,
        task=model.task,
    )


def _anthropic_model(name: str, model: ServedModel) -> AnthropicModel:
    created = datetime.fromtimestamp(model.created_s, tz=UTC)
    return AnthropicModel(
        id=name,
        display_name=name,
        created_at=created.isoformat().replace("+00:00", "Z"),
        max_input_tokens=model.max_input_tokens,
        max_tokens=model.max_total_tokens - 1,
    )


def _page(names: list[str], query: AnthropicModelsQuery, model: ServedModel) -> AnthropicModelList:
    """Raises ValidationError naming the parameter."""
    limit = _PAGE_MODELS if query.limit is None else query.limit
    if not 1 <= limit <= _MAX_PAGE_MODELS:
        raise ValidationError(f"`limit` must be >= 1 and <= {_MAX_PAGE_MODELS}. Given: {limit}", field="limit")
    if query.after_id is not None and query.before_id is not None:
        raise ValidationError("`after_id` and `before_id` must not both be given; choose one", field="before_id")
    if query.before_id is not None:
        before = names[: _place(query.before_id, "before_id", names)]
        chosen, has_more = before[-limit:], len(before) > limit
    else:
        behind = names if query.after_id is None else names[_place(query.after_id, "after_id", names) + 1 :]
        chosen, has_more = behind[:limit], len(behind) > limit
    return AnthropicModelList(
        data=[_anthropic_model(name, model) for name in chosen],
        has_more=has_more,
        first_id=chosen[0] if chosen else None,
        last_id=chosen[-1] if chosen else None,
    )


def _place(name: str, field: str, names: list[str]) -> int:
    if name not in names:
        raise ValidationError(f"`{field}` must be the id of one of the models. Given: {name[:128]!r}", field=field)
    return names.index(name)
