"""Plays conversations between connected clients of a real server that is killed meanwhile, and judges what came of it.

Every device is an SDK client behind a proxy that cuts its connection at random; some devices' programs end and start
again from their stores. The server is killed with SIGKILL and restarted. What clients asked for and what they were
shown is recorded, the logs are read over REST when all is quiet, and the history checker has the last word.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import msgspec

from tests.checks.house import House, log_event, open_house
from tests.replay.conversations import Script, Step
from tidings.client import Client, FullJitter, Observed, ReceiptsSignal, Rest
from tidings.client.errors import NotConnected, OutcomeUnknown, Refused, Timeout
from tidings.client.events import ChannelJoined, ChannelLeft, Event
from tidings.testing.chaos import ChaosProxy
from tidings.testing.checker import Verdict, check_files
from tidings.testing.history import (
    Call,
    Delete,
    Edit,
    Join,
    Leave,
    LogEvent,
    Mark,
    Ok,
    React,
    Send,
    StateFold,
    body_digest,
)
from tidings.testing.recorder import Operation, Recorder

T = TypeVar("T")

# What one step may take, kills and restarts included, seconds: beyond it something hangs.
STEP_SECONDS_MAX = 90.0
# A busy test program handles an event this long after it arrived; see `tidings.testing.checker`.
IN_FLIGHT_S = 15.0
# A visit's people wait for their turn mostly; now and then they talk across each other.
TAKES_TURNS_SHARE = 0.8
# Of the messages in rooms: how many are edited, deleted, reacted to, marked as read up to here.
EDITED_SHARE, DELETED_SHARE, REACTED_SHARE, READ_SHARE = 0.02, 0.01, 0.04, 0.1
EMOJI = ("👍", "❤️", "😂")


class Plan(msgspec.Struct, frozen=True):
    """How to play. `kills`: of the server. `cut_mean_s`: a connection lives so long on average. `restarts`: how many
    times some device's program ends and starts again. `visits_at_once`, `window`: conversations of the clinic at a
    time, steps of a room under way at a time. `pause_s`: how long people in a clinic think on average before they
    speak. `for_trouble`: conversations begin only while there is trouble."""

    seed: int
    kills: int
    cut_mean_s: float
    restarts: int
    visits_at_once: int = 24
    rooms_at_once: int = 2
    window: int = 12
    pause_s: float = 0.0
    for_trouble: bool = False


class Result(msgspec.Struct, frozen=True):
    """The verdict, and what happened: a verdict over a quiet afternoon would be no verdict."""

    verdict: Verdict
    seed: int
    seconds: float
    kills: int
    cuts: int
    restarts: int
    caught_up: int
    duplicates: int
    untold: int

    def render(self) -> str:
        lines = [
            self.verdict.render(),
            f"seed {self.seed}: {self.seconds:.0f} s, {self.kills} kills of the server, {self.cuts} connections cut, "
            f"{self.restarts} programs restarted, {self.caught_up} events caught up on, "
            f"{self.duplicates} retried sends that had arrived, {self.untold} channels seen before they were joined",
        ]
        return "\n".join(lines)


class Device:
    """One device of one user: its client, which may be replaced by a new one with the same store."""

    def __init__(self, play: Play, user: str, name: str, *, store: Path | None, start: str) -> None:
        self.play = play
        self.user = user
        self.name = f"{user}/{name}"
        self._id = name
        self._store = store
        self._start = start
        self._client: Client | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self.seen: dict[str, int] = {}
        self.folds: dict[str, StateFold] = {}
        self._waiting: dict[str, list[tuple[int, asyncio.Future[None]]]] = {}
        self._operations: dict[tuple[str, str], Operation] = {}
        # Nobody says anything while the program is down.
        self.up = asyncio.Event()
        self.busy = 0

    @property
    def restartable(self) -> bool:
        return self._store is not None and self.up.is_set() and not self.busy

    async def open(self) -> None:
        play = self.play
        self._client = client = Client(
            f"http://127.0.0.1:{play.proxy.port}",
            token_provider=self._token,
            device=self._id,
            store=self._store,
            start=self._start,  # type: ignore[arg-type]
            transport="websocket",
            observer=self._observe,
            backoff=lambda rng: FullJitter(base=0.1, cap=1.0, random=rng),
            random=random.Random(play.rng.random()),
        )
        await client.open()
        self._tasks = [
            asyncio.create_task(self._take(client), name=f"take {self.name}"),
            asyncio.create_task(self._watch(client), name=f"watch {self.name}"),
        ]
        self.up.set()

    async def _token(self) -> str:
        return self.play.house.token(self.user)

    async def close(self) -> None:
        self.up.clear()
        if self._client is None:
            return
        client, self._client = self._client, None
        # The application goes on listening until the client has ended: it would miss events of its own stream.
        await client.close()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def restart(self) -> None:
        """The program ends and starts again: it goes on where it was."""
        await self.close()
        self.play.restarted += 1
        await self.open()
        assert self._client is not None
        for channel, seen in self.seen.items():
            # What was shown after the last save is shown again, as the client says it would be.
            position = self._client.position(channel)
            if position is not None and position < seen:
                self.seen[channel] = position
                self.play.recorder.device_start(device=self.name, user=self.user, channel=channel, position=position)

    async def client(self) -> Client:
        while self._client is None or not self.up.is_set():
            await self.up.wait()
        return self._client

    # ------------------------------------------------------------ what it sees

    async def _take(self, client: Client) -> None:
        handled = 0
        async with client.events() as events:
            async for _ in events:
                # The observer has noted it: the position may move.
                events.taken()
                handled += 1
                if handled % 64 == 0:
                    await asyncio.sleep(0)

    async def _watch(self, client: Client) -> None:
        record = self.play.recorder
        async for signal in client.signals(ReceiptsSignal):
            for receipt in signal.receipts:
                for which, position in (("read", receipt.read), ("delivered", receipt.delivered)):
                    if not position:
                        # Left out: this one did not move.
                        continue
                    record.receipt(
                        device=self.name,
                        channel=signal.channel,
                        user=receipt.user,
                        which=which,  # type: ignore[arg-type]
                        position=position,
                    )

    def _observe(self, seen: Observed) -> None:
        record = self.play.recorder
        if seen.kind == "event":
            assert seen.event is not None
            assert seen.source is not None
            self._observe_event(seen.event, seen.source)
            return
        assert seen.channel is not None
        assert seen.key is not None
        place = (seen.channel, seen.key)
        if seen.kind == "invoke":
            call = Send(seen.channel, self.user, seen.key, body_digest(seen.text or ""))
            self._operations[place] = record.invoke(self.name, call)
        elif seen.kind == "ok":
            assert seen.id is not None
            assert seen.seq is not None
            self.play.duplicates += seen.duplicate
            self._operations.pop(place).ok(message_id=seen.id, seq=seen.seq)
        else:
            self._operations.pop(place).fail(getattr(seen.error, "code", ""))

    def _observe_event(self, event: Event, source: str) -> None:
        play = self.play
        if isinstance(event, ChannelJoined):
            if event.channel not in self.seen:
                position = 0 if self._start == "all" else event.joined.head
                self.seen[event.channel] = position
                self.folds[event.channel] = StateFold()
                play.recorder.device_start(device=self.name, user=self.user, channel=event.channel, position=position)
            return
        if isinstance(event, ChannelLeft):
            self.seen.pop(event.channel, None)
            self.folds.pop(event.channel, None)
            return
        channel = event.stream
        if channel == "@me":
            return
        noted = log_event(msgspec.to_builtins(event))
        if channel not in self.seen:
            # While the own stream is being caught up on, a channel that was joined this moment is live already.
            play.untold += 1
            self.folds[channel] = StateFold()
            if self._start == "all":
                play.recorder.device_start(device=self.name, user=self.user, channel=channel, position=0)
        self.seen[channel] = event.seq
        play.caught_up += source == "catchup"
        fold = self.folds.get(channel)
        if fold is not None:
            fold.apply(noted)
        play.recorder.observe(
            device=self.name,
            user=self.user,
            channel=channel,
            epoch=play.epochs.get(channel, ""),
            seq=event.seq,
            event_type=noted.type,
            message_id=noted.message_id,
            key=noted.key,
            sender=noted.sender,
            digest=noted.digest,
            source=source,  # type: ignore[arg-type]
        )
        waiting = self._waiting.get(channel)
        if waiting:
            for seq, future in waiting:
                if seq <= event.seq and not future.done():
                    future.set_result(None)
            self._waiting[channel] = [item for item in waiting if not item[1].done()]

    async def until(self, channel: str, seq: int) -> None:
        """Wait until this device has shown everything up to `seq`."""
        if self.seen.get(channel, 0) >= seq:
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(channel, []).append((seq, future))
        try:
            await asyncio.wait_for(future, STEP_SECONDS_MAX)
        except TimeoutError:
            raise AssertionError(
                f"{self.name} stands at {self.seen.get(channel)} of {channel} instead of {seq}; its client is "
                f"{self._client.state if self._client else None} ({self._client.error if self._client else ''})"
            ) from None

    # ------------------------------------------------------------ what it does

    async def say(self, channel: str, text: str, key: str, reply_to: str | None = None) -> tuple[str, int]:
        """Send a message, over whatever happens; its id and seq."""
        self.busy += 1
        try:
            client = await self.client()
            sent = await client.channel(channel).send(text, key=key, reply_to=reply_to, timeout=STEP_SECONDS_MAX)
        finally:
            self.busy -= 1
        return sent.id, sent.seq

    async def change(self, call: Call, work: Callable[[Client], Awaitable[int | None]]) -> None:
        """Ask for something else once; what became of it goes into the record."""
        self.busy += 1
        client = await self.client()
        operation = self.play.recorder.invoke(self.name, call)
        try:
            operation.ok(seq=await work(client) or 0)
        except Refused as error:
            operation.fail(error.code)
        except (OutcomeUnknown, Timeout, NotConnected) as error:
            operation.info(type(error).__name__)
        finally:
            self.busy -= 1


@dataclass(slots=True)
class _Coming:
    """A join or leave whose place in the log is looked up at the end."""

    operation: str
    channel: str
    user: str
    added: bool
    at: int


@dataclass
class Play:
    """One replay under way."""

    plan: Plan
    house: House
    proxy: ChaosProxy
    recorder: Recorder
    folder: Path
    rng: random.Random
    step_done: Callable[[], None]
    epochs: dict[str, str] = field(default_factory=dict)
    channels: list[str] = field(default_factory=list)
    devices: dict[str, list[Device]] = field(default_factory=dict)
    opened: list[Device] = field(default_factory=list)
    comings: list[_Coming] = field(default_factory=list)
    stepped: int = 0
    kills: int = 0
    restarted: int = 0
    caught_up: int = 0
    duplicates: int = 0
    untold: int = 0
    moved: asyncio.Event = field(default_factory=asyncio.Event)

    async def close(self) -> None:
        for device in self.opened:
            await device.close()

    def step(self) -> None:
        self.stepped += 1
        self.moved.set()
        self.step_done()

    # ------------------------------------------------------------ people and channels

    async def user(self, name: str, *, devices: int = 1, durable: bool = False, start: str = "all") -> list[Device]:
        """Somebody and their devices, connected."""
        if name not in self.devices:
            made = []
            for number in range(devices):
                store = self.folder / f"{name}.{number}.db" if durable else None
                made.append(Device(self, name, f"d{number}", store=store, start=start))
            self.devices[name] = made
            self.opened += made
            for device in made:
                device.busy += 1
                await device.open()
                client = await device.client()
                await client.wait_connected(STEP_SECONDS_MAX)
                device.busy -= 1
        return self.devices[name]

    async def insist(self, work: Callable[[], Awaitable[T]], done: Sequence[str] = ()) -> T | None:
        """Repeat a request until it is answered. A refusal named in `done` says that an earlier attempt did it."""
        deadline = time.monotonic() + STEP_SECONDS_MAX
        while True:
            try:
                return await work()
            except Refused as error:
                if error.code in done:
                    return None
                if error.retry != "later" or time.monotonic() > deadline:
                    raise
            except (NotConnected, OutcomeUnknown):
                if time.monotonic() > deadline:
                    raise
            await asyncio.sleep(0.05)  # why: the pace of a loop that looks at a condition

    async def make_channel(self, script: Script) -> str:
        rest = self.house.rest

        async def make() -> None:
            await rest.channels.create(
                script.id,
                type="direct" if script.kind == "direct" else "group",
                name=f"About {script.id}",
                members=list(script.members[:100]),
            )

        await self.insist(make, done=("already_exists",))
        if script.members[100:]:
            await self.insist(lambda: rest.members.add(script.id, list(script.members[100:])))
        page = await self.insist(lambda: rest.streams.events(script.id, 0, limit=1))
        assert page is not None
        self.epochs[script.id] = page.epoch
        self.channels.append(script.id)
        return script.id

    # ------------------------------------------------------------ conversations

    async def visit(self, script: Script) -> None:
        """A conversation in a clinic: mostly, one speaks when they have read what was said before."""
        rng = random.Random(f"{self.plan.seed} {script.id}")
        people = {
            name: await self.user(name, durable=name.startswith("doctor") or rng.random() < 0.2)
            for name in script.people
        }
        channel = await self.make_channel(script)
        last = 0
        for number, step in enumerate(script.steps):
            device = rng.choice(people[step.who])
            if self.plan.pause_s:
                await asyncio.sleep(rng.expovariate(1 / self.plan.pause_s))
            if rng.random() < TAKES_TURNS_SHARE:
                await device.until(channel, last)
            _, last = await device.say(channel, step.text, f"{script.id}/{number}")
            self.step()
        for name, devices in people.items():
            for device in devices:
                await device.until(channel, last)
                if not name.startswith("doctor"):
                    self.finish(device)
            if not name.startswith("doctor"):
                for device in self.devices.pop(name):
                    await device.close()

    async def room(self, script: Script) -> None:
        """A day in a channel: everybody types at once, people come and go; what answers waits for what it answers."""
        rng = random.Random(f"{self.plan.seed} {script.id}")
        for name in script.people:
            await self.user(name, durable=rng.random() < 0.1, start="now")
        channel = await self.make_channel(script)
        window = asyncio.Semaphore(self.plan.window)
        said: list[asyncio.Future[tuple[str, int] | None]] = []
        latest: dict[str, asyncio.Future[tuple[str, int] | None]] = {}

        async def do(
            number: int, step: Step, before: asyncio.Future[tuple[str, int] | None] | None
        ) -> tuple[str, int] | None:
            try:
                if before is not None:
                    await before
                if step.action != "say":
                    await self.come_or_go(channel, step)
                    return None
                answered = await said[step.reply_to] if step.reply_to is not None else None
                device = self.devices[step.who][0]
                sent = await device.say(
                    channel, step.text, f"{script.id}/{number}", answered[0] if answered is not None else None
                )
                await self.after_saying(
                    device, channel, sent, step, random.Random(f"{self.plan.seed} {script.id} {number}")
                )
                return sent
            finally:
                window.release()
                self.step()

        async with asyncio.TaskGroup() as group:
            for number, step in enumerate(script.steps):
                await window.acquire()
                task = group.create_task(do(number, step, latest.get(step.who)))
                said.append(task)
                latest[step.who] = task
        page = await self.insist(lambda: self.house.rest.streams.events(channel, 0, limit=1))
        assert page is not None
        members = {
            member.user.id if hasattr(member.user, "id") else member.user for member in await self.members(channel)
        }
        for name in script.people:
            for device in self.devices.pop(name):
                if name in members:
                    await device.until(channel, page.head)
                self.finish(device)
                await device.close()

    async def members(self, channel: str) -> list[object]:
        async def ask() -> list[object]:
            return [member async for member in self.house.rest.members.all(channel)]

        return await self.insist(ask) or []

    async def come_or_go(self, channel: str, step: Step) -> None:
        rest: Rest = self.house.rest
        if step.action == "join":
            operation = self.recorder.invoke(step.who, Join(channel, step.who))
            await self.insist(lambda: rest.members.add(channel, [step.who]))
        else:
            operation = self.recorder.invoke(step.who, Leave(channel, step.who))
            await self.insist(lambda: rest.as_user(step.who).channels.leave(channel), done=("not_found", "forbidden"))
        self.comings.append(_Coming(operation.id, channel, step.who, step.action == "join", self.recorder.now()))

    async def after_saying(
        self, device: Device, channel: str, sent: tuple[str, int], step: Step, rng: random.Random
    ) -> None:
        message, seq = sent
        user = device.user
        if rng.random() < EDITED_SHARE:
            text = f"{step.text} (edited)"
            await device.change(
                Edit(channel, user, message, body_digest(text)), lambda chat: chat.channel(channel).edit(message, text)
            )
        if rng.random() < REACTED_SHARE:
            emoji = rng.choice(EMOJI)
            await device.change(
                React(channel, user, message, emoji),
                lambda chat: chat.channel(channel).react(message, emoji),
            )
        if rng.random() < READ_SHARE:

            async def read(chat: Client) -> int:
                return (await chat.channel(channel).read(seq)).read

            await device.change(Mark(channel, user, "read", seq), read)
        if rng.random() < DELETED_SHARE:
            await device.change(Delete(channel, user, message), lambda chat: chat.channel(channel).delete(message))

    def finish(self, device: Device) -> None:
        """This device was given all the time it needed."""
        for channel, position in device.seen.items():
            # The state is told only by devices that saw everything from the first event on.
            whole = device._start == "all"
            self.recorder.device_final(
                device=device.name,
                user=device.user,
                channel=channel,
                position=position,
                state=device.folds[channel].digest() if whole else "",
            )

    # ------------------------------------------------------------ trouble

    async def until_step(self, number: float) -> None:
        while self.stepped < number:
            self.moved.clear()
            await self.moved.wait()

    async def kill_server(self, steps: int) -> None:
        """Kill the server as often as planned, spread over the steps."""
        rng = random.Random(f"{self.plan.seed} kills")
        for number in range(self.plan.kills):
            await self.until_step(steps * (number + rng.uniform(0.2, 0.8)) / self.plan.kills)
            self.house.server.kill9()
            await asyncio.sleep(rng.uniform(0.0, 0.5))
            await self.house.server.restart()
            self.kills += 1

    async def restart_programs(self, steps: int) -> None:
        rng = random.Random(f"{self.plan.seed} restarts")
        for number in range(self.plan.restarts):
            await self.until_step(steps * (number + rng.random()) / self.plan.restarts)
            candidates = [one for devices in self.devices.values() for one in devices if one.restartable]
            if candidates:
                await rng.choice(candidates).restart()

    async def converge(self, seconds: float) -> float:
        """Wait until every device has shown whatever there is now; how long that took."""
        began = time.monotonic()
        heads: dict[str, int] = {}
        for channel in list(self.channels):
            page = await self.insist(lambda channel=channel: self.house.rest.streams.events(channel, 0, limit=1))
            assert page is not None
            heads[channel] = page.head

        def behind() -> list[str]:
            return [
                f"{device.name} at {seen} of {channel} instead of {heads[channel]}"
                for devices in self.devices.values()
                for device in devices
                for channel, seen in device.seen.items()
                if seen < heads.get(channel, 0)
            ]

        while late := behind():
            assert time.monotonic() < began + seconds, f"not within {seconds} s: {late[:10]}"
            await asyncio.sleep(0.02)  # why: the pace of a loop that looks at a condition
        return time.monotonic() - began

    # ------------------------------------------------------------ the end

    async def tell_truth(self) -> None:
        """Read every channel's log, and put the comings and goings where they are in it."""
        logs: dict[str, list[LogEvent]] = {}
        for channel in self.channels:
            epoch, events = await self.house.log(channel)
            # A tombstone has lost its key with its content; the database has it still.
            keys = dict(self.house.sql("SELECT id, key FROM messages WHERE sid=?", self.house.sid(channel)))
            events = [
                msgspec.structs.replace(event, key=keys[event.message_id])
                if event.type == "message.created" and not event.key
                else event
                for event in events
            ]
            logs[channel] = events
            self.recorder.final_log(channel, events, epoch=epoch)
        places: dict[tuple[str, str, bool], list[int]] = {}
        for channel, events in logs.items():
            for event in events:
                if event.type in ("member.added", "member.removed"):
                    places.setdefault((channel, event.user, event.type == "member.added"), []).append(event.seq)
        taken: dict[tuple[str, str, bool], int] = {}
        for coming in self.comings:
            key = (coming.channel, coming.user, coming.added)
            found = places.get(key, [])
            # Who was a member from the beginning has one coming that nobody asked for here.
            asked = sum(1 for one in self.comings if (one.channel, one.user, one.added) == key)
            number = taken.get(key, 0) + len(found) - asked
            taken[key] = taken.get(key, 0) + 1
            assert 0 <= number < len(found), f"{coming} is not in the log: {found}"
            self.recorder.append(Ok(coming.operation, coming.at, seq=found[number]))


