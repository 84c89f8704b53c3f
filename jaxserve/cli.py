"""The command line. The only module of the package that may import `rpc`."""

import argparse
import io
import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from jaxserve.commands.options import add_field_options, engine_config, field_docs, given_fields
from jaxserve.commands.start import CommandError, ExitStatus, OutputError, output_errors, start_engine
from jaxserve.config import EngineConfig
from jaxserve.core import garbage_collection
from jaxserve.heap import share_one_arena
from jaxserve.log import configure_logging
from jaxserve.paths import user_path
from jaxserve.request import SamplingParams, StoppingParams

if TYPE_CHECKING:
    from jaxserve.engine import Engine

logger = logging.getLogger(__name__)

SERVED = {"core": "process"}
"""What a served engine has other than EngineConfig says: its loop shares no GIL with the protocol."""
SERVER_OPTIONS = ("host", "grpc_port", "http_port", "metrics_port", "grace", "max_connections", "otlp_endpoint")
SAMPLING_OPTIONS = tuple(name for name in SamplingParams.__dataclass_fields__ if name not in ("logit_bias", "n"))
STOPPING_OPTIONS = tuple(StoppingParams.__dataclass_fields__)
SIZED = ("dtype", "kv_dtype", "quantization", "tensor_parallel", "slots", "page_size", "attention")
"""Fields of EngineConfig that sizes follow from."""
INFORMED = ("model", *SIZED, "replicas", "max_context", "num_pages", "cache_bytes")
"""Those that `info` takes."""
PLANNED = (*SIZED, "prefill_chunks")
"""Those that `plan` takes."""
BROKEN_PIPE = 141
"""Exit status where the reader of standard output has gone, as shells report SIGPIPE."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status."""
    _open_standard_streams()
    try:
        arguments = build_parser().parse_args(argv)
        configure_logging(arguments.log_level)
        return int(arguments.run(arguments))
    except CommandError as error:
        print(f"jaxserve: error: {' '.join(str(error).split())}", file=sys.stderr)
        if isinstance(error, OutputError):
            _drop_output()
        return error.status
    except KeyboardInterrupt:
        return ExitStatus.INTERRUPTED
    except BrokenPipeError:
        _drop_output()
        return BROKEN_PIPE


def _open_standard_streams() -> None:
    """Puts something in the place of standard streams that were closed when the process began. Else the next files have
    their numbers, a client's connection that of standard error, and Python prints its errors on standard output.

    Standard input is then empty and errors go nowhere. Standard output cannot be written: results are not lost unseen.
    """
    modes = {"stdin": os.O_RDONLY, "stdout": os.O_RDONLY, "stderr": os.O_WRONLY}
    for number, (name, mode) in enumerate(modes.items()):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, mode)
            if null != number:
                os.dup2(null, number)
                os.close(null)
            setattr(sys, name, open(number, "r" if name == "stdin" else "w", encoding="utf-8"))  # noqa: SIM115


def _drop_output() -> None:
    """Sends what standard output holds and cannot write nowhere: Python would try once more when it ends."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _print(text: str) -> None:
    with output_errors():
        print(text, flush=True)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; each sets `run`."""
    parser = argparse.ArgumentParser(prog="jaxserve", description="Serves language models with JAX.")
    parser.add_argument("--version", action=_Version, help="show the version and exit")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, about: str) -> argparse.ArgumentParser:
        description = about[0].upper() + about[1:] + "."
        # No abbreviations: a script that uses one breaks when a new option shares its start.
        added = commands.add_parser(name, help=about, description=description, allow_abbrev=False)
        added.add_argument(
            "--log-level",
            choices=("debug", "info", "warning", "error"),
            default="warning",
            help="least severity of what is logged, as JSON lines on standard error (default: warning)",
        )
        return added

    _add_serve(command("serve", "serve a model over gRPC, and over HTTP if asked to, until SIGTERM"))
    _add_generate(command("generate", "run requests given as JSON lines, writing each result as it finishes"))
    _add_chat(command("chat", "talk with a model, or answer the lines of standard input"))
    _add_convert(command("convert", "write a checkpoint in the native format, which loads fastest"))
    _add_add_key(command("add-key", "make an API key of a tenant, add it to a key file, and print it once"))
    _add_profile(command("profile", "take a trace of a live server's device, and say where it lies"))
    _add_info(command("info", "describe a checkpoint: configuration, tokenizer, sizes"))
    _add_plan(command("plan", "say whether a model fits a device that is not there, and the speed it allows"))
    return parser


class _Version(argparse.Action):
    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None):
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        _print(version("jaxserve"))
        parser.exit()


def _engine_options(parser: argparse.ArgumentParser, defaults: dict[str, str] | None = None) -> None:
    group = parser.add_argument_group("engine", "The word none stands for None, where an option takes it.")
    add_field_options(group, EngineConfig, defaults=defaults or {})


