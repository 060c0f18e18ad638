from __future__ import annotations

from collections.abc import AsyncIterator

import pytest_asyncio

from tests.cluster.site import Site, open_site


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def site() -> AsyncIterator[Site]:
    """Three nodes that a module's tests leave as they found them."""
    async with open_site() as made:
        yield made
