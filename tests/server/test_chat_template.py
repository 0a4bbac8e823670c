"""Chat templates, by Hugging Face's conventions and in a sandbox."""

from datetime import datetime

import pytest

from engine.errors import ConfigError, InvalidRequestError
from server.chat_template import ChatTemplate

MESSAGES = [{"role": "user", "content": "Hi <b>é</b>"}]


def test_blocks_leave_no_blank_lines() -> None:
    source = "{%- for m in messages %}\n    {% if true %}\n{{ m.role }}: {{ m.content }}\n    {% endif %}\n{% endfor %}"
    assert ChatTemplate(source).render(MESSAGES) == "user: Hi <b>é</b>\n"


def test_special_tokens_and_the_generation_prompt_are_variables() -> None:
    template = ChatTemplate("{{ bos_token }}|{{ eos_token }}|{{ add_generation_prompt }}", bos_token="<s>")
    assert template.render(MESSAGES) == "<s>||True"
    assert template.render(MESSAGES, add_generation_prompt=False) == "<s>||False"


def test_tojson_escapes_neither_html_nor_other_scripts() -> None:
    assert ChatTemplate("{{ messages[0].content | tojson }}").render(MESSAGES) == '"Hi <b>é</b>"'
    assert ChatTemplate("{{ {'a': [1]} | tojson(indent=2) }}").render(MESSAGES) == '{\n  "a": [\n    1\n  ]\n}'


def test_loops_can_break_and_the_time_can_be_told() -> None:
    assert ChatTemplate("{% for i in range(9) %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}").render(
        MESSAGES
    ) == ("012")
    assert ChatTemplate("{{ strftime_now('%Y') }}").render(MESSAGES) == str(datetime.now().year)


def test_generation_marks_are_their_contents() -> None:
    assert ChatTemplate("a{% generation %}b{% endgeneration %}c").render(MESSAGES) == "abc"


def test_missing_variables_are_empty_and_false() -> None:
    source = "{% if tools %}tools{% endif %}{% if enable_thinking is defined %}{{ enable_thinking }}{% endif %}"
    assert ChatTemplate(source).render(MESSAGES) == ""
    assert ChatTemplate(source).render(MESSAGES, variables={"enable_thinking": False}) == "False"


def test_a_template_can_refuse_the_messages() -> None:
    with pytest.raises(InvalidRequestError, match="Roles must alternate"):
        ChatTemplate("{{ raise_exception('Roles must alternate') }}").render(MESSAGES)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__ }}{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{{ raise_exception.__globals__ }}{{ raise_exception.__globals__['json'] }}",
        "{% for i in range(10000000) %}{% endfor %}",
        "{{ 1 / 0 }}",
        "{{ messages[0].content + 1 }}",
        "{{ nothing.at.all }}",
        "{% include 'file' %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ '%s' | format }}",
    ],
)
def test_whatever_goes_wrong_in_a_template_is_the_requests_error(source: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        ChatTemplate(source).render([dict(MESSAGES[0])])
    assert "\n" not in str(caught.value)


def test_reserved_variables_cannot_be_overridden() -> None:
    with pytest.raises(InvalidRequestError, match="bos_token"):
        ChatTemplate("{{ bos_token }}").render(MESSAGES, variables={"bos_token": "x"})


def test_a_template_with_wrong_syntax_is_a_wrong_setting() -> None:
    with pytest.raises(ConfigError, match="not valid"):
        ChatTemplate("{% if %}")
