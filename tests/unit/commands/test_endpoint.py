import httpx2
import pytest
from tests.unit.commands.conversations import ENDPOINT, client_of

from weft.commands.endpoint import EndpointError, find_endpoint, read_events, refusal_text, served_model
from weft.errors import UsageError


@pytest.mark.parametrize(
    ("url", "root"),
    [
        (None, "http://localhost:3000"),
        ("localhost:8080", "http://localhost:8080"),
        ("http://h:1/v1", "http://h:1"),
        ("https://h/v1/", "https://h"),
        ("https://h/proxy/v1", "https://h/proxy"),
        ("http://[::1]:3000", "http://[::1]:3000"),
    ],
)
def test_a_url_may_have_the_path_of_the_api_or_not(url, root):
    assert find_endpoint(url, {}).root == root


@pytest.mark.parametrize(
    "url", ["ftp://h", "http://", "http://h:x", "http://user:secret@h", "http:/h", "h:", "http://[::1", "h:0"]
)
def test_what_is_no_url_is_refused_by_its_flag(url):
    with pytest.raises(UsageError, match="--url"):
        find_endpoint(url, {})


def test_the_key_of_another_service_goes_only_to_a_server_that_was_named():
    environ = {"OPENAI_API_KEY": "theirs"}
    assert find_endpoint(None, environ).api_key is None
    assert find_endpoint("https://h", environ).api_key == "theirs"
    assert find_endpoint("https://h", {**environ, "WEFT_API_KEY": "ours"}).api_key == "ours"


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (httpx2.Response(429, json={"error": {"message": "busy"}}), "429 busy"),
        (httpx2.Response(422, json={"error": "bad", "error_type": "validation"}), "422 bad"),
        (httpx2.Response(502, text="<html>gateway"), "502 <html>gateway"),
    ],
)
def test_refusals_of_every_form_are_shown(response, expected):
    assert refusal_text(response) == expected


def test_the_model_is_the_first_one_listed():
    with client_of(lambda _: httpx2.Response(200, json={"data": [{"id": "a"}, {"id": "b"}]})) as client:
        assert served_model(client, ENDPOINT) == "a"


@pytest.mark.parametrize(
    ("response", "remedy"),
    [
        (httpx2.Response(401, json={"error": {"message": "no"}}), "WEFT_API_KEY"),
        (httpx2.Response(200, json={"data": []}), "--model"),
        (httpx2.Response(200, text="hello"), "--model"),
        (httpx2.Response(503, json={"error": {"message": "loading"}}), "loading"),
    ],
)
def test_a_server_without_a_model_is_answered_with_a_remedy(response, remedy):
    with client_of(lambda _: response) as client, pytest.raises(EndpointError, match=remedy):
        served_model(client, ENDPOINT)


def test_when_nothing_listens_the_remedy_is_to_start_a_server():
    def refuse(_request):
        raise httpx2.ConnectError("refused")

    with client_of(refuse) as client, pytest.raises(EndpointError, match="weft serve"):
        served_model(client, ENDPOINT)


def test_events_end_at_done_and_comments_are_skipped():
    lines = [": keep-alive", "", 'data: {"a": 1}', "event: ping", 'data:{"a": 2}', "data: [DONE]", 'data: {"a": 3}']
    assert list(read_events(lines)) == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize("data", ["{", "[1]"])
def test_an_event_that_is_no_object_is_an_error(data):
    with pytest.raises(EndpointError, match="event"):
        list(read_events([f"data: {data}"]))
