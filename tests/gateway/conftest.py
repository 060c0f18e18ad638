from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from .world import Node, open_node


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    """Alice, Bob and Carol; the channel `c` has Alice and Bob."""
    async with open_node(tmp_path) as made:
        await made.users("alice", "bob", "carol")
        await made.channel("c", "alice", "bob")
        yield made
