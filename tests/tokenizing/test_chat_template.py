"""Chat templates: what transformers allows them, and what ends the ones that do harm."""

import gc
import os
import signal
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest

from jaxserve.tokenizing.chat_template import ChatTemplate, ChatTemplateError, RenderLimits

MESSAGES = [{"role": "user", "content": "Grüße"}, {"role": "assistant", "content": "<b>"}]
LIMITS = RenderLimits(cpu_seconds=0.2, memory_bytes=256 << 20, max_characters=1 << 20)


def render(source: str, messages=MESSAGES, **variables: str) -> str:
    return ChatTemplate(source, variables, LIMITS).render(messages)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ bos_token }}{{ messages[1]['content'] }}", "<s><b>"),
        ("{% if add_generation_prompt %}yes{% endif %}", "yes"),
        # A block's line leaves no white space behind.
        ("a\n  {% if true %}\nb\n  {% endif %}\nc\n", "a\nb\nc"),
        ("{{ messages[0] | tojson }}", '{"role": "user", "content": "Grüße"}'),
        ("{{ messages[1] | tojson(indent=1) }}", '{\n "role": "assistant",\n "content": "<b>"\n}'),
        ("{{ messages[1] | tojson(true, 1, (',', ':')) }}", '{\n "role":"assistant",\n "content":"<b>"\n}'),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{% generation %}{{ messages[0].role }}{% endgeneration %}", "user"),
        ("{% if tools is none and not documents %}none{% endif %}", "none"),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "2"),
        ("{% macro f(n) %}{{ n }}{% if n %}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(3) }}", "3210"),
        ("{{ strftime_now('%Y') | int > 2000 }}", "True"),
        ("{{ messages[0].nothing }}{{ nothing }}", ""),
    ],
)
def test_a_template_renders_as_in_transformers(source, text):
    assert render(source, bos_token="<s>") == text


def test_chats_with_tools_have_a_template_of_their_own_where_there_is_one():
    template = ChatTemplate("plain", {}, LIMITS, tool_source="{{ tools[0].name }}")
    for _ in range(2):
        assert template.render(MESSAGES) == "plain"
        assert template.render(MESSAGES, tools=[{"name": "f"}]) == "f"
    assert ChatTemplate("plain", {}, LIMITS).render(MESSAGES, tools=[{"name": "f"}]) == "plain"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("a\n{% if %}", "syntax error in line 2"),
        ("{{ nothing.at.all }}", "'nothing' is undefined"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
    ],
)
def test_a_template_that_fails_says_why(source, message):
    with pytest.raises(ChatTemplateError, match=message):
        render(source)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "forbidden"),
        ("{{ raise_exception.__globals__['sys'] }}", "forbidden|undefined"),
        ("{{ messages.append(1) }}", "forbidden"),
        ("{{ cycler.__init__.__globals__.os.system('true') }}", "forbidden"),
        ("{{ '{0.__class__.__mro__}'.format(1) }}", "forbidden"),
        ("{% include '/etc/hostname' %}", "no loader"),
        ("{% import 'os' as os %}", "no loader"),
    ],
)
def test_a_template_reaches_nothing_but_its_messages(source, message):
    with pytest.raises(ChatTemplateError, match=message):
        render(source)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
        ("{% for i in range(10**5) %}{% for j in range(10**5) %}{% endfor %}{% endfor %}", "0.2 s of processor time"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recurses too deeply"),
        (
            "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(50) }}",
            "0.2 s of processor time",
        ),
        ("{{ 'a' * 10**10 }}", "needs too much memory"),
        ("{{ 'a' * messages | length * 10**10 }}", "needs too much memory"),
        ("{{ 10 ** (10 ** 9) }}", "processor time|memory"),
        ("{{ '%9999999999d' % 1 }}", "memory|too big"),
        ("{{ 'a'.ljust(10**10) }}", "needs too much memory"),
        (
            "{% set ns = namespace(x=[]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
            "processor time|memory",
        ),
        ("{{ 'a' * 2**21 }}", "makes a text of 2097152 characters"),
    ],
)
def test_a_template_that_never_ends_or_fills_the_memory_is_refused(source, message):
    with pytest.raises(ChatTemplateError, match=message):
        render(source)


def test_a_template_is_usable_after_it_was_ended():
    template = ChatTemplate(
        "{% for m in messages %}{% for i in range(9**5) %}{% for j in range(9**5) %}{% endfor %}{% endfor %}"
        "{% endfor %}none",
        {},
        LIMITS,
    )
    for _ in range(2):
        with pytest.raises(ChatTemplateError, match="processor time"):
            template.render([{"role": "user"}])
        assert template.render([]) == "none"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_is_for_the_whole_server_ends_no_renderer(number: signal.Signals):
    template = ChatTemplate("{{ messages | length }}", {}, LIMITS)
    assert template.render([]) == "0"
    process = template._renderer.process
    assert process is not None
    os.kill(process.pid, number)
    assert template.render(MESSAGES) == "2"
    assert template._renderer.process is process


def test_a_renderer_that_was_killed_is_started_again():
    template = ChatTemplate("{{ messages | length }}", {}, LIMITS)
    assert template.render([]) == "0"
    process = template._renderer.process
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert template.render(MESSAGES) == "2"


def test_a_renderer_that_was_started_is_that_of_the_first_chat_whatever_the_template_says_of_none():
    for source in ("{{ messages[0].content }}", "{{ raise_exception('no messages') }}"):
        template = ChatTemplate(source, {}, LIMITS)
        assert template._renderer.process is None
        template.start()
        started = template._renderer.process
        assert started is not None and started.poll() is None
        if "raise" not in source:
            assert template.render(MESSAGES) == "Grüße"
            assert template._renderer.process is started


def test_the_renderer_ends_with_its_template():
    template = ChatTemplate("{{ messages | length }}", {}, LIMITS)
    template.render([])
    process, gone = template._renderer.process, weakref.ref(template)
    del template
    gc.collect()
    assert gone() is None and process is not None and process.returncode is not None


def test_threads_share_a_template():
    template = ChatTemplate("{{ messages[0].content }}", {}, LIMITS)
    texts = [str(number) * 1000 for number in range(100)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda text: template.render([{"content": text}]), texts)) == texts


def test_large_messages_pass():
    content = "\U0001f642\n" * 250_000
    assert render("{{ messages[0].content }}", [{"content": content}]) == content


def test_messages_that_are_no_json_are_refused():
    nested: dict[str, object] = {}
    for _ in range(5000):
        nested = {"a": nested}
    for value in (b"bytes", nested):
        with pytest.raises(ChatTemplateError, match="must be JSON values"):
            render("", [{"content": value}])
