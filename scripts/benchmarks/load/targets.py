"""What a load is sent to: a server by gRPC or by HTTP, as streams of the same events."""

import asyncio
import json
import ssl
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol
from urllib.parse import urlsplit

import grpc.aio
from smg_grpc_proto.generated import vllm_engine_pb2, vllm_engine_pb2_grpc

from jaxserve.events import Delta, Event, Finished, FinishReason, Timings, Usage
from jaxserve.request import Request
from jaxserve.request_errors import EngineUnavailable, QueueFull
from rpc.client import AsyncClient, Credentials
from rpc.client.calls import CHANNEL_OPTIONS, mapped_errors

if TYPE_CHECKING:
    import aiohttp


@dataclass(frozen=True)
class Address:
    """Where a server is, and what opens it."""

    url: str
    """grpc://HOST:PORT, grpcs://, vllm:// (the protocol of smg's workers), http:// or https://"""
    api_key: str | None = None
    root_certificates: str | None = None

    @property
    def scheme(self) -> str:
        """Of the URL."""
        return urlsplit(self.url).scheme

    def check(self) -> None:
        """Raises ValueError for what is no such URL."""
        parts = urlsplit(self.url)
        known = ("grpc", "grpcs", "vllm", "http", "https")
        if self.scheme not in known or parts.hostname is None or parts.port is None:
            raise ValueError(f"{self.url!r}: must be SCHEME://HOST:PORT, the scheme one of {', '.join(known)}")

    @property
    def is_grpc(self) -> bool:
        """Whether it is the gRPC side of a server, in whichever protocol."""
        return self.scheme in ("grpc", "grpcs", "vllm")

    def grpc_client(self) -> AsyncClient:
        """A client of its gRPC side."""
        tls = self.scheme == "grpcs"
        credentials = Credentials(self.api_key, tls, self.root_certificates if tls else None)
        return AsyncClient(urlsplit(self.url).netloc, credentials)


class Target(Protocol):
    """A server that requests are sent to."""

    def send(self, request: Request, timeout: float | None) -> AsyncGenerator[Event]:
        """The events of a request; leaving the iteration cancels it. Raises QueueFull, EngineUnavailable or
        TimeoutError, and RuntimeError for what a server should not do."""
        ...


class GrpcTarget:
    """`jaxserve.v1.Inference.Generate`."""

    def __init__(self, client: AsyncClient):
        self._client = client

    def send(self, request: Request, timeout: float | None) -> AsyncGenerator[Event]:
        """As `Target.send`; the deadline travels with the call."""
        return self._client.generate(request, timeout=timeout).events()


class VllmTarget:
    """`vllm.grpc.engine.VllmEngine.Generate`, streamed."""

    def __init__(self, channel: grpc.aio.Channel):
        self._generate = vllm_engine_pb2_grpc.VllmEngineStub(channel).Generate

    async def send(self, request: Request, timeout: float | None) -> AsyncGenerator[Event]:
        """As `Target.send`; the deadline travels with the call."""
        call = self._generate(_vllm_request(request), timeout=timeout)
        try:
            with mapped_errors():
                async for response in call:
                    if response.HasField("chunk"):
                        yield Delta(request.request_id, 0, tuple(response.chunk.token_ids))
                        continue
                    done = response.complete
                    usage = Usage(done.prompt_tokens, done.cached_tokens, done.completion_tokens)
                    reason = FinishReason(done.finish_reason)
                    yield Finished(request.request_id, 0, reason, usage, Timings(0.0, 0.0, 0.0, 0.0))
        finally:
            call.cancel()


def _vllm_request(request: Request) -> vllm_engine_pb2.GenerateRequest:
    message = vllm_engine_pb2.GenerateRequest(request_id=request.request_id, stream=True)
    if request.token_ids is None:
        message.text = request.prompt or ""
    else:
        message.tokenized.input_ids.extend(request.token_ids)
    params = message.sampling_params
    params.temperature = request.sampling.temperature
    params.ignore_eos = request.stopping.ignore_eos
    if request.stopping.max_tokens is not None:
        params.max_tokens = request.stopping.max_tokens
    if request.sampling.seed is not None:
        params.seed = request.sampling.seed
    return message


