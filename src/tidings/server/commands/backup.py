"""`tidings backup` and `tidings restore`: a consistent copy while the server runs, and putting it in place.

A backup is a directory: `tidings.db`, `manifest.json` and, when asked for, `root.key`. It appears under its name only
when it is whole and on disk.

After a restore history may have been rolled back: messages that clients have already seen are gone, and their numbers
will be given out again. So every stream gets a new epoch, which tells clients to start over, and counts as moved at the
moment of the restore: clients that come back with a mark are told of streams that moved since, and would otherwise
never hear of the new epoch.
"""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import sqlite3
import time
from contextlib import closing
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Final

import msgspec
from cyclopts import Parameter

from tidings.server.config import Config
from tidings.server.errors import StoreCorrupt, TidingsError
from tidings.server.store.sqlite import connect

from .datadir import COMMANDS_LOCK, RESTORING, ROTATION_LOCK, SERVER_LOCK, fsync_directory, fsync_file, hold, is_private
from .terminal import ConfigOption, DataDirOption, console, progress, settings

DATABASE: Final = "tidings.db"
MANIFEST: Final = "manifest.json"
KEYS: Final = "root.key"
# Pages copied per step, 4 MiB: the server's writer waits at most for one step, a few milliseconds on a slow disk.
STEP_PAGES: Final = 1_024
# Between steps, so that on a busy disk the server's own fsyncs get their turn.
STEP_PAUSE_SECONDS: Final = 0.001
CHUNK_BYTES: Final = 1 << 20
# Sealed rows opened to check that key file and database belong together: enough to meet every app and key version of
# ordinary installations, few enough to take well under a second.
SAMPLE_ROWS: Final = 200
# Streams given a new epoch between two steps of the progress bar.
EPOCHS_STEP: Final = 5_000
FORMAT: Final = "tidings-backup"
_EPOCH_BYTES: Final = 5
# What may lie in a data directory without there being data.
_NOT_DATA: Final = (SERVER_LOCK, COMMANDS_LOCK, ROTATION_LOCK, "root.key", "root.key.lock", "lost+found")


class BackupFailed(TidingsError):
    """A backup or a restore could not be done. The text says why and what to do."""


class Manifest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=False):
    """What `manifest.json` says. `needs_root_keys`: the ids of the root keys without which nothing can be read."""

    format: str
    tidings: str
    made_at: datetime
    schema_revision: str
    database: str
    database_bytes: int
    database_sha256: str
    needs_root_keys: list[str]
    includes_keys: bool


# ---------------------------------------------------------------- backup


def backup(
    dest: Path,
    /,
    *,
    include_keys: Annotated[bool, Parameter(negative="")] = False,
    verify: Annotated[bool, Parameter(negative="")] = False,
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
) -> None:
    """Copy all data into the new directory DEST, also while the server runs.

    The copy holds everything that was acknowledged before it was finished. The key file is NOT in it, on purpose:
    backups travel and lie around, and without the key file nobody can read them. Keep a copy of the key file somewhere
    else, once and after each `tidings keys rotate-root`: a backup without its key file is lost.

    For example:

        tidings backup /backup/tidings-$(date +%F) --verify

        tidings backup /media/usb/all --include-keys

    Parameters
    ----------
    dest
        A directory that does not exist yet.
    include_keys
        Put the key file in too. Whoever has this backup can then read everything.
    verify
        Check the copy afterwards: its pages and indexes, and that a sample of its rows opens with the key file.
    """
    made = make_backup(settings(config, data_dir), dest, include_keys=include_keys, verify=verify)
    err = console()
    err.print(f"[bold green]Backed up[/] to {dest}: {_size(made.database_bytes)}, schema {made.schema_revision}.")
    if verify:
        err.print("Checked: the database is sound, and its rows open with the key file.")
    if include_keys:
        err.print("[bold]The key file is in it:[/] guard this copy like the keys themselves.")
    elif made.needs_root_keys:
        err.print(f"The key file is not in it. Reading it needs root key {', '.join(made.needs_root_keys)}.")


