"""Every frame that stands in the protocol's pages is one that the codec knows, and every kind of frame stands there."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.protocol.frames import check_client_frame, check_server_frame
from tidings.server.rest.asyncapi import command_types, reply_types, signal_types, tag_of
from tidings.wire import problems, replies, requests, resources
from tidings.wire.events import EVENT_DATA, EventType

PAGES = Path(__file__).parents[2] / "docs/protocol"
BLOCK = re.compile(r"^```json ?([^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks() -> Iterator[tuple[str, str, Any]]:
    """(page and line, tag, document): blocks hold one document per line."""
    for page in sorted(PAGES.glob("*.md")):
        text = page.read_text(encoding="utf-8")
        for found in BLOCK.finditer(text):
            line = text.count("\n", 0, found.start()) + 2
            for number, document in enumerate(found[2].splitlines(), line):
                yield f"{page.name}:{number}", found[1], msgspec.json.decode(document)


ALL = list(blocks())


@pytest.mark.parametrize(("place", "tag", "document"), ALL, ids=[place for place, _, _ in ALL])
def test_an_example_is_what_goes_over_the_wire(place: str, tag: str, document: Any) -> None:
    kind, _, name = tag.partition(":")
    if kind == "client":
        check_client_frame(document)
    elif kind == "server":
        check_server_frame(document)
    elif kind == "body":
        found = next(
            getattr(module, name) for module in (requests, replies, resources, problems) if hasattr(module, name)
        )
        decoded = msgspec.json.decode(msgspec.json.encode(document), type=found)
        encoded = msgspec.json.decode(msgspec.json.encode(decoded))
        if name not in dir(requests):
            assert encoded == document
        for event in document.get("events", ()):
            check_server_frame(event)
    else:
        assert kind == "plain", f"{place}: say whose example it is: ```json client, server, body:Type or plain"
        for one in document.get("frames", ()):
            if isinstance(one, dict):
                check_server_frame(one["frame"])


def shown(tag: str, page: str) -> set[str]:
    return {document["type"] for place, kind, document in ALL if kind == tag and place.startswith(page)}


def test_every_command_and_answer_has_an_example() -> None:
    assert shown("client", "frames.md") == {tag_of(frame) for frame in command_types()}
    assert shown("server", "frames.md") == {tag_of(frame) for frame in (*reply_types(), *signal_types())}


def test_every_event_has_a_heading_and_an_example() -> None:
    assert shown("server", "events.md") == set(EVENT_DATA) == set(EventType)
    text = (PAGES / "events.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^### ([a-z]+\.[a-z]+)$", text, re.MULTILINE)) == set(EventType)


def test_every_command_has_a_heading() -> None:
    text = (PAGES / "frames.md").read_text(encoding="utf-8")
    assert {tag_of(frame) for frame in command_types()} <= set(re.findall(r"^### (\S+)", text, re.MULTILINE))
