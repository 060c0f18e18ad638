"""What `pip install tidings` brings is enough for the SDK: nothing of the server is needed."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys

import pytest

# Distributions that are imported under another name.
IMPORTED_AS = {"pyjwt": "jwt", "opentelemetry-api": "opentelemetry", "prometheus-client": "prometheus_client"}

PROGRAM = """\
import importlib.abc, sys

forbidden = set(sys.argv[1].split(","))

class Forbid(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "tidings.server" or name.startswith("tidings.server.") or name.partition(".")[0] in forbidden:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Forbid())
__import__(sys.argv[2])
if sys.argv[2] == "tidings.client":
    import tidings.client
    for name in tidings.client.__all__:
        getattr(tidings.client, name)
    tidings.client.Rest("http://127.0.0.1:1", token="t")
    tidings.client.Client("http://127.0.0.1:1", token="t", device="d")
"""


def server_packages() -> set[str]:
    """Top-level modules of the extra `server`, that the SDK must do without."""
    names = set()
    for requirement in importlib.metadata.requires("tidings") or []:
        if re.search(r"extra\s*==\s*['\"]server['\"]", requirement):
            name = re.split(r"[\s;\[<>=~!]", requirement)[0].lower()
            names.add(IMPORTED_AS.get(name, name.replace("-", "_")))
    return names


def attempt(module: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM, ",".join(server_packages()), module]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("module", ["tidings.client", "tidings.wire.commands", "tidings.testing.checker"])
def test_the_sdk_needs_nothing_of_the_server(module: str) -> None:
    done = attempt(module)
    assert done.returncode == 0, done.stderr


def test_the_command_without_the_server_says_what_to_install() -> None:
    assert {"litestar", "cyclopts", "sqlalchemy", "jwt"} <= server_packages()
    assert attempt("tidings.server.cli").returncode != 0
    program = "import sys; sys.modules['cyclopts'] = None; import tidings.server.cli"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "tidings[server]" in done.stderr
    assert "Traceback" not in done.stderr
