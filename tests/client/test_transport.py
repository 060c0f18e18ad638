"""The socket below the client."""

from typing import Any

import pytest

from tidings.client import transport
from tidings.client.errors import NotConnected


async def test_a_line_that_is_cut_in_the_tick_of_the_handshake_is_a_connection_that_did_not_come_about(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # What picows answers then; it takes hundreds of connections through a bad network to see it happen.
    async def ws_connect(*args: Any, **more: Any) -> tuple[object, None]:
        return object(), None

    monkeypatch.setattr(transport.picows, "ws_connect", ws_connect)
    with pytest.raises(NotConnected):
        await transport.open_websocket(
            "http://127.0.0.1:1", b"{}", on_frame=lambda data: None, on_closed=lambda code, reason: None
        )
