"""OpenAI's /v1/embeddings: refused, because the models served here generate text and have no embeddings to give."""

from weft.errors import NotSupportedError
from weft.router.body import decode
from weft.router.context import RouterContext
from weft.router.exchange import Exchange
from weft.router.model_names import answering_name
from weft.router.schemas_openai import EmbeddingsRequest


async def embeddings(context: RouterContext, exchange: Exchange) -> None:
    """POST /v1/embeddings. Raises NotSupportedError, or ModelNotServedError for a model that is not here."""
    name = answering_name(decode(exchange.body, EmbeddingsRequest).model, context)
    raise NotSupportedError(
        f"`model` must be an embedding model. Given: `{name}`, which generates text; embedding models are not "
        "supported yet. Ask a server that has one, or generate with /v1/chat/completions",
        field="model",
    )
