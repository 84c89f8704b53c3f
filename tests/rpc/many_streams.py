"""A client of many streams, as a process of its own: python many_streams.py PROTOCOL ADDRESS COUNT [WINDOW].

PROTOCOL is native, vllm or http. Prints "open" when every stream has had a token. With a WINDOW, in bytes, it then reads
nothing more, and takes no more than about that ahead; by HTTP it then has eight prompts a stream.
"""

import asyncio
import json
import socket
import sys
from collections.abc import Awaitable, Callable

import grpc.aio
from smg_grpc_proto.generated import vllm_engine_pb2, vllm_engine_pb2_grpc

from rpc.v1 import jaxserve_pb2 as pb
from rpc.v1 import jaxserve_pb2_grpc

IDS = [300, 301, 302]

Read = Callable[[], Awaitable[object]]
"""Reads some more of a stream."""


async def grpc_streams(protocol: str, address: str, count: int, window: int | None) -> list[Read]:
    """On one connection."""
    options = [] if window is None else [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", window)]
    channel = grpc.aio.insecure_channel(address, options=options)
    if protocol == "native":
        generate = jaxserve_pb2_grpc.InferenceStub(channel).Generate
        request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=IDS))
    else:
        generate = vllm_engine_pb2_grpc.VllmEngineStub(channel).Generate
        prompt = vllm_engine_pb2.TokenizedInput(input_ids=IDS)
        params = vllm_engine_pb2.SamplingParams(ignore_eos=True)
        request = vllm_engine_pb2.GenerateRequest(tokenized=prompt, stream=True, sampling_params=params)
    return [generate(request).read for _ in range(count)]


async def http_streams(address: str, count: int, window: int | None) -> list[Read]:
    """On a connection each."""
    host, port = address.split(":")
    # A slow reader asks for more: the buffers of the system and the server must fill.
    prompt = IDS if window is None else [IDS] * 8
    body = json.dumps({"prompt": prompt, "stream": True, "ignore_eos": True}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nhost: test\r\ncontent-type: application/json\r\n"
    reads: list[Read] = []
    for _ in range(count):
        connection = socket.socket()
        if window is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, window)
        connection.connect((host, int(port)))
        connection.setblocking(False)
        reader, writer = await asyncio.open_connection(sock=connection, limit=window or 1 << 16)
        writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        reads.append(lambda reader=reader, writer=writer: reader.readuntil(b"data: "))
    return reads


async def main(protocol: str, address: str, count: int, window: int | None) -> None:
    if protocol == "http":
        reads = await http_streams(address, count, window)
    else:
        reads = await grpc_streams(protocol, address, count, window)
    for _ in range(2):
        for read in reads:
            await read()
    print("open", flush=True)
    while window is None:
        for read in reads:
            await read()
    await asyncio.sleep(3600)


asyncio.run(main(*sys.argv[1:3], int(sys.argv[3]), int(sys.argv[4]) if len(sys.argv) > 4 else None))
