"""Deliberate breaks of the product, each of which must turn its tests red. Run: `make mutants`, `… ARGS="-k D3"`.

A check that no break can turn red proves nothing. Each mutant is applied to a copy of `src` and `sdk`, and the tests
that claim to notice run against the copy. A mutant whose text is no longer in the source exactly once is stale and counts as a
failure: move it along with the code.

To add one: find the line that makes the promise true, write the smallest plausible mistake, name the tests.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).parents[1]

# Longest that one mutant's tests may take, in seconds: a break that makes a test hang is noticed too.
SECONDS_MAX = 300


@dataclass(frozen=True, slots=True)
class Mutant:
    """Replace `old` by `new` in `file` (from the root; `old` occurs exactly once), and `tests` must fail.

    `check` names the promise or check that `tests` show; `tests` are pytest's arguments: files, node ids, `-k` words.
    """

    check: str
    file: str
    old: str
    new: str
    tests: Sequence[str]
    why: str = ""


MUTANTS: list[Mutant] = [
    Mutant(
        check="S4",
        why="the key's algorithm does not bind the token",
        file="src/tidings/server/services/tokens.py",
        old="if key.algorithm != header.algorithm:",
        new="if key.algorithm != header.algorithm and False:",
        tests=["tests/auth/test_tokens.py", "-k", "every_attack"],
    ),
    Mutant(
        check="S4",
        why="a token that was verified once outlives its key",
        file="src/tidings/server/services/tokens.py",
        old="if known.keyring is not keyring:",
        new="if known.keyring.app.app_id != keyring.app.app_id:",
        tests=["tests/auth/test_tokens.py", "-k", "ends_with_its_key"],
    ),
    Mutant(
        check="S5",
        why="every unknown kid fetches",
        file="src/tidings/server/services/jwks.py",
        old="return state.attempted_at is None or self._monotonic() - state.attempted_at >= self._interval_seconds",
        new="return True",
        tests=["tests/auth/test_jwks.py", "-k", "flood"],
    ),
    Mutant(
        check="S12",
        why="judge the address, then connect by name",
        file="src/tidings/server/outbound.py",
        old="            judged.append(str(address))",
        new="            judged.append(name)",
        tests=["tests/auth/test_outbound.py", "-k", "rebinding_name"],
    ),
    Mutant(
        check="D3",
        why="an unsafe store is accepted without being asked for by name",
        file="src/tidings/server/config.py",
        old='if config.store_synchronous != "full" and not config.allow_unsafe_store:',
        new='if config.store_synchronous == "off" and not config.allow_unsafe_store:',
        tests=["tests/config/test_config.py", "-k", "unsafe_store"],
    ),
    Mutant(
        check="TLS",
        why="beyond loopback without a certificate",
        file="src/tidings/server/config.py",
        old="if not config.tls and not config.behind_proxy:",
        new="if not config.tls and not config.behind_proxy and not config.public_url and config.port == 443:",
        tests=["tests/config/test_config.py", "-k", "beyond_loopback"],
    ),
    Mutant(
        check="H12",
        why="content in logs: only the outermost fields are looked at",
        file="src/tidings/server/telemetry.py",
        old="return {str(key): _clean_field(str(key), item, depth + 1) for key, item in value.items()}",
        new="return {str(key): _clean(item, depth + 1) for key, item in value.items()}",
        tests=["tests/config/test_telemetry.py", "-k", "holds_content"],
    ),
    Mutant(
        check="H12",
        why="content in logs: exceptions quote what they failed on",
        file="src/tidings/server/telemetry.py",
        old="        if self._messages:\n",
        new="        if True:\n",
        tests=["tests/config/test_telemetry.py", "-k", "exception"],
    ),
    Mutant(
        check="H12",
        why="content in logs: libraries' arguments",
        file="src/tidings/server/telemetry.py",
        old="str(record.msg).splitlines()",
        new="record.getMessage().splitlines()",
        tests=["tests/config/test_telemetry.py", "-k", "libraries"],
    ),
    Mutant(
        check="S8",
        why="tokens in logs, under a harmless name",
        file="src/tidings/server/telemetry.py",
        old="return _TOKEN.sub(WITHHELD, text)",
        new="return text",
        tests=["tests/config/test_telemetry.py", "-k", "looks_like_a_token"],
    ),
    Mutant(
        check="ids",
        why="a millisecond that is full starts again",
        file="src/tidings/server/clock.py",
        old="max(ms, self._ms + 1)",
        new="ms",
        tests=["tests/config/test_clock.py"],
    ),
    Mutant(
        check="ids",
        why="ids of one millisecond repeat",
        file="src/tidings/server/clock.py",
        old="counter = self._counter + 1",
        new="counter = self._counter",
        tests=["tests/config/test_clock.py"],
    ),
    Mutant(
        check="G3",
        why="a message is sent again under another key",
        file="src/tidings/client/outbox.py",
        old="ref = self._transmit(outgoing.command,",
        new='ref = self._transmit(msgspec.structs.replace(outgoing.command, key=f"{outgoing.key}.{now}"),',
        tests=["tests/client/test_outbox.py", "-k", "lost_reply"],
    ),
    Mutant(
        check="G2",
        why="the outbox sends a channel's messages side by side",
        file="src/tidings/client/outbox.py",
        old="            head = lane.waiting[0]\n",
        new="            head = next((one for one in lane.waiting if one.ref is None), lane.waiting[0])\n",
        tests=["tests/client/test_outbox.py", "-k", "order_holds"],
    ),
    Mutant(
        check="G2",
        why="a durable outbox comes back in another order",
        file="src/tidings/client/store.py",
        old="FROM outbox ORDER BY n",
        new="FROM outbox ORDER BY key DESC",
        tests=["tests/client/test_outbox.py", "-k", "death_of_the_program"],
    ),
    Mutant(
        check="G1",
        why="the client sends what is not on its disk yet",
        file="src/tidings/client/outbox.py",
        old="if head.ref is not None or not head.stored:",
        new="if head.ref is not None:",
        tests=["tests/client/test_outbox.py", "-k", "on_disk_before"],
    ),
    Mutant(
        check="G4",
        why="the client takes a repeated event for a new one",
        file="src/tidings/client/following.py",
        old="        if seq != stream.received + 1:",
        new="        if seq > stream.received + 1:",
        tests=["tests/client/test_delivery.py", "-k", "duplicated_frames"],
    ),
    Mutant(
        check="G4",
        why="the client does not notice a gap",
        file="src/tidings/client/following.py",
        old="        if seq != stream.received + 1:",
        new="        if seq <= stream.received:",
        tests=["tests/client/test_delivery.py", "-k", "gap_is_filled"],
    ),
    Mutant(
        check="G4",
        why="a position moves when the event arrives, not when the application took it",
        file="src/tidings/client/following.py",
        old="        stream.received = seq\n        stream.fruitless = 0\n",
        new="        stream.received = seq\n        self._move(stream, event)\n",
        tests=["tests/client/test_delivery.py", "-k", "position_moves_only"],
    ),
    Mutant(
        check="G4",
        why="a saved mark vouches for events that the application has not taken",
        file="src/tidings/client/following.py",
        old="SavedStream(stream.name, stream.taken_epoch, stream.taken, stream.open)",
        new="SavedStream(stream.name, stream.taken_epoch, stream.taken, False)",
        tests=["tests/client/test_outbox.py", "-k", "mark_does_not_vouch"],
    ),
    Mutant(
        check="G4",
        why="a slow application lets the queue grow",
        file="src/tidings/client/following.py",
        old="            wire.pause()",
        new="            pass",
        tests=["tests/client/test_delivery.py", "-k", "slow_consumer_stops"],
    ),
    Mutant(
        check="G4",
        why="a slow application that waits for a reply lets the queue grow",
        file="src/tidings/client/following.py",
        old="            self._hold_back(True)",
        new="            pass",
        tests=["tests/client/test_delivery.py", "-k", "holds_back"],
    ),
    Mutant(
        check="G4",
        why="what had no room is asked for again while there is still none",
        file="src/tidings/client/following.py",
        old="            elif self._wire.opened and self._has_place(stream):",
        new="            elif self._wire.opened:",
        tests=["tests/client/test_delivery.py", "-k", "beyond_any_room"],
    ),
    Mutant(
        check="G4",
        why="what the client learned from the own stream counts as shown to the application",
        file="src/tidings/client/following.py",
        old="                stream.received = seq\n                self._touch(stream)\n",
        new="                stream.received = stream.taken = seq\n                self._touch(stream)\n",
        tests=["tests/client/test_delivery.py", "-k", "own_stream_waits"],
    ),
    Mutant(
        check="G4",
        why="an own event that is shown late makes the client leave a channel a second time",
        file="src/tidings/client/following.py",
        old="        if event.seq != self._applied + 1:",
        new="        if event.seq > self._applied + 1:",
        tests=["tests/client/test_delivery.py", "-k", "change_nothing_twice"],
    ),
    Mutant(
        check="D10",
        why="a full transport that has room again forgets that the client wants no events",
        file="src/tidings/server/gateway/connection.py",
        old="        self.paused = self.entering or self.withheld\n",
        new="        self.paused = self.entering\n",
        tests=["tests/gateway/test_catch_up.py", "-k", "wants_no_events"],
    ),
    Mutant(
        check="G4",
        why="a fresh device begins behind its own first message",
        file="src/tidings/client/client.py",
        old="ready = self._connection.identified and self._following.mark is not None",
        new="ready = self._connection.identified",
        tests=["tests/client/test_delivery.py", "-k", "fresh_device_is_told"],
    ),
    Mutant(
        check="D20",
        why="clients come back at the same moment",
        file="src/tidings/client/backoff.py",
        old="self._random.uniform(0.0, self.bound())",
        new="self._random.uniform(self.bound() / 2, self.bound())",
        tests=["tests/client/test_connection.py", "-k", "spreads_a_crowd"],
    ),
    Mutant(
        check="D20",
        why="the pause before a retry grows without a bound",
        file="src/tidings/client/backoff.py",
        old="return min(self._cap, self._base * 2.0 ** min(self.attempt, 40))",
        new="return self._base * 2.0 ** min(self.attempt, 40)",
        tests=["tests/client/test_connection.py", "-k", "doubling_bound"],
    ),
    Mutant(
        check="D20",
        why="the client comes back although it was told not to",
        file="src/tidings/client/connection.py",
        old="final = 4500 <= code < 5000 if",
        new="final = 4900 <= code < 5000 if",
        tests=["tests/client/test_connection.py", "-k", "from_the_4500s"],
    ),
    Mutant(
        check="D17",
        why="the client does not notice that the server is dead",
        file="src/tidings/client/connection.py",
        old="now - self._last_frame > 2 * session.heartbeat_seconds",
        new="now - self._last_frame > 99 * session.heartbeat_seconds",
        tests=["tests/client/test_connection.py", "-k", "falls_silent"],
    ),
    Mutant(
        check="SDK",
        why="the SDK needs a package of the server's",
        file="src/tidings/client/backoff.py",
        old="import random\n",
        new="import random\n\nimport structlog  # noqa: F401\n",
        tests=["tests/client/test_install.py", "-k", "sdk_needs_nothing"],
    ),
    Mutant(
        check="S1",
        why="a key with narrow scopes lists every channel",
        file="src/tidings/server/services/channels.py",
        old="or (actor.user is None and actor.may(P.CHANNEL_READ))",
        new="or actor.user is None",
        tests=["tests/api/test_access_matrix.py", "-k", "channels.list"],
    ),
    Mutant(
        check="S1",
        why="who may read a channel may do anything in it",
        file="src/tidings/server/services/access.py",
        old="            if self.grants & _READ:\n                raise Forbidden(need.value)",
        new="            if self.grants & _READ:\n                return",
        tests=["tests/api/test_access_matrix.py", "-k", "who_gets_in"],
    ),
    Mutant(
        check="S3",
        why="unknown fields of a request are dropped in silence",
        file="src/tidings/wire/requests.py",
        old="kw_only=True, forbid_unknown_fields=True):",
        new="kw_only=True):",
        tests=["tests/api/test_door.py", "-k", "only_the_server_writes"],
    ),
    Mutant(
        check="S17",
        why="whoever is refused is let in again at once",
        file="src/tidings/server/domain/limits.py",
        old="if full_at < now:",
        new="if full_at > now:",
        tests=["tests/domain/test_limits.py", "tests/api/test_door.py", "-k", "burst or too_often"],
    ),
    Mutant(
        check="D7",
        why="copies of a send that run at once do not know of each other",
        file="src/tidings/server/rest/messages.py",
        old="        self._keys.add(one)\n",
        new="        self._keys.add((0, None, '', ''))\n",
        tests=["tests/api/test_messages.py", "-k", "copies"],
    ),
    Mutant(
        check="H12",
        why="an internal error quotes what it failed on",
        file="src/tidings/server/rest/problems.py",
        old='f"This is our mistake. It is logged as {request_id}."',
        new='f"This is our mistake. It is logged as {request_id}: {error}"',
        tests=["tests/api/test_door.py", "-k", "our_mistakes"],
    ),
    Mutant(
        check="poll",
        why="a long poll takes its own last answer for news and spins",
        file="src/tidings/server/rest/sync.py",
        old='page.mark.partition(".")[2] != told',
        new='page.mark.partition(".")[2] != ""',
        tests=["tests/api/test_door.py", "-k", "own_answer"],
    ),
    Mutant(
        check="bounds",
        why="a body without a length is read to its end before it is refused",
        file="src/tidings/server/rest/factory.py",
        old=" and size <= bound:",
        new=":",
        tests=["tests/api/test_door.py", "-k", "without_a_length"],
    ),
    Mutant(
        check="metrics",
        why="metrics for everybody behind a proxy",
        file="src/tidings/server/rest/system.py",
        old="if client is None or any(name in _FORWARDED",
        new="if client is None or any(name in ()",
        tests=["tests/api/test_door.py", "-k", "neighbourhood"],
    ),
    Mutant(
        check="S19",
        why="an answer that the document does not know",
        file="src/tidings/server/rest/channels.py",
        old='    body=MembershipUpdate,\n    problems=("conflict",),',
        new="    body=MembershipUpdate,",
        tests=["tests/api/test_fuzz.py", "-k", "membership"],
    ),
    Mutant(
        check="D12",
        why="after a restore the epochs are the old ones",
        file="src/tidings/server/commands/backup.py",
        old='"UPDATE streams SET epoch=?, moved_at=? WHERE sid=?",',
        new='"UPDATE streams SET epoch=coalesce(epoch,?), moved_at=? WHERE sid=?",',
        tests=["tests/ops/test_backup.py", "-k", "another_epoch or starts_over"],
    ),
    Mutant(
        check="D12",
        why="clients that come back with a mark are not told of the new epoch",
        file="src/tidings/server/commands/backup.py",
        old='"UPDATE streams SET epoch=?, moved_at=? WHERE sid=?",',
        new='"UPDATE streams SET epoch=?, moved_at=coalesce(moved_at,?) WHERE sid=?",',
        tests=["tests/ops/test_backup.py", "-k", "starts_over"],
    ),
    Mutant(
        check="H3",
        why="an app's old key is removed while something still stands under it",
        file="src/tidings/server/services/rotation.py",
        old="            if used is not None:\n",
        new="            if False:\n",
        tests=["tests/ops/test_keys.py", "-k", "hour_later"],
    ),
    Mutant(
        check="H3",
        why="an app's old key is removed while a server may be about to use it",
        file="src/tidings/server/services/rotation.py",
        old="if not old or not (alone or now - since >= RETIRE_AFTER_MS):",
        new="if not old:",
        tests=["tests/ops/test_keys.py", "-k", "old_key_stays"],
    ),
    Mutant(
        check="H3",
        why="a rotation that was killed begins anew instead of going on",
        file="src/tidings/server/services/rotation.py",
        old="            if begun is not None:\n                return int(begun[0]), True\n",
        new="",
        tests=["tests/ops/test_keys.py", "-k", "killed_rotation"],
    ),
    Mutant(
        check="H3",
        why="everything is wrapped with a root key that the other nodes have never seen",
        file="src/tidings/server/crypto/keyfile.py",
        old="            self._replace(msgspec.structs.replace(before, current=kid))\n",
        new="            kid, version = self._fresh_version()\n"
        "            self._replace(msgspec.structs.replace(before, current=kid, keys={**before.keys, kid: version}))\n",
        tests=["tests/ops/test_root_keys.py", "-k", "goes_round"],
    ),
    Mutant(
        check="H3",
        why="the key that was prepared is removed with the old ones",
        file="src/tidings/server/services/rotation.py",
        old="            old = held[: held.index(kid)]\n",
        new="            old = tuple(other for other in held if other != kid)\n",
        tests=["tests/ops/test_root_keys.py", "-k", "prepared"],
    ),
    Mutant(
        check="D2",
        why="over PostgreSQL, acknowledge what is not on the disk",
        file="src/tidings/server/store/postgres.py",
        old="        if asynchronous and allow_unsafe:\n",
        new="        if True:\n",
        tests=["tests/checks/test_d02_power_cuts.py", "-k", "survives_power_cuts and postgres"],
    ),
    Mutant(
        check="start",
        why="nodes that start at once make a first app each",
        file="src/tidings/server/services/founding.py",
        old="                    await tx.execute(_ONE_AT_A_TIME)\n",
        new="",
        tests=["tests/ops/test_postgres.py", "-k", "make_one_app"],
    ),
    Mutant(
        check="H3",
        why="an app is stored under a root key that has just been retired",
        file="src/tidings/server/crypto/keyring.py",
        old="if kid not in self._root.kids():",
        new="if False:",
        tests=["tests/ops/test_keys.py", "-k", "refused_rather_than_lost"],
    ),
    Mutant(
        check="D1",
        why="acknowledge before the commit",
        file="src/tidings/server/store/sqlite.py",
        old='            connection.execute("COMMIT")\n        except Exception as error:',
        new="            self._tell(self._finish, outcomes, 0.0)\n            time.sleep(0.05)\n"
        '            connection.execute("COMMIT")\n            return\n        except Exception as error:',
        tests=["tests/checks/test_d01_to_d21_faults.py", "-k", "test_d1_"],
    ),
    Mutant(
        check="D4",
        why="a number is left out now and then",
        file="src/tidings/server/store/sqlite.py",
        old="seq = head[0] = head[0] + 1",
        new="seq = head[0] = head[0] + 1 + (head[0] % 100 == 99)",
        tests=["tests/checks/test_d04_to_d09_log.py", "-k", "test_d4_"],
    ),
    Mutant(
        check="D5",
        why="a page holds what does not follow on its beginning",
        file="src/tidings/server/store/log.py",
        old="    return events[:limit]",
        new="    return events",
        tests=["tests/checks/test_d03_d05_store.py", "-k", "test_d5_"],
    ),
    Mutant(
        check="D7",
        why="a used key is not looked up",
        file="src/tidings/server/store/sqlite.py",
        old="        if first is not None:\n            if first[3]",
        new="        if first is not None and first[1] < 0:\n            if first[3]",
        tests=["tests/checks/test_d04_to_d09_log.py", "-k", "test_d7_a_hundred"],
    ),
    Mutant(
        check="D8",
        why="the same key with another body is a repetition",
        file="src/tidings/server/store/sqlite.py",
        old="if first[3] != item.digest:",
        new="if first[3] != item.digest and False:",
        tests=["tests/checks/test_d04_to_d09_log.py", "-k", "test_d8_"],
    ),
    Mutant(
        check="D11",
        why="positions of another history are taken",
        file="src/tidings/server/services/sync.py",
        old="if position.epoch is not None and position.epoch != handle.epoch:",
        new="if position.epoch is not None and position.epoch != handle.epoch and False:",
        tests=["tests/checks/test_d10_to_d16_resume.py", "-k", "test_d11_"],
    ),
    Mutant(
        check="D13",
        why="live before the last of the log was sent",
        file="src/tidings/server/gateway/gateway.py",
        old="            if position >= stream.head and (sid",
        new="            if position >= stream.head - 1 and (sid",
        tests=["tests/checks/test_d10_to_d16_resume.py", "-k", "test_d13_"],
    ),
    Mutant(
        check="D14",
        why="all devices of a user share one position",
        file="src/tidings/server/services/receipts.py",
        old="device_key = (app, user, device, sid)",
        new='device_key = (app, user, "all", sid)',
        tests=["tests/checks/test_d10_to_d16_resume.py", "-k", "test_d14_"],
    ),
    Mutant(
        check="D14",
        why="a second device ends the first one's connection",
        file="src/tidings/server/gateway/gateway.py",
        old="        key = (actor.app.app, actor.user, device.id)\n        older",
        new='        key = (actor.app.app, actor.user, "")\n        older',
        tests=["tests/checks/test_d10_to_d16_resume.py", "-k", "test_d14_"],
    ),
    Mutant(
        check="D15",
        why="more may be acknowledged than was sent",
        file="src/tidings/server/gateway/gateway.py",
        old="            if seq > bound:",
        new="            if seq > bound + 100:",
        tests=["tests/checks/test_d10_to_d16_resume.py", "-k", "test_d15_acknowledging"],
    ),
    Mutant(
        check="D15",
        why="what is told is the acknowledging device's position, not the member's",
        file="src/tidings/server/services/receipts.py",
        old="max(at, delivered[app, sid, user]), read)",
        new="delivered[app, sid, user], read)",
        tests=["tests/checks/test_d10_to_d16_resume.py", "-k", "test_d15_"],
    ),
    Mutant(
        check="D16",
        why="commands run before anybody has said who they are",
        file="src/tidings/server/gateway/session.py",
        old='        if not isinstance(command, Connect):\n            return self._close(Refusal("unauthenticated"',
        new='        if isinstance(command, Ping):\n            return self._close(Refusal("unauthenticated"',
        tests=["tests/checks/test_d10_to_d16_resume.py", "-k", "test_d16_"],
    ),
    Mutant(
        check="D17",
        why="a dead peer is kept for twenty heartbeats",
        file="src/tidings/server/gateway/session.py",
        old="SILENT_HEARTBEATS_MAX: Final = 2",
        new="SILENT_HEARTBEATS_MAX: Final = 20",
        tests=["tests/checks/test_d01_to_d21_faults.py", "-k", "test_d17_"],
    ),
    Mutant(
        check="D19",
        why="who does not read is written to all the same",
        file="src/tidings/server/gateway/hub.py",
        old="if peer.paused or (peer.behind and sid in peer.behind):",
        new="if peer.behind and sid in peer.behind:",
        tests=["tests/checks/test_d01_to_d21_faults.py", "-k", "test_d19_"],
    ),
    Mutant(
        check="D20",
        why="a mark vouches for more than it should",
        file="src/tidings/server/services/sync.py",
        old="max(0, now_ms - MARK_MARGIN_MS)",
        new="max(0, now_ms + 60_000)",
        tests=["tests/checks/test_d01_to_d21_faults.py", "-k", "test_d20_five"],
    ),
    Mutant(
        check="D21",
        why="what was done before the commit failed is acknowledged",
        file="src/tidings/server/store/sqlite.py",
        old="            outcomes = [(item, reason) for item in batch]",
        new="            outcomes = outcomes or [(item, reason) for item in batch]",
        tests=["tests/checks/test_d01_to_d21_faults.py", "-k", "full_disk"],
    ),
    Mutant(
        check="S2",
        why="the hub goes on delivering to who has left",
        file="src/tidings/server/gateway/hub.py",
        old="                subscriber.told.add(sid)\n            self.leave(subscriber, sid)\n",
        new="                subscriber.told.add(sid)\n",
        tests=["tests/checks/test_s02_to_s17_access.py", "-k", "test_s2_"],
    ),
    Mutant(
        check="S6",
        why="a revoked token's connection lives on",
        file="src/tidings/server/gateway/connection.py",
        old='        self.close(Refusal(notice.code, "The credentials of this connection were withdrawn."))',
        new="        return",
        tests=["tests/checks/test_s02_to_s17_access.py", "-k", "test_s6_revoking"],
    ),
    Mutant(
        check="S6",
        why="a token's end does not end its connection",
        file="src/tidings/server/gateway/session.py",
        old="if self.expires_at is not None and now >= self.expires_at:",
        new="if self.expires_at is not None and now >= self.expires_at + 600:",
        tests=["tests/checks/test_s02_to_s17_access.py", "-k", "test_s6_revoking"],
    ),
    Mutant(
        check="S9",
        why="who never says who they are may stay",
        file="src/tidings/server/gateway/session.py",
        old="if now - self.opened_at >= self.limits.auth_timeout_seconds:",
        new="if now - self.opened_at >= 60 * self.limits.auth_timeout_seconds:",
        tests=["tests/checks/test_s09_to_s19_socket.py", "-k", "test_s9_"],
    ),
    Mutant(
        check="S10",
        why="any number of fragments",
        file="src/tidings/server/gateway/endpoint.py",
        old="if self._size > bound or len(self._fragments) > FRAGMENTS_MAX:",
        new="if self._size > bound:",
        tests=["tests/checks/test_s09_to_s19_socket.py", "-k", "test_s10_what"],
    ),
    Mutant(
        check="S10",
        why="reserved bits mean nothing",
        file="src/tidings/server/gateway/endpoint.py",
        old="if frame.rsv1 or frame.rsv2 or frame.rsv3:",
        new="if False:",
        tests=["tests/checks/test_s09_to_s19_socket.py", "-k", "test_s10_what"],
    ),
    Mutant(
        check="S17",
        why="REST has a bucket of its own",
        file="src/tidings/server/rest/factory.py",
        old="    if limiter is None:",
        new="    if not limiter:",
        tests=["tests/checks/test_s02_to_s17_access.py", "-k", "test_s17_"],
    ),
    Mutant(
        check="H2",
        why="no associated data: a box may be moved",
        file="src/tidings/server/crypto/keyring.py",
        old='    return row + len(item).to_bytes(4, "big") + item',
        new='    return b""',
        tests=["tests/checks/test_s08_h01_h02_secrets.py", "-k", "test_h2_ and swap"],
    ),
    Mutant(
        check="replay",
        why="the SDK makes a new key for every attempt",
        file="src/tidings/client/outbox.py",
        old="ref = self._transmit(outgoing.command, ",
        new="ref = self._transmit(msgspec.structs.replace(outgoing.command, key=f'{outgoing.key}{now}'), ",
        tests=["tests/replay", "-k", "sample"],
    ),
    Mutant(
        check="D13",
        why="a peer goes live one event too early",
        file="src/tidings/server/gateway/gateway.py",
        old="            if position >= stream.head and (sid",
        new="            if position >= stream.head - 1 and (sid",
        tests=["tests/gateway/test_catch_up.py", "-k", "interleaving or exactly"],
    ),
    Mutant(
        check="D13",
        why="an announcement that was lost is passed over",
        file="src/tidings/server/gateway/hub.py",
        old="        if seq != stream.head + 1:",
        new="        if seq <= stream.head:",
        tests=["tests/gateway/test_hub.py", "-k", "lost_announcement"],
    ),
    Mutant(
        check="D13",
        why="streams that moved are not held until the client names them",
        file="src/tidings/server/gateway/gateway.py",
        old="            self.hub.hold(connection, moved.at)\n",
        new="            self.hub.hold(connection, {})\n",
        tests=["tests/gateway/test_catch_up.py", "-k", "are_held or stay_held"],
    ),
    Mutant(
        check="S2",
        why="a removed member's sockets stay in the channel",
        file="src/tidings/server/gateway/hub.py",
        old="        stream.subscribers.pop(subscriber, None)\n        stream.turn = -1\n",
        new="        stream.subscribers.pop(subscriber, None)\n",
        tests=["tests/gateway/test_hub.py", "-k", "removal"],
    ),
    Mutant(
        check="S2",
        why="who leaves while they are away is not told, and comes back",
        file="src/tidings/server/gateway/hub.py",
        old="            subscribers = [] if one is None else [one]",
        new="            subscribers = [one] if one is not None and one.peers else []",
        tests=["tests/gateway/test_hub.py", "-k", "who_comes_back"],
    ),
    Mutant(
        check="S2",
        why="memberships are kept whatever another process has written",
        file="src/tidings/server/gateway/hub.py",
        old="            subscriber.known = False",
        new="            subscriber.known = bool(subscriber.peers)",
        tests=["tests/gateway/test_hub.py", "-k", "another_process"],
    ),
    Mutant(
        check="D13",
        why="a joining that was not announced is never found",
        file="src/tidings/server/gateway/gateway.py",
        old="moved.own_head > subscriber.own.head",
        new="moved.own_head < subscriber.own.head",
        tests=["tests/gateway/test_hub.py", "-k", "not_announced"],
    ),
    Mutant(
        check="D10",
        why="what the user did elsewhere is left out of what moved",
        file="src/tidings/server/services/sync.py",
        old="                rows += await tx.all(",
        new="                await tx.all(",
        tests=["tests/services/test_sync.py", "-k", "whichever_way"],
    ),
    Mutant(
        check="S6",
        why="what is revoked while a connection enters does not end it",
        file="src/tidings/server/gateway/gateway.py",
        old="        if auth.forgotten != forgotten:",
        new="        if auth.forgotten < forgotten:",
        tests=["tests/gateway/test_hub.py", "-k", "looked_up"],
    ),
    Mutant(
        check="S2",
        why="a right to read that was lost while it was asked for counts",
        file="src/tidings/server/gateway/gateway.py",
        old="                handles.clear()\n",
        new="",
        tests=["tests/gateway/test_hub.py", "-k", "asked_for_again"],
    ),
    Mutant(
        check="S2",
        why="a page that was read before the removal is sent after it",
        file="src/tidings/server/gateway/gateway.py",
        old="            if connection.streams.get(sid) is not stream or behind.get(sid) != position or connection",
        new="            if behind.get(sid, position) != position or connection",
        tests=["tests/gateway/test_catch_up.py", "-k", "removed_while"],
    ),
    Mutant(
        check="S2",
        why="a stream that cannot be read any more goes live",
        file="src/tidings/server/gateway/gateway.py",
        old="they do not listen to it either.\n                self.hub.deafen(connection, sid)",
        new="they do not listen to it either.\n                behind.pop(sid, None)",
        tests=["tests/gateway/test_catch_up.py", "-k", "gone_is_left"],
    ),
    Mutant(
        check="D19",
        why="a slow peer is written to all the same",
        file="src/tidings/server/gateway/hub.py",
        old="            if peer.paused or (peer.behind and sid in peer.behind):",
        new="            if peer.behind and sid in peer.behind:",
        tests=["tests/gateway/test_hub.py", "-k", "paused_peer"],
    ),
    Mutant(
        check="once",
        why="every recipient gets bytes of their own",
        file="src/tidings/server/gateway/hub.py",
        old="            out.append(entry)\n            delivered += 1",
        new="            out.append((bytes(bytearray(entry[0])), entry[1]))\n            delivered += 1",
        tests=["tests/gateway/test_hub.py", "-k", "same_bytes"],
    ),
    Mutant(
        check="D15",
        why="more than was sent can be acknowledged",
        file="src/tidings/server/gateway/gateway.py",
        old="            if seq > bound:",
        new="            if seq > bound + 1:",
        tests=["tests/gateway/test_receipts.py", "-k", "refused_as_a_whole or no_more"],
    ),
    Mutant(
        check="D15",
        why="what came before a replay cannot be acknowledged during it",
        file="src/tidings/server/gateway/connection.py",
        old="        return max(position, self.sent_before.get(stream.sid, 0))",
        new="        return position",
        tests=["tests/gateway/test_receipts.py", "-k", "asked_for_again"],
    ),
    Mutant(
        check="D17",
        why="a transport that ended while it entered stays online for ever",
        file="src/tidings/server/gateway/connection.py",
        old='ended, by whomever."""\n        self.ended = True\n',
        new='ended, by whomever."""\n',
        tests=["tests/gateway/test_hub.py", "-k", "ends_while"],
    ),
    Mutant(
        check="order",
        why="a message that has to wait is overtaken by those before it",
        file="src/tidings/server/gateway/connection.py",
        old="                while (self._in_store or self._again) and not self.ended:",
        new="                while self._again and not self._in_store and not self.ended:",
        tests=["tests/gateway/test_hub.py", "-k", "on_their_way_to_the_store"],
    ),
    Mutant(
        check="drain",
        why="a command is not counted, so that nobody waits for its answer",
        file="src/tidings/server/gateway/session.py",
        old="        self.state = State.CONNECTING\n        self.in_flight += 1",
        new="        self.state = State.CONNECTING",
        tests=["tests/gateway/test_hub.py", "tests/gateway/test_session.py", "-k", "draining or Machine"],
    ),
    Mutant(
        check="S10",
        why="ill-typed commands are free",
        file="src/tidings/server/gateway/session.py",
        old="Answer(self._limited(now) or refusal_of(error), _ref_of(data))",
        new="Answer(refusal_of(error), _ref_of(data))",
        tests=["tests/gateway/test_session.py", "-k", "count_against"],
    ),
    Mutant(
        check="S9",
        why="talking without connecting buys time",
        file="src/tidings/server/gateway/session.py",
        old="            if now - self.opened_at >= self.limits.auth_timeout_seconds:",
        new="            if now - self.heard_at >= self.limits.auth_timeout_seconds:",
        tests=["tests/gateway/test_session.py", "-k", "buys_no_time"],
    ),
    Mutant(
        check="D16",
        why="knowing a session's id is enough to read it",
        file="src/tidings/server/gateway/http.py",
        old="        if connection is None or connection.user != actor.user or connection.app != actor.app.app:",
        new="        if connection is None or connection.app != actor.app.app:",
        tests=["tests/gateway/test_http_fallback.py", "-k", "users_alone"],
    ),
    Mutant(
        check="G4",
        why="a poll from before what is kept goes on after the gap",
        file="src/tidings/server/gateway/http.py",
        old="(self._kept[0][0] if self._kept else self._next) - 1",
        new="(self._kept[0][0] if self._kept else 1) - 1",
        tests=["tests/gateway/test_http_fallback.py", "-k", "cannot_be_asked_for"],
    ),
    Mutant(
        check="G9",
        why="every keystroke is told",
        file="src/tidings/server/gateway/gateway.py",
        old="        if last is not None and now - last < TYPING_SECONDS:",
        new="        if last is not None and now < last:",
        tests=["tests/gateway/test_typing.py", "-k", "once_in_its_time"],
    ),
    Mutant(
        check="D18 nodes",
        why="among 80,000 streams a lost last event is found after a quarter of a minute",
        file="src/tidings/server/gateway/nodes.py",
        old="TURN_STREAMS_MAX: Final = 30_000",
        new="TURN_STREAMS_MAX: Final = 5_000",
        tests=["tests/gateway/test_nodes.py", "-k", "eighty_thousand"],
    ),
    Mutant(
        check="D18 nodes",
        why="what has grown by one event is passed over",
        file="src/tidings/server/store/log.py",
        old=" JOIN streams s ON s.sid=k.sid WHERE s.head>k.head",
        new=" JOIN streams s ON s.sid=k.sid WHERE s.head>k.head+1",
        tests=["tests/services/test_sync.py", "-k", "have_grown"],
    ),
    Mutant(
        check="types",
        why="a type that is remembered makes channels though it was deleted",
        file="src/tidings/server/services/channels.py",
        old="                await self._check_type(tx, app, body.type)\n",
        new="                pass\n",
        tests=["tests/gateway/test_nodes.py", "-k", "deleted_elsewhere"],
    ),
    Mutant(
        check="types",
        why="who makes a channel does not hold its type",
        file="src/tidings/server/services/channels.py",
        old=" + tx.for_key_share, app.app, name)",
        new=", app.app, name)",
        tests=["tests/gateway/test_nodes.py", "-k", "not_deleted_while"],
    ),
    Mutant(
        check="S6 nodes",
        why="sessions are asked about one by one",
        file="src/tidings/server/gateway/doubts.py",
        old="            some = list(islice(self._credentials, RECHECK_BATCH))\n",
        new="            some = list(islice(self._credentials, 1))\n",
        tests=["tests/gateway/test_nodes.py", "-k", "asks_about_all"],
    ),
    Mutant(
        check="S6 nodes",
        why="among many, nobody's token is looked for among the revoked",
        file="src/tidings/server/services/auth.py",
        old="            gone = one.jti is not None and (app.app, revoked_name(user, one.jti)) in revoked\n",
        new="            gone = False\n",
        tests=["tests/services/test_auth.py", "-k", "looked_at_together"],
    ),
    Mutant(
        check="large",
        why="whoever asks for a role has every member looked at",
        file="src/tidings/server/services/membership.py",
        old=" AND m.role=?",
        new=" AND coalesce(m.role,'')=?",
        tests=["tests/services/test_members_role.py", "-k", "come_from_the_index"],
    ),
    Mutant(
        check="G9",
        why="nobody is told that people type in a large channel",
        file="src/tidings/server/gateway/gateway.py",
        old="            self.crowds.joined(connection, sid)\n",
        new="",
        tests=["tests/gateway/test_typing.py", "-k", "how_many_type"],
    ),
    Mutant(
        check="G9",
        why="who types in a large channel is told as often as they type",
        file="src/tidings/server/gateway/crowds.py",
        old="        if crowd is None:\n",
        new="        if True:\n",
        tests=["tests/gateway/test_typing.py", "-k", "many_who_type"],
    ),
    Mutant(
        check="G9 nodes",
        why="a node tells only who types at its own sessions",
        file="src/tidings/server/gateway/crowds.py",
        old="        total = here + sum(count for count, _ in crowd.elsewhere.values())",
        new="        total = here",
        tests=["tests/gateway/test_nodes.py", "-k", "how_many_type"],
    ),
    Mutant(
        check="G9 nodes",
        why="the number of a node that is gone counts for ever",
        file="src/tidings/server/gateway/crowds.py",
        old="        for node in [node for node, (_, until) in crowd.elsewhere.items() if until <= now]:",
        new="        for node in [node for node, (_, until) in crowd.elsewhere.items() if until < 0]:",
        tests=["tests/gateway/test_nodes.py", "-k", "how_many_type"],
    ),
    Mutant(
        check="G9",
        why="who wants to be unseen is seen",
        file="src/tidings/server/gateway/presence.py",
        old="        if not connection.visible:\n            return",
        new="        if not connection.user:\n            return",
        tests=["tests/gateway/test_presence.py", "-k", "invisible"],
    ),
    Mutant(
        check="D7",
        why="a key repeated within one batch is not known",
        file="src/tidings/server/store/sqlite.py",
        old="        known[key] = (message_id, seq, at, item.digest)\n",
        new="",
        tests=["tests/contracts/test_store.py", "-k", "repeated_key"],
    ),
    Mutant(
        check="D8",
        why="the same key with another body passes for a retry",
        file="src/tidings/server/store/sqlite.py",
        old="            if first[3] != item.digest:",
        new="            if first[3] == b'':",
        tests=["tests/contracts/test_store.py", "-k", "another_body"],
    ),
    Mutant(
        check="G8",
        why="what was authorised before a removal is stored after it",
        file="src/tidings/server/store/sqlite.py",
        old="        if head[3] != item.access_version:",
        new="        if head[3] < item.access_version:",
        tests=["tests/contracts/test_store.py", "-k", "past_access_version"],
    ),
    Mutant(
        check="S1",
        why="an app appends to another's stream in a shared batch",
        file="src/tidings/server/store/sqlite.py",
        old="        if head is None or head[4] != item.app:",
        new="        if head is None:",
        tests=["tests/contracts/test_store.py", "-k", "stream_of_another"],
    ),
    Mutant(
        check="G2",
        why="what a failed unit wrote is committed with its neighbours",
        file="src/tidings/server/store/sqlite.py",
        old='            connection.execute("ROLLBACK TO unit")\n',
        new="",
        tests=["tests/contracts/test_store.py", "-k", "rolls_back_alone or leaves_a_gap"],
    ),
    Mutant(
        check="D21",
        why="a failed commit leaves its transaction open",
        file="src/tidings/server/store/sqlite.py",
        old="            if connection.in_transaction:\n                try:",
        new="            if not connection.in_transaction:\n                try:",
        tests=["tests/contracts/test_store.py", "-k", "in_trouble or disk_that_is_full"],
    ),
    Mutant(
        check="D3",
        why="a connection that may lose commits passes",
        file="src/tidings/server/store/sqlite.py",
        old='    if (level < 2 or mode != "wal") and not allow:',
        new='    if (level < 1 or mode != "wal") and not allow:',
        tests=["tests/contracts/test_store.py", "-k", "may_lose_commits"],
    ),
    Mutant(
        check="H1",
        why="the database can be read by everyone on the machine",
        file="src/tidings/server/store/sqlite.py",
        old="os.O_CREAT | os.O_RDWR, 0o600",
        new="os.O_CREAT | os.O_RDWR, 0o644",
        tests=["tests/contracts/test_store.py", "-k", "owners_alone"],
    ),
    Mutant(
        check="counts",
        why="silent messages count as unread",
        file="src/tidings/server/store/sqlite.py",
        old="        if item.flags & COUNTS:",
        new="        if item.flags:",
        tests=["tests/contracts/test_store.py", "-k", "counters"],
    ),
    Mutant(
        check="D7",
        why="PostgreSQL: a key that is known is stored again",
        file="src/tidings/server/store/postgres_append.py",
        old="  WHERE v.n NOT IN (SELECT n FROM known)\n",
        new="",
        tests=["tests/contracts/test_store.py", "-k", "postgres and repeated_key"],
    ),
    Mutant(
        check="D7",
        why="PostgreSQL: a repeat that another node has just stored fails the batch",
        file="src/tidings/server/store/postgres.py",
        old="        except (asyncpg.UniqueViolationError, *_OVERTAKEN):\n",
        new="        except _OVERTAKEN:\n",
        tests=["tests/store/test_postgres.py", "-k", "test_d7_"],
    ),
    Mutant(
        check="D4",
        why="PostgreSQL: numbers are taken from the head as the statement's snapshot has it",
        file="src/tidings/server/store/postgres_append.py",
        old="WHERE sid=ANY($14::bigint[]) ORDER BY sid FOR UPDATE\n)",
        new="WHERE sid=ANY($14::bigint[]) ORDER BY sid\n)",
        tests=["tests/store/test_postgres.py", "-k", "test_d4_"],
    ),
    Mutant(
        check="G8",
        why="PostgreSQL: what was authorised before a removal is stored after it",
        file="src/tidings/server/store/postgres_append.py",
        old=" AND h.access_version=v.version\n",
        new=" AND h.access_version>=v.version\n",
        tests=["tests/contracts/test_store.py", "-k", "postgres and access_version"],
    ),
    Mutant(
        check="S1",
        why="PostgreSQL: an app appends to another's stream",
        file="src/tidings/server/store/postgres_append.py",
        old="JOIN heads h ON h.sid=v.sid AND h.app=v.app AND",
        new="JOIN heads h ON h.sid=v.sid AND",
        tests=["tests/contracts/test_store.py", "-k", "postgres and stream_of_another"],
    ),
    Mutant(
        check="D3",
        why="PostgreSQL: a server without fsync passes",
        file="src/tidings/server/store/postgres.py",
        old='("fsync", fsync, fsync == "on"),',
        new='("fsync", fsync, True),',
        tests=["tests/store/test_postgres.py", "-k", "test_d3_ and fsync"],
    ),
    Mutant(
        check="D2",
        why="PostgreSQL: commits do not wait for the disk",
        file="src/tidings/server/store/postgres.py",
        old="    if commit not in SAFE_COMMITS:\n",
        new='    if commit == "local":\n',
        tests=["tests/store/test_postgres.py", "-k", "wait_for_the_disk"],
    ),
    Mutant(
        check="D21",
        why="PostgreSQL: a commit whose answer was lost counts as done",
        file="src/tidings/server/store/postgres.py",
        old="raise _unavailable(error, unknown=_is_unknown(error)) from error\n                raise\n",
        new="return value\n                raise\n",
        tests=["tests/store/test_postgres.py", "-k", "answer_is_lost"],
    ),
    Mutant(
        check="order",
        why="a unit is told before the batch with the lower number",
        file="src/tidings/server/store/commits.py",
        old="        if not flight.landed:\n            return True\n",
        new="        if not flight.landed:\n            return False\n",
        tests=["tests/store/test_commits.py"],
    ),
    Mutant(
        check="order",
        why="a batch is told before the unit with the lower number",
        file="src/tidings/server/store/commits.py",
        old="ticket.taken[sid] < first for sid",
        new="ticket.taken[sid] > first for sid",
        tests=["tests/store/test_commits.py"],
    ),
    Mutant(
        check="order",
        why="units are told as their answers come",
        file="src/tidings/server/store/commits.py",
        old="        ticket = self._committing[0]\n",
        new="        ticket = next((one for one in self._committing if one.finished), self._committing[0])\n"
        "        self._committing.remove(ticket)\n        self._committing.appendleft(ticket)\n",
        tests=["tests/store/test_commits.py"],
    ),
    Mutant(
        check="schema",
        why="a node starts on a schema that it cannot use",
        file="src/tidings/server/store/migrations/postgres.py",
        old="        if compatible_from > HEAD:\n",
        new="        if compatible_from > current:\n",
        tests=["tests/store/test_postgres_migrations.py", "-k", "cannot_use"],
    ),
    Mutant(
        check="S1",
        why="an administrator may read every conversation",
        file="src/tidings/server/domain/permissions.py",
        old="        P.MEMBER_READ,\n        P.USER_CREATE,",
        new="        P.MEMBER_READ,\n        P.CHANNEL_READ,\n        P.USER_CREATE,",
        tests=["tests/domain/test_permissions.py"],
    ),
    Mutant(
        check="harness",
        why="a server that had ended before anybody looked leaves its workers behind",
        file="src/tidings/testing/process.py",
        old="            return None\n        _kill_group(process)\n",
        new="            return None\n",
        tests=["tests/testing/test_process.py", "-k", "before_anybody_looked"],
    ),
    Mutant(
        check="start",
        why="litestar loads whatever it has a plugin for",
        file="src/tidings/server/rest/factory.py",
        old="app = _Litestar(",
        new="app = Litestar(",
        tests=["tests/ops/test_start.py", "-k", "only_what_serving_needs"],
    ),
    # ------------------------------------------------------------ several nodes
    Mutant(
        check="S2 nodes",
        why="the log is read under access that is remembered, whatever the store says",
        file="src/tidings/server/services/sync.py",
        old="if handle.access_version is not None and stream[2] != handle.access_version:",
        new="if False:",
        tests=["tests/gateway/test_nodes.py", "-k", "nobody_tells and (live or events)"],
    ),
    Mutant(
        check="S2 nodes",
        why="history is read under access that is remembered, whatever the store says",
        file="src/tidings/server/services/access.py",
        old="                if row is None or row[0] != access.channel.access_version:\n"
        "                    raise Stale\n                return await unit(tx, access, row[1], row[2])",
        new="                assert row is not None\n                return await unit(tx, access, row[1], row[2])",
        tests=["tests/gateway/test_nodes.py", "-k", "nobody_tells and (history or message or members)"],
    ),
    Mutant(
        check="D13 nodes",
        why="heads are compared before interest is known to be in place",
        file="src/tidings/server/gateway/nodes.py",
        old="                if await self._bus.settle():\n",
        new="                if False:\n",
        tests=["tests/gateway/test_nodes.py", "-k", "before_interest_was_known"],
    ),
    Mutant(
        check="D13 nodes",
        why="interest counts as known before the server has said so",
        file="src/tidings/server/bus/nats_link.py",
        old="        self._settling.append(future)\n",
        new="        future.set_result(True)\n",
        tests=["tests/contracts/test_bus.py", "-k", "settling_waits"],
    ),
    Mutant(
        check="D18 nodes",
        why="a lost last event is never looked for",
        file="src/tidings/server/gateway/nodes.py",
        old="            await self.compare(self._round[-self._per_turn :])\n",
        new="",
        tests=["tests/gateway/test_nodes.py", "-k", "last_event or running_node_finds"],
    ),
    Mutant(
        check="D18 nodes",
        why="who finds the bus again does not look for what it has missed",
        file="src/tidings/server/bus/nats.py",
        old="            self._deliver(Lost())\n            self._tell_loss()",
        new="            self._lossy = False",
        tests=["tests/contracts/test_bus.py", "-k", "cut_off"],
    ),
    Mutant(
        check="D18 nodes",
        why="what was dropped is not told when the server takes notices again",
        file="src/tidings/server/bus/nats.py",
        old="        self._lossy = True\n",
        new="",
        tests=["tests/contracts/test_bus.py", "-k", "bounded_memory"],
    ),
    Mutant(
        check="S6 nodes",
        why="a node that is cut off goes on trusting what it remembers",
        file="src/tidings/server/gateway/nodes.py",
        old="        cut_off = not self._bus.connected\n",
        new="        cut_off = False\n",
        tests=["tests/gateway/test_nodes.py", "-k", "trusts_nothing or from_the_store_while"],
    ),
    Mutant(
        check="S2 nodes",
        why="only nodes with sessions of the user hear that they have joined",
        file="src/tidings/server/bus/nats.py",
        old="        if isinstance(notice, Arrived):\n",
        new='        if type(notice).__name__ in ("Arrived", "Joined"):\n',
        tests=["tests/contracts/test_bus.py", "-k", "unasked"],
    ),
    Mutant(
        check="D6 nodes",
        why="a node hears its own events a second time",
        file="src/tidings/server/bus/nats_link.py",
        old='"echo": False,',
        new='"echo": True,',
        tests=["tests/contracts/test_bus.py", "-k", "ones_own"],
    ),
    Mutant(
        check="G4 nodes",
        why="a gap in one's own stream does not make memberships be read again",
        file="src/tidings/server/gateway/hub.py",
        old="                self._on_unsure(subscriber)\n",
        new="                pass\n",
        tests=["tests/gateway/test_nodes.py", "-k", "joining_that_was_not_heard"],
    ),
    Mutant(
        check="S17 nodes",
        why="what other nodes let through is not taken from one's own buckets",
        file="src/tidings/server/domain/limits.py",
        old="        full_at = max(now, self._full_at.get(key, now)) + units * self._step\n",
        new="        full_at = max(now, self._full_at.get(key, now))\n",
        tests=["tests/gateway/test_nodes.py", "-k", "together_hold_a_rate"],
    ),
    Mutant(
        check="S16 nodes",
        why="an HTTP session is served to anybody whose request comes by another node",
        file="src/tidings/server/gateway/http.py",
        old="if connection is None or (connection.app, connection.user) != (passed.app, passed.user):",
        new="if connection is None:",
        tests=["tests/gateway/test_nodes.py", "-k", "whatever_node"],
    ),
    Mutant(
        check="D17 nodes",
        why="the users of a node that died stay online for ever",
        file="src/tidings/server/gateway/presence.py",
        old="            elif self._told[key]:\n",
        new="            elif False:\n",
        tests=["tests/gateway/test_nodes.py", "-k", "node_that_dies"],
    ),
    Mutant(
        check="D14 nodes",
        why="two sessions of a device end each other",
        file="src/tidings/server/gateway/nodes.py",
        old="if (older.connected_at_ms, older.id) < (notice.at_ms, notice.session) or (",
        new="if True or (",
        tests=["tests/gateway/test_nodes.py", "-k", "twice_at_once"],
    ),
    Mutant(
        check="S8",
        why="a span quotes what was raised, and with it what somebody wrote",
        file="src/tidings/server/tracing.py",
        old="name, kind=kind, attributes=_named(about), record_exception=False, set_status_on_exception=False",
        new="name, kind=kind, attributes=_named(about), record_exception=True, set_status_on_exception=False",
        tests=["tests/gateway/test_tracing.py", "-k", "does_not_quote"],
    ),
    Mutant(
        check="D21",
        why="a store that is away counts as there: nobody is woken",
        file="src/tidings/server/jobs/health.py",
        old="metrics.store_up.value = 0",
        new="metrics.store_up.value = 1",
        tests=["tests/gateway/test_metrics.py", "-k", "is_down_and_comes_back"],
    ),
    Mutant(
        check="deploy",
        why="systemd never hears that the server is ready",
        file="src/tidings/server/app.py",
        old="""            notify("READY=1")
""",
        new="",
        tests=["tests/deploy/test_systemd.py", "-k", "says_when_it_answers"],
    ),
    Mutant(
        check="G4",
        why="`connected` vouches for what is still on its way",
        file="src/tidings/server/gateway/gateway.py",
        old="            mark = command.since or NO_MARK\n",
        new="            pass\n",
        tests=["tests/gateway/test_catch_up.py", "-k", "vouch"],
    ),
    Mutant(
        check="G4",
        why="a gap that another node has left is not read from the log",
        file="src/tidings/server/gateway/hub.py",
        old="                peer.behind[stream.sid] = last\n                peer.fell_behind()\n",
        new="                pass\n",
        tests=["tests/sim", "-k", "whatever_happens"],
    ),
    Mutant(
        check="G8",
        why="whoever is told that they have joined is asked about under what was remembered before",
        file="src/tidings/server/services/members.py",
        old="            notices.insert(0, AccessChanged(",
        new="            notices.append(AccessChanged(",
        tests=["tests/services/test_members.py"],
    ),
    Mutant(
        check="D13",
        why="streams are not compared with the store: what a crash kept from the bus is lost to others",
        file="src/tidings/server/gateway/nodes.py",
        old="            self._gateway.metrics.bus_healed.inc(hub.recheck(ahead))",
        new="            self._gateway.metrics.bus_healed.inc(len(ahead) * 0)",
        tests=["tests/cluster/test_access.py", "-k", "died_before_it_told"],
    ),
    Mutant(
        check="S2",
        why="a node that is cut off from the bus trusts what it remembers",
        file="src/tidings/server/gateway/nodes.py",
        old="            await self._gateway.changed_elsewhere()\n            self._lost = False",
        new="            self._lost = False",
        tests=["tests/cluster/test_access.py", "-k", "cut_off"],
    ),
    Mutant(
        check="workers",
        why="workers are started before the first one has made what there is only once",
        file="src/tidings/server/commands/workers.py",
        old="return absent if self._opened or self._workers[0].ready else",
        new="return absent if absent else",
        tests=["tests/commands/test_workers.py", "-k", "nobody_else"],
    ),
    Mutant(
        check="workers",
        why="anybody on the machine may say that a worker is ready",
        file="src/tidings/server/commands/workers.py",
        old="if worker.pid and worker.pid in speakers), None)",
        new="if worker.pid), None)",
        tests=["tests/commands/test_workers.py", "-k", "strangers"],
    ),
    Mutant(
        check="workers",
        why="workers outlive a parent that was killed",
        file="src/tidings/server/commands/workers.py",
        old=".prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)",
        new=".prctl(_PR_SET_PDEATHSIG, 0, 0, 0, 0)",
        tests=["tests/commands/test_workers.py", "-k", "parent_is_killed"],
    ),
    Mutant(
        check="workers",
        why="a worker that never drains keeps the service for ever",
        file="src/tidings/server/commands/workers.py",
        old="if self.monotonic() >= self._give_up_at:",
        new="if self._give_up_at < 0:",
        tests=["tests/commands/test_workers.py", "-k", "does_not_drain"],
    ),
    Mutant(
        check="workers",
        why="a worker that serves nobody any more is left alone",
        file="src/tidings/server/commands/workers.py",
        old="self._kill_silent(2 * pace)",
        new="self._kill_silent(float(2**30))",
        tests=["tests/commands/test_workers.py", "-k", "event_loop"],
    ),
    Mutant(
        check="workers",
        why="a port on which somebody listens already is shared with them",
        file="src/tidings/server/app.py",
        old="    _bind(host, port).close()\n",
        new="",
        tests=["tests/cluster/test_workers.py", "-k", "others_listen"],
    ),
    Mutant(
        check="G8",
        why="whose rights hang on somebody who leaves keeps them",
        file="src/tidings/server/services/access.py",
        old="        for user in (*moved.users, *view.relating):",
        new="        for user in moved.users:",
        tests=["tests/services/test_access.py"],
    ),
    Mutant(
        check="G8",
        why="a change of access that was not heard of is skipped over",
        file="src/tidings/server/services/access.py",
        old="view.access_version < moved.version - 1:",
        new="view.access_version < 0:",
        tests=["tests/services/test_access.py"],
    ),
    Mutant(
        check="G8",
        why="a decision under way passes under the version that came after it",
        file="src/tidings/server/services/access.py",
        old="replace(view, access_version=moved.version, member_count=moved.member_count)\n",
        new="view\n        view.access_version, view.member_count = moved.version, moved.member_count\n",
        tests=["tests/services/test_access.py"],
    ),
    Mutant(
        check="receipts",
        why="who joined later counts as having read what was there",
        file="src/tidings/server/services/receipts.py",
        old="        later = self._joined.at_least(seq)",
        new="        later = 0",
        tests=["tests/services/test_receipts.py"],
    ),
    Mutant(
        check="transfer",
        why="only the rows are counted, not what is in them",
        file="src/tidings/server/store/transfer.py",
        old="            if got != expected:",
        new="            if got.rows != expected.rows:",
        tests=["tests/ops/test_transfer.py", "-k", "arrived_otherwise"],
    ),
    Mutant(
        check="transfer",
        why="a node starts on half of the data",
        file="src/tidings/server/app.py",
        old="        await check_target(connection)\n",
        new="",
        tests=["tests/ops/test_transfer.py", "-k", "killed_in_the_middle"],
    ),
    Mutant(
        check="transfer",
        why="the old server starts again beside the new one",
        file="src/tidings/server/app.py",
        old="    check_source(config.data_dir)\n",
        new="",
        tests=["tests/ops/test_transfer.py", "-k", "goes_on_over_postgresql"],
    ),
    Mutant(
        check="transfer",
        why="numbers are given out from the beginning again",
        file="src/tidings/server/store/transfer.py",
        old="            if shape.serial is not None:",
        new="            if shape.serial is not None and False:",
        tests=["tests/ops/test_transfer.py", "-k", "goes_on_over_postgresql"],
    ),
    Mutant(
        check="G4",
        why="events that overtook one another are read from the log, each of them",
        file="src/tidings/server/gateway/hub.py",
        old="        if self._interest is None or (early is not None and len(early) >= EARLY_MAX):",
        new="        if True:",
        tests=["tests/gateway/test_nodes.py", "-k", "overtook_one_another"],
    ),
    Mutant(
        check="G4",
        why="what was overtaken and never comes is waited for until the next event",
        file="src/tidings/server/gateway/hub.py",
        old="            self._put_behind(stream, max(early))",
        new="            pass",
        tests=["tests/gateway/test_nodes.py", "-k", "does_not_come"],
    ),
]

