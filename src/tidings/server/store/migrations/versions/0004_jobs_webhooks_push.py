"""jobs webhooks push."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"

TEXT = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")


def upgrade() -> None:
    """From 0003 to 0004."""
    op.create_table(
        "jobs",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("app", sa.BigInteger(), nullable=False),
        sa.Column("kind", TEXT, nullable=False),
        sa.Column("key", TEXT, nullable=False),
        sa.Column("priority", sa.BigInteger(), server_default="1", nullable=False),
        sa.Column("due_at", sa.BigInteger(), nullable=False),
        sa.Column("lease", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("rearmed", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("attempts", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("payload", sa.LargeBinary(), nullable=True),
        sa.Column("error", TEXT, nullable=True),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("dead_at", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("id"),
    )
    with op.batch_alter_table("jobs", schema=None) as batch_op:
        batch_op.create_index(
            "jobs_dead",
            ["app", "id"],
            unique=False,
            sqlite_where=sa.text("dead_at IS NOT NULL"),
            postgresql_where=sa.text("dead_at IS NOT NULL"),
        )
        batch_op.create_index(
            "jobs_due",
            ["kind", "priority", "due_at"],
            unique=False,
            sqlite_where=sa.text("dead_at IS NULL"),
            postgresql_where=sa.text("dead_at IS NULL"),
        )
        batch_op.create_index("jobs_key", ["kind", "app", "key"], unique=True)

    op.create_table(
        "notification_preferences",
        sa.Column("app", sa.BigInteger(), nullable=False),
        sa.Column("user", TEXT, nullable=False),
        sa.Column("device", TEXT, nullable=False),
        sa.Column("sid", sa.BigInteger(), nullable=False),
        sa.Column("definition", TEXT, nullable=False),
        sa.Column("updated_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("app", "user", "device", "sid"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "presend_hooks",
        sa.Column("app", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("definition", TEXT, nullable=False),
        sa.Column("sealed", sa.LargeBinary(), nullable=False),
        sa.Column("updated_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("app"),
    )
    op.create_table(
        "push_log",
        sa.Column("app", sa.BigInteger(), nullable=False),
        sa.Column("sid", sa.BigInteger(), nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("user", TEXT, nullable=False),
        sa.Column("device", TEXT, nullable=False),
        sa.Column("id", TEXT, nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.Column("outcome", TEXT, nullable=False),
        sa.Column("reason", TEXT, nullable=False),
        sa.Column("provider", TEXT, nullable=True),
        sa.Column("detail", TEXT, nullable=True),
        sa.PrimaryKeyConstraint("app", "sid", "seq", "user", "device", "id"),
        sqlite_with_rowid=False,
    )
    with op.batch_alter_table("push_log", schema=None) as batch_op:
        batch_op.create_index("push_log_at", ["at"], unique=False)

    op.create_table(
        "push_providers",
        sa.Column("app", sa.BigInteger(), nullable=False),
        sa.Column("id", TEXT, nullable=False),
        sa.Column("kind", TEXT, nullable=False),
        sa.Column("definition", TEXT, nullable=False),
        sa.Column("sealed", sa.LargeBinary(), nullable=True),
        sa.Column("status", TEXT, nullable=False),
        sa.Column("error", TEXT, nullable=True),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("updated_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("app", "id"),
    )
    op.create_table(
        "push_tokens",
        sa.Column("app", sa.BigInteger(), nullable=False),
        sa.Column("user", TEXT, nullable=False),
        sa.Column("device", TEXT, nullable=False),
        sa.Column("provider", TEXT, nullable=False),
        sa.Column("digest", sa.LargeBinary(), nullable=False),
        sa.Column("sealed", sa.LargeBinary(), nullable=False),
        sa.Column("language", TEXT, nullable=True),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("updated_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("app", "user", "device", "provider"),
    )
    with op.batch_alter_table("push_tokens", schema=None) as batch_op:
        batch_op.create_index("push_tokens_digest", ["app", "provider", "digest"], unique=True)

    op.create_table(
        "webhook_deliveries",
        sa.Column("app", sa.BigInteger(), nullable=False),
        sa.Column("webhook", TEXT, nullable=False),
        sa.Column("id", TEXT, nullable=False),
        sa.Column("message", TEXT, nullable=False),
        sa.Column("type", TEXT, nullable=False),
        sa.Column("sid", sa.BigInteger(), nullable=True),
        sa.Column("seq", sa.BigInteger(), nullable=True),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.Column("attempt", sa.BigInteger(), nullable=False),
        sa.Column("outcome", TEXT, nullable=False),
        sa.Column("status", sa.BigInteger(), nullable=True),
        sa.Column("milliseconds", sa.BigInteger(), nullable=False),
        sa.Column("error", TEXT, nullable=True),
        sa.Column("sealed", sa.LargeBinary(), nullable=True),
        sa.PrimaryKeyConstraint("app", "webhook", "id"),
        sqlite_with_rowid=False,
    )
    with op.batch_alter_table("webhook_deliveries", schema=None) as batch_op:
        batch_op.create_index("webhook_deliveries_at", ["at"], unique=False)
        batch_op.create_index("webhook_deliveries_message", ["app", "sid", "seq"], unique=False)

    op.create_table(
        "webhooks",
        sa.Column("app", sa.BigInteger(), nullable=False),
        sa.Column("id", TEXT, nullable=False),
        sa.Column("definition", TEXT, nullable=False),
        sa.Column("sealed", sa.LargeBinary(), nullable=False),
        sa.Column("status", TEXT, nullable=False),
        sa.Column("reason", TEXT, nullable=True),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("updated_at", sa.BigInteger(), nullable=False),
        sa.Column("failing_since", sa.BigInteger(), nullable=True),
        sa.Column("paused_until", sa.BigInteger(), nullable=True),
        sa.Column("failures", sa.BigInteger(), server_default="0", nullable=False),
        sa.PrimaryKeyConstraint("app", "id"),
    )
