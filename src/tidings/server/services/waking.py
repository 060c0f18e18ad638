"""Rows that say where people can be woken and backends be told: what they are called when they are sealed, and how
they go."""

from __future__ import annotations

from typing import Final

from tidings.server.store.base import Tx

PRESEND_ITEM: Final = b"presend"


def token_item(user: str, device: str, provider: str) -> bytes:
    """The name of a token's row."""
    return f"token:{user}/{device}/{provider}".encode()


def provider_item(id: str) -> bytes:
    """The name of a provider's row."""
    return f"push:{id}".encode()


def webhook_item(id: str) -> bytes:
    """The name of a webhook's row."""
    return f"webhook:{id}".encode()


def delivery_item(id: str) -> bytes:
    """The name of a delivery's row."""
    return f"delivery:{id}".encode()


async def forget_device(tx: Tx, app: int, user: str, device: str) -> None:
    """A device is removed: it is woken no more, and what was said about it goes."""
    await tx.execute("DELETE FROM push_tokens WHERE app=? AND push_tokens.user=? AND device=?", app, user, device)
    await tx.execute(
        "DELETE FROM notification_preferences WHERE app=? AND notification_preferences.user=? AND device=?",
        app,
        user,
        device,
    )


async def forget_user(tx: Tx, app: int, user: str) -> None:
    """A user is deleted."""
    await tx.execute("DELETE FROM push_tokens WHERE app=? AND push_tokens.user=?", app, user)
    await tx.execute("DELETE FROM notification_preferences WHERE app=? AND notification_preferences.user=?", app, user)
