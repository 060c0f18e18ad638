"""The schema, once for both databases: SQLAlchemy Core tables that Alembic compares with and `create_all` builds.

Conventions: every key begins with the app, and with the stream where there is one, so that the tables shard by
tenant and stream. Times are milliseconds since 1970 (UTC). Columns named `sealed` hold ciphertext; the item that
their associated data names is given beside them. `sid` numbers a stream inside the server and is never shown.

Texts compare bytewise in both databases: pages of identifiers, and cursors into them, must not depend on a language.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import BigInteger, Column, Index, Integer, LargeBinary, MetaData, PrimaryKeyConstraint, Table, Text

metadata = MetaData()

# SQLite compares bytes anyway; PostgreSQL would use the database's language.
TEXT: Final = Text().with_variant(Text(collation="C"), "postgresql")


def _int(name: str, *, null: bool = False, default: str | None = None) -> Column[int]:
    return Column(name, BigInteger, nullable=null, server_default=default)


def _text(name: str, *, null: bool = False, default: str | None = None) -> Column[str]:
    return Column(name, TEXT, nullable=null, server_default=default)


def _blob(name: str, *, null: bool = False) -> Column[bytes]:
    return Column(name, LargeBinary, nullable=null)


meta = Table("meta", metadata, Column("name", TEXT, primary_key=True), _text("value"))

apps = Table(
    "apps",
    metadata,
    # The app's number inside the server.
    Column("app", BigInteger().with_variant(Integer, "sqlite"), primary_key=True),
    Column("id", TEXT, nullable=False, unique=True),
    _text("name"),
    _text("settings"),
    _int("created_at"),
)

# Wrapped by the root key. `purpose`: data (wraps stream keys, seals profiles) or index (keys fingerprints).
app_keys = Table(
    "app_keys",
    metadata,
    _int("app"),
    _text("purpose"),
    _int("version"),
    _text("root_kid"),
    _blob("wrapped"),
    _int("created_at"),
    PrimaryKeyConstraint("app", "purpose", "version"),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", TEXT, primary_key=True),
    _int("app"),
    _text("name"),
    _blob("secret_hash"),
    _text("scopes"),
    _int("created_at"),
    _int("expires_at", null=True),
    _int("revoked_at", null=True),
    _int("last_used_at", null=True),
    Index("api_keys_app", "app"),
)

# Keys that verify users' tokens; HS256 secrets are sealed (item: `signing:` + kid), public keys stand as PEM.
signing_keys = Table(
    "signing_keys",
    metadata,
    _int("app"),
    _text("kid"),
    _text("algorithm"),
    _blob("sealed", null=True),
    _text("public_key", null=True),
    _text("status"),
    _int("created_at"),
    PrimaryKeyConstraint("app", "kid"),
)

identity_providers = Table(
    "identity_providers",
    metadata,
    _int("app"),
    _text("id"),
    _text("jwks_url"),
    _text("algorithms"),
    _int("cache_seconds"),
    _int("created_at"),
    PrimaryKeyConstraint("app", "id"),
)

roles = Table(
    "roles",
    metadata,
    _int("app"),
    _text("scope"),
    _text("name"),
    _text("grants"),
    PrimaryKeyConstraint("app", "scope", "name"),
)

channel_types = Table(
    "channel_types",
    metadata,
    _int("app"),
    _text("name"),
    _text("definition"),
    PrimaryKeyConstraint("app", "name"),
)

relations = Table(
    "relations",
    metadata,
    _int("app"),
    _text("user"),
    _text("other"),
    _text("kind"),
    PrimaryKeyConstraint("app", "user", "other", "kind"),
    Index("relations_other", "app", "other"),
)

# `sealed`: the profile (name, avatar_url, custom), item `user:` + id, under the app key.
users = Table(
    "users",
    metadata,
    _int("app"),
    _text("id"),
    _int("sid"),
    _text("role"),
    _blob("sealed", null=True),
    _text("labels", default="{}"),
    _int("created_at"),
    _int("updated_at"),
    _int("last_seen_at", null=True),
    _int("deactivated_at", null=True),
    _int("deleted_at", null=True),
    # Tokens issued before this moment are void.
    _int("tokens_after", default="0"),
    _int("invisible", default="0"),
    PrimaryKeyConstraint("app", "id"),
    Index("users_created", "app", "created_at", "id"),
)

labels = Table(
    "labels",
    metadata,
    _int("app"),
    # `user` or `channel`.
    _text("noun"),
    _text("name"),
    _text("value"),
    _text("id"),
    PrimaryKeyConstraint("app", "noun", "name", "value", "id"),
    Index("labels_id", "app", "noun", "id"),
    sqlite_with_rowid=False,
)

revoked_tokens = Table(
    "revoked_tokens",
    metadata,
    _int("app"),
    _text("jti"),
    _int("expires_at"),
    PrimaryKeyConstraint("app", "jti"),
)

devices = Table(
    "devices",
    metadata,
    _int("app"),
    _text("user"),
    _text("id"),
    _text("platform", null=True),
    # The name, item `device:` + user + `/` + id, under the app key.
    _blob("sealed", null=True),
    _int("created_at"),
    _int("last_seen_at"),
    PrimaryKeyConstraint("app", "user", "id"),
)

# How far each device of each user has acknowledged each stream.
device_positions = Table(
    "device_positions",
    metadata,
    _int("app"),
    _text("user"),
    _text("device"),
    _int("sid"),
    _int("seq"),
    _int("at"),
    PrimaryKeyConstraint("app", "user", "device", "sid"),
    sqlite_with_rowid=False,
)

streams = Table(
    "streams",
    metadata,
    Column("sid", BigInteger().with_variant(Integer, "sqlite"), primary_key=True),
    _int("app"),
    # `channel` or `user`, and the channel's or user's id.
    _text("kind"),
    _text("ref"),
    _text("epoch"),
    _int("head", default="0"),
    # Messages that count as unread: neither system nor silent.
    _int("counted", default="0"),
    _int("messages", default="0"),
    # The oldest seq that is still there, minus one: cursors below it have expired.
    _int("floor", default="0"),
    _int("moved_at"),
    _int("last_message_at", null=True),
    # Grows whenever who may do what here may have changed; an append authorised under an older one is refused.
    _int("access_version", default="1"),
    _blob("key_wrapped", null=True),
    _int("key_version", null=True),
    _int("key_app_version", null=True),
    Index("streams_ref", "app", "kind", "ref", unique=True),
    Index("streams_moved", "app", "moved_at"),
)

# `sealed`: name, description, avatar_url, custom; item `channel`, under the stream's key.
channels = Table(
    "channels",
    metadata,
    _int("app"),
    _text("id"),
    _int("sid"),
    _text("type"),
    _blob("sealed", null=True),
    _text("labels", default="{}"),
    # The two members of a direct channel, sorted and joined: one channel per pair.
    _text("pair", null=True),
    _text("created_by", null=True),
    _int("created_at"),
    _int("updated_at"),
    _int("frozen", default="0"),
    _int("deleted_at", null=True),
    _int("member_count", default="0"),
    PrimaryKeyConstraint("app", "id"),
    Index("channels_sid", "sid", unique=True),
    Index("channels_pair", "app", "type", "pair", unique=True),
    Index("channels_created", "app", "created_at", "id"),
)

members = Table(
    "members",
    metadata,
    _int("app"),
    _int("sid"),
    _text("user"),
    _text("role"),
    _int("joined_at"),
    # Head of the stream when they joined: with history `since_join` nothing at or before it is theirs to see.
    _int("joined_seq"),
    _int("delivered", default="0"),
    _int("read", default="0"),
    # How many counted messages stand at or before `read`.
    _int("read_counted", default="0"),
    # Set by "mark unread": the seq from which everything counts as unread.
    _int("marked_from", null=True),
    _int("hidden", default="0"),
    _int("archived", default="0"),
    _int("muted_until", null=True),
    # When the caller's own side last changed (joined, read, settings), for other devices' catch-up. Sending changes it
    # too, and moves the stream: that is told by the stream's time.
    _int("moved_at"),
    PrimaryKeyConstraint("app", "sid", "user"),
    Index("members_user", "app", "user", "sid"),
    Index("members_moved", "app", "user", "moved_at"),
    # Those of one role, in the order of a page; whether anybody else may manage roles.
    Index("members_role", "app", "sid", "role", "user"),
    sqlite_with_rowid=False,
)

# The log, but for the events `message.created`: those are the rows of `messages`, so that an append writes one row,
# and readers merge the two by seq. `item` names the row in the associated data of `sealed` (a message's version, a
# change's id). `redacted`: 1 hidden by a deletion, 2 destroyed.
events = Table(
    "events",
    metadata,
    _int("app"),
    _int("sid"),
    _int("seq"),
    _text("type"),
    _int("at"),
    _text("by", null=True),
    _text("ref", null=True),
    _text("item"),
    _blob("sealed", null=True),
    _int("redacted", default="0"),
    PrimaryKeyConstraint("app", "sid", "seq"),
    sqlite_with_rowid=False,
)
# A message's later versions: few rows, found when it is edited, deleted or looked into.
Index(
    "events_versions",
    events.c.app,
    events.c.sid,
    events.c.ref,
    events.c.seq,
    sqlite_where=events.c.type == "message.updated",
    postgresql_where=events.c.type == "message.updated",
)

# One row is the event `message.created` and the message. `sealed`: as it was created, item: its id.
messages = Table(
    "messages",
    metadata,
    _int("app"),
    _int("sid"),
    _int("seq"),
    _text("id"),
    _text("sender"),
    _text("key"),
    # Keyed fingerprint of what was sent: tells a retry from another body under the same key.
    _blob("digest"),
    # The event that holds the current content: its own, or its last `message.updated`.
    _int("content_seq"),
    # How many counted messages stand at or before this one.
    _int("counted"),
    # 1 system, 2 silent, 4 counts as unread, 8 mentions all.
    _int("flags"),
    _text("reply_to", null=True),
    _int("at"),
    _int("edits", default="0"),
    _int("edited_at", null=True),
    _text("edited_by", null=True),
    _int("deleted_at", null=True),
    _text("deleted_by", null=True),
    _blob("sealed", null=True),
    _int("redacted", default="0"),
    PrimaryKeyConstraint("app", "sid", "seq"),
    # Ids sort by time, so that new ones share a page at the right edge; with the stream in front every message
    # would dirty a page of its own (a third of the cost of an append).
    Index("messages_id", "app", "id", unique=True),
    # For ever: a retry finds its first result here.
    Index("messages_key", "app", "sid", "sender", "key", unique=True),
    sqlite_with_rowid=False,
)
# Few rows: deletions of counted messages, subtracted from unread counts. It holds every column that counting reads:
# SQLite would walk the primary key otherwise, through everything that is unread.
Index(
    "messages_deleted",
    messages.c.app,
    messages.c.sid,
    messages.c.seq,
    messages.c.flags,
    messages.c.sender,
    messages.c.deleted_at,
    sqlite_where=messages.c.deleted_at.is_not(None),
    postgresql_where=messages.c.deleted_at.is_not(None),
)
Index(
    "messages_replies",
    messages.c.app,
    messages.c.sid,
    messages.c.reply_to,
    messages.c.seq,
    sqlite_where=messages.c.reply_to.is_not(None),
    postgresql_where=messages.c.reply_to.is_not(None),
)

mentions = Table(
    "mentions",
    metadata,
    _int("app"),
    _int("sid"),
    # A user id, or `*` for everyone.
    _text("user"),
    _int("seq"),
    PrimaryKeyConstraint("app", "sid", "user", "seq"),
    sqlite_with_rowid=False,
)

reactions = Table(
    "reactions",
    metadata,
    _int("app"),
    _int("sid"),
    _int("message_seq"),
    _text("emoji"),
    _text("user"),
    _int("at"),
    PrimaryKeyConstraint("app", "sid", "message_seq", "emoji", "user"),
    sqlite_with_rowid=False,
)

# What jobs have still to look at, written with the event. Taken by id, so order of commits does not matter.
outbox = Table(
    "outbox",
    metadata,
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True),
    _int("app"),
    _int("sid"),
    _int("seq"),
    _text("type"),
)

# Work to be done later, at least once, by whoever claims it (`services/queue.py`). A job is in one of three states:
# waiting until `due_at`; claimed, then `lease` is the claim's number and `due_at` when it falls to the next; dead, with
# `dead_at`. `app` 0: of no app. Payloads name things and hold no content.
jobs = Table(
    "jobs",
    metadata,
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True),
    _int("app"),
    _text("kind"),
    # One job per kind, app and key: putting it again while it waits changes nothing but its time.
    _text("key"),
    # 0 urgent, 1 normal, 2 bulk.
    _int("priority", default="1"),
    _int("due_at"),
    _int("lease", default="0"),
    # Put again while it was claimed: it is due at once when it ends.
    _int("rearmed", default="0"),
    _int("attempts", default="0"),
    _blob("payload", null=True),
    _text("error", null=True),
    _int("created_at"),
    _int("dead_at", null=True),
    Index("jobs_key", "kind", "app", "key", unique=True),
)
Index(
    "jobs_due",
    jobs.c.kind,
    jobs.c.priority,
    jobs.c.due_at,
    sqlite_where=jobs.c.dead_at.is_(None),
    postgresql_where=jobs.c.dead_at.is_(None),
)
Index(
    "jobs_dead",
    jobs.c.app,
    jobs.c.id,
    sqlite_where=jobs.c.dead_at.is_not(None),
    postgresql_where=jobs.c.dead_at.is_not(None),
)

# Where an app hears of its events. `definition`: url, events, channel types, content …; `sealed`: its secrets, item
# `webhook:` + id, under the app key. `status`: enabled, disabled; `reason` says why.
webhooks = Table(
    "webhooks",
    metadata,
    _int("app"),
    _text("id"),
    _text("definition"),
    _blob("sealed"),
    _text("status"),
    _text("reason", null=True),
    _int("created_at"),
    _int("updated_at"),
    # Since when no delivery has succeeded, though some were tried.
    _int("failing_since", null=True),
    # Until when nothing is sent there: it has failed, or has asked to be left alone.
    _int("paused_until", null=True),
    _int("failures", default="0"),
    PrimaryKeyConstraint("app", "id"),
)

# What was sent to an endpoint and what it answered, one row per attempt, kept for some days. `sealed`: headers and
# bodies, item `delivery:` + id, under the app key.
webhook_deliveries = Table(
    "webhook_deliveries",
    metadata,
    _int("app"),
    _text("webhook"),
    # Sorts by time.
    _text("id"),
    # The message's id in the sense of Standard Webhooks: the same for every attempt.
    _text("message"),
    _text("type"),
    _int("sid", null=True),
    _int("seq", null=True),
    _int("at"),
    _int("attempt"),
    # delivered, failed (will be tried again), exhausted, refused.
    _text("outcome"),
    _int("status", null=True),
    _int("milliseconds"),
    _text("error", null=True),
    _blob("sealed", null=True),
    PrimaryKeyConstraint("app", "webhook", "id"),
    Index("webhook_deliveries_message", "app", "sid", "seq"),
    Index("webhook_deliveries_at", "at"),
    sqlite_with_rowid=False,
)

# How an app reaches a push provider. `sealed`: its credentials, item `push:` + id, under the app key. `status`:
# enabled, disabled, misconfigured, then `error` says what the provider answered.
push_providers = Table(
    "push_providers",
    metadata,
    _int("app"),
    _text("id"),
    # fcm, apns, webpush, http.
    _text("kind"),
    _text("definition"),
    _blob("sealed", null=True),
    _text("status"),
    _text("error", null=True),
    _int("created_at"),
    _int("updated_at"),
    PrimaryKeyConstraint("app", "id"),
)

# Where one device of a user can be woken. `sealed`: the provider's token or subscription, item `token:` + user + `/` +
# device + `/` + provider, under the app key; `digest`: its fingerprint, so that a token belongs to one device.
push_tokens = Table(
    "push_tokens",
    metadata,
    _int("app"),
    _text("user"),
    _text("device"),
    _text("provider"),
    _blob("digest"),
    _blob("sealed"),
    _text("language", null=True),
    _int("created_at"),
    _int("updated_at"),
    PrimaryKeyConstraint("app", "user", "device", "provider"),
    Index("push_tokens_digest", "app", "provider", "digest", unique=True),
)

# What a user wants to be told of. `device` empty: every device; `sid` 0: every channel.
notification_preferences = Table(
    "notification_preferences",
    metadata,
    _int("app"),
    _text("user"),
    _text("device"),
    _int("sid"),
    _text("definition"),
    _int("updated_at"),
    PrimaryKeyConstraint("app", "user", "device", "sid"),
    sqlite_with_rowid=False,
)

# What became of a message's pushes, one row per decision and per attempt, kept for some days. `device` empty: the
# user as a whole; `user` empty: the channel as a whole.
push_log = Table(
    "push_log",
    metadata,
    _int("app"),
    _int("sid"),
    _int("seq"),
    _text("user"),
    _text("device"),
    # Sorts by time.
    _text("id"),
    _int("at"),
    # skipped, scheduled, accepted, failed, dropped; `reason` is a word of one list, `provider` who was asked.
    _text("outcome"),
    _text("reason"),
    _text("provider", null=True),
    # The provider's own words, cut; never content.
    _text("detail", null=True),
    PrimaryKeyConstraint("app", "sid", "seq", "user", "device", "id"),
    Index("push_log_at", "at"),
    sqlite_with_rowid=False,
)

# An app's own say about a message before it is stored. `sealed`: the secrets, item `presend`, under the app key.
presend_hooks = Table(
    "presend_hooks",
    metadata,
    Column("app", BigInteger, primary_key=True, autoincrement=False),
    _text("definition"),
    _blob("sealed"),
    _int("updated_at"),
)

audit = Table(
    "audit",
    metadata,
    _int("app"),
    _text("id"),
    _int("at"),
    _text("actor"),
    _text("action"),
    _text("target"),
    _text("detail", default="{}"),
    PrimaryKeyConstraint("app", "id"),
    Index("audit_at", "app", "at", "id"),
)
