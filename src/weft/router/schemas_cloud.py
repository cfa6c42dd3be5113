"""Bodies of the cloud platforms' routes: Vertex AI and KServe v2. Wire types and nothing else.

Source: TGI 3.3.7 `router/src/vertex.rs` and `kserve.rs`, as facts; Open Inference Protocol v2
"""

from typing import Annotated

from msgspec import Meta, Struct

from weft.router.json_values import ABSENT, Anything
from weft.router.schemas_native import GenerateParameters, GenerateResponse


class InvocationShape(Struct, kw_only=True):
    """What tells the three bodies of /invocations apart."""

    inputs: Anything = ABSENT
    messages: Anything = ABSENT
    prompt: Anything = ABSENT


class VertexRequest(Struct, kw_only=True):
    """Body of a Vertex AI prediction."""

    instances: Annotated[
        list[Anything],
        Meta(
            description="Each as the body of /generate (`inputs`, `parameters`) or of /v1/chat/completions (`messages`)"
        ),
    ]


class VertexResponse(Struct, kw_only=True):
    """Answer to a Vertex AI prediction: one entry per instance, in order."""

    predictions: Annotated[
        list[str | GenerateResponse], Meta(description="Texts; with `details`, what /generate would answer")
    ]


class InputTensor(Struct, kw_only=True):
    """One tensor of texts."""

    name: str
    shape: list[int]
    datatype: Annotated[str, Meta(description="BYTES")]
    data: Annotated[
        list[Annotated[int, Meta(ge=0, le=255)] | str],
        Meta(description="Texts, or the bytes of one text in UTF-8 as numbers"),
    ]


class RequestedOutput(Struct, kw_only=True):
    """Name of an output."""

    name: str


class InferRequest(Struct, kw_only=True):
    """Body of a KServe inference."""

    inputs: list[InputTensor]
    id: str | None = None
    outputs: Annotated[
        list[RequestedOutput] | None, Meta(description="One per input; absent = called as the inputs are")
    ] = None
    parameters: GenerateParameters | None = None


class OutputTensor(Struct, kw_only=True):
    """Generated texts, in the form in which the input came."""

    name: str
    shape: list[int]
    datatype: str
    data: list[int | str]


class InferResponse(Struct, kw_only=True):
    """Answer to a KServe inference."""

    id: str
    outputs: list[OutputTensor]


class ServerMetadata(Struct, kw_only=True):
    """What this server is, as KServe asks."""

    name: str
    version: str
    extensions: list[str]


class ModelMetadata(Struct, kw_only=True):
    """What the model is, as KServe asks."""

    name: str
    version: str
    extensions: list[str]


class LiveResponse(Struct, kw_only=True):
    """Answer of KServe's probes."""

    live: bool