@contextmanager
def http_errors() -> Iterator[None]:
    """Raises EngineUnavailable where a server gives no answer, or breaks off in one. That its certificate is not
    trusted stays aiohttp's own error, an OSError."""
    import aiohttp

    try:
        yield
    except (TimeoutError, aiohttp.ClientSSLError):
        raise
    except aiohttp.ClientError as error:
        raise EngineUnavailable(f"{type(error).__name__}: {error}") from error


class HttpTarget:
    """`POST /v1/completions`, streamed, with token ids and usage."""

    def __init__(self, session: "aiohttp.ClientSession", url: str):
        self._session = session
        self._url = url.rstrip("/") + "/v1/completions"

    async def send(self, request: Request, timeout: float | None) -> AsyncGenerator[Event]:
        """As `Target.send`; a deadline is a client that leaves."""
        with http_errors():
            async with asyncio.timeout(timeout), self._session.post(self._url, json=_body(request)) as response:
                if response.status != 200:
                    raise _refusal(response.status, (await response.read()).decode(errors="replace")[:500])
                reason = None
                async for line in response.content:
                    data = line.strip().removeprefix(b"data: ")
                    if not data or data == b"[DONE]":
                        continue
                    chunk = json.loads(data)
                    if "error" in chunk:
                        raise RuntimeError(f"request {request.request_id}: {chunk['error']}")
                    for choice in chunk["choices"]:
                        if choice.get("token_ids") or choice["text"]:
                            yield Delta(request.request_id, 0, tuple(choice.get("token_ids") or ()), choice["text"])
                        reason = choice["finish_reason"] or reason
                    if chunk.get("usage") is not None and reason is not None:
                        yield _finished(request.request_id, reason, chunk["usage"])


def _body(request: Request) -> dict[str, object]:
    return {
        "model": request.model,
        "prompt": request.prompt if request.token_ids is None else list(request.token_ids),
        "max_tokens": request.stopping.max_tokens,
        "ignore_eos": request.stopping.ignore_eos,
        "temperature": request.sampling.temperature,
        "seed": request.sampling.seed,
        "priority": request.priority,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
    }


def _refusal(status: int, text: str) -> Exception:
    if status == 429:
        return QueueFull(0, 1.0)
    if status in (502, 503):
        return EngineUnavailable(text)
    return RuntimeError(f"HTTP status {status}: {text}")


def _finished(request_id: str, reason: str, usage: dict[str, int]) -> Finished:
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)  # pyright: ignore[reportAttributeAccessIssue]
    counts = Usage(usage["prompt_tokens"], cached, usage["completion_tokens"])
    known = FinishReason(reason) if reason in FinishReason else FinishReason.STOP
    return Finished(request_id, 0, known, counts, Timings(0.0, 0.0, 0.0, 0.0))


@asynccontextmanager
async def http_session(address: Address) -> AsyncGenerator["aiohttp.ClientSession"]:
    """A session that shows the address's key, and trusts its authorities."""
    try:
        import aiohttp
    except ImportError as error:
        raise SystemExit("HTTP needs aiohttp: pip install 'jaxserve[load]'") from error
    context = None
    if address.scheme == "https":
        context = ssl.create_default_context(cafile=address.root_certificates)
    headers = {} if address.api_key is None else {"authorization": f"Bearer {address.api_key}"}
    connector = aiohttp.TCPConnector(limit=0, ssl=context or True)
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=30.0)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, headers=headers) as session:
        yield session


@asynccontextmanager
async def connect(address: Address) -> AsyncGenerator[Target]:
    """The target at an address, while the context lasts."""
    if address.scheme == "vllm":
        async with grpc.aio.insecure_channel(urlsplit(address.url).netloc, options=CHANNEL_OPTIONS) as channel:
            yield VllmTarget(channel)
    elif address.is_grpc:
        async with address.grpc_client() as client:
            yield GrpcTarget(client)
    else:
        async with http_session(address) as session:
            yield HttpTarget(session, address.url)
