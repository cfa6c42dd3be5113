"""The spellings of cloud platforms: SageMaker's /invocations, Vertex AI's predictions, KServe's v2 protocol.

Each is a frame around the native or the OpenAI routes: parameters are honoured as there, failures keep their status.

Source: TGI 3.3.7 `router/src/{sagemaker,vertex,kserve}.rs`, as facts; Open Inference Protocol v2
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import aclosing
from typing import Protocol

import msgspec

from weft.core.events import TokenEvent
from weft.core.request import Request
from weft.errors import (
    BadRequestError,
    EncodingError,
    NotSupportedError,
    RequestError,
    TensorCountError,
    ValidationError,
)
from weft.router import health, native, openai
from weft.router.body import decode
from weft.router.chat_prompt import render_chat
from weft.router.context import RouterContext
from weft.router.exchange import Exchange, new_request_id
from weft.router.generation import Generation
from weft.router.json_values import Anything, is_given
from weft.router.request_origin import origin_of
from weft.router.schemas_cloud import (
    InferRequest,
    InferResponse,
    InputTensor,
    InvocationShape,
    LiveResponse,
    ModelMetadata,
    OutputTensor,
    ServerMetadata,
    VertexRequest,
    VertexResponse,
)
from weft.router.schemas_native import (
    CompatGenerateRequest,
    GenerateParameters,
    GenerateRequest,
    GenerateResponse,
)
from weft.router.schemas_openai import ChatRequest
from weft.router.sequence_text import SequenceText
from weft.router.stream import encode_json
from weft.router.validate import build_requests, check_chat, check_prompt_chars, fit_openai

_SERVER_NAME = "text-generation-inference"
_TEXT_TYPES = ("BYTES", "UINT8")


class _Answer(Protocol):
    """One prompt's part in an answer."""

    sequences: list[SequenceText]

    @property
    def requests(self) -> list[Request]: ...

    def collect(self, sequence: SequenceText, batch: Sequence[TokenEvent]) -> None: ...


# --- SageMaker ----------------------------------------------------------------------------------------------------


async def invocations(context: RouterContext, exchange: Exchange) -> None:
    """POST /invocations: the body's shape chooses between /, /v1/chat/completions and /v1/completions."""
    shape = decode(exchange.body, InvocationShape)
    if is_given(shape.inputs):
        await native.compat_generate(context, exchange)
        return
    # From here on an error is said as the route that is meant would say it.
    if is_given(shape.messages):
        exchange.speaks_like = "/v1/chat/completions"
        await openai.chat_completions(context, exchange)
    elif is_given(shape.prompt):
        exchange.speaks_like = "/v1/completions"
        await openai.completions(context, exchange)
    else:
        raise BadRequestError(
            "The body must have `inputs` (a text), `messages` (a conversation) or `prompt` (a text to complete)",
            field="inputs",
        )


# --- Vertex AI ----------------------------------------------------------------------------------------------------


async def vertex(context: RouterContext, exchange: Exchange) -> None:
    """POST /vertex and $AIP_PREDICT_ROUTE: every instance at once, answers in order."""
    instances = decode(exchange.body, VertexRequest).instances
    _check_count("instances", len(instances), context)
    answers: list[native.WholeAnswer | _ChatAnswer] = []
    for position, instance in enumerate(instances):
        first_index = sum(len(answer.requests) for answer in answers)
        try:
            answers.append(await _vertex_answer(context, exchange, instance, first_index))
        except (BadRequestError, ValidationError) as error:
            raise _at(f"instances[{position}]", error) from None
    await _run(context, exchange, answers)
    predictions = [_prediction(answer) for answer in answers]
    await exchange.reply(200, encode_json(VertexResponse(predictions=predictions)))


