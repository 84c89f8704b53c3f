"""A client of many streams, as a process of its own: python many_streams.py ADDRESS COUNT [WINDOW].

Prints "open" when every stream has had a token. With a WINDOW, in bytes, it then reads nothing more, and takes no more
than that ahead.
"""

import asyncio
import sys

import grpc.aio

from rpc.v1 import jaxserve_pb2 as pb
from rpc.v1 import jaxserve_pb2_grpc


async def main(address: str, count: int, window: int | None) -> None:
    options = [] if window is None else [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", window)]
    async with grpc.aio.insecure_channel(address, options=options) as channel:
        stub = jaxserve_pb2_grpc.InferenceStub(channel)
        request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[300, 301, 302]))
        calls = [stub.Generate(request) for _ in range(count)]
        for call in calls:
            await call.read()
            await call.read()
        print("open", flush=True)
        while window is None:
            for call in calls:
                await call.read()
        await asyncio.sleep(3600)


asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else None))