Verdict = Literal["caught", "SURVIVED", "STALE", "BROKEN"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one mutant, and how long its tests took."""

    mutant: Mutant
    verdict: Verdict
    seconds: float
    note: str = ""


def run_tests(root: Path, tests: Sequence[str]) -> tuple[int, str]:
    """pytest's exit code and last line, with `tidings` imported from `src`, and JavaScript from `sdk`, of `root`."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--no-header", "--tb=no", *tests]
    # PYTHONPATH comes before the installed package, for the tests and for every server that they start.
    environ = os.environ | {
        "PYTHONPATH": str(root / "src"),
        "PYTHONDONTWRITEBYTECODE": "1",
        "TIDINGS_TEST_SDK": str(root / "sdk"),
    }
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environ,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=SECONDS_MAX)
    except subprocess.TimeoutExpired:
        # The tests' own servers are in their process group, which is ours to end.
        os.killpg(process.pid, 9)
        process.communicate()
        return 1, "hung"
    return process.returncode, (output.strip().splitlines() or [""])[-1]


def try_mutant(mutant: Mutant) -> Outcome:
    """Apply one mutant to a copy of the source and see whether its tests notice."""
    begun = time.monotonic()

    def outcome(verdict: Verdict, note: str = "") -> Outcome:
        return Outcome(mutant, verdict, time.monotonic() - begun, note)

    with tempfile.TemporaryDirectory(prefix="tidings-mutant-") as folder:
        for part in ("src", "sdk"):
            ignored = shutil.ignore_patterns("__pycache__", "node_modules")
            shutil.copytree(ROOT / part, Path(folder) / part, ignore=ignored)
        (Path(folder) / "sdk/node_modules").symlink_to(ROOT / "sdk/node_modules")
        target = Path(folder) / mutant.file
        text = target.read_text(encoding="utf-8") if target.is_file() else ""
        if (times := text.count(mutant.old)) != 1:
            return outcome("STALE", f"its text occurs {times} times in {mutant.file}")
        target.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
        code, note = run_tests(Path(folder), mutant.tests)
    # pytest: 0 all passed, 1 some failed, 2 interrupted (an import failed), 4 wrong usage, 5 nothing collected.
    verdicts: dict[int, Verdict] = {0: "SURVIVED", 1: "caught", 2: "caught"}
    return outcome(verdicts.get(code, "BROKEN"), note)


