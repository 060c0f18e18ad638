"""Which store tests run on: SQLite, PostgreSQL (`TIDINGS_TEST_STORE=postgres`), and some of them on both."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests import postgres

# What sends every kind of statement through the port, in all areas; the rest is run on PostgreSQL by the environment.
ON_BOTH = frozenset(
    {
        "jobs/test_queue.py",
        "jobs/test_worker.py",
        "jobs/test_relay.py",
        "services/test_messages.py",
        "services/test_trace.py",
        "services/test_push.py",
        "services/test_webhooks.py",
        "services/test_presend.py",
        "services/test_receipts.py",
        "services/test_counting.py",
        "services/test_members_role.py",
        "services/test_sync.py",
        "services/test_users.py",
        "services/test_admin.py",
        "api/test_messages.py",
        "checks/test_w1_w2_kills.py",
        "gateway/test_catch_up.py",
        "gateway/test_nodes.py",
    }
)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    module = metafunc.module.__file__ or ""
    if postgres.kind == "sqlite" and any(module.endswith(f"/tests/{name}") for name in ON_BOTH):
        alone = metafunc.definition.get_closest_marker("sqlite")
        metafunc.parametrize("store_kind", ["sqlite"] if alone else ["sqlite", "postgres"], indirect=True)


@pytest.fixture(autouse=True)
def store_kind(request: pytest.FixtureRequest) -> Iterator[str]:
    """The store that `tests.postgres` opens during this test."""
    before = postgres.kind
    kind: str = getattr(request, "param", before)
    if kind != "sqlite" and request.node.get_closest_marker("sqlite"):
        pytest.skip("it is about SQLite")
    postgres.kind = kind
    yield kind
    postgres.kind = before
