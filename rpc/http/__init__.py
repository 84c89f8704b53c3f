"""The OpenAI API over HTTP, in the process and on the event loop of the gRPC server.

A request's way: `protocol` (bytes, bounded) -> `app` (its route) -> `body` -> `schema`: the engine's requests ->
`generation`: admission, streams -> `answers`: chunks or one answer. `errors` says every refusal.
"""
