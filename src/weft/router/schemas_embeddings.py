"""Bodies of /v1/embeddings and /embed: wire types and nothing else. Null equals absent in every request.

Source: OpenAI API reference, embeddings; text-embeddings-inference 1.8 `/embed`, as facts
"""

from typing import Annotated

from msgspec import Meta, Struct


class EmbeddingsRequest(Struct, kw_only=True):
    """Body of /v1/embeddings."""

    input: Annotated[str | list[str | int | list[int]], Meta(description="Text, token ids, or a list of either")]
    model: Annotated[str | None, Meta(description="A name of /v1/models; absent = the model served")] = None
    dimensions: Annotated[int | None, Meta(description="Keep this many numbers of each vector; absent = all")] = None
    encoding_format: Annotated[str | None, Meta(description="float, or base64 of float32 in little-endian order")] = (
        None
    )
    user: str | None = None
    truncate_prompt_tokens: Annotated[
        int | None, Meta(description="Keep this many of an input's last tokens; -1 = as many as the model takes")
    ] = None


class EmbedRequest(Struct, kw_only=True):
    """Body of /embed."""

    inputs: Annotated[str | list[str | int | list[int]], Meta(description="Text, token ids, or a list of either")]
    normalize: Annotated[bool | None, Meta(description="Divide each vector by its length; absent = true")] = None
    truncate: Annotated[bool | None, Meta(description="Cut inputs that are too long; absent = false")] = None
    truncation_direction: Annotated[str | None, Meta(description="Which end is cut off: Right or Left")] = None
    prompt_name: Annotated[str | None, Meta(description="Refused: put the prompt into the input")] = None
    dimensions: Annotated[int | None, Meta(description="Keep this many numbers of each vector; absent = all")] = None


class EmbeddingObject(Struct, kw_only=True):
    """The vector of one input."""

    object: str = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(Struct, kw_only=True):
    """What was counted."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(Struct, kw_only=True):
    """Answer of /v1/embeddings."""

    object: str = "list"
    data: list[EmbeddingObject]
    model: str
    usage: EmbeddingUsage
