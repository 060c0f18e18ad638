"""members by role."""

from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """From 0002 to 0003."""
    with op.batch_alter_table("members", schema=None) as batch_op:
        batch_op.create_index("members_role", ["app", "sid", "role", "user"], unique=False)
