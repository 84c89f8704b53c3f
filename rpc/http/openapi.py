"""The OpenAPI description of the routes. A test holds its parameters to those that are taken, and fuzzes it."""

import json
from collections.abc import Mapping
from pathlib import Path

from jaxserve.request import MAX_LOGIT_BIAS, MAX_LOGPROBS, MAX_STOP_STRING_LENGTH, MAX_STOP_STRINGS
from rpc.http.chat import MAX_MESSAGES
from rpc.http.schema import MAX_PROMPTS, MAX_TIMEOUT
from rpc.http.tools import MAX_TOOLS

Schema = dict[str, object]


def _integer(low: int, high: int, about: str) -> Schema:
    return {"type": ["integer", "null"], "minimum": low, "maximum": high, "description": about}


def _number(low: float, high: float, about: str, open_low: bool = False) -> Schema:
    least = "exclusiveMinimum" if open_low else "minimum"
    return {"type": ["number", "null"], least: low, "maximum": high, "description": about}


def _boolean(about: str) -> Schema:
    return {"type": ["boolean", "null"], "description": about}


def _string(about: str) -> Schema:
    return {"type": ["string", "null"], "description": about}


def _only(values: list[object], about: str) -> Schema:
    return {"enum": [*values, None], "description": about}


def _of(name: str) -> Schema:
    """One of `openapi_schemas.json`."""
    return {"$ref": f"#/components/schemas/{name}"}


_SCHEMAS = Path(__file__).with_name("openapi_schemas.json")
"""What has no bound that the code owns: messages, tools, answers, errors."""

_MAX_INT = 2**31 - 1

_JSON_SCHEMA: Schema = {"type": ["object", "boolean"]}

SHARED: Mapping[str, Schema] = {
    "model": _string("The served model's name; left out, it is the one that is served."),
    "temperature": _number(0, 100, "0 is greedy; 1 if left out."),
    "top_p": _number(0, 1, "Keep the smallest set of tokens whose probabilities sum to this.", open_low=True),
    "top_k": _integer(0, _MAX_INT, "Keep the k likeliest tokens; 0 keeps all."),
    "min_p": _number(0, 1, "Keep tokens at least this likely, relative to the likeliest."),
    "presence_penalty": _number(-2, 2, "Subtracted from the logit of each token already generated."),
    "frequency_penalty": _number(-2, 2, "Subtracted once for each time the token was generated."),
    "repetition_penalty": _number(0.01, 100, "Divides logits of tokens seen before."),
    "seed": _integer(0, 2**32 - 1, "The same seed gives the same tokens."),
    "n": _integer(1, _MAX_INT, "Choices for one prompt; the engine has a lower limit."),
    "logit_bias": {
        "type": ["object", "null"],
        "maxProperties": MAX_LOGIT_BIAS,
        "propertyNames": {"pattern": "^(0|[1-9][0-9]{0,8})$"},
        "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
        "description": "Added to the logits of these token ids.",
    },
    "max_tokens": _integer(1, _MAX_INT, "Most tokens to generate; to the end of the context if left out."),
    "min_tokens": _integer(0, _MAX_INT, "Nothing ends a sequence before this many tokens."),
    "stop": {
        "anyOf": [
            {"type": "string", "minLength": 1, "maxLength": MAX_STOP_STRING_LENGTH},
            {
                "type": "array",
                "maxItems": MAX_STOP_STRINGS,
                "items": {"type": "string", "minLength": 1, "maxLength": MAX_STOP_STRING_LENGTH},
            },
            {"type": "null"},
        ],
        "description": "Strings that end the sequence and are not part of its text.",
    },
    "stop_token_ids": {"type": ["array", "null"], "items": {"type": "integer", "minimum": 0}},
    "include_stop": _boolean("Keep the stop string in the text."),
    "ignore_eos": _boolean("The model's end-of-sequence ids do not end the sequence."),
    "priority": _integer(-(2**31), _MAX_INT, "Higher goes first: each level counts as 4,096 arrivals earlier."),
    "cache_salt": _string("Requests share cached prefixes only within one salt."),
    "timeout": _number(
        0,
        MAX_TIMEOUT,
        "Seconds from the request's arrival; then it ends with finish_reason deadline, or status 504 without a token.",
        open_low=True,
    ),
    "stream": _boolean("Server-sent events as tokens come, the last of which is [DONE]."),
    "stream_options": {
        "type": ["object", "null"],
        "properties": {"include_usage": _boolean("The stream ends with token counts.")},
        "additionalProperties": False,
        "description": "Only where stream is true.",
    },
    "response_format": {
        "type": ["object", "null"],
        "required": ["type"],
        "properties": {
            "type": {"enum": ["text", "json_object", "json_schema"]},
            "json_schema": {"type": "object", "required": ["schema"], "properties": {"schema": _JSON_SCHEMA}},
        },
        "description": "The text is JSON, or JSON of a schema.",
    },
    "json_schema": {"anyOf": [_JSON_SCHEMA, {"type": ["string", "null"]}], "description": "The text is JSON of this."},
    "regex": _string("The text matches this, in the syntax of Rust's regex."),
    "grammar": _string("The text follows this grammar, in llguidance's Lark."),
    "choice": {"type": ["array", "null"], "items": {"type": "string"}, "description": "The text is one of these."},
    "json_object": _boolean("The text is a JSON object."),
    "return_token_ids": _boolean("Choices have token_ids."),
    "user": _string("Has no effect."),
    "metadata": {"type": ["object", "null"], "description": "Has no effect."},
    "store": _only([False], "Nothing is stored."),
    "service_tier": _only(["auto", "default"], "Has no effect."),
}
"""Parameters of both endpoints. Null is the same as leaving one out."""

