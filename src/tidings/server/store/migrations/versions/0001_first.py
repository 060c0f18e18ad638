"""first."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

# What `tables.py` says about texts.
TEXT = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")


def _keep_ciphertext(table: str) -> None:
    """In PostgreSQL, do not try to compress what does not compress."""
    if op.get_context().dialect.name == "postgresql":
        op.execute(f"ALTER TABLE {table} ALTER COLUMN sealed SET STORAGE EXTERNAL")


def _leave_room(table: str, percent: int) -> None:
    """In PostgreSQL, fill pages to so many percent: rows that every message updates stay on their page."""
    if op.get_context().dialect.name == "postgresql":
        op.execute(f"ALTER TABLE {table} SET (fillfactor = {percent})")


def upgrade() -> None:
    """From nothing to 0001."""
    op.create_table(
        "api_keys",
        sa.Column("id", TEXT, nullable=False),
        sa.Column("app", sa.BigInteger(), nullable=False),
        sa.Column("name", TEXT, nullable=False),
        sa.Column("secret_hash", sa.LargeBinary(), nullable=False),
        sa.Column("scopes", TEXT, nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("expires_at", sa.BigInteger(), nullable=True),
        sa.Column("revoked_at", sa.BigInteger(), nullable=True),
        sa.Column("last_used_at", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("id"),
    )
    with op.batch_alter_table("api_keys", schema=None) as batch_op:
        batch_op.create_index("api_keys_app", ["app"], unique=False)

    op.create_table(
        "app_keys",
        sa.Column("app", sa.BigInteger(), nullable=False),
        sa.Column("purpose", TEXT, nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.Column("root_kid", TEXT, nullable=False),
        sa.Column("wrapped", sa.LargeBinary(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("app", "purpose", "version"),
    )
    op.create_table(
        "apps",
        sa.Column("app", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("id", TEXT, nullable=False),
        sa.Column("name", TEXT, nullable=False),
        sa.Column("settings", TEXT, nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("app"),
        sa.UniqueConstraint("id"),
    )
    op.create_table(
        "audit",
        sa.Column("app", sa.BigInteger(), nullable=False),
        sa.Column("id", TEXT, nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.Column("actor", TEXT, nullable=False),
        sa.Column("action", TEXT, nullable=False),
        sa.Column("target", TEXT, nullable=False),
        sa.Column("detail", TEXT, server_default="{}", nullable=False),
        sa.PrimaryKeyConstraint("app", "id"),
    )
    with op.batch_alter_table("audit", schema=None) as batch_op:
        batch_op.create_index("audit_at", ["app", "at", "id"], unique=False)

    op.create_table(
        "channel_types",
        sa.Column("app", sa.BigInteger(), nullable=False),
        sa.Column("name", TEXT, nullable=False),
        sa.Column("definition", TEXT, nullable=False),
        sa.PrimaryKeyConstraint("app", "name"),
    )
    op.create_table(
        "channels",
        sa.Column("app", sa.BigInteger(), nullable=False),
        sa.Column("id", TEXT, nullable=False),
        sa.Column("sid", sa.BigInteger(), nullable=False),
        sa.Column("type", TEXT, nullable=False),
        sa.Column("sealed", sa.LargeBinary(), nullable=True),
        sa.Column("labels", TEXT, server_default="{}", nullable=False),
        sa.Column("pair", TEXT, nullable=True),
        sa.Column("created_by", TEXT, nullable=True),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("updated_at", sa.BigInteger(), nullable=False),
        sa.Column("frozen", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("deleted_at", sa.BigInteger(), nullable=True),
        sa.Column("member_count", sa.BigInteger(), server_default="0", nullable=False),
        sa.PrimaryKeyConstraint("app", "id"),
    )
    with op.batch_alter_table("channels", schema=None) as batch_op:
        batch_op.create_index("channels_created", ["app", "created_at", "id"], unique=False)
        batch_op.create_index("channels_pair", ["app", "type", "pair"], unique=True)
        batch_op.create_index("channels_sid", ["sid"], unique=True)

    op.create_table(
        "device_positions",
        sa.Column("app", sa.BigInteger(), nullable=False),
        sa.Column("user", TEXT, nullable=False),
        sa.Column("device", TEXT, nullable=False),
        sa.Column("sid", sa.BigInteger(), nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("app", "user", "device", "sid"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "devices",
        sa.Column("app", sa.BigInteger(), nullable=False),
        sa.Column("user", TEXT, nullable=False),
        sa.Column("id", TEXT, nullable=False),
        sa.Column("platform", TEXT, nullable=True),
        sa.Column("sealed", sa.LargeBinary(), nullable=True),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("last_seen_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("app", "user", "id"),
    )
    op.create_table(
        "events",
        sa.Column("app", sa.BigInteger(), nullable=False),
        sa.Column("sid", sa.BigInteger(), nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("type", TEXT, nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.Column("by", TEXT, nullable=True),
        sa.Column("ref", TEXT, nullable=True),
        sa.Column("item", TEXT, nullable=False),
        sa.Column("sealed", sa.LargeBinary(), nullable=True),
        sa.Column("redacted", sa.BigInteger(), server_default="0", nullable=False),
        sa.PrimaryKeyConstraint("app", "sid", "seq"),
        sqlite_with_rowid=False,
    )
    _keep_ciphertext("events")
    with op.batch_alter_table("events", schema=None) as batch_op:
        batch_op.create_index(
            "events_versions",
            ["app", "sid", "ref", "seq"],
            unique=False,
            sqlite_where=sa.text("type = 'message.updated'"),
            postgresql_where=sa.text("type = 'message.updated'"),
        )

    op.create_table(
        "identity_providers",
        sa.Column("app", sa.BigInteger(), nullable=False),
        sa.Column("id", TEXT, nullable=False),
        sa.Column("jwks_url", TEXT, nullable=False),
        sa.Column("algorithms", TEXT, nullable=False),
        sa.Column("cache_seconds", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("app", "id"),
    )
    op.create_table(
        "labels",
        sa.Column("app", sa.BigInteger(), nullable=False),
        sa.Column("noun", TEXT, nullable=False),
        sa.Column("name", TEXT, nullable=False),
        sa.Column("value", TEXT, nullable=False),
        sa.Column("id", TEXT, nullable=False),
        sa.PrimaryKeyConstraint("app", "noun", "name", "value", "id"),
        sqlite_with_rowid=False,
    )
    with op.batch_alter_table("labels", schema=None) as batch_op:
        batch_op.create_index("labels_id", ["app", "noun", "id"], unique=False)

    op.create_table(
        "members",
        sa.Column("app", sa.BigInteger(), nullable=False),
        sa.Column("sid", sa.BigInteger(), nullable=False),
        sa.Column("user", TEXT, nullable=False),
        sa.Column("role", TEXT, nullable=False),
        sa.Column("joined_at", sa.BigInteger(), nullable=False),
        sa.Column("joined_seq", sa.BigInteger(), nullable=False),
        sa.Column("delivered", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("read", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("read_counted", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("marked_from", sa.BigInteger(), nullable=True),
        sa.Column("hidden", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("archived", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("muted_until", sa.BigInteger(), nullable=True),
        sa.Column("moved_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("app", "sid", "user"),
        sqlite_with_rowid=False,
    )
    with op.batch_alter_table("members", schema=None) as batch_op:
        _leave_room("members", 80)
        batch_op.create_index("members_user", ["app", "user", "sid"], unique=False)

    op.create_table(
        "mentions",
        sa.Column("app", sa.BigInteger(), nullable=False),
        sa.Column("sid", sa.BigInteger(), nullable=False),
        sa.Column("user", TEXT, nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("app", "sid", "user", "seq"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "messages",
        sa.Column("app", sa.BigInteger(), nullable=False),
        sa.Column("sid", sa.BigInteger(), nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("id", TEXT, nullable=False),
        sa.Column("sender", TEXT, nullable=False),
        sa.Column("key", TEXT, nullable=False),
        sa.Column("digest", sa.LargeBinary(), nullable=False),
        sa.Column("content_seq", sa.BigInteger(), nullable=False),
        sa.Column("counted", sa.BigInteger(), nullable=False),
        sa.Column("flags", sa.BigInteger(), nullable=False),
        sa.Column("reply_to", TEXT, nullable=True),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.Column("edits", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("edited_at", sa.BigInteger(), nullable=True),
        sa.Column("edited_by", TEXT, nullable=True),
        sa.Column("deleted_at", sa.BigInteger(), nullable=True),
        sa.Column("deleted_by", TEXT, nullable=True),
        sa.Column("sealed", sa.LargeBinary(), nullable=True),
        sa.Column("redacted", sa.BigInteger(), server_default="0", nullable=False),
        sa.PrimaryKeyConstraint("app", "sid", "seq"),
        sqlite_with_rowid=False,
    )
    _keep_ciphertext("messages")
    with op.batch_alter_table("messages", schema=None) as batch_op:
        batch_op.create_index(
            "messages_deleted",
            ["app", "sid", "seq", "flags", "sender", "deleted_at"],
            unique=False,
            sqlite_where=sa.text("deleted_at IS NOT NULL"),
            postgresql_where=sa.text("deleted_at IS NOT NULL"),
        )
        batch_op.create_index("messages_id", ["app", "id"], unique=True)
        batch_op.create_index("messages_key", ["app", "sid", "sender", "key"], unique=True)
        batch_op.create_index(
            "messages_replies",
            ["app", "sid", "reply_to", "seq"],
            unique=False,
            sqlite_where=sa.text("reply_to IS NOT NULL"),
            postgresql_where=sa.text("reply_to IS NOT NULL"),
        )

    op.create_table(
        "meta",
        sa.Column("name", TEXT, nullable=False),
        sa.Column("value", TEXT, nullable=False),
        sa.PrimaryKeyConstraint("name"),
    )
    op.create_table(
        "outbox",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("app", sa.BigInteger(), nullable=False),
        sa.Column("sid", sa.BigInteger(), nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("type", TEXT, nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_table(
        "reactions",
        sa.Column("app", sa.BigInteger(), nullable=False),
        sa.Column("sid", sa.BigInteger(), nullable=False),
        sa.Column("message_seq", sa.BigInteger(), nullable=False),
        sa.Column("emoji", TEXT, nullable=False),
        sa.Column("user", TEXT, nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("app", "sid", "message_seq", "emoji", "user"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "relations",
        sa.Column("app", sa.BigInteger(), nullable=False),
        sa.Column("user", TEXT, nullable=False),
        sa.Column("other", TEXT, nullable=False),
        sa.Column("kind", TEXT, nullable=False),
        sa.PrimaryKeyConstraint("app", "user", "other", "kind"),
    )
    with op.batch_alter_table("relations", schema=None) as batch_op:
        batch_op.create_index("relations_other", ["app", "other"], unique=False)

    op.create_table(
        "revoked_tokens",
        sa.Column("app", sa.BigInteger(), nullable=False),
        sa.Column("jti", TEXT, nullable=False),
        sa.Column("expires_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("app", "jti"),
    )
    op.create_table(
        "roles",
        sa.Column("app", sa.BigInteger(), nullable=False),
        sa.Column("scope", TEXT, nullable=False),
        sa.Column("name", TEXT, nullable=False),
        sa.Column("grants", TEXT, nullable=False),
        sa.PrimaryKeyConstraint("app", "scope", "name"),
    )
    op.create_table(
        "signing_keys",
        sa.Column("app", sa.BigInteger(), nullable=False),
        sa.Column("kid", TEXT, nullable=False),
        sa.Column("algorithm", TEXT, nullable=False),
        sa.Column("sealed", sa.LargeBinary(), nullable=True),
        sa.Column("public_key", TEXT, nullable=True),
        sa.Column("status", TEXT, nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("app", "kid"),
    )
    op.create_table(
        "streams",
        sa.Column("sid", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("app", sa.BigInteger(), nullable=False),
        sa.Column("kind", TEXT, nullable=False),
        sa.Column("ref", TEXT, nullable=False),
        sa.Column("epoch", TEXT, nullable=False),
        sa.Column("head", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("counted", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("messages", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("floor", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("moved_at", sa.BigInteger(), nullable=False),
        sa.Column("last_message_at", sa.BigInteger(), nullable=True),
        sa.Column("access_version", sa.BigInteger(), server_default="1", nullable=False),
        sa.Column("key_wrapped", sa.LargeBinary(), nullable=True),
        sa.Column("key_version", sa.BigInteger(), nullable=True),
        sa.Column("key_app_version", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("sid"),
    )
    with op.batch_alter_table("streams", schema=None) as batch_op:
        _leave_room("streams", 50)
        batch_op.create_index("streams_moved", ["app", "moved_at"], unique=False)
        batch_op.create_index("streams_ref", ["app", "kind", "ref"], unique=True)

    op.create_table(
        "users",
        sa.Column("app", sa.BigInteger(), nullable=False),
        sa.Column("id", TEXT, nullable=False),
        sa.Column("sid", sa.BigInteger(), nullable=False),
        sa.Column("role", TEXT, nullable=False),
        sa.Column("sealed", sa.LargeBinary(), nullable=True),
        sa.Column("labels", TEXT, server_default="{}", nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("updated_at", sa.BigInteger(), nullable=False),
        sa.Column("last_seen_at", sa.BigInteger(), nullable=True),
        sa.Column("deactivated_at", sa.BigInteger(), nullable=True),
        sa.Column("deleted_at", sa.BigInteger(), nullable=True),
        sa.Column("tokens_after", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("invisible", sa.BigInteger(), server_default="0", nullable=False),
        sa.PrimaryKeyConstraint("app", "id"),
    )
    with op.batch_alter_table("users", schema=None) as batch_op:
        batch_op.create_index("users_created", ["app", "created_at", "id"], unique=False)
