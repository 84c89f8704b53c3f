"""The network side of jaxserve: protocol, gRPC server, clients.

A request's way: `servicer` (Generate) -> `convert` -> `call_runner`: the engine's `submit`, its stream -> `convert` ->
client. The servicers of other protocols differ in what they convert alone.
`server` owns listening, loading, health and draining, `serve` the process around it. `errors` says every refusal on
both sides.
"""
