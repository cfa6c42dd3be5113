"""Bodies of TGI's native routes: wire types and nothing else. Null equals absent in every request.

Texts are shown in the OpenAPI document. Source: TGI 3.3.7 `router/src/lib.rs`, as facts.
"""

from typing import Annotated

from msgspec import UNSET, Meta, Struct, UnsetType

from weft.router.json_values import ABSENT, Anything

UInt32 = Annotated[int, Meta(ge=0, le=2**32 - 1)]
Int32 = Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)]


class GenerateParameters(Struct, kw_only=True):
    """How to generate. An empty object decodes greedily; no object at all samples at temperature 1."""

    best_of: Annotated[
        UInt32 | None,
        Meta(description="Generate this many, 1 to --max-best-of, and keep the likeliest; needs sampling; absent = 1"),
    ] = None
    temperature: Annotated[float | None, Meta(description="> 0; absent = 1, neutral")] = None
    repetition_penalty: Annotated[float | None, Meta(description="> 0; absent = 1, neutral")] = None
    frequency_penalty: Annotated[float | None, Meta(description="-2 to 2; absent = 0, neutral")] = None
    top_k: Annotated[Int32 | None, Meta(description="Sample among the k likeliest tokens; >= 1; absent = all")] = None
    top_p: Annotated[float | None, Meta(description="0 < p <= 1; absent = 1, off")] = None
    typical_p: Annotated[float | None, Meta(description="0 < p <= 1; absent = 1, off")] = None
    do_sample: Annotated[
        bool | None, Meta(description="Sample instead of taking the likeliest token; absent = only if a value needs it")
    ] = None
    max_new_tokens: Annotated[
        UInt32 | None, Meta(description="Most tokens to generate, >= 1; absent = what the context leaves")
    ] = None
    return_full_text: Annotated[
        bool | None,
        Meta(description="Put the prompt before the generated text; absent = false, true on / and /invocations"),
    ] = None
    stop: Annotated[
        list[str] | None,
        Meta(description="Texts that end the generation and stay in the text; at most --max-stop-sequences"),
    ] = None
    truncate: Annotated[
        UInt32 | None, Meta(description="Keep this many of the prompt's last tokens, 1 to --max-input-tokens")
    ] = None
    watermark: Annotated[bool | None, Meta(description="Mark the text, arXiv 2301.10226; absent = false")] = None
    details: Annotated[
        bool | None, Meta(description="Return tokens, log-probabilities and the finish reason; absent = false")
    ] = None
    decoder_input_details: Annotated[
        bool | None,
        Meta(description="Return the prompt's log-probabilities too; implies details, not in streams; absent = false"),
    ] = None
    seed: Annotated[int | None, Meta(description="0 to 2^64 - 1; absent = random")] = None
    top_n_tokens: Annotated[
        UInt32 | None, Meta(description="Return this many likeliest tokens per place, 0 to --max-top-n-tokens")
    ] = None
    grammar: Annotated[Anything, Meta(description="Not supported yet")] = ABSENT
    adapter_id: Annotated[str | None, Meta(description="Not supported yet")] = None


class GenerateRequest(Struct, kw_only=True):
    """Body of /generate and /generate_stream."""

    inputs: str
    parameters: GenerateParameters | None = None


class CompatGenerateRequest(GenerateRequest, kw_only=True):
    """Body of /: as /generate, and `stream` chooses."""

    stream: bool | None = None


class PrefillToken(Struct):
    """One token of the prompt; the first has no log-probability."""

    id: int
    text: str
    logprob: float | None


class Token(Struct):
    """One generated token."""

    id: int
    text: str
    logprob: float | None
    special: bool


class BestOfSequence(Struct, kw_only=True):
    """A sequence that was not the best."""

    generated_text: str
    finish_reason: str
    generated_tokens: int
    seed: int | None
    prefill: list[PrefillToken]
    tokens: list[Token]
    top_tokens: list[list[Token]] | UnsetType = UNSET


class Details(Struct, kw_only=True):
    """How the text came about."""

    finish_reason: str
    generated_tokens: int
    seed: int | None
    prefill: list[PrefillToken]
    tokens: list[Token]
    best_of_sequences: list[BestOfSequence] | UnsetType = UNSET
    top_tokens: list[list[Token]] | UnsetType = UNSET


class GenerateResponse(Struct, kw_only=True):
    """Answer of /generate."""

    generated_text: str
    details: Details | UnsetType = UNSET


class StreamDetails(Struct, kw_only=True):
    """In the last event of a stream, when asked for."""

    finish_reason: str
    generated_tokens: int
    seed: int | None
    input_length: int


class StreamResponse(Struct, kw_only=True):
    """One event of a stream."""

    index: int
    token: Token
    top_tokens: list[Token] | UnsetType = UNSET
    generated_text: str | None
    details: StreamDetails | None


class ErrorResponse(Struct, kw_only=True):
    """Every error of a native route."""

    error: str
    error_type: str


class NotReadyResponse(ErrorResponse, kw_only=True):
    """An error that says how far the start has come."""

    state: str
    phase: str
    percent: int


class TokenizeToken(Struct):
    """One token of a text; start and stop are byte offsets."""

    id: int
    text: str
    start: int
    stop: int


class ChatTokenizeResponse(Struct, kw_only=True):
    """Answer of /chat_tokenize."""

    tokenize_response: list[TokenizeToken]
    templated_text: str


class Quality(Struct, kw_only=True):
    """What few bits cost: the model against itself in the type of its activations, on a fixed text."""

    reference: str
    top1_agreement: float
    kl_nats: float
    num_tokens: int


class Info(Struct, kw_only=True):
    """Answer of /info: TGI's fields, then what the shard says about itself."""

    model_id: str
    model_sha: str | None
    model_pipeline_tag: str | None
    max_concurrent_requests: int
    max_best_of: int
    max_stop_sequences: int
    max_top_n_tokens: int
    max_input_tokens: int
    max_total_tokens: int
    validation_workers: int
    max_client_batch_size: int
    router: str
    version: str
    sha: str | None
    docker_label: str | None
    model_type: str
    model_dtype: str
    model_device_type: str
    model_device_name: str
    num_parameters: int
    quantization: str
    quality: Quality | None
    kernel_set: str
    vocab_size: int
    max_batch_prefill_tokens: int
    max_batch_total_tokens: int
    max_num_sequences: int
    block_size_tokens: int
    num_blocks: int
    weights_bytes: int
    kv_pool_bytes: int
    activation_bytes: int
    prefix_caching: bool
    batch_invariant: bool
    num_shard: int
    fingerprint: str
    task: Annotated[str, Meta(description="generate or embed")]
    pooling: Annotated[str | None, Meta(description="How texts become vectors: last, mean or cls")]
    embedding_size: Annotated[int | None, Meta(description="Numbers in a vector")]
    startup_seconds: dict[str, float]
