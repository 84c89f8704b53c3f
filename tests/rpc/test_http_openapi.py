"""The OpenAPI description, and schemathesis' attempts to break what it describes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from http_serving import exchange, http_serving
from scripted_engine import ScriptedEngine
from serving import server_process

from rpc.http import openapi, schema

SCRIPTED = "def engine_factory(): return ScriptedEngine(step_time=0.0005, max_context=64, slots=32)"

CHECKS = (
    *("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance"),
    *("negative_data_rejection", "unsupported_method"),
)
"""Of schemathesis. Not that all valid data is accepted: a prompt may be valid and too long."""


# Beside the statuses that schemathesis knows as refusals, that of a body beyond the server's limit: it makes bodies of
# 18 MB where a list must have more entries than its most. And 504 is no fault where a timeout of 5e-324 s was asked for.
CONFIGURATION = """
[checks.not_a_server_error]
expected-statuses = ["2xx", "3xx", "4xx", "504"]

[checks.negative_data_rejection]
expected-statuses = ["400", "401", "403", "404", "405", "409", "413", "415", "429"]
"""


@pytest.fixture
def cases(request: pytest.FixtureRequest) -> int:
    """Cases for each route and phase: `--schemathesis-cases`."""
    return request.config.getoption("--schemathesis-cases")


def test_schemathesis_finds_no_server_error_and_no_answer_that_is_not_described(cases: int, tmp_path: Path) -> None:
    phases = "fuzzing" if cases < 100 else "examples,coverage,fuzzing"  # coverage makes 900 cases of its own
    configuration = tmp_path / "schemathesis.toml"
    configuration.write_text(CONFIGURATION)
    with server_process(SCRIPTED, http=True) as server:
        server.report("ready")
        command = [
            *(
                sys.executable,
                "-m",
                "schemathesis.cli",
                "--config-file",
                str(configuration),
                "run",
                f"http://{server.http_address}/openapi.json",
            ),
            *("--mode", "all", "--phases", phases, "--max-examples", str(cases)),
            *("--checks", ",".join(CHECKS), "--seed", "6", "--workers", "1", "--request-timeout", "60"),
            *("--generation-database", "none", "--suppress-health-check", "all", "--no-color"),
        ]
        run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        print(run.stdout[-600:])  # how many cases there were
        assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
        assert server.process.poll() is None


@pytest.mark.asyncio
async def test_the_description_names_just_the_parameters_that_are_taken() -> None:
    async with http_serving(ScriptedEngine()) as (_, address):
        answer = await exchange(address, b"GET /openapi.json HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n")
    description = json.loads(answer.body)
    assert set(schema.PASSED) <= set(openapi.SHARED)
    for path, own in (("/v1/completions", openapi.COMPLETION), ("/v1/chat/completions", openapi.CHAT)):
        body = description["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert set(body["properties"]) == {*openapi.SHARED, *own}
