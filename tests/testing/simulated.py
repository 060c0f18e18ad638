"""A correct little chat server, simulated: it makes good histories in which the checker must find nothing."""

import random
from dataclasses import dataclass, field

from tidings.testing.history import (
    Call,
    Delete,
    DeviceFinal,
    DeviceStart,
    Edit,
    Entry,
    Fail,
    Fetch,
    FinalLog,
    Info,
    Invoke,
    Join,
    Leave,
    LogEvent,
    Mark,
    Observe,
    Ok,
    React,
    Receipt,
    Remove,
    Send,
    StateFold,
    body_digest,
)

CHANNEL = "c"
EPOCH = "e1"
MILLISECOND = 1_000_000


@dataclass
class Device:
    name: str
    user: str
    position: int
    online: bool = True
    fold: StateFold = field(default_factory=StateFold)


class World:
    """One channel, users `u0` … with two devices each. `u0` owns it and never leaves."""

    def __init__(self, seed: int, *, users: int = 3) -> None:
        self.random = random.Random(seed)
        self.entries: list[Entry] = []
        self.log: list[LogEvent] = []
        self.now = 0
        self.users = [f"u{number}" for number in range(users)]
        self.members: set[str] = set()
        self.devices: list[Device] = []
        self.positions: dict[str, int] = dict.fromkeys(self.users, 0)
        self._operations = 0
        self._messages: list[LogEvent] = []
        for user in self.users:
            self.join(user)
        for user in self.users:
            for number in range(2):
                device = Device(f"{user}.d{number}", user, 0)
                self.devices.append(device)
                self.entries.append(DeviceStart(self.tick(), device.name, user, CHANNEL, 0))

    def tick(self) -> int:
        self.now += self.random.randint(1, 5) * MILLISECOND
        return self.now

    def invoke(self, call: Call, process: str) -> str:
        self._operations += 1
        name = f"{process}/{self._operations}"
        self.entries.append(Invoke(name, self.tick(), process, call))
        return name

    def append(
        self, kind: str, message_id: str = "", key: str = "", sender: str = "", digest: str = "", user: str = ""
    ):
        event = LogEvent(len(self.log) + 1, kind, message_id, key, sender, digest, user)
        self.log.append(event)
        return event

    def join(self, user: str) -> None:
        name = self.invoke(Join(CHANNEL, user), user)
        event = self.append("member.added", sender=user, user=user)
        self.members.add(user)
        self.entries.append(Ok(name, self.tick(), seq=event.seq))

    def leave(self, user: str) -> None:
        call = Remove(CHANNEL, user, by="u0") if self.random.random() < 0.5 else Leave(CHANNEL, user)
        for device in self.devices:
            if device.user == user:
                self.catch_up(device)
        name = self.invoke(call, user)
        event = self.append("member.removed", sender=user, user=user)
        self.members.discard(user)
        self.entries.append(Ok(name, self.tick(), seq=event.seq))

    def send(self, user: str, *, outcome: str = "ok") -> None:
        number = self._operations
        call = Send(CHANNEL, user, f"k{number}", body_digest(f"body {number}"))
        if outcome == "refused":
            self.entries.append(Fail(self.invoke(call, user), self.tick(), "forbidden"))
            return
        name = self.invoke(call, user)
        if outcome == "vanished":
            self.entries.append(Info(name, self.tick(), "timed out"))
            return
        event = self.append("message.created", f"m{number}", call.key, user, call.digest)
        self._messages.append(event)
        if outcome in ("unknown", "retried"):
            self.deliver()
            self.entries.append(Info(name, self.tick(), "timed out"))
        if outcome == "retried":
            name = self.invoke(call, user)
        if outcome in ("ok", "retried"):
            self.entries.append(Ok(name, self.tick(), event.message_id, event.seq, EPOCH))

    def change(self, user: str) -> None:
        if not self._messages:
            return
        target = self.random.choice(self._messages).message_id
        gone = any(event.type == "message.deleted" and event.message_id == target for event in self.log)
        if gone:
            return
        what = self.random.choice(["edit", "react", "delete"])
        call: Call
        if what == "edit":
            digest = body_digest(f"edited {len(self.log)}")
            call = Edit(CHANNEL, user, target, digest)
            name = self.invoke(call, user)
            event = self.append("message.updated", target, "", user, digest)
        elif what == "react":
            reaction = f"r{len(self.log)}"
            name = self.invoke(React(CHANNEL, user, target, reaction), user)
            event = self.append("reaction.added", target, "", user, body_digest(reaction))
        else:
            name = self.invoke(Delete(CHANNEL, user, target), user)
            event = self.append("message.deleted", target, "", user)
        self.entries.append(Ok(name, self.tick(), seq=event.seq))

    def mark(self, user: str) -> None:
        wanted = self.random.randint(0, len(self.log))
        name = self.invoke(Mark(CHANNEL, user, "read", wanted), user)
        self.positions[user] = max(self.positions[user], wanted)
        self.entries.append(Ok(name, self.tick(), seq=self.positions[user]))
        for device in self.devices:
            if device.online and device.user in self.members:
                self.entries.append(Receipt(self.tick(), device.name, CHANNEL, user, "read", self.positions[user]))

    def fetch(self, user: str) -> None:
        name = self.invoke(Fetch(CHANNEL, user), user)
        first = self.random.randint(1, len(self.log))
        shown = tuple(event.seq for event in self._messages if event.seq >= first)
        self.entries.append(Ok(name, self.tick(), first=first, last=None, shown=shown))

    def scroll_back(self, device: Device) -> None:
        for event in self._messages[-3:]:
            self.entries.append(self.observation(device, event, "history"))

    def observation(self, device: Device, event: LogEvent, source: str = "live") -> Observe:
        return Observe(
            self.tick(),
            device.name,
            device.user,
            CHANNEL,
            EPOCH,
            event.seq,
            event.type,
            event.message_id,
            event.key,
            event.sender,
            event.digest,
            source,
        )

    def catch_up(self, device: Device, source: str = "catchup") -> None:
        away = False
        for event in self.log:
            if event.type == "member.removed" and event.user == device.user:
                away = True
            if event.type == "member.added" and event.user == device.user:
                away = False
            if event.seq <= device.position or (away and event.user != device.user):
                continue
            self.entries.append(self.observation(device, event, source))
            device.position = event.seq

    def deliver(self) -> None:
        for device in self.devices:
            if device.online and device.user in self.members and self.random.random() < 0.7:
                self.catch_up(device, "live")

    def step(self) -> None:
        user = self.random.choice(sorted(self.members))
        what = self.random.random()
        if what < 0.5:
            outcome = self.random.choices(["ok", "refused", "vanished", "unknown", "retried"], [8, 1, 1, 1, 2])[0]
            self.send(user, outcome=outcome)
        elif what < 0.65:
            self.change(user)
        elif what < 0.75:
            self.mark(user)
        elif what < 0.8:
            self.fetch(user)
        elif what < 0.85:
            self.scroll_back(self.random.choice([device for device in self.devices if device.user in self.members]))
        elif what < 0.92:
            device = self.random.choice(self.devices)
            device.online = not device.online
        else:
            other = self.random.choice(self.users[1:])
            if other in self.members:
                self.leave(other)
            else:
                self.join(other)
        self.deliver()

    def finish(self) -> list[Entry]:
        """Everybody comes back and catches up; the server's log is read."""
        full = StateFold()
        for event in self.log:
            full.apply(event)
        for device in self.devices:
            if device.user in self.members:
                self.catch_up(device)
                self.entries.append(
                    DeviceFinal(self.tick(), device.name, device.user, CHANNEL, len(self.log), full.digest())
                )
            else:
                self.entries.append(DeviceFinal(self.tick(), device.name, device.user, CHANNEL, device.position))
        half = len(self.log) // 2
        self.entries.append(FinalLog(CHANNEL, EPOCH, tuple(self.log[:half])))
        self.entries.append(FinalLog(CHANNEL, EPOCH, tuple(self.log[half:])))
        return self.entries


def good_history(seed: int, *, steps: int = 40) -> list[Entry]:
    """A history in which nothing is broken; `u1` is a former member at its end, `u2` a present one."""
    world = World(seed)
    for _ in range(steps):
        world.step()
    for user in world.users[1:]:
        if user not in world.members:
            world.join(user)
    for user in world.users:
        world.send(user)
    world.deliver()
    world.leave("u1")
    world.send("u0")
    world.fetch("u0")
    world.mark("u0")
    world.send("u2")
    return world.finish()