async def _vertex_answer(
    context: RouterContext, exchange: Exchange, instance: Anything, first_index: int
) -> "native.WholeAnswer | _ChatAnswer":
    shape = decode(bytes(instance), InvocationShape)
    if is_given(shape.messages) and not is_given(shape.inputs):
        return await _ChatAnswer.of(context, exchange, decode(bytes(instance), ChatRequest), first_index)
    body = decode(bytes(instance), CompatGenerateRequest)
    _refuse_fields_without_place({"stream": body.stream})
    if body.parameters is not None and body.parameters.do_sample is None:
        # TGI samples on this route whatever the parameters; here they decide when they say something.
        body.parameters.do_sample = True
    prepared, model = await native.prepare(context, exchange, body, shows_prompt=False, is_stream=False)
    return native.WholeAnswer(prepared, model, first_index)


class _ChatAnswer:
    """The text of one conversation's answer."""

    def __init__(self, sequence: SequenceText, request: Request) -> None:
        self.sequences = [sequence]
        self.requests = [request]
        self._text: list[str] = []

    @classmethod
    async def of(cls, context: RouterContext, exchange: Exchange, body: ChatRequest, first_index: int) -> "_ChatAnswer":
        """Check a conversation and tokenize its prompt. Raises RequestError."""
        model = context.require_model()
        _refuse_fields_without_place({"stream": body.stream, "n": (body.n or 1) != 1, "logprobs": body.logprobs})
        checked = check_chat(body, context.settings, model)
        exchange.stage = "template"
        prompt = await render_chat(body, model)
        check_prompt_chars(prompt, model, "messages")
        exchange.stage = "tokenize"
        ids = await model.tokenizer.encode_async(prompt, add_special_tokens=False)
        exchange.num_prompt_tokens += len(ids)
        max_new_tokens = fit_openai(len(ids), checked, model, "messages")
        (request,) = build_requests(checked, ids, max_new_tokens, model, origin_of(context, exchange))
        return cls(SequenceText(model, ids, checked.stop_strings, index=first_index), request)

    def collect(self, sequence: SequenceText, batch: Sequence[TokenEvent]) -> None:
        """Take in events."""
        for event in batch:
            self._text.append(sequence.push(event))
            if sequence.finish_reason is not None:
                return

    @property
    def text(self) -> str:
        """The answer."""
        return "".join(self._text)


def _refuse_fields_without_place(fields: Mapping[str, bool | None]) -> None:
    for name, is_set in fields.items():
        if is_set:
            raise NotSupportedError(f"`{name}` has no place in a prediction; leave it out", field=name)


def _prediction(answer: "native.WholeAnswer | _ChatAnswer") -> str | GenerateResponse:
    if isinstance(answer, _ChatAnswer):
        return answer.text
    response = answer.response()
    return response.generated_text if response.details is msgspec.UNSET else response


# --- KServe -------------------------------------------------------------------------------------------------------


async def infer(context: RouterContext, exchange: Exchange) -> None:
    """POST /v2/models/{name}/infer, with and without a version: one answer per text, in the form of the input."""
    body = decode(exchange.body, InferRequest)
    _refuse_parameters_without_place(body.parameters)
    names = [tensor.name for tensor in body.outputs or body.inputs]
    if len(names) != len(body.inputs):
        raise TensorCountError(
            f"Inputs and outputs length mismatch. Given: {len(body.inputs)} `inputs` and {len(names)} `outputs`; name "
            "one output per input, or none",
            field="outputs",
        )
    texts = [list(_texts_of(tensor, position)) for position, tensor in enumerate(body.inputs)]
    _check_count("inputs", sum(map(len, texts)), context)
    answers: list[native.WholeAnswer] = []
    for position, text in ((position, text) for position, of_tensor in enumerate(texts) for text in of_tensor):
        first_index = sum(len(answer.requests) for answer in answers)
        request = GenerateRequest(inputs=text, parameters=body.parameters)
        try:
            prepared, model = await native.prepare(context, exchange, request, shows_prompt=False, is_stream=False)
        except ValidationError as error:
            # Parameters are those of all inputs.
            raise _at(f"inputs[{position}].data", error) if error.field == "inputs" else error from None
        answers.append(native.WholeAnswer(prepared, model, first_index))
    await _run(context, exchange, answers)
    generated = iter([answer.response().generated_text for answer in answers])
    outputs = [
        _output(name, [next(generated) for _ in tensor_texts], is_numbers=_is_numbers(tensor))
        for name, tensor, tensor_texts in zip(names, body.inputs, texts, strict=True)
    ]
    await exchange.reply(200, encode_json(InferResponse(id=body.id or new_request_id(), outputs=outputs)))