def make_backup(config: Config, dest: Path, *, include_keys: bool = False, verify: bool = False) -> Manifest:
    """Make a backup; its manifest. Raises BackupFailed, StoreCorrupt, KeyFileError, OSError: then DEST is not there."""
    _check_embedded(config)
    source = config.data_dir / DATABASE
    if not source.is_file():
        raise BackupFailed(f"There is no database in {config.data_dir}: name the server's directory with --data-dir.")
    if os.path.lexists(dest):
        raise BackupFailed(f"{dest} exists already: a backup never overwrites anything. Choose another name.")
    dest.parent.mkdir(parents=True, exist_ok=True)
    # Under another name until it is whole: nobody takes half a backup for one.
    partial = dest.with_name(f".{dest.name}.{os.getpid()}.partial")
    partial.mkdir(mode=0o700)
    try:
        copy = partial / DATABASE
        _copy_database(source, copy)
        manifest = _describe(copy, include_keys)
        if include_keys:
            _copy_private(config.key_file, partial / KEYS)
        if verify:
            _verify(copy, config.key_file)
        _write_private(partial / MANIFEST, msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n")
        fsync_directory(partial)
        # rename(2) replaces an empty directory of the name, were one made meanwhile; anything else is refused.
        partial.rename(dest)
        fsync_directory(dest.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return manifest


def _check_embedded(config: Config) -> None:
    if not config.embedded:
        raise BackupFailed(
            "The data is in PostgreSQL: back it up with PostgreSQL's own tools, and the key file beside it; see "
            "docs/operate/postgresql.md."
        )


def _copy_database(source: Path, target: Path) -> None:
    """Copy a live database with SQLite's online backup, as one ordinary file without a log beside it.

    https://sqlite.org/backup.html: when another process writes between two steps the copy starts over by itself, which
    under constant load would never end. A read transaction held in our own connection gives it one snapshot instead:
    in WAL mode writers go on, and the copy is as of this moment.
    """
    os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600))
    with closing(connect(source, read_only=True)) as live, closing(sqlite3.connect(target)) as copy:
        live.execute("BEGIN")
        live.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()
        with progress() as bar:
            task = bar.add_task("Copying pages", total=None)

            def moved(_status: int, remaining: int, total: int) -> None:
                bar.update(task, total=total, completed=total - remaining)
                time.sleep(STEP_PAUSE_SECONDS)

            live.backup(copy, pages=STEP_PAGES, progress=moved, sleep=0.05)
        live.execute("ROLLBACK")
        # The copied header says WAL. A single file is what a backup should be.
        copy.execute("PRAGMA journal_mode=DELETE")
    fsync_file(target)


def _describe(copy: Path, include_keys: bool) -> Manifest:
    with closing(sqlite3.connect(f"{copy.absolute().as_uri()}?mode=ro", uri=True)) as connection:
        row = connection.execute("SELECT value FROM meta WHERE name='schema_revision'").fetchone()
        kids = [kid for (kid,) in connection.execute("SELECT DISTINCT root_kid FROM app_keys ORDER BY root_kid")]
    return Manifest(
        format=FORMAT,
        tidings=version("tidings"),
        made_at=datetime.now(UTC).replace(microsecond=0),
        schema_revision="" if row is None else str(row[0]),
        database=DATABASE,
        database_bytes=copy.stat().st_size,
        database_sha256=_sha256(copy),
        needs_root_keys=kids,
        includes_keys=include_keys,
    )


# ---------------------------------------------------------------- checking


def _verify(copy: Path, key_file: Path) -> None:
    """Look at every page and index, then open a sample of sealed rows. Raises StoreCorrupt, CryptoError."""
    check_integrity(copy)
    opened = open_sample(copy, key_file)
    if opened == 0 and _has_apps(copy):
        raise StoreCorrupt(f"{copy}: no sealed row was found to try the key file with.")


def check_integrity(path: Path) -> None:
    """Raise StoreCorrupt unless SQLite finds the file sound."""
    with console().status("Checking pages and indexes …"), closing(_read_only(path)) as connection:
        try:
            found = connection.execute("PRAGMA integrity_check(1)").fetchone()[0]
        except sqlite3.DatabaseError as error:
            found = str(error)
    if found != "ok":
        raise StoreCorrupt(f"{path} is damaged: {found}. Use another backup.")


