"""The network side of jaxserve: protocol, gRPC server, clients.

A request's way: `servicer` (Generate) -> `convert` -> the engine's `submit` -> its stream -> `convert` -> client.
`server` owns the process: listening, loading, health, draining. `errors` says every refusal on both sides.
"""
