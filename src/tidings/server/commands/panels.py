"""What a person at a terminal sees when the server is ready.

Written to standard error, once, when the server answers. Never through the log: a first start shows secrets.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TextIO

from tidings.server.config import Config

if TYPE_CHECKING:
    from rich.console import Console

    from tidings.server.services.founding import NewApp

# Where lines are written in full: panels would fold secrets and commands, and a folded command cannot be copied.
_PLAIN_WIDTH_MIN = 72


def welcome(config: Config, new: NewApp | None, *, file: TextIO | None = None, port: int | None = None) -> None:
    """Say where the server is and what to do next; at the first start also the secrets, this once.

    `file`: where to write (standard error). `port`: the one it got, when the configuration says 0.
    """
    from rich.console import Console

    console = Console(file=file, stderr=file is None, highlight=False, soft_wrap=True)
    address = config.url if port is None or config.public_url or config.port else _with_port(config, port)
    if new is None:
        _line(console, f"Tidings is ready at [bold]{address}[/]", f"API reference: {address}/docs")
        if config.demo_on:
            _line(console, f"Demo: {address}/demo")
        return
    _first(console, config, address, new)


def _with_port(config: Config, port: int) -> str:
    return f"{config.url.rsplit(':', 1)[0]}:{port}"


def _line(console: Console, *lines: str) -> None:
    for line in lines:
        console.print(line)


def _first(console: Console, config: Config, address: str, new: NewApp) -> None:
    from rich.rule import Rule

    data = "" if str(config.data_dir) == "data" else f" --data-dir {_quoted(str(config.data_dir))}"

    def rule(title: str) -> None:
        if console.is_terminal:
            console.print(Rule(f"[bold cyan]{title}[/]", style="cyan", align="left"), soft_wrap=False)
        else:
            console.print(f"== {title} ==")

    def pair(name: str, value: str, style: str = "") -> None:
        console.print(f"  [dim]{name:<15}[/] ", end="")
        console.print(value, style=style, markup=False)

    console.print()
    rule("Tidings is ready")
    pair("Address", address, "bold")
    pair("API reference", f"{address}/docs")
    pair("Data", str(config.data_dir.absolute()))
    pair("App", new.app_id)
    console.print()
    rule("Shown this once: keep them where your backend keeps its secrets")
    pair("API key", new.api_key, "bold yellow")
    pair("Signing key", new.signing_kid)
    pair("Signing secret", new.signing_secret, "bold yellow")
    console.print()
    console.print("  [dim]The API key is stored hashed and the secret encrypted: neither can be shown again.[/]")
    console.print("  [dim]The secret signs your users' tokens (HS256); docs/guides/tokens.md shows how.[/]")
    console.print()
    rule("Try it: two users, a channel, a message")
    console.print()
    for line in first_steps(address, new.api_key):
        console.print(line, markup=False)
    console.print()
    rule("Then be Alice: a token for a client of yours")
    console.print()
    console.print(f"  tidings token mint --user alice{data}", markup=False)
    console.print()


def first_steps(address: str, api_key: str) -> list[str]:
    """Commands for a POSIX shell with curl: two users, a channel between them, and a first message from Alice."""
    json = "-H 'Content-Type: application/json'"
    return [
        f"  KEY={_quoted(api_key)}",
        f'  curl -sS -X PUT {address}/v1/users -H "Authorization: Bearer $KEY" {json} \\',
        """       -d '{"users":[{"id":"alice","name":"Alice"},{"id":"bob","name":"Bob"}]}'""",
        f'  curl -sS {address}/v1/channels -H "Authorization: Bearer $KEY" {json} \\',
        """       -d '{"id":"hello","type":"group","members":["alice","bob"]}'""",
        f'  curl -sS {address}/v1/channels/hello/messages -H "Authorization: Bearer $KEY" \\',
        f"""       -H "Tidings-User: alice" {json} -d '{{"key":"first","text":"Hello, Bob!"}}'""",
    ]


def _quoted(text: str) -> str:
    import shlex

    return shlex.quote(text)
