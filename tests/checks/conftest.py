"""One server for all checks of a module, unless a check is about ending it."""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.checks.house import House, open_house


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def house(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[House]:
    async with open_house(tmp_path_factory.mktemp("house")) as opened:
        yield opened


@pytest_asyncio.fixture(autouse=True, loop_scope="module")
async def hang_up(request: pytest.FixtureRequest) -> AsyncIterator[None]:
    """What a check has connected to the module's server ends with it."""
    yield
    if "house" in request.fixturenames:
        await request.getfixturevalue("house").hang_up()
