"""The JavaScript clients of OpenAI and Anthropic against the real server."""

import json
import shutil
import subprocess

import pytest
from tests.e2e.client_environments import npm_packages
from tests.e2e.harness import RunningServer

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("node") is None or shutil.which("npm") is None,
        reason="needs node and npm on the PATH to install and run JavaScript clients",
    ),
]

PACKAGES = ("openai@7.55.0", "@anthropic-ai/sdk@1.10.0")

OPENAI = """
import OpenAI from "openai";
const client = new OpenAI({ baseURL: process.argv[2] + "/v1", apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "What is the capital of France?" }];
const chat = { model: "tgi", messages, temperature: 0, max_tokens: 24 };
const whole = await client.chat.completions.create(chat);
let streamed = "";
for await (const chunk of await client.chat.completions.create({ ...chat, stream: true }))
  streamed += chunk.choices[0]?.delta?.content ?? "";
const completion = await client.completions.create({
  model: "tgi", prompt: "The capital of France is", temperature: 0, max_tokens: 6,
});
const fields = { model: "tgi", input: messages[0].content, temperature: 0, max_output_tokens: 24 };
const response = await client.responses.create(fields);
const events = [];
for await (const event of await client.responses.create({ ...fields, stream: true })) events.push(event);
const again = await client.responses.retrieve(response.id);
let refused = null;
try {
  await client.responses.create({ ...fields, temperature: 9 });
} catch (error) {
  refused = [error instanceof OpenAI.BadRequestError, error.param, error.requestID !== null];
}
console.log(JSON.stringify({
  whole: whole.choices[0].message.content,
  streamed,
  completion: completion.choices[0].text,
  response: response.output_text,
  again: again.output_text,
  deltas: events.filter((event) => event.type === "response.output_text.delta").map((event) => event.delta).join(""),
  last: events.at(-1).type,
  refused,
}));
"""

ANTHROPIC = """
import Anthropic from "@anthropic-ai/sdk";
const client = new Anthropic({ baseURL: process.argv[2], apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "What is the capital of France?" }];
const fields = { model: "tgi", max_tokens: 24, messages };
const whole = await client.messages.create(fields);
const stream = client.messages.stream(fields);
let streamed = "";
stream.on("text", (text) => (streamed += text));
const final = await stream.finalMessage();
const count = await client.messages.countTokens({ model: "tgi", messages });
const models = [];
for await (const model of client.models.list()) models.push(model.type);
let refused = null;
try {
  await client.messages.create({ ...fields, model: "claude" });
} catch (error) {
  refused = error instanceof Anthropic.NotFoundError;
}
console.log(JSON.stringify({
  whole: whole.content[0].text,
  streamed,
  final: final.content[0].text,
  stop_reason: final.stop_reason,
  counted: count.input_tokens,
  models,
  input: final.usage.input_tokens + final.usage.cache_read_input_tokens,
  refused,
}));
"""


def run_script(name: str, script: str, server: RunningServer) -> dict[str, object]:
    directory = npm_packages(PACKAGES)
    program = directory / name
    program.write_text(script)
    done = subprocess.run(
        ["node", str(program), server.base_url], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    said: dict[str, object] = json.loads(done.stdout)
    return said


def test_openai(running_server: RunningServer) -> None:
    said = run_script("openai.mjs", OPENAI, running_server)

    assert "Paris" in str(said["whole"])
    assert said["streamed"] == said["whole"] == said["response"] == said["again"] == said["deltas"]
    assert "Paris" in str(said["completion"])
    assert said["last"] == "response.completed"
    assert said["refused"] == [True, "temperature", True]


def test_anthropic(running_server: RunningServer) -> None:
    said = run_script("anthropic.mjs", ANTHROPIC, running_server)

    assert said["streamed"] == said["final"]
    assert said["whole"]
    assert said["stop_reason"] in ("end_turn", "max_tokens")
    assert said["counted"] == said["input"]
    assert said["models"] == ["model"]
    assert said["refused"] is True
