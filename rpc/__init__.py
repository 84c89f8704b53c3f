"""The network side of jaxserve: protocol, gRPC server, clients.

A request's way: `arrivals` (its message) -> `servicer` (Generate) -> `convert` -> `call_runner`: the engine's `submit`,
its stream -> `convert` -> client. The servicers of other protocols differ in what they convert alone. What a handler
raises becomes the call's status in `arrivals`.
`server` owns listening, loading, health and draining, `serve` the process around it. `errors` says every refusal on
both sides.
"""
