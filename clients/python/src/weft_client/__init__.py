"""Client of Weft servers, and of others that speak TGI's native API or OpenAI's.

    from weft_client import Client

    with Client("http://localhost:3000") as client:
        print(client.generate("Once upon a time", max_new_tokens=20).generated_text)
        for chunk in client.chat_stream([{"role": "user", "content": "Hello!"}]):
            print(chunk.text, end="", flush=True)

`AsyncClient` has the same methods for asyncio. Nothing here needs torch or the server's own package.
"""

from weft_client.async_client import AsyncClient
from weft_client.client import Client
from weft_client.errors import (
    ApiError,
    AuthenticationError,
    ClientError,
    ConnectionFailedError,
    InvalidArgumentError,
    InvalidRequestError,
    NotFoundError,
    NotReadyError,
    OverloadedError,
    ServerError,
    StreamInterruptedError,
    UnreadableAnswerError,
)
from weft_client.options import ChatOptions, CompletionOptions, GenerateOptions, Message
from weft_client.types import (
    ChatChunk,
    ChatCompletion,
    Completion,
    Generation,
    Health,
    Info,
    Model,
    StreamToken,
    Token,
    TokenSpan,
    Usage,
)

__version__ = "0.1.0"

__all__ = [
    "ApiError",
    "AsyncClient",
    "AuthenticationError",
    "ChatChunk",
    "ChatCompletion",
    "ChatOptions",
    "Client",
    "ClientError",
    "Completion",
    "CompletionOptions",
    "ConnectionFailedError",
    "GenerateOptions",
    "Generation",
    "Health",
    "Info",
    "InvalidArgumentError",
    "InvalidRequestError",
    "Message",
    "Model",
    "NotFoundError",
    "NotReadyError",
    "OverloadedError",
    "ServerError",
    "StreamInterruptedError",
    "StreamToken",
    "Token",
    "TokenSpan",
    "UnreadableAnswerError",
    "Usage",
    "__version__",
]
