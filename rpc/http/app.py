"""The routes of the HTTP front end, and what each answers."""

import re
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxserve.log import set_request_id
from jaxserve.request_errors import RequestError
from rpc.call_runner import CallRunner
from rpc.control import installed_version
from rpc.http.answers import Answer, CompletionAnswer
from rpc.http.body import read_object
from rpc.http.chat import ChatAnswer, parse_chat
from rpc.http.errors import HttpError, error_of
from rpc.http.generation import Generation
from rpc.http.guard import HttpGuard
from rpc.http.live import LiveFeed
from rpc.http.openapi import description
from rpc.http.schema import Asked, parse_completion
from rpc.lifecycle import Lifecycle, State
from rpc.metrics import CONTENT_TYPE, Metrics
from rpc.security.access import Access
from rpc.served_engine import ServedEngine
from rpc.server_config import ServerConfig
from rpc.tracing import set_trace_parent

Parse = Callable[[Mapping[str, object], ServedEngine], Asked]

_PAGE = Path(__file__).with_name("page.html")
_PAGE_HEADERS = {
    # The page is one file and fetches nothing but the feed.
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "cache-control": "no-cache",
    "x-content-type-options": "nosniff",
}

PIECE_BYTES = 64 << 10
"""Of a whole answer, sent at once."""

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,100}")
"""An `x-request-id` that is taken over: visible ASCII, short enough for the engine's ids."""


def request_id_of(request: Request) -> str:
    """The id that the client gave, or a new one."""
    given = request.headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


def probes(lifecycle: Lifecycle, metrics: Metrics) -> list[Route]:
    """What the machinery around a server asks of it."""

    async def health(request: Request) -> Response:
        """Status 200 while requests are taken."""
        state = lifecycle.state
        return JSONResponse({"status": state}, status_code=200 if state is State.READY else 503)

    async def read_metrics(request: Request) -> Response:
        return Response(metrics.text(), headers={"content-type": CONTENT_TYPE})

    return [Route("/health", health, methods=["GET"]), Route("/metrics", read_metrics, methods=["GET"])]


def metrics_app(lifecycle: Lifecycle, metrics: Metrics, access: Access) -> ASGIApp:
    """The probes alone, for a server without the API over HTTP."""
    handlers = {HTTPException: _on_http_exception}
    return HttpGuard(Starlette(routes=probes(lifecycle, metrics), exception_handlers=handlers), access)


class HttpFront:
    """The OpenAI API and what stands beside it, over the same engine and calls as the gRPC services."""

    def __init__(self, runner: CallRunner, metrics: Metrics, access: Access, config: ServerConfig):
        self.runner = runner
        self.config = config
        self._began = int(time.time())
        self._feed = LiveFeed(runner.lifecycle)
        self._description = description(installed_version("jaxserve"), needs_key=access.keys is not None)
        routes = Starlette(
            routes=[
                *probes(runner.lifecycle, metrics),
                Route("/", _page, methods=["GET"]),
                Route("/live", self._live, methods=["GET"]),
                Route("/openapi.json", self._openapi, methods=["GET"]),
                Route("/v1/models", self._models, methods=["GET"]),
                Route("/v1/models/{model:path}", self._model, methods=["GET"]),
                Route("/v1/completions", GenerateEndpoint(self, parse_completion, CompletionAnswer), methods=["POST"]),
                Route("/v1/chat/completions", GenerateEndpoint(self, parse_chat, ChatAnswer), methods=["POST"]),
            ],
            exception_handlers={
                HTTPException: _on_http_exception,
                HttpError: _on_refusal,
                RequestError: _on_refusal,
            },
        )
        routes.router.redirect_slashes = False
        self.app = HttpGuard(routes, access)

    # Beside generating

    async def _live(self, request: Request) -> Response:
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        if request.method == "HEAD":  # whose answer ends at once
            return StreamingResponse(iter(()), headers=headers, media_type="text/event-stream")
        frames = self._feed.frames()
        first = await anext(frames)  # what refuses a viewer must do so before the status is sent
        return StreamingResponse(_chain(first, frames), headers=headers, media_type="text/event-stream")

    async def _openapi(self, request: Request) -> Response:
        return JSONResponse(self._description)

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def _model(self, request: Request) -> Response:
        card = self._card()
        name = request.path_params["model"]
        if name != card["id"]:
            raise HttpError(404, f"model: {name!r} is not served here", param="model", code="model_not_found")
        return JSONResponse(card)

    def _card(self) -> dict[str, object]:
        engine = self.runner.lifecycle.loaded_engine()
        return {
            "id": engine.model_name,
            "object": "model",
            "created": self._began,
            "owned_by": "jaxserve",
            "max_model_len": engine.max_context,
        }


async def _chain(first: bytes, rest: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
    async with aclosing(rest):
        yield first
        async for one in rest:
            yield one


async def _page(request: Request) -> Response:
    return FileResponse(_PAGE, media_type="text/html", headers=_PAGE_HEADERS)


class GenerateEndpoint:
    """A route that generates: an ASGI application, for its answer is written as it comes."""

    def __init__(self, front: HttpFront, parse: Parse, answer_class: type[Answer]):
        self._front = front
        self._parse = parse
        self._answer_class = answer_class

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        arrival = time.monotonic()
        request = Request(scope, receive, send)
        set_trace_parent(request.headers.items())
        runner, config, request_id = self._front.runner, self._front.config, request_id_of(request)
        set_request_id(request_id)
        generation = Generation(runner, request_id)
        try:
            engine = runner.lifecycle.ready_engine()
            asked = self._parse(await read_object(request, config.max_request_bytes, config.message_timeout), engine)
            await generation.admit(asked, receive, None if asked.timeout is None else arrival + asked.timeout)
            answer = self._answer_class(asked, request_id, engine.model_name, engine.tokenizer)
            if asked.stream:
                await generation.stream(answer, [(b"x-request-id", request_id.encode())], send)
                return
            response = Response(await generation.whole(answer), media_type="application/json")
            await _send(response, request_id, request, send)
        except ClientDisconnect:
            pass
        except Exception as error:
            await _send(error_of(error).response(), request_id, request, send)
        finally:
            generation.close()


async def _send(response: Response, request_id: str, request: Request, send: Send) -> None:
    """Sends a whole answer in pieces, each when there is room: a connection does not see what TLS has taken, so that
    one that had all at once could not tell a client that reads from one that does not."""
    response.headers["x-request-id"] = request_id

    async def send_pieces(message: Message) -> None:
        body = memoryview(message.get("body", b""))
        while len(body) > PIECE_BYTES:
            await send({**message, "body": body[:PIECE_BYTES], "more_body": True})
            body = body[PIECE_BYTES:]
            message = {**message, "body": body}
        await send(message)

    await response(request.scope, request.receive, send_pieces)


async def _on_refusal(request: Request, error: Exception) -> Response:
    return error_of(error).response()


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """No such path, or no such method."""
    assert isinstance(error, HTTPException)
    response = HttpError(error.status_code, f"{request.method} {request.url.path}: {error.detail}").response()
    response.headers.update(error.headers or {})
    return response