def open_sample(path: Path, key_file: Path) -> int:
    """Open the newest sealed rows of a database with a key file; how many. Raises KeyFileError, CryptoError."""
    from tidings.server.crypto.keyfile import KeyFile
    from tidings.server.crypto.keyring import KeyPurpose, Keyring, WrappedKey, WrappedStreamKey
    from tidings.server.services.founding import signing_item

    keyring = Keyring(KeyFile(key_file, create=False))
    opened = 0
    with closing(_read_only(path)) as connection:
        names = dict(connection.execute("SELECT app, id FROM apps"))
        for app, purpose, number, kid, box in connection.execute(
            "SELECT app, purpose, version, root_kid, wrapped FROM app_keys"
        ):
            wrapped = WrappedKey(purpose=KeyPurpose(purpose), version=number, root_kid=kid, wrapped=box)
            keyring.load_app_key(names[app], wrapped)
            opened += 1
        for app, kid, sealed in connection.execute(
            "SELECT app, kid, sealed FROM signing_keys WHERE sealed IS NOT NULL LIMIT ?", (SAMPLE_ROWS,)
        ):
            keyring.app_cipher(names[app]).open(sealed, signing_item(kid))
        for app, user, sealed in connection.execute(
            "SELECT app, id, sealed FROM users WHERE sealed IS NOT NULL LIMIT ?", (SAMPLE_ROWS,)
        ):
            keyring.app_cipher(names[app]).open(sealed, b"user:" + user.encode())
        for app, sid, key, number, app_version, item, sealed in connection.execute(
            "SELECT s.app, s.sid, s.key_wrapped, s.key_version, s.key_app_version, coalesce(e.item, m.id),"
            " coalesce(e.sealed, m.sealed) AS box FROM"
            " (SELECT sid FROM streams WHERE head>0 AND length(key_wrapped)>0 ORDER BY moved_at DESC LIMIT ?) v"
            " JOIN streams s ON s.sid=v.sid LEFT JOIN events e ON e.app=s.app AND e.sid=s.sid AND e.seq=s.head"
            " LEFT JOIN messages m ON m.app=s.app AND m.sid=s.sid AND m.seq=s.head WHERE box IS NOT NULL",
            (SAMPLE_ROWS,),
        ):
            stream_key = WrappedStreamKey(version=number, app_key_version=app_version, wrapped=key)
            keyring.cipher(names[app], str(sid), stream_key).open(sealed, item.encode())
            opened += 1
    return opened


def _has_apps(path: Path) -> bool:
    with closing(_read_only(path)) as connection:
        return connection.execute("SELECT 1 FROM apps LIMIT 1").fetchone() is not None


def _read_only(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)


# ---------------------------------------------------------------- restore


def restore(
    src: Path,
    /,
    *,
    force: Annotated[bool, Parameter(negative="")] = False,
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
) -> None:
    """Put the backup in directory SRC in place. The server must not run.

    The key file that belongs to the backup must be in place first, unless the backup includes it. Connected apps and
    devices notice that history may have been rolled back and load it anew; nobody has to do anything on them.

    For example:

        tidings restore /backup/tidings-2026-01-31

        tidings restore /backup/tidings-2026-01-31 --data-dir /var/lib/tidings --force

    Parameters
    ----------
    src
        A directory that `tidings backup` made.
    force
        Restore although there is data. It is moved aside within the data directory, and never deleted.
    """
    done = restore_backup(settings(config, data_dir), src, force=force)
    err = console()
    err.print(f"[bold green]Restored[/] {src} (made {done.manifest.made_at:%Y-%m-%d %H:%M:%S} UTC).")
    if done.aside is not None:
        err.print(f"What was there before is in {done.aside}.")
    if done.keys is not None:
        err.print(f"The backup's key file was put at {done.keys}.")
    err.print(
        f"All {done.streams:,} streams have a new epoch. At its next connection each client is told `epoch_changed`,\n"
        "drops what it has of a conversation and loads it again; messages after the backup are gone."
    )
    err.print("Next: tidings serve")


