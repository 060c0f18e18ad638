"""What all commands share: consoles, progress bars, and how a failure is said."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

from cyclopts import Parameter

from tidings.server.config import Config, load_config

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

ConfigOption = Annotated[Path | None, Parameter(name="--config", help="TOML file with settings.")]
DataDirOption = Annotated[Path | None, Parameter(name=["--data-dir", "--data"], help="Directory of the data.")]

StoreOption = Annotated[str | None, Parameter(name="--store", help="sqlite, or the URL of a PostgreSQL database.")]


def settings(config: Path | None, data_dir: Path | None, **more: object) -> Config:
    """The configuration that a command works with. Raises ConfigError."""
    return load_config(file=config, overrides={"data_dir": data_dir, **more})


def console(*, stderr: bool = True) -> Console:
    """A console for people: standard error, since standard output is for results. No colour where no terminal is."""
    from rich.console import Console

    # Paths and commands are copied from what is said: they are never folded. Tables are.
    return Console(stderr=stderr, highlight=False, soft_wrap=stderr)


def progress() -> Progress:
    """A bar with counts and the time left. Shows nothing when standard error is not a terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    err = console()
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=err,
        disable=not err.is_terminal,
        transient=True,
    )


def fail(message: str, do: str = "", status: int = 1) -> NoReturn:
    """End with one line that says what is wrong and, below, what to do."""
    sys.stderr.write(f"tidings: {message}\n" + (f"{do}\n" if do else ""))
    raise SystemExit(status)


def what_to_do(error: BaseException) -> str:
    """The step that usually mends an error of the machine; empty where the message says it itself."""
    if isinstance(error, PermissionError):
        return "Run this as the user that runs the server, or give that user the file; `tidings doctor` looks further."
    if isinstance(error, FileNotFoundError):
        return "Look for a typing error in the path; --data-dir names the directory that the server uses."
    if isinstance(error, OSError):
        return "`tidings doctor` looks at disk, limits and port."
    return ""


def guarded(run: Callable[[], Any]) -> int:
    """Run a command to its end; its exit status. Expected failures become a line instead of a trace.

    0 done, 1 failed, 2 wrong usage or configuration, 130 interrupted (128 + SIGINT, as shells count).
    """
    from tidings.server.config import ConfigError
    from tidings.server.crypto.base import CryptoError
    from tidings.server.errors import Refusal, TidingsError

    try:
        run()
    except ConfigError as error:
        sys.stderr.write("tidings: the configuration is not usable:\n")
        sys.stderr.writelines(f"  {problem}\n" for problem in error.problems)
        return 2
    except Refusal as refusal:
        at = f" ({refusal.field})" if refusal.field else ""
        sys.stderr.write(f"tidings: {refusal.detail}{at}\n")
        return 1
    except (TidingsError, CryptoError) as error:
        sys.stderr.write(f"tidings: {error}\n")
        return 1
    except BrokenPipeError:
        # Whoever read our output has gone (`tidings … | head`): nothing is wrong, and nobody is left to be told.
        sys.stderr.close()
        return 1
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        sys.stderr.write(f"tidings: {where}{error.strerror or error}\n")
        if advice := what_to_do(error):
            sys.stderr.write(f"{advice}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("\nInterrupted.\n")
        return 130
    except SystemExit as ended:
        if isinstance(ended.code, str):
            sys.stderr.write(f"{ended.code}\n")
            return 1
        return int(ended.code or 0)
    return 0
