"""The body of a request: bounded in bytes, time and depth, and plain JSON in UTF-8."""

import asyncio
import json
import re
from typing import NoReturn

from starlette.requests import Request

from rpc.http.errors import HttpError

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
"""An escape that may be half of a character; in UTF-8, only such can make a string that is no Unicode text."""


async def read_object(request: Request, limit: int, timeout: float) -> dict[str, object]:
    """The JSON object in a request's body. Raises HttpError, and ClientDisconnect where the client has gone.

    Args:
        request: whose body has not been read.
        limit: bytes of the body.
        timeout: seconds that it may take to arrive.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise HttpError(415, f"content-type: must be application/json, got {kind!r}", param="content-type")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise HttpError(415, "content-encoding: compressed requests are not taken", param="content-encoding")
    data = await _read(request, limit, timeout)
    try:
        # Bytes, `json.loads` would take in UTF-16 too, and halves of characters in either.
        text = data.decode("utf-8-sig")
        value = json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise HttpError(400, "the request body is nested too deeply", code="invalid_json") from None
    except ValueError as error:  # JSON, UTF-8, or a number of more digits than Python reads
        raise HttpError(400, f"the request body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise HttpError(400, f"the request body must be a JSON object, not {type(value).__name__}", code="invalid_json")
    if _SURROGATE.search(text):
        _check_unicode(value)
    return value


async def _read(request: Request, limit: int, timeout: float) -> bytes:
    too_large = HttpError(413, f"the request body is larger than {limit} bytes", code="request_too_large")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > limit:
        raise too_large
    data = bytearray()
    try:
        async with asyncio.timeout(timeout):
            async for piece in request.stream():
                data += piece
                if len(data) > limit:
                    raise too_large
    except TimeoutError:
        raise HttpError(408, f"the request body did not arrive within {timeout:g} s", "timeout") from None
    return bytes(data)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number of JSON")


def _check_unicode(value: dict[str, object]) -> None:
    """Refuses half characters: no tokenizer, log or answer can take them."""
    for name, part in value.items():
        try:
            json.dumps({name: part}, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            code = ord(error.object[error.start])
            shown = name.encode("ascii", "backslashreplace").decode()
            message = f"{shown}: is not valid Unicode text: the lone surrogate U+{code:04X}"
            raise HttpError(400, message, param=shown, code="invalid_value") from None
