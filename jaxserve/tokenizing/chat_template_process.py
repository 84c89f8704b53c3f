"""Renders a chat template: a program of its own, run by `ChatTemplate`, without files or network.

A template is a program that came with a checkpoint. The sandbox of Jinja keeps it from Python's internals; the limits
that the kernel sets here keep it from endless loops, from memory, and from files and sockets should the sandbox fail.

The settings are `template`, `tool_template` (of chats with tools), `variables`, `max_characters` and those of
`answer_lines`. A chat is `messages` and `tools` (null where there are none); its answer is `text` or `error`.
"""

import datetime
import json
import resource
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

import jinja2.debug  # loaded lazily for tracebacks, when no file can be opened any more
import jinja2.ext
from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from jaxserve.limited_program import answer_lines


class GenerationTag(jinja2.ext.Extension):
    """`{% generation %}`, with which templates mark the assistant's words for training; here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012 - declared by Jinja, as of an instance

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The tag's body."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def raise_exception(message: str) -> NoReturn:
    """Lets a template refuse its messages."""
    raise TemplateError(message)


def strftime_now(format: str) -> str:
    """The local time."""
    return datetime.datetime.now().strftime(format)


def tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as models saw it in training: Jinja's own filter escapes for HTML. Parameters in transformers' order."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def environment() -> ImmutableSandboxedEnvironment:
    """The environment that transformers renders chat templates in."""
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, jinja2.ext.loopcontrols]
    )
    made.filters["tojson"] = tojson
    made.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return made


def answer(render: Callable[[], str], max_characters: int) -> dict[str, str]:
    """The text, or what kept the template from making one. A template may raise anything."""
    try:
        text = render()
    except TemplateSyntaxError as error:
        return {"error": f"syntax error in line {error.lineno}: {error.message}"}
    except SecurityError as error:
        return {"error": f"forbidden: {error}"}
    except TemplateError as error:
        return {"error": str(error)}
    except MemoryError:
        return {"error": "needs too much memory"}
    except RecursionError:
        return {"error": "recurses too deeply"}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    if len(text) > max_characters:
        return {"error": f"makes a text of {len(text)} characters (limit {max_characters})"}
    return {"text": text}


def renderer(settings: dict[str, Any]) -> Callable[[dict[str, Any]], dict[str, str]]:
    """Renders chats. From now on this process opens no files."""
    # What Python and Jinja load when first used must be loaded before files are out of reach.
    answer(environment().from_string("{{ 'text' }}{{ strftime_now('%Y') }}{{ raise_exception('') }}").render, 0)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))
    compiled: dict[str, Template] = {}

    def render(chat: dict[str, Any]) -> str:
        source = settings["tool_template" if chat["tools"] else "template"]
        template = compiled.get(source) or environment().from_string(source)
        compiled[source] = template
        return template.render(**settings["variables"], **chat, add_generation_prompt=True, documents=None)

    return lambda chat: answer(partial(render, chat), settings["max_characters"])


if __name__ == "__main__":
    answer_lines(renderer)
