"""The `tidings` command. Thin: every sub-command lives in `tidings.server.commands`."""

from __future__ import annotations

import cyclopts

app = cyclopts.App(
    name="tidings",
    help="A chat API that you run yourself: ordered, durable, synchronised.",
    version_flags=["--version"],
)
app.command("tidings.server.commands.serve:serve", name="serve")


def main() -> None:
    """Entry point."""
    app()


if __name__ == "__main__":
    main()
