"""Use-cases by noun: authorise, decide, append, announce."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tidings.server.bus.base import Bus
    from tidings.server.clock import Clock, Ids
    from tidings.server.store.base import Store

    from .access import AccessService
    from .admin import Admin
    from .apps import Apps
    from .auth import Auth
    from .channels import Channels
    from .jobs import Jobs
    from .members import Members
    from .messages import Messages
    from .notifications import Notifications
    from .presend import PresendHooks
    from .push_test import PushTester
    from .receipts import Receipts
    from .sync import Sync
    from .trace import Trace
    from .users import Users
    from .webhooks import Webhooks


@dataclass(slots=True, frozen=True)
class Services:
    """What the doors of one server process call. Made by the composition root."""

    store: Store
    clock: Clock
    ids: Ids
    apps: Apps
    access: AccessService
    auth: Auth
    admin: Admin
    users: Users
    channels: Channels
    members: Members
    messages: Messages
    receipts: Receipts
    sync: Sync
    jobs: Jobs
    trace: Trace
    notifications: Notifications
    webhooks: Webhooks
    push_tester: PushTester
    presend_hooks: PresendHooks
    bus: Bus | None = None
