"""`tidings demo`: two people talk through a real server, in the terminal, for a quarter of a minute.

Nothing here is played back: each column shows only what that person's own client was told by a server on a temporary
directory, over a WebSocket. The left one goes through a proxy whose connections are really cut.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import tempfile
import time
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

from cyclopts import Parameter

from tidings.server.errors import TidingsError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live

    from tidings.client import Client, Outgoing


CHANNEL: Final = "visit-4711"
PATIENT, CLINICIAN = "ada", "dr-marek"
NAMES: Final = {PATIENT: "Ada", CLINICIAN: "Dr. Marek"}
# Whatever the story waits for comes within milliseconds; a machine under load may take a hundred times as long.
PATIENCE_SECONDS: Final = 20.0
# A server without connections stops at once.
STOP_SECONDS: Final = 5.0
# Fast enough for dots that move, slow enough not to flicker over a remote shell.
FRAMES_PER_SECOND: Final = 12
# Two columns in which a sentence is readable; narrower terminals get the story as lines.
WIDTH_MIN: Final = 76
COLUMN_WIDTH_MAX: Final = 58
MESSAGES_SHOWN: Final = 10


class DemoFailed(TidingsError):
    """The demo did not get where it should."""


def demo(*, fast: Annotated[bool, Parameter(negative="")] = False) -> None:
    """Watch two people talk through a real server: typing, ticks, a dead connection, and nothing lost.

    Needs nothing and leaves nothing behind: server and data live in a temporary directory for about 15 seconds.

    For example:

        tidings demo

        tidings demo --fast

    Parameters
    ----------
    fast
        Without the pauses for the eye.
    """
    # The clients' log tells of broken connections, which are what this is about.
    logging.getLogger("tidings").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="tidings-demo-") as folder:
        import uvloop

        try:
            uvloop.run(_run(Path(folder), 0.0 if fast else 1.0))
        except asyncio.CancelledError:
            raise KeyboardInterrupt from None


@dataclass(slots=True)
class Bubble:
    """A message as one of the two sees it. `seq` 0: it waits in the outbox."""

    user: str
    text: str
    seq: int = 0
    outgoing: Outgoing | None = None
    missed: bool = False


@dataclass
class Screen:
    """What one person's device shows, made of nothing but what its client was told."""

    user: str
    title: str
    other: str
    bubbles: list[Bubble] = field(default_factory=list)
    connected: bool = True
    typing_until: float = 0.0
    delivered: int = 0
    read: int = 0
    catching_up: bool = False

    def event(self, event: Any) -> None:
        """A message has arrived, in order."""
        message = event.message
        for bubble in self.bubbles:
            if bubble.outgoing is not None and bubble.outgoing.key == message.key and message.user == self.user:
                bubble.seq = message.seq
                break
        else:
            self.bubbles.append(Bubble(message.user, message.text, message.seq, missed=self.catching_up))
        self.bubbles.sort(key=lambda bubble: bubble.seq or 1 << 60)
        if message.user != self.user:
            self.typing_until = 0.0

    def typing(self, signal: Any) -> None:
        if signal.user == self.other:
            self.typing_until = time.monotonic() + signal.expires_in_ms / 1000 if signal.on else 0.0

    def receipts(self, signal: Any) -> None:
        for receipt in signal.receipts:
            if receipt.user == self.other:
                self.delivered = max(self.delivered, receipt.delivered)
                self.read = max(self.read, receipt.read)

    def ticks(self, bubble: Bubble) -> tuple[str, str]:
        """The marks behind an own message and their style: waiting, stored, delivered, read."""
        if not bubble.seq:
            return "…", "yellow"
        if self.read >= bubble.seq:
            return "✓✓", "bold bright_cyan"
        return ("✓✓" if self.delivered >= bubble.seq else "✓"), "dim"

    @property
    def is_typing(self) -> bool:
        return time.monotonic() < self.typing_until