class Restored(msgspec.Struct, frozen=True, kw_only=True):
    """What a restore did. `aside`: where the old data went; `keys`: where the backup's key file was put."""

    manifest: Manifest
    streams: int
    aside: Path | None
    keys: Path | None


def restore_backup(config: Config, src: Path, *, force: bool = False) -> Restored:
    """Put a backup in place. Raises BackupFailed, DataDirInUse, StoreCorrupt, KeyFileError, CryptoError, OSError.

    Until the moment of the exchange nothing of the old data is touched; an exchange that is interrupted is finished by
    running the same again, and until then `tidings serve` refuses the directory.
    """
    from tidings.server.store import migrations

    _check_embedded(config)
    manifest = read_manifest(src)
    source = src / manifest.database
    known = migrations.known_revisions()
    if manifest.schema_revision not in known:
        raise BackupFailed(
            f"{src} was made by Tidings {manifest.tidings}, with schema revision {manifest.schema_revision}; this one "
            f"knows {migrations.HEAD} and earlier. Restore it with that version or a newer one."
        )
    directory = config.data_dir
    with hold(directory, f"a restore of {src}"), hold(directory, f"a restore of {src}", lock=COMMANDS_LOCK):
        unfinished = directory / RESTORING
        resumed = unfinished.exists()
        old = [path for path in directory.iterdir() if path.name not in _NOT_DATA and not _is_ours(path)]
        if old and not force and not resumed:
            raise BackupFailed(
                f"{directory} holds data ({', '.join(sorted(path.name for path in old)[:3])}). Say --force to move it "
                "aside and restore, or name another --data-dir."
            )
        incoming = directory / f"{DATABASE}.restoring"
        for path in (incoming, *_logs(incoming)):
            path.unlink(missing_ok=True)
        key_file, keys_from = _key_file_for(config, src, manifest)
        try:
            _copy_checked(source, incoming, manifest)
            check_integrity(incoming)
            open_sample(incoming, key_file)
            streams = _new_epochs(incoming)
        except BaseException:
            for path in (incoming, *_logs(incoming)):
                path.unlink(missing_ok=True)
            raise
        aside = _unused(directory, f"before-restore-{datetime.now(UTC):%Y%m%dT%H%M%SZ}")
        _exchange(directory, incoming, aside)
        placed = None
        if keys_from is not None:
            placed = _place_keys(keys_from, config.key_file, aside)
        unfinished.unlink(missing_ok=True)
        fsync_directory(directory)
    return Restored(manifest=manifest, streams=streams, aside=aside if aside.exists() else None, keys=placed)


def read_manifest(src: Path) -> Manifest:
    """What a backup says of itself. Raises BackupFailed."""
    try:
        manifest = msgspec.json.decode((src / MANIFEST).read_bytes(), type=Manifest)
    except (FileNotFoundError, NotADirectoryError):
        raise BackupFailed(f"{src} is not a backup: there is no {MANIFEST} in it.") from None
    except msgspec.DecodeError as error:
        raise BackupFailed(f"{src / MANIFEST} is malformed: {error}. Use another backup.") from None
    if manifest.format != FORMAT or manifest.database != DATABASE:
        raise BackupFailed(f"{src / MANIFEST} does not describe a backup of this server.")
    return manifest


def _is_ours(path: Path) -> bool:
    return path.name.startswith("before-restore-") or path.name in (RESTORING, f"{DATABASE}.restoring")


def _logs(database: Path) -> tuple[Path, ...]:
    return tuple(database.with_name(database.name + suffix) for suffix in ("-wal", "-shm", "-journal"))


def _copy_checked(source: Path, target: Path, manifest: Manifest) -> None:
    """Copy a backup's database and compare its checksum on the way. Raises BackupFailed."""
    digest = hashlib.sha256()
    fd = os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    with progress() as bar, source.open("rb") as reader, open(fd, "wb") as writer:
        task = bar.add_task("Copying", total=manifest.database_bytes)
        while chunk := reader.read(CHUNK_BYTES):
            digest.update(chunk)
            writer.write(chunk)
            bar.advance(task, len(chunk))
        writer.flush()
        os.fsync(writer.fileno())
    if digest.hexdigest() != manifest.database_sha256:
        raise BackupFailed(f"{source} is not what was backed up: its checksum differs. Use another backup.")


