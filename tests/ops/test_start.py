"""What a start costs, told by what it loads: times are for `bench start`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tidings.testing.process import ServerProcess

ROOT = Path(__file__).parents[2]

# Each would be a twentieth of the start or more, and serving has no use for it: the schema is there, nobody has been
# called, nothing is drawn. pydantic comes with what tests the API, and litestar would load it.
NOT_AT_START = {"alembic", "httpx", "pydantic", "rich.console", "sqlalchemy"}


async def test_a_start_loads_only_what_serving_needs(tmp_path: Path) -> None:
    async with ServerProcess(tmp_path / "data", environment={"PYTHONPROFILEIMPORTTIME": "1"}) as server:
        said = server.stderr_path.read_text()
        # A new schema is made without the migrations, and the secrets are drawn when the server listens.
        assert imported(said) & NOT_AT_START <= {"rich.console"}
        await server.restart(graceful=True)
        loaded = imported(server.stderr_path.read_text()[len(said) :])
    assert {"tidings.server.app", "litestar", "structlog"} <= loaded
    assert loaded & NOT_AT_START == set()


def imported(said: str) -> set[str]:
    """The modules in what `python -X importtime` wrote."""
    return set(re.findall(r"^import time:.*\|\s+(\S+)$", said, re.MULTILINE))


def test_set_up_compiles_what_a_start_loads_even_where_no_bytecode_is_to_be_written(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPYCACHEPREFIX": str(tmp_path)}
    subprocess.run([sys.executable, ROOT / ".ci" / "compile.py"], check=True, env=environment)
    compiled = {path.name.partition(".")[0] for path in tmp_path.rglob("tidings/server/**/*.pyc")}
    assert {"app", "serve", "factory", "sqlite"} <= compiled
    assert list(tmp_path.rglob("litestar/app.*.pyc"))
