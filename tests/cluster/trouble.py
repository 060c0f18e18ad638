"""What happens to a cluster while people talk: each kind of trouble begins, is felt for a while, and is mended."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from tests.cluster.site import Site
from tests.replay.play import Play

# All clients have everything so soon after it is mended, seconds.
CONVERGED_SECONDS_MAX = 30.0
# Conversation between two kinds of trouble, and during one: steps.
STEPS_BETWEEN, STEPS_DURING = 15, 10
# How long one may last although nobody gets a word through: long enough to be noticed by everybody.
LASTS_SECONDS_MAX = 6.0


@dataclass
class Troubles:
    """Makes them one after the other, and keeps count."""

    site: Site
    seed: int
    rounds: int
    # kind: how long it took, each time, until everybody had everything after it was mended, seconds
    converged: dict[str, list[float]] = field(default_factory=dict)

    async def __call__(self, play: Play, steps: int) -> None:
        rng = random.Random(f"{self.seed} troubles")
        kinds: list[Callable[[Play, random.Random], Awaitable[None]]] = [
            self.kill_a_node,
            self.kill_a_bus_server,
            self.restart_the_database,
            self.cut_a_node_off_from_the_bus,
            self.cut_a_node_off_from_the_database,
            self.restart_nodes_one_after_the_other,
        ]
        for _ in range(self.rounds):
            for kind in rng.sample(kinds, len(kinds)):
                await play.until_step(play.stepped + STEPS_BETWEEN)
                await kind(play, rng)
                name = kind.__name__
                try:
                    seconds = await play.converge(CONVERGED_SECONDS_MAX)
                except AssertionError as error:
                    error.add_note(f"after {name}")
                    raise
                self.converged.setdefault(name, []).append(seconds)
                candidates = [one for devices in play.devices.values() for one in devices if one.restartable]
                if candidates:
                    await rng.choice(candidates).restart()

    async def _during(self, play: Play) -> None:
        """People go on talking, as far as they can."""
        try:
            async with asyncio.timeout(LASTS_SECONDS_MAX):
                await play.until_step(play.stepped + STEPS_DURING)
        except TimeoutError:
            pass

    async def kill_a_node(self, play: Play, rng: random.Random) -> None:
        node = rng.choice(self.site.nodes)
        node.server.kill9()
        play.kills += 1
        await self._during(play)
        await node.server.restart()

    async def kill_a_bus_server(self, play: Play, rng: random.Random) -> None:
        server = rng.choice(self.site.nats)
        server.kill9()
        await self._during(play)
        await server.restart()

    async def restart_the_database(self, play: Play, rng: random.Random) -> None:
        if rng.random() < 0.5:
            self.site.postgres.kill9()
        else:
            self.site.postgres.stop()
        # Nobody gets a word through; that it is down is felt.
        await asyncio.sleep(rng.uniform(0.2, 1.0))
        self.site.postgres.start()

    async def cut_a_node_off_from_the_bus(self, play: Play, rng: random.Random) -> None:
        node = rng.choice(self.site.nodes)
        await node.cut_off_from_bus(silent=rng.random() < 0.5)
        await self._during(play)
        await node.mend()

    async def cut_a_node_off_from_the_database(self, play: Play, rng: random.Random) -> None:
        node = rng.choice(self.site.nodes)
        await node.cut_off_from_store(silent=rng.random() < 0.5)
        await self._during(play)
        await node.mend()

    async def restart_nodes_one_after_the_other(self, play: Play, rng: random.Random) -> None:
        for node in self.site.nodes:
            assert await node.server.terminate() == 0, node.server.tail()
            await node.server.start()
            await play.until_step(play.stepped + STEPS_DURING)