_IDS: Schema = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}}
_TEXT: Schema = {"type": "string", "minLength": 1}

COMPLETION: Mapping[str, Schema] = {
    "prompt": {
        "anyOf": [
            _TEXT,
            _IDS,
            {"type": "array", "minItems": 1, "maxItems": MAX_PROMPTS, "items": _TEXT},
            {"type": "array", "minItems": 1, "maxItems": MAX_PROMPTS, "items": _IDS},
        ],
        "description": "Text, token ids, or a list of either.",
    },
    "logprobs": _integer(0, MAX_LOGPROBS, "Log-probabilities of the tokens and of this many of the likeliest."),
    "best_of": _integer(1, _MAX_INT, "Must equal n."),
    "echo": _only([False], "The prompt is not echoed."),
    "suffix": _only([""], "Text is not inserted."),
}
"""Parameters of `/v1/completions` alone."""

CHAT: Mapping[str, Schema] = {
    "messages": {"type": "array", "minItems": 1, "maxItems": MAX_MESSAGES, "items": _of("Message")},
    "logprobs": _boolean("Log-probabilities of the tokens."),
    "top_logprobs": _integer(0, MAX_LOGPROBS, "And of this many of the likeliest; needs logprobs."),
    "max_completion_tokens": _integer(1, _MAX_INT, "The later name of max_tokens."),
    "tools": {
        "type": ["array", "null"],
        "maxItems": MAX_TOOLS,
        "items": _of("Tool"),
        "description": "Functions that the model may call, where its chat template has tools.",
    },
    "tool_choice": _of("ToolChoice"),
    "parallel_tool_calls": _boolean(
        "Whether several calls may be made at once; of those of a model the first is told else."
    ),
    "modalities": _only([["text"]], "Text alone."),
}
"""Parameters of `/v1/chat/completions` alone."""

_REFUSALS = {
    400: "The request is not valid; `param` names the field.",
    401: "The API key is missing or not known.",
    403: "The API key does not open this.",
    404: "There is no such model, or no such path.",
    405: "The path has no such method.",
    408: "The request took too long to arrive.",
    409: "A request with this id is active.",
    413: "The body is too large.",
    415: "The body is not plain JSON.",
    429: "The queue is full; `retry-after` says when to try again.",
    500: "The engine failed this request.",
    503: "The server is loading, draining or has failed.",
    504: "The timeout passed before the first token.",
}


def _json(schema: Schema, about: str) -> Schema:
    return {"description": about, "content": {"application/json": {"schema": schema}}}


def _refusals(*statuses: int) -> dict[str, Schema]:
    return {str(status): _json(_of("Error"), _REFUSALS[status]) for status in statuses}


def _generates(name: str, about: str, body: Mapping[str, Schema], required: str, answer: Schema) -> Schema:
    schema = {"type": "object", "required": [required], "properties": {**SHARED, **body}, "additionalProperties": False}
    done = _json(answer, "The whole answer, or a stream of its chunks.")
    done["content"] |= {"text/event-stream": {}}  # pyright: ignore[reportOperatorIssue]
    return {
        "operationId": name,
        "summary": about,
        "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
        "responses": {"200": done, **_refusals(400, 401, 403, 404, 408, 409, 413, 415, 429, 500, 503, 504)},
    }


def _reads(name: str, about: str, content: Schema, *statuses: int, parameters: list[Schema] | None = None) -> Schema:
    return {
        "operationId": name,
        "summary": about,
        **({"parameters": parameters} if parameters else {}),
        "responses": {"200": {"description": about, "content": content}, **_refusals(*statuses)},
    }


def _content(name: str) -> Schema:
    return {"application/json": {"schema": _of(name)}}


def description(version: str, needs_key: bool) -> Schema:
    """The description of a server. `needs_key`: whether it asks for API keys."""
    name_parameter: Schema = {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
    health_route = _reads("health", "Whether requests are taken.", _content("Health"))
    health_route["responses"]["503"] = _json(_of("Health"), _REFUSALS[503])  # pyright: ignore[reportIndexIssue]
    paths = {
        "/v1/completions": {
            "post": _generates("createCompletion", "Goes on with a prompt.", COMPLETION, "prompt", _of("Completion"))
        },
        "/v1/chat/completions": {
            "post": _generates(
                "createChatCompletion", "Answers a conversation.", CHAT, "messages", _of("ChatCompletion")
            )
        },
        "/v1/models": {"get": _reads("listModels", "The model that is served.", _content("Models"), 401, 503)},
        "/v1/models/{model}": {
            "get": _reads(
                "getModel",
                "The model, by its name.",
                _content("Model"),
                401,
                404,
                503,
                parameters=[name_parameter],
            )
        },
        "/health": {"get": health_route},
        "/metrics": {
            "get": _reads("metrics", "Prometheus metrics.", {"text/plain": {"schema": {"type": "string"}}}, 401)
        },
        "/openapi.json": {"get": _reads("openapi", "This description.", _content("Description"), 401)},
    }
    components: Schema = {"schemas": json.loads(_SCHEMAS.read_text())}
    made: Schema = {
        "openapi": "3.1.0",
        "info": {
            "title": "jaxserve",
            "version": version,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": components,
    }
    if needs_key:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        made["security"] = [{"key": []}]
    return made
