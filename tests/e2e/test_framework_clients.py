"""Frameworks that speak to servers like ours against the real server; each in its own environment, as they disagree."""

import json
import os
import subprocess

import pytest
from tests.e2e.client_environments import python_environment
from tests.e2e.harness import RunningServer, clean_environment

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.skipif(
        "FRAMEWORK_CLIENTS" not in os.environ, reason="installs three environments; `make frameworks` runs it"
    ),
]

LITELLM = """
import litellm
fields = dict(model="openai/tgi", api_base=url + "/v1", api_key="none", temperature=0, max_tokens=24)
whole = litellm.completion(messages=messages, **fields)
chunks = litellm.completion(messages=messages, stream=True, **fields)
say(whole.choices[0].message.content, "".join(chunk.choices[0].delta.content or "" for chunk in chunks))
"""

LANGCHAIN = """
from langchain_openai import ChatOpenAI
model = ChatOpenAI(model="tgi", base_url=url + "/v1", api_key="none", temperature=0, max_tokens=24, stream_usage=True)
whole = model.invoke(question)
assert whole.usage_metadata["total_tokens"] > 0
parts = list(model.stream(question))
assert any(part.usage_metadata for part in parts)
say(whole.content, "".join(part.content for part in parts))
"""

LLAMA_INDEX = """
from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike
model = OpenAILike(
    model="tgi", api_base=url + "/v1", api_key="none", is_chat_model=True, temperature=0, max_tokens=24
)
talk = [ChatMessage(role="user", content=question)]
say(model.chat(talk).message.content, "".join(part.delta or "" for part in model.stream_chat(talk)))
"""

FRAME = """
import json, sys
url, question = sys.argv[1], "What is the capital of France?"
messages = [{"role": "user", "content": question}]
def say(whole, streamed):
    print(json.dumps({"whole": whole, "streamed": streamed}))
"""


FRAMEWORKS = {
    "litellm==1.105.0": LITELLM,
    "langchain-openai==1.7.3": LANGCHAIN,
    "llama-index-llms-openai-like==0.8.1": LLAMA_INDEX,
}


@pytest.mark.parametrize("package", FRAMEWORKS)
def test_chat_whole_and_streamed(running_server: RunningServer, package: str) -> None:
    python = python_environment([package])

    done = subprocess.run(
        [str(python), "-c", FRAME + FRAMEWORKS[package], running_server.base_url],
        env={**clean_environment(), "LITELLM_LOCAL_MODEL_COST_MAP": "True"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert "Paris" in said["whole"]
    assert said["streamed"] == said["whole"]