def _config(arguments: argparse.Namespace, defaults: dict[str, str] | None = None) -> EngineConfig:
    try:
        return engine_config(arguments, defaults or {})
    except ValueError as error:
        raise CommandError(str(error)) from error


# serve


def _add_serve(parser: argparse.ArgumentParser) -> None:
    from rpc.security.config import SecurityConfig
    from rpc.server_config import ServerConfig

    add_field_options(parser, ServerConfig, SERVER_OPTIONS)
    group = parser.add_argument_group("security", "Addresses other than loopback need keys and TLS.")
    add_field_options(group, SecurityConfig)
    _engine_options(parser, SERVED)
    parser.set_defaults(run=_serve)


def _serve(arguments: argparse.Namespace) -> int:
    # gRPC reads this as it is imported, and has no other setting for it. Left alone it tells of every failed handshake
    # on standard error, in lines that are no JSON.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    from rpc.lifecycle import PortUnavailable
    from rpc.security.config import SecurityConfig
    from rpc.serve import print_report, serve
    from rpc.server_config import ServerConfig
    from rpc.telemetry import TelemetryUnavailable

    share_one_arena()
    config = _config(arguments, SERVED)
    listening = False

    def report(event: dict[str, object]) -> None:
        nonlocal listening
        listening = listening or event["event"] == "listening"
        try:
            with output_errors():
                print_report(event)
        except (BrokenPipeError, OutputError) as error:
            if event["event"] not in ("draining", "stopped"):
                raise
            # Whoever read that the server was ready may have gone since: it still leaves in good order.
            logger.warning("%s is not told: %r", event["event"], error)

    def start() -> "Engine":
        engine = start_engine(config)
        garbage_collection.quieten()
        return engine

    try:
        server_config = ServerConfig(
            **given_fields(arguments, ServerConfig),
            longest_context=config.max_context or ServerConfig.longest_context,
            security=SecurityConfig(**given_fields(arguments, SecurityConfig)),
        )
        return serve(start, server_config, report)
    except ValueError as error:
        if listening:
            raise
        raise CommandError(str(error)) from error
    except (PortUnavailable, TelemetryUnavailable) as error:
        raise CommandError(str(error)) from error


# generate


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--input",
        required=True,
        metavar="FILE",
        help="file of one JSON object a line, - for standard input. An object has an id, one of prompt, token_ids and "
        "messages, and any sampling, stopping, output or constraint field of the API (temperature, max_tokens, stop, "
        "logprobs, regex, ...). A line that is refused becomes an error line; the others run.",
    )
    parser.add_argument(
        "--output", default="-", metavar="FILE", help="where results go, - for standard output (default: -)"
    )
    _engine_options(parser)
    parser.set_defaults(run=_generate)


def _generate(arguments: argparse.Namespace) -> int:
    from jaxserve.commands.generate import run_batch

    config = _config(arguments)
    with ExitStack() as files:
        try:
            to_stdout = arguments.output == "-"
            if not to_stdout and _is_file_of(arguments.input, arguments.output):
                raise CommandError(f"{arguments.output}: is the input as well, which writing it would empty")
            lines = _open_input(arguments.input)
            files.enter_context(output_errors("standard output" if to_stdout else arguments.output))
            output = sys.stdout.buffer if to_stdout else files.enter_context(open(arguments.output, "wb"))
        except OSError as error:
            raise CommandError(f"{error.filename}: {error.strerror}") from error
        engine = files.enter_context(start_engine(config))
        return run_batch(engine, lines, output)


def _is_file_of(input_name: str, output_name: str) -> bool:
    """Whether the input and the output are one file, whatever they are called."""
    if not os.path.isfile(output_name):
        return False  # a device or a pipe may be both
    return os.path.samestat(os.stat(0 if input_name == "-" else input_name), os.stat(output_name))


def _open_input(name: str) -> Iterator[bytes]:
    """The lines of a file, which is opened now. Only the thread that reads them closes it: when SIGINT ends the
    command that thread may wait in it, and closing it from here, as the interpreter does with sys.stdin, would wait
    for the thread."""
    file = open(0 if name == "-" else name, "rb", closefd=name != "-")  # noqa: SIM115

    def lines() -> Iterator[bytes]:
        with file:
            yield from file

    return lines()


# chat


