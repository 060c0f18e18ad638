"""The AsyncAPI document says what the codec does."""

from typing import Any

import jsonschema
import msgspec
import pytest

from tests.protocol.frames import check_client_frame, check_server_frame
from tidings.server.rest.asyncapi import (
    REPLY_TO,
    asyncapi_document,
    command_types,
    reply_types,
    signal_types,
    tag_of,
)
from tidings.wire.events import EventType
from tidings.wire.problems import CATALOGUE

DOCUMENT = asyncapi_document("https://chat.example.com/base")
MESSAGES: dict[str, Any] = DOCUMENT["components"]["messages"]


def references(node: Any) -> list[str]:
    if isinstance(node, dict):
        here = [node["$ref"]] if isinstance(node.get("$ref"), str) else []
        return here + [found for value in node.values() for found in references(value)]
    if isinstance(node, list):
        return [found for value in node for found in references(value)]
    return []


def resolve(reference: str) -> Any:
    found: Any = DOCUMENT
    for step in reference.removeprefix("#/").split("/"):
        found = found[step]
    return found


def test_every_frame_of_the_protocol_has_a_message() -> None:
    wanted = {f"command.{tag_of(frame)}" for frame in command_types()}
    wanted |= {f"reply.{tag_of(frame)}" for frame in reply_types()}
    wanted |= {f"signal.{tag_of(frame)}" for frame in signal_types()}
    wanted |= {f"event.{event.value}" for event in EventType}
    assert set(MESSAGES) == wanted
    assert set(DOCUMENT["channels"]["socket"]["messages"]) == wanted


def test_every_message_belongs_to_an_operation() -> None:
    assert set(REPLY_TO) == set(command_types())
    used = {reference.rpartition("/")[2] for reference in references(DOCUMENT["operations"])}
    assert set(MESSAGES) <= used
    assert {operation["action"] for operation in DOCUMENT["operations"].values()} == {"send", "receive"}


def test_every_reference_resolves() -> None:
    found = references(DOCUMENT)
    assert len(found) > 100
    for reference in found:
        assert isinstance(resolve(reference), dict), reference


@pytest.mark.parametrize("name", MESSAGES)
def test_examples_satisfy_their_schema_and_the_codec(name: str) -> None:
    message = MESSAGES[name]
    schema = {"$ref": message["payload"]["$ref"], "components": DOCUMENT["components"]}
    for example in message["examples"]:
        payload = example["payload"]
        jsonschema.Draft202012Validator(schema).validate(payload)
        check = check_client_frame if name.startswith("command.") else check_server_frame
        check(payload)
        assert payload["type"] == name.partition(".")[2]


def test_the_address_is_the_servers() -> None:
    server = DOCUMENT["servers"]["this"]
    assert (server["host"], server["protocol"], server["pathname"]) == ("chat.example.com", "wss", "/base")
    assert asyncapi_document("http://127.0.0.1:8080")["servers"]["this"]["protocol"] == "ws"


def test_every_close_code_is_listed_with_whether_to_come_back() -> None:
    listed = {entry["code"]: entry for entry in DOCUMENT["x-close-codes"]}
    assert set(listed) == {problem.close for problem in CATALOGUE.values() if problem.close is not None}
    assert listed[4401]["reconnect"]
    assert not listed[4505]["reconnect"]


def test_the_document_is_json() -> None:
    assert msgspec.json.decode(msgspec.json.encode(DOCUMENT)) == DOCUMENT