def _key_file_for(config: Config, src: Path, manifest: Manifest) -> tuple[Path, Path | None]:
    """The key file that opens the backup, and the one to put in place if it is not there yet. Raises BackupFailed."""
    from tidings.server.crypto.keyfile import KeyFile

    needed = set(manifest.needs_root_keys)
    if config.key_file.exists() and needed <= set(KeyFile(config.key_file, create=False).kids()):
        return config.key_file, None
    inside = src / KEYS
    if inside.is_file() and is_private(inside) and needed <= set(KeyFile(inside, create=False).kids()):
        return inside, inside
    if inside.is_file() and not is_private(inside):
        raise BackupFailed(f"{inside} can be read by other accounts: chmod 600 {inside}, then try again.")
    raise BackupFailed(
        f"This backup needs root key {', '.join(sorted(needed))}, and {config.key_file} does not hold it. Put the key "
        "file that was in use when the backup was made there (mode 0600), then try again."
    )


def _new_epochs(path: Path) -> int:
    """Give every stream another epoch and count it as moved now; how many. One transaction."""
    now = time.time_ns() // 1_000_000
    with closing(connect(path)) as connection:
        sids = [sid for (sid,) in connection.execute("SELECT sid FROM streams ORDER BY sid")]
        connection.execute("BEGIN IMMEDIATE")
        with progress() as bar:
            task = bar.add_task("New epochs", total=len(sids))
            for start in range(0, len(sids), EPOCHS_STEP):
                chunk = sids[start : start + EPOCHS_STEP]
                connection.executemany(
                    "UPDATE streams SET epoch=?, moved_at=? WHERE sid=?",
                    [(base64.b32encode(os.urandom(_EPOCH_BYTES)).decode().lower(), now, sid) for sid in chunk],
                )
                bar.advance(task, len(chunk))
        connection.execute("COMMIT")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    # The last connection has taken the log with it: the file alone is the database.
    for log in _logs(path):
        if log.exists() and log.stat().st_size:
            raise BackupFailed(f"{log} was left over: is another program looking at {path}?")
        log.unlink(missing_ok=True)
    fsync_file(path)
    return len(sids)


def _unused(directory: Path, name: str) -> Path:
    """A path in the directory that nothing has yet: what was moved aside before is never written over."""
    path, number = directory / name, 1
    while path.exists():
        number += 1
        path = directory / f"{name}-{number}"
    return path


def _exchange(directory: Path, incoming: Path, aside: Path) -> None:
    """Move what is there aside and the new database into place. Interrupted, it may be run again."""
    _write_private(directory / RESTORING, aside.name.encode() + b"\n", replace=True)
    fsync_directory(directory)
    old = [path for path in directory.iterdir() if path.name not in _NOT_DATA and not _is_ours(path)]
    if old:
        aside.mkdir(mode=0o700)
        # The log goes with its database: beside another one it would be taken for that one's.
        for path in sorted(old, key=lambda path: path.name, reverse=True):
            path.rename(aside / path.name)
        fsync_directory(aside)
    incoming.rename(directory / DATABASE)
    fsync_directory(directory)


def _place_keys(source: Path, target: Path, aside: Path) -> Path:
    """Copy the backup's key file into place; one that is there goes aside."""
    if target.exists():
        aside.mkdir(mode=0o700, exist_ok=True)
        target.rename(aside / target.name)
        fsync_directory(aside)
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = target.with_name(f"{target.name}.restoring")
    temporary.unlink(missing_ok=True)
    _copy_private(source, temporary)
    temporary.rename(target)
    fsync_directory(target.parent)
    return target


# ---------------------------------------------------------------- files


def _copy_private(source: Path, target: Path) -> None:
    _write_private(target, source.read_bytes())


def _write_private(path: Path, content: bytes, *, replace: bool = False) -> None:
    flags = os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC | (os.O_TRUNC if replace else os.O_EXCL)
    with open(os.open(path, flags, 0o600), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
