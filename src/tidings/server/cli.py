"""The `tidings` command. Thin: sub-commands live in `tidings.server.commands` and are imported when called."""

from __future__ import annotations

import sys

try:
    import cyclopts
except ModuleNotFoundError:
    # The package without its extra is the SDK, which has no commands.
    sys.exit("tidings: this is the SDK alone. The server and its commands: pip install 'tidings[server]'")

app = cyclopts.App(
    name="tidings",
    help="""A chat API that you run yourself: ordered, durable, synchronised.

See it talk in your terminal, then run it; everything is kept in one directory.

    tidings demo

    tidings serve

Every command explains itself with examples: `tidings backup --help`.
""",
    version_flags=["--version"],
)
_COMMANDS = "tidings.server.commands"

_RUN = cyclopts.Group("Run", sort_key=1)
_APPS = cyclopts.Group("Apps, users and their keys", sort_key=2)
_OPERATE = cyclopts.Group("Operate", sort_key=3)

app.command(f"{_COMMANDS}.serve:serve", name="serve", group=_RUN, help="Run the server until SIGTERM or Ctrl-C.")
app.command(f"{_COMMANDS}.demo:demo", name="demo", group=_RUN, help="Watch two people talk through a real server.")
app.command(
    f"{_COMMANDS}.cluster:cluster", name="cluster", group=_RUN, help="Run a real cluster here: PostgreSQL, NATS, nodes."
)
app.command(
    f"{_COMMANDS}.worker:worker", name="worker", group=_RUN, help="Do webhooks, push and housekeeping, without serving."
)
app.command(f"{_COMMANDS}.admin:app", name="app", group=_APPS, help="Apps: the tenants of this server.")
app.command(f"{_COMMANDS}.admin:key", name="key", group=_APPS, help="API keys, with which a backend calls.")
app.command(f"{_COMMANDS}.admin:user", name="user", group=_APPS, help="Users of an app.")
app.command(f"{_COMMANDS}.admin:token", name="token", group=_APPS, help="Users' tokens: make one, end them.")
app.command(f"{_COMMANDS}.backup:backup", name="backup", group=_OPERATE, help="Copy the data while the server runs.")
app.command(f"{_COMMANDS}.backup:restore", name="restore", group=_OPERATE, help="Put a backup in place.")
app.command(
    f"{_COMMANDS}.epochs:renew_epochs", name="renew-epochs", group=_OPERATE, help="After a restore by other means."
)
app.command(f"{_COMMANDS}.keys:app", name="keys", group=_OPERATE, help="Encryption keys: list and rotate.")
app.command(f"{_COMMANDS}.webhooks:app", name="webhooks", group=_APPS, help="Where an app's backend hears of events.")
app.command(f"{_COMMANDS}.presend:app", name="presend", group=_APPS, help="An app's say about messages before they go.")
app.command(f"{_COMMANDS}.push:app", name="push", group=_APPS, help="Push: would this device be woken, and why not?")
app.command(f"{_COMMANDS}.jobs:app", name="jobs", group=_OPERATE, help="What was given up behind the scenes.")
app.command(f"{_COMMANDS}.trace:trace", name="trace", group=_OPERATE, help="Where is my message?")
app.command(f"{_COMMANDS}.admin:migrate", name="migrate", group=_OPERATE, help="Bring the schema up to this version.")
app.command(f"{_COMMANDS}.transfer:transfer", name="transfer", group=_OPERATE, help="Move from SQLite to PostgreSQL.")
app.command(f"{_COMMANDS}.doctor:doctor", name="doctor", group=_OPERATE, help="Look for what will go wrong.")


def main() -> None:
    """Entry point. Exit status: 0 done, 1 failed, 2 wrong usage or configuration, 130 interrupted."""
    from tidings.server.commands.terminal import guarded

    sys.exit(guarded(_run))


def _run() -> None:
    _let_it_explain(sys.argv[1:2])
    try:
        app(exit_on_error=False)
    except cyclopts.CycloptsError:
        # It has said what is wrong with the command line.
        raise SystemExit(2) from None


def _let_it_explain(words: list[str]) -> None:
    """The line above stands in the list of commands; a command's own `--help` is what its function says, examples and
    all (under `For example:`, for sections called `Examples:` are not shown). Loads what is about to run, no more."""
    for word in words:
        if word in app and (command := app[word]).default_command is not None:
            command.help = None


if __name__ == "__main__":
    main()
