"""Rows that say where people can be woken: their names, and how they go."""

from __future__ import annotations

from tidings.server.store.base import Tx


def token_item(user: str, device: str, provider: str) -> bytes:
    """The name of a token's row."""
    return f"token:{user}/{device}/{provider}".encode()


def provider_item(id: str) -> bytes:
    """The name of a provider's row."""
    return f"push:{id}".encode()


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
