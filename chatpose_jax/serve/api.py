"""What ``/openapi.json`` says of the routes. The schema of a request is the one that checks it (``openai.request_schema``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from chatpose_jax import __version__
from chatpose_jax.serve.openai import Limits, request_schema
from chatpose_jax.serve.poses import KINDS

TEXT, NUMBER, WHOLE = {"type": "string"}, {"type": "number"}, {"type": "integer"}
MAYBE = {"type": ["string", "null"]}

ERRORS = {
    400: "the request is wrong; `param` names the field", 401: "no key, or another", 403: "not for this caller", 404: "there is no such thing",
    408: "the request did not come in time", 413: "the request is too large", 429: "the queue is full; Retry-After says when to try again",
    500: "the server or the model failed", 503: "the model is being loaded, has failed, or the server stops", 504: "the answer took too long",
}  # fmt: skip


def obj(**properties: Any) -> dict[str, Any]:
    """An object with these fields, all of them there. A name that ends with _ may be missing."""
    named = {name.rstrip("_"): schema for name, schema in properties.items()}
    return {"type": "object", "properties": named, "required": [name for name in properties if not name.endswith("_")]}


def array(items: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


ERROR = obj(error=obj(message=TEXT, type=TEXT, param=MAYBE, code=MAYBE))
SHAPE = {
    "id": TEXT, "frame": {"enum": ["camera", "model", "z-up"]}, "body": TEXT, "axis_angle": array(array(NUMBER)), "joint_names": array(TEXT),
    "joints": array(array(NUMBER)), "betas_": array(NUMBER), "translation_": array(NUMBER),
}  # fmt: skip
POSE = obj(object={"enum": ["pose"]}, parents=array(WHOLE), samples_=array(obj(**SHAPE)), **SHAPE)
USAGE = obj(
    prompt_tokens=WHOLE, completion_tokens=WHOLE, total_tokens=WHOLE, prompt_tokens_details=obj(cached_tokens=WHOLE)
)
MODEL = obj(id=TEXT, object={"enum": ["model"]}, created=WHOLE, owned_by=TEXT, description_=TEXT)
MESSAGE = obj(role={"enum": ["assistant"]}, content=TEXT, refusal={"type": "null"}, poses=array(POSE))
CHOICE = obj(index=WHOLE, message=MESSAGE, logprobs={"type": "null"}, finish_reason={"enum": ["stop", "length"]})
COMPLETION = obj(
    id=TEXT, object={"enum": ["chat.completion"]}, created=WHOLE, model=TEXT, choices=array(CHOICE), usage=USAGE
)


def document(name: str, limits: Limits) -> dict[str, Any]:
    """The OpenAPI document of a server whose model has this name."""

    def answers(content: Mapping[str, Any], *errors: int) -> dict[str, Any]:
        wrong = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
        found = {
            str(status): {"description": ERRORS[status], "content": wrong} for status in sorted((401, 403, *errors))
        }
        return {"200": {"description": "the answer", "content": content}, **found}

    def get(about: str, content: Mapping[str, Any], *errors: int, **parameter: Any) -> dict[str, Any]:
        given = [{"name": each, "in": "path", "required": True, **schema} for each, schema in parameter.items()]
        return {"get": {"summary": about, "parameters": given, "responses": answers(content, *errors)}}

    def json(schema: Mapping[str, Any]) -> dict[str, Any]:
        return {"application/json": {"schema": schema}}

    events = {"text/event-stream": {"schema": {"type": "string"}}}
    asked = {"required": True, "content": json({"$ref": "#/components/schemas/Request"})}
    ask = {
        "summary": "An answer to a conversation, with its poses; as events with `stream`.",
        "requestBody": asked,
        "responses": answers({**json(COMPLETION), **events}, 400, 404, 408, 413, 429, 500, 503, 504),
    }
    files = {kind: {"schema": {"type": "string", "format": "binary"}} for kind in sorted(set(KINDS.values()))}
    health = get("Whether the server can answer.", json(obj(status={"enum": ["ok"]})), 503)
    health["get"]["security"] = []
    return {
        "openapi": "3.1.0",
        "info": {"title": f"ChatPose-JAX: {name}", "version": __version__},
        "paths": {
            "/v1/chat/completions": {"post": ask},
            "/v1/models": get("The model.", json(obj(object={"enum": ["list"]}, data=array(MODEL)))),
            "/v1/models/{model}": get("The model.", json(MODEL), 404, model={"schema": TEXT, "example": name}),
            "/v1/poses/{file}": get(
                f"A pose of an answer as a file: its id with {', '.join('.' + kind for kind in KINDS)}.", files, 404, file={"schema": TEXT}
            ),
            "/health": health,
            "/metrics": get("Counters, for Prometheus.", {"text/plain": {"schema": TEXT}}),
            "/version": get("The version of the program.", json(obj(version=TEXT))),
        },
        "components": {
            "schemas": {"Request": request_schema(limits), "Error": ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}],
    }  # fmt: skip
