"""Clients of a jaxserve server, asynchronous and plain, with the types and the errors of the engine itself.

    async with AsyncClient("localhost:50051") as client:
        async for delta in client.generate("Once upon a time", max_tokens=32):
            print(delta.text, end="", flush=True)

    with Client("localhost:50051", Credentials(api_key=key, root_certificates="authority.pem")) as client:
        for delta in client.chat([{"role": "user", "content": "Hello"}]):
            print(delta.text, end="", flush=True)

A request that is refused raises what `Engine.submit` raises: InvalidRequest with its `field`, QueueFull with
`retry_after`, ModelNotFound, DuplicateRequestId, EngineUnavailable; a call without the right key Unauthenticated, or
Forbidden where the key is not an admin's. A deadline raises TimeoutError, a broken connection ConnectionLost, which is
an EngineUnavailable, anything else RpcFailed. Leaving the loop over a stream early cancels the request on the server.
"""

from rpc.client.asynchronous import AsyncClient, AsyncGeneration
from rpc.client.blocking import Client, Generation
from rpc.client.calls import Credentials
from rpc.errors import ConnectionLost, RpcFailed
from rpc.security.principal import Forbidden, Unauthenticated

__all__ = [
    "AsyncClient",
    "AsyncGeneration",
    "Client",
    "ConnectionLost",
    "Credentials",
    "Forbidden",
    "Generation",
    "RpcFailed",
    "Unauthenticated",
]
