"""The OpenAPI document is valid, complete and true."""

from __future__ import annotations

import json
import re
from typing import Any

import msgspec
import pytest
from jsonschema import Draft202012Validator
from openapi_spec_validator import validate

from tidings.server.config import Config
from tidings.server.rest.factory import all_operations
from tidings.server.rest.operation import Operation
from tidings.server.telemetry import Metrics
from tidings.wire.problems import CATALOGUE

from .world import World

OPERATIONS = {op.id: op for op in all_operations(Config(), Metrics())}


@pytest.fixture
async def document(world: World) -> dict[str, Any]:
    reply = await world.http.get("/v1/openapi.json")
    assert reply.headers["content-type"] == "application/json"
    return dict(reply.json())


def resolve(document: dict[str, Any], value: dict[str, Any]) -> dict[str, Any]:
    if "$ref" not in value:
        return value
    for name in value["$ref"].removeprefix("#/").split("/"):
        document = document[name]
    return document


async def test_the_document_is_valid_openapi(document: dict[str, Any]) -> None:
    assert document["openapi"] == "3.1.0"
    validate(document)


async def test_every_route_is_described_and_every_description_is_routed(world: World, document: dict[str, Any]) -> None:
    routed = {
        (method, re.sub(r"{(\w+):\w+}", r"{\1}", route.path))
        for route in world.rest.routes
        for method in route.methods  # type: ignore[union-attr]
        if method != "OPTIONS"
    }
    described = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    assert described == routed


async def test_everything_is_exemplified_and_the_examples_fit(document: dict[str, Any]) -> None:
    def check(schema: dict[str, Any], example: Any) -> None:
        Draft202012Validator({**schema, "components": document["components"]}).validate(example)

    for methods in document["paths"].values():
        for op in methods.values():
            assert op["summary"]
            assert op["description"], op["operationId"]
            if body := op.get("requestBody"):
                check(body["content"]["application/json"]["schema"], body["content"]["application/json"]["example"])
            for found in op["responses"].values():
                reply = resolve(document, found)
                for kind, content in reply.get("content", {}).items():
                    if kind == "application/problem+json":
                        for example in content["examples"].values():
                            check(content["schema"], example["value"])
                    elif kind == "application/json" and op["operationId"] not in ("system.openapi", "system.asyncapi"):
                        check(content["schema"], content["example"])


async def test_examples_of_requests_are_accepted_by_the_decoders(document: dict[str, Any]) -> None:
    for methods in document["paths"].values():
        for op in methods.values():
            if body := op.get("requestBody"):
                example = json.dumps(body["content"]["application/json"]["example"])
                msgspec.json.decode(example, type=OPERATIONS[op["operationId"]].body)


@pytest.mark.parametrize("op", OPERATIONS.values(), ids=OPERATIONS.keys())
def test_problems_are_of_the_catalogue(op: Operation) -> None:
    assert set(op.problems) <= set(CATALOGUE)


async def test_authenticated_operations_tell_rates_and_problems(document: dict[str, Any]) -> None:
    for methods in document["paths"].values():
        for op in methods.values():
            if op.get("security") == []:
                continue
            assert {"401", "403", "429", "500", "503"} <= set(op["responses"]), op["operationId"]
            success = next(op["responses"][status] for status in op["responses"] if status < "300")
            assert {"RateLimit", "RateLimit-Policy", "X-Request-Id"} <= set(success["headers"])
            assert "Retry-After" in resolve(document, op["responses"]["429"])["headers"]


async def test_lists_take_a_cursor_and_give_one(document: dict[str, Any]) -> None:
    for methods in document["paths"].values():
        for op in methods.values():
            if any(one["name"] == "cursor" for one in op.get("parameters", [])):
                schema = op["responses"]["200"]["content"]["application/json"]["schema"]
                assert "next" in resolve(document, schema)["properties"], op["operationId"]


async def test_the_page_lists_every_operation_and_loads_nothing(world: World) -> None:
    reply = await world.http.get("/docs")
    assert reply.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in reply.headers["content-security-policy"]
    for id in OPERATIONS:
        assert f'id="{id}"' in reply.text
    assert not re.search(r"<(script|link|img|iframe)|src=|@import|url\(", reply.text)
