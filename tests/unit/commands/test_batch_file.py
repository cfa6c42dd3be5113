import json

import pytest

from weft.commands import batch_file
from weft.commands.batch_file import check_input, finished_ids, lines_of
from weft.errors import UsageError


def request(custom_id="a", **changes):
    found = {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": {"prompt": "x"}, **changes}
    return {name: value for name, value in found.items() if value is not None}


def written(tmp_path, *lines):
    path = tmp_path / "in.jsonl"
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def test_requests_come_back_in_the_order_of_the_file_and_blank_lines_do_not_matter(tmp_path):
    checked = check_input(written(tmp_path, request("b"), "", request("a")))
    assert checked.custom_ids == ("b", "a")
    assert [found["custom_id"] for found in checked.requests()] == ["b", "a"]


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("{", "line 2: not JSON"),
        ("[]", "line 2: not a JSON object"),
        ("[" * 100_000, "line 2: not JSON"),
        (request(""), "line 2: `custom_id` must be a text of 1 to 512"),
        (request(7), "line 2: `custom_id`"),
        (request("a"), "line 2: `custom_id` 'a' stands on line 1"),
        (request("b", method="GET"), "line 2: `method` must be \"POST\". Given: 'GET'"),
        (request("b", url="/v1/files"), "line 2: `url` must be one of /v1/chat/completions"),
        (request("b", body=[]), "line 2: `body` must be an object"),
        (request("b", body={"stream": True}), "line 2: `body.stream`"),
        (request("b", body={"temperature": float("nan")}), "line 2: `body` must hold finite numbers only"),
        (
            '{"custom_id": "b", "method": "POST", "url": "/v1/completions", "body": {"top_p": [1e999]}}',
            "line 2: `body` must hold finite numbers only",
        ),
    ],
)
def test_a_wrong_line_is_named_by_its_number_and_field(tmp_path, line, fault):
    with pytest.raises(UsageError) as caught:
        check_input(written(tmp_path, request("a"), line))
    assert fault in caught.value.message


def test_every_fault_is_told_at_once_up_to_a_bound(tmp_path):
    with pytest.raises(UsageError) as caught:
        check_input(written(tmp_path, *["?"] * 30))
    assert "line 20:" in caught.value.message
    assert "line 21:" not in caught.value.message
    assert "… and 10 more" in caught.value.message


def test_a_line_without_end_is_not_read_into_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(batch_file, "MAX_LINE_BYTES", 100)
    with pytest.raises(UsageError, match="line 1: longer than 100 bytes"):
        check_input(written(tmp_path, "x" * 101))


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_file_is_refused(tmp_path, content):
    path = tmp_path / "in.jsonl"
    path.write_text(content)
    with pytest.raises(UsageError, match="no request"):
        check_input(path)


def test_what_a_crash_left_of_a_line_is_cut_off_and_asked_again(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_text('{"custom_id":"a"}\n{"custom_id":"b","respo')

    with lines_of(path) as answers:
        assert finished_ids(answers) == {"a"}
        answers.append([{"custom_id": "b"}])

    assert path.read_text() == '{"custom_id":"a"}\n{"custom_id":"b"}\n'


def test_appending_to_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "notes.jsonl"
    path.write_text("hello\n")

    with lines_of(path) as answers, pytest.raises(UsageError, match="line 1 of the output"):
        finished_ids(answers)

    assert path.read_text() == "hello\n"


def test_two_runs_cannot_write_one_file(tmp_path):
    path = tmp_path / "out.jsonl"
    with lines_of(path), pytest.raises(UsageError, match="another run"), lines_of(path):
        pass


def test_failures_of_the_last_run_are_forgotten(tmp_path):
    path = tmp_path / "errors.jsonl"
    path.write_text("{}\n")
    with lines_of(path, keeps_content=False) as failures:
        assert list(failures) == []
