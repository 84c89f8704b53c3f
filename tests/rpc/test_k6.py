"""A load tester that nobody here wrote: k6, with 32 streams at once over gRPC reflection."""

import asyncio
import json
import sys
from pathlib import Path

import pytest
from scripted_engine import ScriptedEngine
from serving import back_to_the_start, serving

pytestmark = pytest.mark.asyncio

K6 = Path(sys.executable).parent / "k6"
SCRIPT = Path(__file__).parent / "k6" / "streams.js"


@pytest.mark.parametrize("method", ["jaxserve.v1.Inference/Generate", "vllm.grpc.engine.VllmEngine/Generate"])
async def test_32_streams_get_exact_deltas_one_terminal_event_each_and_leak_nothing(
    method: str, tmp_path: Path
) -> None:
    engine = ScriptedEngine(slots=16, max_waiting=32)
    summary = tmp_path / "summary.json"
    async with serving(engine) as (server, client):
        process = await asyncio.create_subprocess_exec(
            *(K6, "run", "--quiet", "--no-usage-report", "--address", "127.0.0.1:0", "--summary-export", summary),
            *("-e", f"ADDRESS={client.address}", "-e", f"METHOD={method}", SCRIPT),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        output, _ = await process.communicate()
        assert process.returncode == 0, output.decode()
        checks = json.loads(summary.read_text())["metrics"]["checks"]
        assert (checks["passes"], checks["fails"]) == (32 * 3, 0)
        assert engine.submitted == 32
        await back_to_the_start(engine, server)
