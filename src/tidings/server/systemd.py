"""What systemd is told about this service, so that `Type=notify` and `WatchdogSec=` mean something.

The protocol is one datagram per message to the socket that `NOTIFY_SOCKET` names: sd_notify(3), "Notes". Without that
variable, as anywhere but under systemd, nothing is said.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Mapping
from typing import Final

__all__ = ["notify", "watchdog", "watchdog_seconds"]

# systemd's own advice, sd_watchdog_enabled(3): speak twice in the time after which it would restart the service.
_PER_PERIOD: Final = 2


def notify(state: str, environ: Mapping[str, str] | None = None) -> bool:
    """Tell systemd a state such as `READY=1`; whether there was somebody to tell. Never raises.

    A state that does not arrive is not worth a server: systemd then waits, and stops it after its time-out.
    """
    address = (os.environ if environ is None else environ).get("NOTIFY_SOCKET", "")
    if address[:1] not in ("/", "@"):
        return False
    # An address in the abstract namespace begins with a zero byte, written as @.
    path = "\0" + address[1:] if address[0] == "@" else address
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as messenger:
            messenger.setblocking(False)
            messenger.sendto(state.encode(), path)
    except OSError:
        return False
    return True


def watchdog_seconds(environ: Mapping[str, str] | None = None) -> float | None:
    """Time between signs of life that systemd asks this process for, None if it asks for none."""
    environ = os.environ if environ is None else environ
    if environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    text = environ.get("WATCHDOG_USEC", "")
    return int(text) / 1e6 / _PER_PERIOD if text.isascii() and text.isdigit() and int(text) else None


async def watchdog(seconds: float) -> None:
    """Give signs of life for ever: they stop when the event loop does. Its owner cancels it."""
    while notify("WATCHDOG=1"):
        await asyncio.sleep(seconds)