class Stage:
    """Shows both screens: side by side on a terminal that is wide enough, as lines elsewhere."""

    def __init__(self, console: Console, screens: tuple[Screen, Screen], pace: float) -> None:
        self.console = console
        self.screens = screens
        self.pace = pace
        self.caption = ""
        self.live: Live | None = None
        self._told: set[tuple[int, str]] = set()

    async def pause(self, seconds: float) -> None:
        """Time for the eye."""
        await asyncio.sleep(seconds * self.pace)

    def say(self, caption: str) -> None:
        """What is going on, below the screens."""
        self.caption = caption
        if self.live is None:
            self.console.print(f"[dim]·[/] {caption}", soft_wrap=True)

    def changed(self) -> None:
        """Lines for what is new, where there are no screens."""
        if self.live is not None:
            return
        for number, screen in enumerate(self.screens):
            for bubble in screen.bubbles:
                if bubble.seq:
                    note = " (missed, caught up)" if bubble.missed else ""
                    self._once(number, f"{bubble.seq}", f"{NAMES[bubble.user]}: {bubble.text}{note}")
                elif not screen.connected:
                    self._once(number, f"q{bubble.text}", f"{NAMES[bubble.user]}: {bubble.text} … waits in the outbox")
            if screen.is_typing:
                self._once(number, f"t{len(screen.bubbles)}", f"{NAMES[screen.other]} is typing …")
            own = [bubble for bubble in screen.bubbles if bubble.user == screen.user and bubble.seq]
            for word, mark in (("delivered", screen.delivered), ("read", screen.read)):
                seen = [bubble.seq for bubble in own if bubble.seq <= mark]
                if seen:
                    self._once(number, f"{word}{seen[-1]}", f"message {seen[-1]} {word} by {NAMES[screen.other]}")

    def _once(self, number: int, key: str, line: str) -> None:
        if (number, key) not in self._told:
            self._told.add((number, key))
            self.console.print(f"  [{self.screens[number].title}] {line}", markup=False, soft_wrap=True)

    def __rich__(self) -> RenderableType:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        grid = Table.grid(expand=False, padding=(0, 1))
        width = min(COLUMN_WIDTH_MAX, (self.console.width - 4) // 2)
        for _ in self.screens:
            grid.add_column(width=width)
        grid.add_row(*(self._panel(screen, width) for screen in self.screens))
        return Group(grid, Text.from_markup(f" {self.caption}"))

    def _panel(self, screen: Screen, width: int) -> RenderableType:
        from rich.align import Align
        from rich.console import Group
        from rich.panel import Panel
        from rich.text import Text

        inside = width - 4
        height = min(MESSAGES_SHOWN * 3 + 3, self.console.height - 4)
        lines: list[RenderableType] = []
        for bubble in _newest(screen.bubbles, height - 3, inside - 8):
            own = bubble.user == screen.user
            text = Text(bubble.text)
            if own:
                mark, style = screen.ticks(bubble)
                text.append("  ").append(mark, style=style)
            elif bubble.missed:
                text.append("  ↻", style="bold green")
            shape = Panel(
                text,
                width=min(inside - 4, max(len(text.plain) + 4, 8)),
                border_style="yellow" if own and not bubble.seq else "green" if own else "blue",
                padding=(0, 1),
            )
            lines.append(Align.right(shape) if own else shape)
        dots = "." * (1 + int(time.monotonic() * 3) % 3)
        lines.append(Text(f"{NAMES[screen.other]} is typing{dots}" if screen.is_typing else "", style="italic dim"))
        state = "[green]● online[/]" if screen.connected else "[bold red]○ no connection[/]"
        return Panel(
            Group(*lines),
            title=f"[bold]{screen.title}[/]",
            subtitle=state,
            border_style="white" if screen.connected else "red",
            width=width,
            height=height,
        )


def _newest(bubbles: list[Bubble], lines: int, width: int) -> list[Bubble]:
    """The last bubbles that fit into so many lines of so many characters."""
    shown: list[Bubble] = []
    for bubble in reversed(bubbles):
        # Two lines of frame; four characters for the ticks.
        lines -= 2 + -(-(len(bubble.text) + 4) // width)
        if lines < 0:
            break
        shown.insert(0, bubble)
    return shown


class Person:
    """One of the two: a client, and the screen that it fills."""

    def __init__(self, client: Client, screen: Screen, stage: Stage) -> None:
        self.client = client
        self.screen = screen
        self.stage = stage
        self.channel = client.channel(CHANNEL)

    def watch(self, group: asyncio.TaskGroup) -> list[asyncio.Task[None]]:
        """Follow everything that the client is told."""
        from tidings.client import MessageCreated, ReceiptsSignal, State, TypingSignal

        async def events() -> None:
            async for event in self.client.events(CHANNEL):
                if isinstance(event, MessageCreated):
                    self.screen.event(event)
                    self.stage.changed()

        async def signals() -> None:
            async for told in self.client.signals():
                if isinstance(told, TypingSignal):
                    self.screen.typing(told)
                elif isinstance(told, ReceiptsSignal):
                    self.screen.receipts(told)
                self.stage.changed()

        async def states() -> None:
            async for change in self.client.states():
                self.screen.connected = change.state is State.CONNECTED

        return [group.create_task(follow()) for follow in (events, signals, states)]

    async def say(self, text: str, *, wait: bool = True) -> None:
        """Type for as long as one would, then send."""
        if wait:
            self.channel.typing()
            await self.stage.pause(min(1.1, 0.35 + len(text) / 60))
        outgoing = await self.channel.send(text, wait=False)
        self.screen.bubbles.append(Bubble(self.screen.user, text, outgoing=outgoing))
        self.stage.changed()
        if wait:
            await outgoing.sent(PATIENCE_SECONDS)

    async def has(self, count: int) -> None:
        """Wait until this screen shows `count` messages, all with their numbers."""
        await _until(lambda: sum(bubble.seq > 0 for bubble in self.screen.bubbles) >= count, "messages arrived")

    async def read_all(self) -> None:
        """Look at the screen."""
        await self.channel.read(max(bubble.seq for bubble in self.screen.bubbles))

    async def sees_ticks(self, *, read: bool) -> None:
        """Wait until the other one has everything, or has read it."""
        newest = max(bubble.seq for bubble in self.screen.bubbles if bubble.user == self.screen.user)

        def reached() -> bool:
            return (self.screen.read if read else self.screen.delivered) >= newest

        await _until(reached, "the ticks came")
        self.stage.changed()


async def _until(condition: Callable[[], bool], what: str) -> None:
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not condition():
                await asyncio.sleep(0.01)
    except TimeoutError:
        raise DemoFailed(f"The demo waited {PATIENCE_SECONDS:.0f} s in vain until {what}.") from None


async def _run(folder: Path, pace: float) -> None:
    from rich.console import Console
    from rich.live import Live

    console = Console(highlight=False)
    ada = Screen(PATIENT, "Ada's phone", CLINICIAN)
    marek = Screen(CLINICIAN, "Dr. Marek's desk", PATIENT)
    stage = Stage(console, (ada, marek), pace)
    begun = time.monotonic()
    async with AsyncExitStack() as stack:
        with console.status("Starting a server in a temporary directory …"):
            people, proxy, server_url = await _set_up(stack, folder, stage, ada, marek)
        console.print(
            f"A real server at {server_url}, two real clients, a real database. Press Ctrl-C to leave.\n",
            soft_wrap=True,
        )
        group = await stack.enter_async_context(asyncio.TaskGroup())
        watching = [task for person in people for task in person.watch(group)]
        try:
            if console.is_terminal and console.width >= WIDTH_MIN:
                with Live(stage, console=console, refresh_per_second=FRAMES_PER_SECOND) as live:
                    stage.live = live
                    await _story(stage, *people, proxy)
            else:
                await _story(stage, *people, proxy)
        finally:
            for task in watching:
                task.cancel()
    _check(ada, marek)
    total = sum(bubble.seq > 0 for bubble in ada.bubbles)
    console.print(
        f"\n[bold green]Both screens show the same {total} messages in the same order:[/] none lost, none twice "
        f"({time.monotonic() - begun:.0f} s)."
    )
    console.print("Next, a server of your own:  [bold]tidings serve[/]")


async def _set_up(
    stack: AsyncExitStack, folder: Path, stage: Stage, ada: Screen, marek: Screen
) -> tuple[tuple[Person, Person], Any, str]:
    """A server, a channel with two users, and a client for each; all of it ends with `stack`."""
    from tidings.client import Client, FullJitter, Rest
    from tidings.server.app import Server, open_core
    from tidings.server.config import Config
    from tidings.server.telemetry import setup_logging
    from tidings.testing.chaos import LOOPBACK, ChaosProxy, reserve_port

    setup_logging(level="error", format="json", development=False)
    port_holder = reserve_port()
    stack.callback(port_holder.close)
    port = port_holder.getsockname()[1]
    config = Config(host=LOOPBACK, port=port, data_dir=folder / "data", drain_seconds=1.0)
    core = await stack.enter_async_context(open_core(config))
    new = await core.services.admin.create_app("Demo", via="demo")
    server = Server(config, core)
    started = asyncio.Event()
    # owned by the stack: `_stop` ends it and hears how.
    serving = asyncio.ensure_future(server.serve(ready=started.set))  # owned by the exit stack, which awaits it
    stack.push_async_callback(_stop, serving)
    # owned by `_first`, which waits for it or cancels it.
    await _first(asyncio.ensure_future(started.wait()), serving)  # owned by _first
    # The server has taken Ctrl-C for itself. Here it ends the story, and with it the server.
    story = asyncio.current_task()
    assert story is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, story.cancel)

    rest = await stack.enter_async_context(Rest(config.url, api_key=new.api_key))
    for user in (PATIENT, CLINICIAN):
        await rest.users.create(user, name=NAMES[user])
    await rest.channels.create(CHANNEL, name="Your visit", members=[PATIENT, CLINICIAN])
    proxy = await stack.enter_async_context(ChaosProxy(port))
    people = []
    for screen, at in ((ada, proxy.port), (marek, port)):
        token = (await rest.users.token(screen.user)).token
        client = Client(
            f"http://{LOOPBACK}:{at}",
            token=token,
            device="phone" if screen is ada else "desk",
            store=folder / f"{screen.user}.db",
            # A demo of fifteen seconds cannot wait for the ordinary patience of a phone.
            backoff=lambda random: FullJitter(base=0.1, cap=0.3, random=random),
        )
        await stack.enter_async_context(client)
        await client.wait_connected(PATIENCE_SECONDS)
        people.append(Person(client, screen, stage))
    return (people[0], people[1]), proxy, config.url


async def _first(wanted: asyncio.Future[Any], other: asyncio.Future[Any]) -> None:
    """Wait for one of two; raise what the other ended with."""
    await asyncio.wait({wanted, other}, return_when=asyncio.FIRST_COMPLETED)
    if not wanted.done():
        wanted.cancel()
        other.result()
        raise DemoFailed("The server ended before it was ready.")


async def _stop(serving: asyncio.Future[None]) -> None:
    """Stop the server as an operator would: it drains, and closes what it opened."""
    if not serving.done():
        signal.raise_signal(signal.SIGTERM)
    await asyncio.wait({serving}, timeout=STOP_SECONDS)
    serving.cancel()
    with suppress(asyncio.CancelledError):
        await serving


async def _story(stage: Stage, ada: Person, marek: Person, proxy: Any) -> None:
    stage.say("Every message is on disk before its tick: [dim]✓ stored  ✓✓ delivered[/]  [bold bright_cyan]✓✓ read[/]")
    await stage.pause(0.4)
    await ada.say("Good morning! I took the new tablets. Now I feel dizzy.")
    await marek.has(1)
    await ada.sees_ticks(read=False)
    await stage.pause(0.5)
    await marek.read_all()
    await ada.sees_ticks(read=True)
    await marek.say("Good morning, Ada. Since when?")
    await ada.has(2)
    await ada.read_all()
    await ada.say("Since about an hour after breakfast.")
    await marek.has(3)
    await marek.read_all()
    await ada.sees_ticks(read=True)
    await stage.pause(0.4)

    stage.say("[bold red]Ada's train enters a tunnel: her connection is cut.[/]")
    await proxy.refuse_connections()
    proxy.cut()
    await _until(lambda: not ada.screen.connected, "the phone noticed that it has no connection")
    await stage.pause(0.8)
    stage.say("Dr. Marek goes on. His messages are stored (one tick), and wait for her.")
    await marek.say("That is common on the first day.")
    await marek.say("Sit down, drink some water, and measure your blood pressure.")
    stage.say("Ada writes, too: her message waits in the outbox on her phone.")
    await ada.say("Hello? Are you still there?", wait=False)
    await stage.pause(0.8)
    await marek.say("If it is below 90, call me at once.")
    await stage.pause(0.8)

    stage.say("[bold green]Out of the tunnel: she gets exactly what she missed (↻), in order; hers leaves, once.[/]")
    ada.screen.catching_up = True
    await proxy.accept_connections()
    await ada.has(7)
    await marek.has(7)
    ada.screen.catching_up = False
    await marek.sees_ticks(read=False)
    await stage.pause(1.2)
    await ada.read_all()
    await marek.read_all()
    await marek.sees_ticks(read=True)
    await ada.say("I was in a tunnel. It is 112 to 70, and I feel better.")
    await marek.has(8)
    await marek.read_all()
    await ada.sees_ticks(read=True)
    stage.say("[dim]One cut connection, eight messages, two identical screens.[/]")
    await stage.pause(1.2)


def _check(ada: Screen, marek: Screen) -> None:
    """What the demo claims at its end must be so."""
    seen = [[(bubble.seq, bubble.user, bubble.text) for bubble in screen.bubbles] for screen in (ada, marek)]
    if seen[0] != seen[1] or len(seen[0]) != 8:
        raise DemoFailed(f"The screens differ: {seen[0]} and {seen[1]}. Please report this.")