def _add_chat(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--system", metavar="TEXT", help="instructions that precede the conversation (default: none)")
    group = parser.add_argument_group("sampling and stopping")
    add_field_options(group, SamplingParams, SAMPLING_OPTIONS)
    add_field_options(group, StoppingParams, STOPPING_OPTIONS)
    _engine_options(parser)
    parser.set_defaults(run=_chat)


def _chat(arguments: argparse.Namespace) -> int:
    from jaxserve.commands.chat import Conversation, piped_lines, typed_lines

    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a model may say what the terminal cannot show
    with start_engine(_config(arguments)) as engine:
        conversation = Conversation(
            engine,
            SamplingParams(**given_fields(arguments, SamplingParams)),
            StoppingParams(**given_fields(arguments, StoppingParams)),
            interactive,
            sys.stdout,
            sys.stderr,
            arguments.system,
        )
        return conversation.run(typed_lines(sys.stderr) if interactive else piped_lines())


# convert, add-key, info


def _add_convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help=field_docs(EngineConfig)["model"])
    parser.add_argument("folder", metavar="DST", help="folder to write, which must not exist")
    add_field_options(parser, EngineConfig, ("dtype", "quantization"))
    parser.set_defaults(run=_convert)


def _convert(arguments: argparse.Namespace) -> int:
    from jaxserve.commands.convert import convert_checkpoint

    config = _config(arguments)
    _print(convert_checkpoint(arguments.source, arguments.folder, config.dtype, config.quantization))
    return ExitStatus.SUCCESS


def _add_add_key(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="key file; made if need be. It holds no key, only their hashes")
    parser.add_argument("tenant", metavar="TENANT", help="whose key it is")
    parser.add_argument("--admin", action="store_true", help="open admin calls and other tenants' requests to it")
    parser.set_defaults(run=_add_key)


def _add_key(arguments: argparse.Namespace) -> int:
    from rpc.security.keys import KeyFileError, add_key

    try:
        _print(add_key(Path(arguments.file), arguments.tenant, arguments.admin))
    except KeyFileError as error:
        raise CommandError(str(error)) from error
    return ExitStatus.SUCCESS


def _add_profile(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--address", default="127.0.0.1:50051", metavar="HOST:PORT", help="of the server's gRPC port")
    parser.add_argument("--seconds", type=float, default=3.0, metavar="NUMBER", help="length of the trace (default: 3)")
    parser.add_argument("--api-key-file", metavar="FILE", help="file that holds an admin's key (default: no key)")
    parser.add_argument("--tls-ca", metavar="FILE", help="PEM file of the server's authority (default: plain text)")
    parser.set_defaults(run=_profile)


def _profile(arguments: argparse.Namespace) -> int:
    from jaxserve.request_errors import RequestError
    from rpc.client import Client, Credentials, RpcFailed

    file = arguments.api_key_file
    try:
        key = None if file is None else user_path(file).read_text(encoding="ascii").strip()
        credentials = Credentials(api_key=key, root_certificates=arguments.tls_ca)
    except (OSError, ValueError) as error:
        raise CommandError(f"{file}: {error}") from error
    try:
        with Client(arguments.address, credentials) as client:
            _print(client.profile(arguments.seconds))
    except (OSError, RequestError, RpcFailed) as error:
        raise CommandError(f"{arguments.address}: {error}") from error
    return ExitStatus.SUCCESS


def _add_info(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object (default: off)")
    add_field_options(parser, EngineConfig, INFORMED)
    parser.set_defaults(run=_info)


def _info(arguments: argparse.Namespace) -> int:
    from jaxserve.commands.info import as_text, describe, stored_dtype

    stored = stored_dtype(given_fields(arguments, EngineConfig).get("model", EngineConfig.model))
    description = describe(_config(arguments, stored))
    _print(json.dumps(description) if arguments.json else as_text(description))
    return ExitStatus.SUCCESS


def _add_plan(parser: argparse.ArgumentParser) -> None:
    from jaxserve.device.devices import DEVICES

    parser.add_argument(
        "--model",
        required=True,
        metavar="CONFIG",
        help="a config.json, a model's folder, a .gguf file, or a name as llama-3.1-8b; no weights are read",
    )
    parser.add_argument(
        "--device",
        required=True,
        metavar="KIND-COUNT",
        help=f"kind and number of devices, as v6e-4: {', '.join(DEVICES)}",
    )
    parser.add_argument(
        "--context", type=int, metavar="INT", help="tokens of each request (default: the model's, at most 8192)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object (default: off)")
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile the steps for the device, with the packages of the extra aot, and tell what they need "
        "(default: off)",
    )
    add_field_options(parser, EngineConfig, PLANNED)
    parser.set_defaults(run=_plan)


def _plan(arguments: argparse.Namespace) -> int:
    from jaxserve.commands.plan import plan, plan_text
    from jaxserve.device.devices import parse_device

    arguments.max_context = arguments.context
    config = _config(arguments)
    try:
        device, count = parse_device(arguments.device)
    except ValueError as error:
        raise CommandError(str(error)) from error
    found = plan(config, device, count, compiles=arguments.compile)
    _print(json.dumps(found) if arguments.json else plan_text(found))
    return ExitStatus.SUCCESS if found["fits"] else ExitStatus.DOES_NOT_FIT
