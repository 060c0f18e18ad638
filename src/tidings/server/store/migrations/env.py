"""What Alembic runs: the migrations on the connection that `runner` hands in, or as text for a dialect."""

from alembic import context

from tidings.server.store.tables import metadata

_attributes = context.config.attributes

if context.is_offline_mode():
    context.configure(
        dialect_name=_attributes["dialect"],
        target_metadata=metadata,
        literal_binds=True,
        dialect_opts={"paramstyle": "named"},
        # The transaction belongs to whoever runs the text: it holds a lock, and more than the migrations.
        transactional_ddl=False,
    )
    context.run_migrations()
else:
    # SQLite cannot alter most of a table: batch mode copies it. The transaction is the runner's.
    context.configure(connection=_attributes["connection"], target_metadata=metadata, render_as_batch=True)
    context.run_migrations()
