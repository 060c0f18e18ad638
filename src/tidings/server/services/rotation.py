"""Changing keys while the server runs: root keys and apps' keys.

Nothing sealed under a stream's key is touched: rotating an app's key wraps the streams' keys anew and reseals the few
boxes that stand directly under the app's key. Each batch is computed outside of any transaction and written by
compare-and-set in a short one of its own: a row that somebody changed meanwhile is met again in the next pass, and
whoever is interrupted goes on where the rows say that it stopped. A marker in `meta` tells a rotation that has to be
finished from a new one.

Who may still hold the old key? A running server learns of a new one within a second or when it first meets it (see
`streams.with_keys`), and until then seals with the old. So an old app key is removed only when nothing stands under it
AND nobody can be about to seal with it: nobody else has the data open, or the new key has been current for
`RETIRE_AFTER_MS`. Root keys are used only to wrap app keys, in transactions that check first that the root key is still
held (`check_root_key`).
Fingerprints (client keys' digests) hang on the index key, which is wrapped anew but never replaced: they stay valid.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from tidings.server.clock import Clock, Ids
from tidings.server.crypto.base import RootKeyProvider
from tidings.server.crypto.keyring import AppCipher, KeyPurpose, Keyring, WrappedKey, WrappedStreamKey
from tidings.server.errors import NotFound, Refusal
from tidings.server.store.base import Row, Store, Tx

from .audit import Action, Line
from .founding import signing_item
from .users import device_item, user_item
from .waking import PRESEND_ITEM, delivery_item, provider_item, token_item, webhook_item

# Rows per transaction: a few milliseconds of the write lock, less than a batch of messages.
BATCH: Final = 200
# Between batches, so that the server's own writes get the lock: SQLite's queue for it is not fair.
PAUSE_SECONDS: Final = 0.002
# A running server looks for others' commits once a second; after this it seals with the new key.
NOTICE_SECONDS: Final = 2.0
# Passes over all rows. The second finds what was written during the first; a third only after a server that took
# longer than it should to notice.
PASSES_MAX: Final = 10
# After this no process can still be about to commit something that it sealed with the old key, stopped ones included.
RETIRE_AFTER_MS: Final = 3_600_000

_MARK: Final = "rotating:"


class RootKeys(RootKeyProvider, Protocol):
    """A provider whose versions can be prepared, made current and taken away."""

    def prepared_kid(self) -> str | None:
        """A version that opens and does not wrap yet, if there is one."""
        ...

    def retire(self, kid: str) -> None:
        """Remove an old version for good."""
        ...


@dataclass(slots=True, frozen=True)
class Boxes:
    """A table with boxes under the app's key. `item` gives the associated data's item from the values of `keys`."""

    table: str
    keys: tuple[str, ...]
    item: Callable[..., bytes]


# Whatever is sealed with an `AppCipher` and stored stands in this list.
BOXES: Final = (
    Boxes("signing_keys", ("kid",), signing_item),
    Boxes("users", ("id",), user_item),
    Boxes("devices", ("user", "id"), device_item),
    Boxes("webhooks", ("id",), webhook_item),
    Boxes("webhook_deliveries", ("webhook", "id"), lambda _webhook, id: delivery_item(id)),
    Boxes("push_providers", ("id",), provider_item),
    Boxes("push_tokens", ("user", "device", "provider"), token_item),
    # One row per app, which has no key of its own: its definition tells it apart from what replaces it.
    Boxes("presend_hooks", ("definition",), lambda _definition: PRESEND_ITEM),
)


@dataclass(slots=True, frozen=True)
class AppRotation:
    """What became of a rotation. `retired`: versions removed; `kept`: old ones that stay for now."""

    app_id: str
    version: int
    resumed: bool
    streams: int
    boxes: int
    retired: tuple[int, ...]
    kept: tuple[int, ...]


@dataclass(slots=True, frozen=True)
class RootRotation:
    """What became of a rotation of the root key."""

    kid: str
    resumed: bool
    rewrapped: int
    retired: tuple[str, ...]
    kept: tuple[str, ...]


@dataclass(slots=True, frozen=True)
class AppKeys:
    """An app's keys as `list_keys` shows them: (purpose, version, root key, made at ms, streams wrapped by it)."""

    app_id: str
    name: str
    rotating: bool
    keys: tuple[tuple[str, int, str, int, int], ...]


