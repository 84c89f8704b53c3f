"""Options made from dataclasses: each field is one, with its type, its default and its docstring."""

import argparse
import subprocess
import sys
from dataclasses import fields

import pytest

from jaxserve.cli import SERVED, build_parser, main
from jaxserve.commands.options import add_field_options, engine_config, field_docs, option_name
from jaxserve.config import EngineConfig
from jaxserve.request import SamplingParams


def parse(*arguments: str) -> EngineConfig:
    parser = argparse.ArgumentParser()
    add_field_options(parser, EngineConfig)
    return engine_config(parser.parse_args(arguments))


def help_of(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    assert ended.value.code == 0
    return " ".join(capsys.readouterr().out.split())


def test_no_options_give_the_default_configuration():
    assert parse() == EngineConfig()


def test_options_of_every_kind_reach_their_field():
    given = (
        "--slots 4 --prefill-chunks 64 256 --no-prefix-cache --max-context 512 --simulated-step-ms 2.5 --dtype float32"
    )
    wanted = EngineConfig(
        slots=4,
        prefill_chunks=(64, 256),
        prefix_cache=False,
        max_context=512,
        simulated_step_ms=2.5,
        dtype="float32",
    )
    assert parse(*given.split()) == wanted


@pytest.mark.parametrize("word", ["none", "None"])
def test_the_word_none_is_none_where_a_field_may_be_none(word: str):
    config = parse("--compilation-cache", word, "--max-context", word, "--kv-dtype", word)
    assert config.compilation_cache is None
    assert config.max_context is None
    assert config.kv_dtype is None


@pytest.mark.parametrize("given", ["--slots many", "--dtype float16", "--max-context some", "--slot 3"])
def test_a_value_of_the_wrong_type_and_an_unknown_option_are_refused(given: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        main(["serve", *given.split()])
    assert ended.value.code == 2
    assert given.split()[0] in capsys.readouterr().err


@pytest.mark.parametrize("command", ["serve", "generate", "chat"])
def test_help_explains_each_option_with_its_default(command: str, capsys: pytest.CaptureFixture[str]):
    text = help_of(capsys, command)
    docs = field_docs(EngineConfig)
    for field in fields(EngineConfig):
        assert option_name(field.name) in text
        # Lines are broken after hyphens, too.
        assert docs[field.name].replace(" ", "") in text.replace(" ", "")
    defaults = {field.name: field.default for field in fields(EngineConfig)} | (SERVED if command == "serve" else {})
    assert f"(default: {defaults['slots']})" in text
    assert f"(default: {defaults['core']})" in text


def test_chat_has_an_option_for_each_way_to_sample(capsys: pytest.CaptureFixture[str]):
    text = help_of(capsys, "chat")
    for field in fields(SamplingParams):
        assert (option_name(field.name) + " " in text) == (field.name not in ("n", "logit_bias"))


def test_a_served_engine_has_its_loop_in_a_process_of_its_own_unless_told_otherwise():
    parser = build_parser()
    assert engine_config(parser.parse_args(["serve"]), SERVED).core == "process"
    assert engine_config(parser.parse_args(["serve", "--core", "thread"]), SERVED).core == "thread"


def test_help_imports_neither_jax_nor_grpc():
    script = """
import sys
from jaxserve.cli import main
try:
    main(["serve", "--help"])
except SystemExit:
    print([name for name in ("jax", "flax", "numpy", "grpc", "tokenizers") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("field", "value", "what"),
    [
        ("slots", "4", "a whole number"),
        ("slots", 2.5, "a whole number"),
        ("slots", True, "a whole number"),
        ("num_pages", 1e3, "a whole number or None"),
        ("resumable_seconds", "60", "a number"),
        ("watchdog_seconds", False, "a number or None"),
        ("simulated_step_ms", float("nan"), "finite and at least 0"),
        ("simulated_step_ms", -5, "finite and at least 0"),
    ],
)
def test_a_program_is_told_which_field_is_of_another_type_or_out_of_bounds(field: str, value: object, what: str):
    with pytest.raises(ValueError, match=f"^{field}: must be {what}, got {value!r}$"):
        EngineConfig(**{field: value})
