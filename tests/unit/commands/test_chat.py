import io
import json

import httpx2
import pytest
from rich.console import Console
from tests.unit.commands.conversations import ENDPOINT, answer, client_of, sse, text_event

from weft.commands.chat import Chat, Conversation, Reply, Timings, chat
from weft.commands.endpoint import EndpointError
from weft.errors import UsageError


class Talk:
    """A chat with a server that answers from a list, and remembers what it was asked."""

    def __init__(self, *answers, system=None):
        self.bodies = []
        self._answers = iter(answers)
        self.chat = Chat(
            client=client_of(self._answer),
            endpoint=ENDPOINT,
            model="m",
            options={"temperature": 0},
            conversation=Conversation(system),
            console=Console(file=io.StringIO(), width=100),
            is_plain=True,
        )

    def _answer(self, request):
        self.bodies.append(json.loads(request.content))
        found = next(self._answers)
        return found if isinstance(found, httpx2.Response) else httpx2.Response(200, content=found)

    @property
    def shown(self):
        return self.chat.console.file.getvalue()


def test_an_answer_streams_to_standard_output_and_is_remembered(capsys):
    talk = Talk(answer("Hel", "lo"), answer("again"), system="Be kind.")

    assert talk.chat.ask("Hi")
    assert talk.chat.ask("More")

    assert capsys.readouterr().out == "Hello\nagain\n"
    assert talk.bodies[1]["messages"] == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "More"},
    ]
    assert talk.bodies[0] | {"messages": []} == {
        "model": "m",
        "messages": [],
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_a_refusal_leaves_the_conversation_as_it_was():
    talk = Talk(httpx2.Response(429, json={"error": {"message": "busy"}}))

    with pytest.raises(EndpointError, match="429 busy"):
        talk.chat.ask("Hi")

    assert talk.chat.conversation.turns == []


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        (sse(text_event("par"), {"error": {"message": "shard died"}}), "shard died"),
        (sse(text_event("par")), "incomplete"),
    ],
)
def test_an_answer_that_breaks_off_is_an_error_and_kept_as_far_as_it_came(stream, message):
    talk = Talk(stream)

    with pytest.raises(EndpointError, match=message):
        talk.chat.ask("Hi")

    assert talk.chat.conversation.turns[-1] == {"role": "assistant", "content": "par"}


def test_ctrl_c_stops_the_answer_and_keeps_what_was_shown():
    def pieces():
        yield sse(text_event("par"))
        raise KeyboardInterrupt

    talk = Talk(httpx2.Response(200, content=pieces()))

    assert not talk.chat.ask("Hi")
    assert talk.chat.conversation.turns[-1]["content"] == "par"


def test_timings_come_from_one_clock_and_the_servers_own_counts():
    ticks = iter([0, 0, 50_000_000, 150_000_000])
    usage = {"prompt_tokens": 7, "completion_tokens": 11, "prompt_tokens_details": {"cached_tokens": 5}}
    reply = Reply(
        client_of(lambda _: httpx2.Response(200, content=answer("a", "b", usage=usage))),
        ENDPOINT,
        {},
        now_ns=lambda: next(ticks),
    )

    with reply:
        assert list(reply) == ["a", "b"]

    assert str(reply.timings) == "first token 50 ms · 100.0 tok/s · 11 tokens · prompt 7 tokens, 5 cached"


def test_without_usage_the_pieces_are_counted_and_marked_as_an_estimate():
    timings = Timings(sent_ns=0, first_ns=1, last_ns=1, prompt_tokens=None, completion_tokens=1, is_counted=False)
    assert str(timings) == "first token 0 ms · ≈ 1 tokens"


def test_reset_forgets_the_turns_and_keeps_the_system_text():
    talk = Talk(answer("x"), system="s")
    talk.chat.ask("Hi")

    assert talk.chat.run_command("/reset")

    assert talk.chat.conversation.messages == [{"role": "system", "content": "s"}]


def test_a_new_system_text_begins_anew():
    talk = Talk(answer("x"))
    talk.chat.ask("Hi")

    talk.chat.run_command("/system  Be brief. ")

    assert talk.chat.conversation.messages == [{"role": "system", "content": "Be brief."}]


def test_the_conversation_is_saved_as_json_or_markdown(tmp_path):
    talk = Talk(answer("Bonjour é"))
    talk.chat.ask("Hi")

    talk.chat.run_command(f"/save {tmp_path / 'talk.json'}")
    talk.chat.run_command(f"/save {tmp_path / 'talk.md'}")

    assert json.loads((tmp_path / "talk.json").read_text())["messages"][1]["content"] == "Bonjour é"
    assert "**assistant**\n\nBonjour é\n" in (tmp_path / "talk.md").read_text()


def test_a_file_that_cannot_be_written_does_not_end_the_chat(tmp_path):
    talk = Talk()

    assert talk.chat.run_command(f"/save {tmp_path / 'none' / 'talk.json'}")

    assert "Cannot write" in talk.shown


@pytest.mark.parametrize(("line", "stays"), [("/exit", False), ("/help", True), ("/wrong", True), ("/save", True)])
def test_only_exit_leaves(line, stays):
    talk = Talk()
    assert talk.chat.run_command(line) is stays


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--temperature", "3"], "--temperature"),
        (["--max-tokens", "0"], "--max-tokens"),
        (["--modle", "x"], "--modle"),
        (["model", "--url", "h"], "--url"),
    ],
)
def test_wrong_flags_are_named(argv, named):
    with pytest.raises(UsageError, match=named):
        chat(argv, {})


def test_what_is_piped_in_must_be_text(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9")))
    monkeypatch.setattr("weft.commands.chat.served_model", lambda *_: "m")

    with pytest.raises(UsageError, match=r"what was piped in is not UTF-8 \(byte 3\)"):
        chat([], {})


@pytest.mark.parametrize("flag", ["--system", "--model"])
def test_arguments_must_be_text(flag):
    with pytest.raises(UsageError, match=f"{flag}: must be valid Unicode"):
        chat([flag, "caf\udce9"], {})
