"""Text of one sequence: the same however tokens fall, with stop strings, special tokens and broken characters."""

from hypothesis import given
from hypothesis import strategies as st
from tests.contract.house import BOS, EOS, FinishReason, build_house, ids_of

from weft.core.events import TokenEvent
from weft.router.sequence_text import SequenceText

MODEL = build_house().context.model
TEXTS = st.text(alphabet="ab é🙂\n", max_size=30)


def events(token_ids: list[int], reason: FinishReason = FinishReason.LENGTH) -> list[TokenEvent]:
    last = len(token_ids) - 1
    return [
        TokenEvent(
            request_id=1, token_index=i, token_id=token, logprob=0.0, finish_reason=reason if i == last else None
        )
        for i, token in enumerate(token_ids)
    ]


def run(token_ids: list[int], stops: list[str], **options: object) -> tuple[str, SequenceText]:
    sequence = SequenceText(MODEL, (), stops, **options)
    text = ""
    for event in events(token_ids):
        text += sequence.push(event)
        if sequence.finish_reason is not None:
            break
    return text, sequence


@given(TEXTS)
def test_without_stops_the_text_is_what_the_tokens_say(text: str):
    shown, sequence = run([*ids_of(text, eos=False), EOS], [])

    assert shown == text
    assert sequence.num_tokens == len(text.encode()) + 1


@given(TEXTS, st.lists(st.text(alphabet="ab é", min_size=1, max_size=3), min_size=1, max_size=3))
def test_a_stop_string_cuts_at_its_first_place(text: str, stops: list[str]):
    places = [(text.find(stop), -len(stop), stop) for stop in stops if stop in text]

    shown, sequence = run([*ids_of(text, eos=False), ord("z") + 2], stops)
    kept, _ = run([*ids_of(text, eos=False), ord("z") + 2], stops, keeps_stop=True)

    if places:
        start, _, stop = min(places)
        assert shown == text[:start]
        assert kept == text[:start] + stop
        assert sequence.finish_reason is FinishReason.STOP_SEQUENCE
    else:
        assert shown == kept == text + "z"
        assert sequence.finish_reason is FinishReason.LENGTH


@given(TEXTS, st.lists(st.text(alphabet="ab", min_size=1, max_size=3), max_size=2))
def test_shown_text_never_splits_a_character_and_never_takes_back(text: str, stops: list[str]):
    sequence = SequenceText(MODEL, (), stops)
    so_far = ""
    for event in events(ids_of(text)):
        so_far += sequence.push(event)
        assert text.startswith(so_far)
        if sequence.finish_reason is not None:
            break


def test_an_end_inside_a_character_shows_a_replacement():
    shown, sequence = run(ids_of("é", eos=False)[:1], [])

    assert shown == sequence.token_text == "�"


def test_special_tokens_have_a_spelling_and_no_text():
    sequence = SequenceText(MODEL, (), ["<s>"])

    assert sequence.push(events([BOS, EOS])[0]) == ""
    assert (sequence.token_text, sequence.is_special) == ("<s>", True)
    assert sequence.finish_reason is None


def test_end_of_text_wins_over_a_stop_string():
    """The held text `ab` is a whole stop string only if nothing longer follows, which end of text decides."""
    sequence = SequenceText(MODEL, (), ["abc"])
    for event in events([*ids_of("ab", eos=False), EOS], FinishReason.EOS_TOKEN):
        last = sequence.push(event)

    assert last == "ab"
    assert sequence.finish_reason is FinishReason.EOS_TOKEN


def test_a_token_out_of_order_is_refused():
    import pytest

    from weft.errors import InternalError

    sequence = SequenceText(MODEL, (), [])
    with pytest.raises(InternalError):
        sequence.push(events(ids_of("ab"))[1])
