"""An example app with people who have been talking, for whoever looks at Tidings for the first time.

Made at its first use, and once: each step has an id or a key of its own, so that one that was interrupted goes on. It
is an app of its own; nothing in it touches another.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any, Final

from tidings.server.domain.permissions import EVERYTHING
from tidings.server.errors import NotFound, Refusal
from tidings.wire.notifications import PushProviderPut
from tidings.wire.push import WebPushConfig
from tidings.wire.requests import ChannelCreate, UserCreate
from tidings.wire.resources import Token

from .access import Actor
from .admin import Admin
from .apps import Apps
from .auth import Auth
from .channels import Channels
from .messages import Draft, Messages
from .notifications import Notifications
from .users import Users

APP: Final = "app_demo"
TOKEN_SECONDS: Final = 3_600
# So that there is something to scroll through.
OLD_MESSAGES: Final = 400
_PROVIDER: Final = "web"
# Push services want to know whom to ask (RFC 8292, 2.1). Nobody has one for a demonstration.
_OPERATOR: Final = "mailto:demo@example.com"


@dataclass(slots=True, frozen=True)
class Person:
    """Somebody to be in the demonstration."""

    id: str
    name: str
    about: str


PEOPLE: Final = (
    Person("amira", "Amira Haddad", "Patient, six weeks after knee surgery"),
    Person("lena", "Dr. Lena Weiss", "Orthopaedic surgeon"),
    Person("jonas", "Jonas Brandt", "Physiotherapist"),
    Person("priya", "Priya Nair", "Patient services"),
)


@dataclass(slots=True, frozen=True)
class _Talk:
    """A channel and what was said in it: (who, text)."""

    id: str
    name: str | None
    members: tuple[str, ...]
    said: tuple[tuple[str, str], ...]
    type: str = "group"
    custom: dict[str, Any] = field(default_factory=dict)


_OLD: Final = (
    "Good morning. Ten minutes of cycling today, no resistance.",
    "Done! It felt easier than yesterday.",
    "Lovely. How far could you bend it?",
    "About 95 degrees, I think.",
    "That is right on plan. Ice it afterwards, please.",
    "Will do. The swelling is almost gone in the mornings.",
    "Then we add two sets of leg raises tomorrow.",
    "🙂",
)
_TALKS: Final = (
    _Talk("demo-knee", "Knee follow-up", ("amira", "lena", "jonas"), (
        ("lena", "Good morning Amira. The X-ray looks very good: everything sits where it should."),
        ("amira", "That is a relief, thank you! I was a little worried about the clicking."),
        ("lena", "The clicking is normal at this stage, as long as it does not hurt."),
        ("jonas", "We saw the same on Tuesday, full extension without pain. 👍"),
        ("amira", "May I start driving again? My office is half an hour away."),
        ("lena", "Let us wait one more week. The guidance for patients explains how to tell:\nhttps://www.nhs.uk/conditions/knee-replacement/recovery/"),
        ("amira", "I will read it tonight. One more thing: is it fine to sleep on the side?"),
    )),
    _Talk("demo-ward", "Ward team", ("lena", "jonas", "priya"), (
        ("priya", "Bed 12 is free from noon. Shall I move Mr. Okafor's admission forward?"),
        ("lena", "Yes please. His anaesthetist has already seen him."),
        ("jonas", "I can take him at 15:00 for the first mobilisation."),
        ("priya", "Booked. I have told his daughter, too."),
    )),
    _Talk("demo-bill", "Invoice 2041", ("amira", "priya"), (
        ("amira", "Hello, my insurer asks for the invoice with the treatment codes."),
        ("priya", "Of course. I have sent it to your post box; the codes are on page two."),
        ("amira", "Found it. Thank you for being so quick!"),
    )),
    _Talk("demo-physio", "Daily exercises", ("amira", "jonas"), tuple(
        (("jonas", "amira")[number % 2], _OLD[number % len(_OLD)]) for number in range(OLD_MESSAGES)
    )),
)  # fmt: skip


class Example:
    """The example app of one server."""

    def __init__(
        self,
        admin: Admin,
        apps: Apps,
        users: Users,
        channels: Channels,
        messages: Messages,
        notifications: Notifications,
        auth: Auth,
    ) -> None:
        self._admin = admin
        self._apps = apps
        self._users = users
        self._channels = channels
        self._messages = messages
        self._notifications = notifications
        self._auth = auth
        self._making = asyncio.Lock()
        self._made = False

    async def token(self, person: str) -> Token:
        """A token for one of the example people. Raises Refusal `invalid_field` for anybody else."""
        if person not in {one.id for one in PEOPLE}:
            known = ", ".join(one.id for one in PEOPLE)
            raise Refusal("invalid_field", f"There is nobody of that name; there are: {known}.", field="user")
        async with self._making:
            if not self._made:
                await self._make()
                self._made = True
        return await self._auth.mint(await self._backend(), person, TOKEN_SECONDS)

    async def _backend(self) -> Actor:
        return Actor(await self._apps.get(APP), None, EVERYTHING, "demo")

    async def _make(self) -> None:
        try:
            await self._apps.get(APP)
        except NotFound:
            try:
                await self._admin.create_app("Demo", APP, via="demo")
            except Refusal as refusal:
                # Another node was first.
                if refusal.code != "already_exists":
                    raise
        backend = await self._backend()
        # Not anew: browsers have subscribed with its key, and somebody may have switched it off.
        if all(one.id != _PROVIDER for one in await self._notifications.providers(backend)):
            wanted = PushProviderPut(config=WebPushConfig(subject=_OPERATOR))
            await self._notifications.put_provider(backend, _PROVIDER, wanted)
        for person in PEOPLE:
            await _unless_there(self._users.create(backend, UserCreate(id=person.id, name=person.name)))
        for talk in _TALKS:
            made = ChannelCreate(id=talk.id, type=talk.type, name=talk.name, members=list(talk.members))
            await _unless_there(self._channels.create(backend, made))
            for number, (who, text) in enumerate(talk.said):
                app = backend.app
                actor = Actor(app, who, app.app_roles["user"], f"user:{who}")
                await self._messages.send(actor, talk.id, Draft(text=text), f"demo-{number}")


async def _unless_there(made: Any) -> None:
    try:
        await made
    except Refusal as refusal:
        if refusal.code != "already_exists":
            raise