async def server_metadata(context: RouterContext, exchange: Exchange) -> None:
    """GET /v2."""
    body = ServerMetadata(name=_SERVER_NAME, version=context.version, extensions=["health", "models", "metrics"])
    await exchange.reply(200, encode_json(body))


async def model_metadata(context: RouterContext, exchange: Exchange) -> None:
    """GET /v2/models/{name}, with and without a version: both are what the platform calls the model."""
    del context
    params = exchange.path_params
    body = ModelMetadata(name=params["name"], version=params.get("version", "1"), extensions=["infer", "ready"])
    await exchange.reply(200, encode_json(body))


async def live(context: RouterContext, exchange: Exchange) -> None:
    """GET /v2/health/live."""
    del context
    await exchange.reply(200, encode_json(LiveResponse(live=True)))


async def ready(context: RouterContext, exchange: Exchange) -> None:
    """GET /v2/health/ready and those of models: TGI's body, but 503 as /health while nothing would be served."""
    if await health.find_fault(context) is None:
        await exchange.reply(200, encode_json(LiveResponse(live=True)))
    else:
        await health.health(context, exchange)


def _texts_of(tensor: InputTensor, position: int) -> Iterator[str]:
    place = f"inputs[{position}]"
    if tensor.datatype not in _TEXT_TYPES:
        raise ValidationError(
            f"`{place}.datatype` must be BYTES. Given: {tensor.datatype[:32]!r}", field=f"{place}.datatype"
        )
    texts = [part for part in tensor.data if isinstance(part, str)]
    numbers = [part for part in tensor.data if isinstance(part, int)]
    if texts and numbers:
        raise ValidationError(f"`{place}.data` must not mix texts and bytes", field=f"{place}.data")
    if texts:
        yield from texts
        return
    try:
        yield bytes(numbers).decode()
    except UnicodeDecodeError as error:
        raise EncodingError(f"`{place}.data` is not UTF-8 from byte {error.start} on", field=f"{place}.data") from None


def _is_numbers(tensor: InputTensor) -> bool:
    return all(isinstance(part, int) for part in tensor.data)


def _output(name: str, texts: list[str], *, is_numbers: bool) -> OutputTensor:
    if not is_numbers:
        return OutputTensor(name=name, shape=[len(texts)], datatype="BYTES", data=list(texts))
    (text,) = texts
    data = text.encode()
    return OutputTensor(name=name, shape=[1, len(data)], datatype="BYTES", data=list(data))


def _refuse_parameters_without_place(parameters: GenerateParameters | None) -> None:
    if parameters is None:
        return
    for name in ("details", "decoder_input_details", "top_n_tokens"):
        if getattr(parameters, name):
            raise NotSupportedError(f"`{name}` has no place in a tensor; leave it out", field=name)


# --- shared -------------------------------------------------------------------------------------------------------


async def _run(context: RouterContext, exchange: Exchange, answers: Sequence[_Answer]) -> None:
    """Generate all sequences of all answers; the first failure ends all."""
    requests = [request for answer in answers for request in answer.requests]
    owners = [answer for answer in answers for _ in answer.requests]
    sequences = [sequence for answer in answers for sequence in answer.sequences]
    with Generation(context, exchange, requests, sequences) as generation:
        async with aclosing(generation.progress()) as progress:
            async for sequence, batch in progress:
                owners[sequence.index].collect(sequence, batch)


def _check_count(field: str, count: int, context: RouterContext) -> None:
    limit = context.settings.max_concurrent_requests
    if not 1 <= count <= limit:
        raise ValidationError(f"`{field}` must hold 1 to {limit} entries. Given: {count}", field=field)


def _at(place: str, error: RequestError) -> RequestError:
    """The same error, saying which instance it is about."""
    field = place if error.field is None else f"{place}.{error.field}"
    return type(error)(f"{error.message} (in `{place}`)", field=field, retry_after_s=error.retry_after_s)