Trouble = Callable[[Play, int], Awaitable[None]]


async def replay(
    scripts: Sequence[Script],
    plan: Plan,
    folder: Path,
    *,
    step_done: Callable[[], None] = lambda: None,
    open_at: Callable[[Path], AbstractAsyncContextManager[House]] = open_house,
    make_trouble: Trouble = Play.kill_server,
) -> Result:
    """Play the scripts in `folder` and judge. `open_at` opens the servers; `make_trouble`, told how many steps there
    are, breaks them meanwhile, and mends them. Raises `AssertionError` when something hangs."""
    began = time.monotonic()
    rng = random.Random(plan.seed)
    steps = sum(len(script.steps) for script in scripts)
    history = folder / "history.jsonl"
    async with (
        open_at(folder) as house,
        ChaosProxy(*house.ports, seed=plan.seed) as proxy,
        AsyncExitStack() as stack,
    ):
        recorder = stack.enter_context(Recorder(history, name="replay"))
        play = Play(plan, house, proxy, recorder, folder, rng, step_done)
        stack.push_async_callback(play.close)
        everyone = sorted({name for script in scripts for name in script.people})
        await house.users(*everyone)
        doctors = [name for name in everyone if name.startswith("doctor.")]
        for name in doctors:
            await play.user(name, devices=2, durable=True)
        proxy.set(cut_mean_s=plan.cut_mean_s)
        visits = asyncio.Semaphore(plan.visits_at_once)
        rooms = asyncio.Semaphore(plan.rooms_at_once)

        async def one(script: Script) -> None:
            async with rooms if script.kind == "room" else visits:
                if plan.for_trouble and all(task.done() for task in trouble):
                    return
                await (play.room(script) if script.kind == "room" else play.visit(script))

        async with asyncio.TaskGroup() as group:
            trouble = [
                group.create_task(_work(make_trouble(play, steps))),
                group.create_task(play.restart_programs(steps)),
            ]
            played = [group.create_task(one(script)) for script in scripts]
            await asyncio.wait(played, return_when=asyncio.FIRST_EXCEPTION)
            if not all(task.done() and task.exception() is None for task in played):
                for task in trouble:
                    task.cancel()
        proxy.heal()
        await settle(play)
        await play.tell_truth()
    verdict = await asyncio.to_thread(check_files, [history], in_flight_s=IN_FLIGHT_S)
    return Result(
        verdict,
        plan.seed,
        time.monotonic() - began,
        play.kills,
        proxy.stats.cuts,
        play.restarted,
        play.caught_up,
        play.duplicates,
        play.untold,
    )


async def _work(trouble: Awaitable[None]) -> None:
    await trouble


async def settle(play: Play) -> None:
    """Those who are still there are given the time to have everything."""
    for devices in play.devices.values():
        for device in devices:
            for channel in list(device.seen):
                page = await play.house.rest.streams.events(channel, 0, limit=1)
                await device.until(channel, page.head)
            play.finish(device)
