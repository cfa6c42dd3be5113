import io

from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from weft.commands.markdown_stream import MarkdownStream, split_finished, without_controls


def test_text_up_to_the_last_blank_line_is_finished():
    assert split_finished("# A\n\ntext\n\nmore") == ("# A\n\ntext\n\n", "more")


def test_a_blank_line_inside_a_code_fence_finishes_nothing():
    text = "```python\na = 1\n\nb = 2\n"
    assert split_finished(text) == ("", text)
    assert split_finished(text + "```\n\nend") == (text + "```\n\n", "end")


def test_a_fence_is_closed_by_one_of_its_own_kind():
    text = "````\n```\n\n~~~\n\n"
    assert split_finished(text) == ("", text)


@given(st.text(alphabet="a \n`#-", max_size=60), st.integers(0, 60))
def test_nothing_is_lost_and_what_is_finished_stays_so(text, cut):
    finished, rest = split_finished(text)
    assert finished + rest == text
    assert finished.startswith(split_finished(text[:cut])[0]) or split_finished(text[:cut])[0] == ""


def test_what_a_model_writes_cannot_steer_the_terminal():
    assert without_controls("a\x1b[2Jb\x9b1mc\r\n\td\x7f") == "a[2Jb1mc\n\td"


def test_every_block_is_printed_once():
    console = Console(file=io.StringIO(), width=40, force_terminal=False)

    with MarkdownStream(console) as stream:
        for piece in ("# Tit", "le\n\nOne ", "two.\n", "\n- a\n- b"):
            stream.push(piece)

    shown = console.file.getvalue()
    assert [shown.count(word) for word in ("Title", "One two.", "• a", "• b")] == [1, 1, 1, 1]