@dataclass(slots=True)
class Told:
    """Where a rotation stands: called after each batch with what is done of how much."""

    step: Callable[[str, int, int], None] = field(default=lambda what, done, total: None)


class Rotation:
    """Rotates keys through a store that others use at the same time."""

    def __init__(self, store: Store, keyring: Keyring, root: RootKeys, clock: Clock, ids: Ids) -> None:
        self._store = store
        self._keyring = keyring
        self._root = root
        self._clock = clock
        self._ids = ids

    # ------------------------------------------------------------ listing

    async def list_keys(self) -> list[AppKeys]:
        """Every app's keys, and how many streams each wraps."""

        async def unit(tx: Tx) -> tuple[list[Row], list[Row], list[Row], list[Row]]:
            return (
                await tx.all("SELECT app,id,name FROM apps ORDER BY created_at, id"),
                await tx.all("SELECT app,purpose,version,root_kid,created_at FROM app_keys ORDER BY purpose, version"),
                await tx.all("SELECT app,key_app_version,COUNT(*) FROM streams GROUP BY app,key_app_version"),
                await tx.all("SELECT name FROM meta WHERE name LIKE ?", f"{_MARK}%"),
            )

        apps, keys, counts, marks = await self._store.read(unit)
        streams = {(app, version): count for app, version, count in counts}
        rotating = {name for (name,) in marks}
        return [
            AppKeys(
                id,
                name,
                f"{_MARK}app:{id}" in rotating,
                tuple(
                    (purpose, version, kid, at, streams.get((owner, version), 0) if purpose == KeyPurpose.DATA else 0)
                    for owner, purpose, version, kid, at in keys
                    if owner == app
                ),
            )
            for app, id, name in apps
        ]

    # ------------------------------------------------------------ an app's key

    async def rotate_app(self, app_id: str, *, alone: bool, via: str = "cli", told: Told | None = None) -> AppRotation:
        """Give an app a new key and move everything to it; finishes an interrupted rotation instead of beginning one.

        `alone`: nobody else has the data open or can open it meanwhile, so that the old key may go at once.
        Raises NotFound, Refusal `conflict` when somebody else rotates, CryptoError.
        """
        told = told or Told()
        app = await self._load(app_id)
        version, resumed = await self._begin(app, app_id, via)
        if not resumed and not alone:
            # Not needed for safety; but a server that knows the new key leaves nothing for a further pass.
            await asyncio.sleep(NOTICE_SECONDS)
        streams = boxes = 0
        for number in range(PASSES_MAX):
            moved = await self._rewrap_streams(app, app_id, version, told)
            streams += moved
            for kind in BOXES:
                count = await self._reseal(app, app_id, version, kind, told)
                boxes += count
                moved += count
            # One more look after whatever was moved: rows may have been written behind the first.
            if moved == 0:
                break
            if number > 1:
                await asyncio.sleep(NOTICE_SECONDS)
        retired, kept = await self._retire_app_keys(app, app_id, version, alone=alone, via=via)
        return AppRotation(app_id, version, resumed, streams, boxes, retired, kept)

    async def _load(self, app_id: str) -> int:
        """The app's number; its keys are in the keyring then."""

        async def unit(tx: Tx) -> tuple[int, list[Row]]:
            row = await tx.one("SELECT app FROM apps WHERE id=?", app_id)
            if row is None:
                raise NotFound("app", field="app")
            return row[0], await tx.all("SELECT purpose,version,root_kid,wrapped FROM app_keys WHERE app=?", row[0])

        app, rows = await self._store.read(unit)
        for row in rows:
            self._keyring.load_app_key(app_id, _wrapped(row))
        return app

    async def _begin(self, app: int, app_id: str, via: str) -> tuple[int, bool]:
        """Make and store the next version, or find the one that an interrupted rotation was moving to."""
        fresh = self._keyring.new_app_key(app_id)
        mark = f"{_MARK}app:{app_id}"
        now = self._clock.now_ms()
        line = Line(
            app, self._ids.new_id("au_"), now, via, Action.APP_KEY_ROTATED, f"app:{app_id}", {"version": fresh.version}
        )

        async def unit(tx: Tx) -> tuple[int, bool]:
            begun = await tx.one("SELECT value FROM meta WHERE name=?" + tx.for_update, mark)
            if begun is not None:
                return int(begun[0]), True
            newest = await tx.one("SELECT MAX(version) FROM app_keys WHERE app=? AND purpose='data'", app)
            if newest is None or newest[0] != fresh.version - 1:
                raise Refusal("conflict", f"Somebody else is rotating the key of {app_id}.", field="app")
            self._keyring.check_root_key(fresh.root_kid)
            await tx.execute(
                "INSERT INTO app_keys(app,purpose,version,root_kid,wrapped,created_at) VALUES (?,?,?,?,?,?)",
                app,
                fresh.purpose.value,
                fresh.version,
                fresh.root_kid,
                fresh.wrapped,
                now,
            )
            await tx.execute("INSERT INTO meta(name,value) VALUES (?,?)", mark, str(fresh.version))
            await line.write(tx)
            return fresh.version, False

        version, resumed = await self._store.run(unit)
        if not resumed:
            # Only what is stored may be sealed with.
            self._keyring.load_app_key(app_id, fresh)
        return version, resumed

    async def _rewrap_streams(self, app: int, app_id: str, version: int, told: Told) -> int:
        total = await self._count("SELECT COUNT(*) FROM streams WHERE app=? AND key_app_version<>?", app, version)
        after, moved = -1, 0
        while True:

            async def look(tx: Tx, after: int = after) -> list[Row]:
                return await tx.all(
                    "SELECT sid,key_wrapped,key_version,key_app_version FROM streams"
                    " WHERE app=? AND sid>? AND key_app_version<>? ORDER BY sid LIMIT ?",
                    app,
                    after,
                    version,
                    BATCH,
                )

            rows = await self._store.read(look)
            if not rows:
                return moved
            changes = await asyncio.to_thread(self._rewrapped, app_id, version, rows)

            async def write(tx: Tx, changes: list[tuple[Any, ...]] = changes) -> int:
                done = 0
                for change in changes:
                    done += await tx.execute(
                        "UPDATE streams SET key_wrapped=?, key_app_version=? WHERE sid=? AND key_wrapped=?", *change
                    )
                return done

            moved += await self._store.run(write)
            after = rows[-1][0]
            told.step(f"{app_id}: stream keys", moved, max(total, moved))
            await asyncio.sleep(PAUSE_SECONDS)

    def _rewrapped(self, app_id: str, version: int, rows: list[Row]) -> list[tuple[Any, ...]]:
        changes = []
        for sid, wrapped, key_version, app_version in rows:
            box = bytes(wrapped)
            if box:
                key = WrappedStreamKey(version=key_version, app_key_version=app_version, wrapped=box)
                box = self._keyring.rewrap_stream_key(app_id, str(sid), key).wrapped
            # A stream that was shredded has no key: only its number moves on.
            changes.append((box, version, sid, wrapped))
        return changes

    async def _reseal(self, app: int, app_id: str, version: int, kind: Boxes, told: Told) -> int:
        table, keys = kind.table, ", ".join(f"{kind.table}.{key}" for key in kind.keys)
        marks = ",".join("?" * len(kind.keys))
        where = f"{table}.app=? AND sealed IS NOT NULL AND substr(sealed,2,2)<>?"
        newest = version.to_bytes(2)
        total = await self._count(f"SELECT COUNT(*) FROM {table} WHERE {where}", app, newest)
        cipher = self._keyring.app_cipher(app_id)
        after: tuple[str, ...] = ("",) * len(kind.keys)
        moved = 0
        while total:

            async def look(tx: Tx, after: tuple[str, ...] = after) -> list[Row]:
                return await tx.all(
                    f"SELECT {keys}, sealed FROM {table} WHERE {where} AND ({keys})>({marks}) ORDER BY {keys} LIMIT ?",
                    app,
                    newest,
                    *after,
                    BATCH,
                )

            rows = await self._store.read(look)
            if not rows:
                break
            changes = await asyncio.to_thread(_resealed, cipher, kind, app, rows)
            matches = " AND ".join(f"{table}.{key}=?" for key in kind.keys)

            async def write(tx: Tx, changes: list[tuple[Any, ...]] = changes, matches: str = matches) -> int:
                done = 0
                for change in changes:
                    done += await tx.execute(
                        f"UPDATE {table} SET sealed=? WHERE {table}.app=? AND {matches} AND sealed=?", *change
                    )
                return done

            moved += await self._store.run(write)
            after = tuple(rows[-1][:-1])
            told.step(f"{app_id}: {table.replace('_', ' ')}", moved, max(total, moved))
            await asyncio.sleep(PAUSE_SECONDS)
        return moved

    async def _retire_app_keys(
        self, app: int, app_id: str, version: int, *, alone: bool, via: str
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """End the rotation, and remove older versions that nothing stands under; which went and which stay."""
        now = self._clock.now_ms()
        audit_id = self._ids.new_id("au_")

        async def unit(tx: Tx) -> tuple[tuple[int, ...], tuple[int, ...]]:
            rows = await tx.all("SELECT version,created_at FROM app_keys WHERE app=? AND purpose='data'", app)
            since = max((at for number, at in rows if number == version), default=now)
            old = sorted(number for number, _ in rows if number < version)
            used = await tx.one(
                "SELECT 1 FROM streams WHERE app=? AND key_app_version<>? AND length(key_wrapped)>0 LIMIT 1",
                app,
                version,
            )
            for kind in BOXES:
                used = used or await tx.one(
                    f"SELECT 1 FROM {kind.table} WHERE {kind.table}.app=? AND sealed IS NOT NULL"
                    " AND substr(sealed,2,2)<>? LIMIT 1",
                    app,
                    version.to_bytes(2),
                )
            if used is not None:
                # The marker stays: running it again goes on.
                return (), tuple(old)
            await tx.execute("DELETE FROM meta WHERE name=?", f"{_MARK}app:{app_id}")
            if not old or not (alone or now - since >= RETIRE_AFTER_MS):
                return (), tuple(old)
            for number in old:
                await tx.execute("DELETE FROM app_keys WHERE app=? AND purpose='data' AND version=?", app, number)
            await Line(app, audit_id, now, via, Action.APP_KEY_RETIRED, f"app:{app_id}", {"versions": list(old)}).write(
                tx
            )
            return tuple(old), ()

        return await self._store.run(unit)

    async def retire(self, app_id: str, *, alone: bool, via: str = "cli") -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Remove an app's old keys that nothing needs any more, without rotating; which went and which stay."""
        app = await self._load(app_id)
        newest = await self._count("SELECT MAX(version) FROM app_keys WHERE app=? AND purpose='data'", app)
        return await self._retire_app_keys(app, app_id, newest, alone=alone, via=via)

    # ------------------------------------------------------------ the root key

    async def rotate_root(
        self, *, keep_old: bool = False, prepared: bool = False, told: Told | None = None
    ) -> RootRotation:
        """Take the prepared root key or a new one, wrap every app's keys with it, and retire the old unless `keep_old`.

        Finishes an interrupted rotation instead of beginning one. `prepared`: begin only with a key that was prepared,
        because others have files of their own. Raises Refusal `conflict` when that is not so, CryptoError.
        """
        told = told or Told()
        kid, resumed = await self._begin_root(prepared=prepared)
        total = await self._count("SELECT COUNT(*) FROM app_keys WHERE root_kid<>?", kid)
        moved = 0
        for _ in range(PASSES_MAX):

            async def look(tx: Tx) -> list[Row]:
                return await tx.all(
                    "SELECT a.id, k.app, k.purpose, k.version, k.root_kid, k.wrapped FROM app_keys k"
                    " JOIN apps a ON a.app=k.app WHERE k.root_kid<>? ORDER BY k.app, k.purpose, k.version",
                    kid,
                )

            rows = await self._store.read(look)
            if not rows:
                break
            for start in range(0, len(rows), BATCH):
                chunk = rows[start : start + BATCH]
                changes = await asyncio.to_thread(self._rewrapped_app_keys, chunk)

                async def write(tx: Tx, changes: list[tuple[Any, ...]] = changes) -> int:
                    done = 0
                    for change in changes:
                        done += await tx.execute(
                            "UPDATE app_keys SET root_kid=?, wrapped=? WHERE app=? AND purpose=? AND version=?"
                            " AND root_kid=?",
                            *change,
                        )
                    return done

                moved += await self._store.run(write)
                told.step("apps' keys", moved, max(total, moved))
                await asyncio.sleep(PAUSE_SECONDS)
        retired, kept = await self._retire_root_keys(kid, keep_old=keep_old)
        return RootRotation(kid, resumed, moved, retired, kept)

    async def _begin_root(self, *, prepared: bool) -> tuple[str, bool]:
        mark = f"{_MARK}root"

        async def look(tx: Tx) -> tuple[Row | None, Row | None]:
            return (
                await tx.one("SELECT value FROM meta WHERE name=?", mark),
                await tx.one("SELECT 1 FROM app_keys WHERE root_kid<>? LIMIT 1", self._root.current_kid),
            )

        begun, behind = await self._store.read(look)
        current = self._root.current_kid
        if begun is not None or behind is not None:
            return current, True
        if prepared and self._root.prepared_kid() is None:
            raise Refusal(
                "conflict",
                "No root key is prepared. Nodes with a key file of their own must have the new key before anything is"
                " wrapped with it: run `tidings keys prepare-root`, copy the file to every node, then rotate.",
                field="root_key",
            )
        kid = await asyncio.to_thread(self._root.add_version)

        async def write(tx: Tx) -> None:
            await tx.execute(
                "INSERT INTO meta(name,value) VALUES (?,?) ON CONFLICT (name) DO UPDATE SET value=excluded.value",
                mark,
                kid,
            )

        await self._store.run(write)
        return kid, False

    async def retire_root(self) -> tuple[str, ...]:
        """Remove the old root keys from the key file, if nothing is wrapped by them any more; which went.

        Raises Refusal `conflict` when something is: an app's key that another node made before it had the new file.
        """
        retired, kept = await self._retire_root_keys(self._root.current_kid, keep_old=False)
        if kept:
            raise Refusal(
                "conflict",
                f"Something is still wrapped by {', '.join(kept)}: run `tidings keys rotate-root` again, which wraps it"
                " anew, and then this.",
                field="root_key",
            )
        return retired

    def _rewrapped_app_keys(self, rows: list[Row]) -> list[tuple[Any, ...]]:
        changes = []
        for app_id, app, *key in rows:
            old = _wrapped(key)
            new = self._keyring.rewrap_app_key(app_id, old)
            changes.append((new.root_kid, new.wrapped, app, old.purpose.value, old.version, old.root_kid))
        return changes

    async def _retire_root_keys(self, kid: str, *, keep_old: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """End the rotation and remove the old root keys. They go while the write lock is held: whoever stores an app's
        key checks under the same lock that its root key is still there."""

        async def unit(tx: Tx) -> tuple[tuple[str, ...], tuple[str, ...]]:
            left = await tx.one("SELECT root_kid FROM app_keys WHERE root_kid<>? LIMIT 1", kid)
            # What comes after the current one is prepared, and needed soon.
            held = tuple(self._root.kids())
            old = held[: held.index(kid)]
            if left is not None:
                return (), old
            await tx.execute("DELETE FROM meta WHERE name=?", f"{_MARK}root")
            if keep_old:
                return (), old
            for other in old:
                self._root.retire(other)
            return old, ()

        return await self._store.run(unit)

    # ------------------------------------------------------------ inside

    async def _count(self, sql: str, *args: Any) -> int:
        async def unit(tx: Tx) -> int:
            row = await tx.one(sql, *args)
            return 0 if row is None or row[0] is None else int(row[0])

        return await self._store.read(unit)


def _wrapped(row: Any) -> WrappedKey:
    purpose, version, root_kid, wrapped = row
    return WrappedKey(purpose=KeyPurpose(purpose), version=version, root_kid=root_kid, wrapped=bytes(wrapped))


def _resealed(cipher: AppCipher, kind: Boxes, app: int, rows: list[Row]) -> list[tuple[Any, ...]]:
    changes = []
    for *key, sealed in rows:
        box = cipher.reseal(bytes(sealed), kind.item(*key))
        changes.append((box, app, *key, sealed))
    return changes
