"""Templates written to take over, stall or exhaust the server. Each must end soon, alone, and without a secret.

A hostile template ends as an error or as harmless text; either way the next conversation is answered.
"""

import dataclasses
import re
import time

import pytest

from weft.errors import TemplateError
from weft.limits import LIMITS
from weft.text.chat import ChatTemplate

pytestmark = pytest.mark.slow

LIMITS_UNDER_TEST = dataclasses.replace(
    LIMITS,
    template_timeout_s=0.5,
    template_memory_bytes=256 << 20,
    max_template_output_bytes=1 << 20,
)
TRIGGER = [{"role": "user", "content": "attack"}]
NORMAL = [{"role": "user", "content": "hi"}]

ESCAPES = {
    "class of a string": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "class by attribute filter": "{{ '' | attr('__class__') | attr('__mro__') }}",
    "class by item": "{{ ''['__class__'] }}",
    "class by format": "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "class by format_map": "{{ '{x.__class__}'.format_map({'x': messages}) }}",
    "class by a mapped attribute": "{{ messages | map(attribute='__class__') | list }}",
    "globals of a macro": "{% macro m() %}{% endmacro %}{{ m.__globals__ }}",
    "globals of a function": "{{ raise_exception.__globals__ }}",
    "globals of lipsum": "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "globals of cycler": "{{ cycler.__init__.__globals__.os.environ }}",
    "globals of joiner": "{{ joiner.__init__.__globals__ }}",
    "globals of namespace": "{{ namespace.__init__.__globals__ }}",
    "class of dict": "{{ dict.__class__.__base__.__subclasses__() }}",
    "frame of a generator": "{{ (messages | map('upper')).gi_frame.f_globals }}",
    "code of a macro": "{% macro m() %}{% endmacro %}{{ m._func.__code__ }}",
    "the environment": "{{ self.__init__.__globals__ }}{{ self._TemplateReference__context.environment }}",
    "another file": "{% include '/etc/passwd' %}",
    "an import": "{% import 'os' as os %}{{ os.environ }}",
    "changing the input": "{{ messages.append({'role': 'system', 'content': 'evil'}) }}",
    "a private name": "{% set n = namespace(__class__=1) %}",
}

EXHAUSTION = {
    "a long string": "{{ messages[0].content * (10 ** 9) }}",
    "a long constant": "{{ 'a' * 10 ** 10 }}",
    "a longer string": "{{ messages[0].content * (10 ** 12) }}",
    "padding by format": "{{ '{:>999999999}'.format(messages[0].content) }}",
    "padding by percent": "{{ '%999999999s' % messages[0].content }}",
    "padding by center": "{{ messages[0].content.center(999999999) }}",
    "padding by filter": "{{ messages[0].content | center(999999999) }}",
    "a long list": "{{ (messages * (10 ** 9)) | length }}",
    "doubling": "{% set n = namespace(s='x') %}{% for i in range(64) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}",
    "doubling by replace": (
        "{% set n = namespace(s='ab') %}{% for i in range(64) %}"
        "{% set n.s = n.s.replace('a', n.s) %}{% endfor %}{{ n.s }}"
    ),
    "a huge number": "{{ 7 ** (messages[0].content | length * 10 ** 9) }}",
    "a huge range": "{% for i in range(10 ** 9) %}{{ i }}{% endfor %}",
    "nested loops": (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
        "{% endfor %}{% endfor %}{% endfor %}"
    ),
    "output without end": "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
    "recursion of a macro": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "branching recursion": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "recursion of a loop": "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "placeholder text": "{{ lipsum(n=10 ** 7) }}",
    "wide indentation": "{{ ((messages[0].content ~ '\n') * 10000) | indent(10 ** 6) }}",
    "wide JSON": "{{ [[messages]] | tojson(indent=10 ** 9) }}",
    "slow joining": "{{ range(99999) | map('string') | map('center', 99999) | join }}",
}

COMPILATION = {
    "a power folded while compiling": "{{ 10 ** (10 ** 10) }}",
    "deep nesting": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "deep blocks": "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
}


async def render_and_heal(attack: str) -> tuple[str | TemplateError, float]:
    """The outcome of the attack and its seconds; asserts that an ordinary conversation is answered afterwards."""
    source = "{% if messages[0].content == 'attack' %}" + attack + "{% else %}{{ messages[0].content }}{% endif %}"
    template = ChatTemplate(source, num_workers=1, limits=LIMITS_UNDER_TEST)
    await template.start()
    started = time.monotonic()
    outcome: str | TemplateError
    try:
        outcome = await template.render(TRIGGER)
    except TemplateError as error:
        outcome = error
    seconds = time.monotonic() - started

    assert await template.render(NORMAL) == "hi"
    await template.close()
    return outcome, seconds


@pytest.mark.parametrize("attack", ESCAPES.values(), ids=ESCAPES)
async def test_no_template_reaches_python(attack: str) -> None:
    outcome, _ = await render_and_heal(attack)

    said = outcome.message if isinstance(outcome, TemplateError) else outcome
    assert not re.search(r"<class|<module|environ\(|root:|uid=|<frame|<code", said)
    assert isinstance(outcome, TemplateError) or outcome in ("", "[]", "[Undefined]")


@pytest.mark.parametrize("attack", EXHAUSTION.values(), ids=EXHAUSTION)
async def test_no_template_exhausts_time_memory_or_output(attack: str) -> None:
    outcome, seconds = await render_and_heal(attack)

    assert isinstance(outcome, TemplateError)
    assert seconds < 1.5 * LIMITS_UNDER_TEST.template_timeout_s + 0.5


@pytest.mark.parametrize("source", COMPILATION.values(), ids=COMPILATION)
async def test_no_template_exhausts_the_server_while_it_is_compiled(source: str) -> None:
    limits = dataclasses.replace(LIMITS_UNDER_TEST, template_compile_timeout_s=0.5)
    template = ChatTemplate(source, num_workers=1, limits=limits)
    started = time.monotonic()

    with pytest.raises(TemplateError, match="compile"):
        await template.start()
    await template.close()

    assert time.monotonic() - started < 3.0