def chosen(words: str) -> Iterator[Mutant]:
    """The mutants whose check is `words`, or whose check, file or reason contains it."""
    exact = [mutant for mutant in MUTANTS if mutant.check.lower() == words.lower()]
    yield from exact or (m for m in MUTANTS if words.lower() in f"{m.check} {m.file} {m.why}".lower())


def main(arguments: Sequence[str] | None = None) -> int:
    """Try the mutants, print a table; 0 when all were caught."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-k", default="", metavar="WORDS", help="only these: a check such as D3, or part of a reason")
    parser.add_argument("-l", "--list", action="store_true", help="list them and try none")
    options = parser.parse_args(arguments)
    mutants = list(chosen(options.k))
    if not mutants:
        print(f"no mutant matches {options.k!r}")
        return 1
    if options.list:
        for mutant in mutants:
            print(f"{mutant.check:<6} {mutant.file}: {mutant.why}")
        return 0
    # A test that is red without any mutant would catch them all.
    for tests in sorted({tuple(mutant.tests) for mutant in mutants}):
        code, note = run_tests(ROOT, tests)
        if code != 0:
            print(f"not green to begin with: {' '.join(tests)}: {note}")
            return 1
    bad = 0
    for number, mutant in enumerate(mutants, 1):
        outcome = try_mutant(mutant)
        bad += outcome.verdict != "caught"
        print(
            f"{number:>3}/{len(mutants)} {outcome.verdict:<8} {outcome.seconds:5.1f} s  {mutant.check:<6} "
            f"{mutant.why or mutant.file}" + (f"  [{outcome.note}]" if outcome.verdict != "caught" else ""),
            flush=True,
        )
    print(f"{len(mutants) - bad} of {len(mutants)} mutants caught")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
