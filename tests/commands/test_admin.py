"""The commands that administer a data directory, run as a person or a script would."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = (
    "import cyclopts; from tidings.server.commands import admin; root = cyclopts.App(name='tidings');"
    "[root.command(part) for part in (admin.app, admin.key, admin.token, admin.user, admin.migrate)]; root()"
)


class Tidings:
    """The command line over one data directory."""

    def __init__(self, data: Path) -> None:
        self.data = data

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", ROOT, *arguments, "--data-dir", str(self.data)]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=self.data.parent)

    def json(self, *arguments: str) -> object:
        done = self.run(*arguments, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


@pytest.fixture
def tidings(tmp_path: Path) -> Tidings:
    return Tidings(tmp_path / "data")


def test_from_nothing_to_a_token_and_back(tidings: Tidings) -> None:
    made = tidings.json("app", "create", "Clinic", "--id", "clinic")
    assert isinstance(made, dict)
    assert made["api_key"].startswith("tk_")
    key = tidings.json("key", "create", "billing", "--scope", "app.read", "--scope", "user.read", "--expires-in", "90d")
    assert isinstance(key, dict)
    assert key["scopes"] == ["app.read", "user.read"]
    tidings.json("key", "revoke", key["id"])
    listed = tidings.json("key", "list")
    assert isinstance(listed, list)
    assert [(row["name"], row["state"]) for row in listed] == [("first key", "active"), ("billing", "revoked")]
    minted = tidings.run("token", "mint", "--user", "alice", "--create", "--ttl", "10m")
    assert minted.stdout.count(".") == 2
    assert minted.stdout.count("\n") == 1
    locked = tidings.json("user", "deactivate", "alice")
    assert isinstance(locked, dict)
    assert locked["state"] == "deactivated"


def test_refusals_end_with_status_1_and_a_reason_for_people_or_scripts(tidings: Tidings) -> None:
    none = tidings.run("key", "list")
    assert none.returncode == 1
    assert "tidings app create NAME" in none.stderr
    tidings.json("app", "create", "One")
    refused = tidings.run("key", "create", "x", "--scope", "mesage.send", "--json")
    assert refused.returncode == 1
    assert refused.stdout == ""
    document = json.loads(refused.stderr)
    assert (document["code"], document["field"]) == ("invalid_field", "scopes[0]")
    tidings.json("app", "create", "Two")
    several = tidings.run("key", "list")
    assert several.returncode == 1
    assert "Say which app" in several.stderr


def test_a_plan_for_the_schema_makes_nothing(tidings: Tidings) -> None:
    planned = tidings.json("migrate", "--plan")
    assert isinstance(planned, dict)
    assert planned["steps"]
    assert not tidings.data.exists()
    tidings.json("migrate")
    again = tidings.json("migrate")
    assert isinstance(again, dict)
    assert again["steps"] == []
