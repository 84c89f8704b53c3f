"""Renders a chat template: a program of its own, run by `ChatTemplate`, without files or network.

A template is a program that came with a checkpoint. The sandbox of Jinja keeps it from Python's internals; the limits
that the kernel sets here keep it from endless loops, from memory, and from files and sockets should the sandbox fail.

It reads lines of JSON: first `template`, `tool_template` (of chats with tools), `variables`, `cpu_seconds`,
`memory_bytes` and `max_characters`, then, for each chat, `messages` and `tools` (null where there are none). It gives
an empty object once it is ready, and answers each chat by a line with `text` or `error`. When the processor time of a
chat is used up, the kernel ends the program (SIGPROF). This file is run by its path and must not import jaxserve, whose
modules take seconds to load.
"""

import datetime
import json
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import jinja2.debug  # loaded lazily for tracebacks, when no file can be opened any more
import jinja2.ext
from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


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


def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """JSON as models saw it in training: Jinja's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


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


def main() -> None:
    """Answers lines until there are no more."""
    # What a terminal or a service manager sends to every process is for the server, which ends this program.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # would be inherited where the server ignores it
    lines = sys.stdin.buffer
    settings = json.loads(lines.readline())
    # What Python and Jinja load when first used must be loaded before files are out of reach.
    answer(environment().from_string("{{ 'text' }}{{ strftime_now('%Y') }}{{ raise_exception('') }}").render, 0)
    resource.setrlimit(resource.RLIMIT_AS, (settings["memory_bytes"],) * 2)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    compiled: dict[str, Template] = {}

    def render() -> str:
        source = settings["tool_template" if chat["tools"] else "template"]
        template = compiled.get(source) or environment().from_string(source)
        compiled[source] = template
        return template.render(**settings["variables"], **chat, add_generation_prompt=True, documents=None)

    _say("{}")
    for line in lines:
        signal.setitimer(signal.ITIMER_PROF, settings["cpu_seconds"])
        chat = json.loads(line)
        reply = json.dumps(answer(render, settings["max_characters"]))
        signal.setitimer(signal.ITIMER_PROF, 0)
        _say(reply)


def _say(line: str) -> None:
    sys.stdout.buffer.write(line.encode() + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
