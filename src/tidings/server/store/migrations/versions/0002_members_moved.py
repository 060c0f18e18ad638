"""members moved."""

from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """From 0001 to 0002."""
    with op.batch_alter_table("members", schema=None) as batch_op:
        batch_op.create_index("members_moved", ["app", "user", "moved_at"], unique=False)
