"""Writes the pages that come from the code: `python -m docs.generate` (part of `make docs`).

`tests/test_docs.py` checks that they are current.
"""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Callable
from pathlib import Path

from tidings.server.domain.permissions import BUILT_IN, CHANNEL_WORDS, PUBLIC_GRANTS, Permission
from tidings.wire import limits
from tidings.wire.problems import CATALOGUE, Retry

DOCS = Path(__file__).parent
NOTE = "<!-- Written by docs/generate.py from {source}: change it there, then run `make docs`. -->\n"

RETRY = {
    Retry.NEVER: "The same request will be refused for ever. Tell the user, or mend the program.",
    Retry.AUTH: "Get a fresh token, then try again.",
    Retry.LATER: "Try the very same request again after `retry_after_ms`, or after a pause that grows and is random.",
    Retry.RESYNC: "Your position does not fit. Start that stream (or session) over as [catching up]"
    "(../protocol/catching-up.md) says.",
}

WORDS = {
    Permission.CHANNEL_READ: "See the channel, its messages and events",
    Permission.CHANNEL_JOIN: "Become a member by oneself",
    Permission.CHANNEL_LEAVE: "End one's own membership",
    Permission.CHANNEL_UPDATE: "Change name, description, picture, custom data, labels",
    Permission.CHANNEL_FREEZE: "Freeze and thaw the channel",
    Permission.CHANNEL_DELETE: "Delete the channel",
    Permission.MEMBER_READ: "See who is a member, and how far each has read",
    Permission.MEMBER_ADD: "Add members",
    Permission.MEMBER_REMOVE: "Remove members who hold no more than oneself",
    Permission.MEMBER_UPDATE: "Give members another role, of those that hold no more than oneself",
    Permission.MESSAGE_SEND: "Send messages",
    Permission.MESSAGE_SEND_FROZEN: "Send and edit in a frozen channel too",
    Permission.MESSAGE_SYSTEM: "Send system messages",
    Permission.MESSAGE_SILENT: "Send messages that do not count as unread",
    Permission.MESSAGE_MENTION_ALL: "Mention everyone in the channel",
    Permission.MESSAGE_EDIT_OWN: "Edit one's own messages",
    Permission.MESSAGE_EDIT_ANY: "Edit anybody's messages",
    Permission.MESSAGE_DELETE_OWN: "Delete one's own messages",
    Permission.MESSAGE_DELETE_ANY: "Delete anybody's messages",
    Permission.MESSAGE_DELETE_HARD: "Destroy a message's content and all its versions",
    Permission.MESSAGE_VERSIONS: "Read earlier versions of others' messages, and of deleted ones",
    Permission.REACTION_ADD: "Add and take back one's own reactions",
    Permission.RECEIPT_SEND: "Have a read position",
    Permission.TYPING_SEND: "Be shown as typing",
    Permission.CHANNEL_CREATE: "Make channels",
    Permission.CHANNEL_CREATE_DIRECT: "Begin direct conversations",
    Permission.CHANNEL_LIST_ANY: "List and look at every channel (not into it)",
    Permission.USER_READ: "See other users' profiles",
    Permission.USER_CREATE: "Create users",
    Permission.USER_UPDATE_OWN: "Change one's own profile",
    Permission.USER_UPDATE_ANY: "Change anybody's profile",
    Permission.USER_DEACTIVATE: "Deactivate users and let them back in",
    Permission.USER_DELETE: "Delete users",
    Permission.USER_ACT_AS: "Act in a user's name (`Tidings-User`)",
    Permission.TOKEN_MINT: "Have user tokens made by the server",
    Permission.TOKEN_REVOKE: "Revoke users' tokens",
    Permission.DEVICE_MANAGE_ANY: "See and remove anybody's devices",
    Permission.APP_READ: "See the app's settings, roles, types and keys (never secrets)",
    Permission.APP_UPDATE: "Change the app's settings and channel types",
    Permission.ROLE_MANAGE: "Define roles and relations",
    Permission.KEY_MANAGE: "Make and revoke API keys, signing keys and identity providers",
    Permission.AUDIT_READ: "Read the audit trail",
    Permission.JOB_MANAGE: "See what is done behind the scenes, and have what was given up tried again",
    Permission.TRACE_READ: "See what became of a message, on which device and by which push, without what it says",
    Permission.PUSH_MANAGE: "Set push providers up, and try whether a device would be woken",
    Permission.WEBHOOK_MANAGE: "Set webhooks up, see what was sent to them, send it again",
    Permission.HOOK_MANAGE: "Have messages approved, changed or refused by an endpoint before they are stored",
}

SCOPES = {
    "app": "App roles: held by a user everywhere in the app",
    "channel": "Channel roles: held by a member in one channel",
    "relation": "Relation roles: held towards the channels of the people one is related to",
}


def problems_page() -> str:
    """Every code of the catalogue."""
    lines = [
        NOTE.format(source="src/tidings/wire/problems.py"),
        "# Problem codes\n",
        "One catalogue for REST (problem documents, RFC 9457) and the socket (`error` frames). Act on `code` and",
        "`retry`; `detail` is for people. How to handle them: [errors and close codes](../protocol/errors.md).\n",
        "| code | HTTP | close | retry | means |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| `{one.code}` | {one.status} | {one.close or ''} | `{one.retry.value}` | {one.title} |"
        for one in CATALOGUE.values()
    ]
    lines += [
        "",
        "A close code stands where the refusal can end a connection. Other refusals leave it open.\n",
        "| retry | what to do |",
        "|---|---|",
    ]
    lines += [f"| `{retry.value}` | {RETRY[retry]} |" for retry in Retry]
    return "\n".join(lines) + "\n"


def limits_page() -> str:
    """Every bound of the wire with its unit and reason, from the source and its comments."""
    assert limits.__file__ is not None
    source = Path(limits.__file__).read_text(encoding="utf-8")
    comments = {
        token.start[0]: token.string.removeprefix("#").strip()
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    lines = [
        NOTE.format(source="src/tidings/wire/limits.py"),
        "# Limits\n",
        "What crosses the network is bounded. A refusal names the bound it hit (`bound`) and the field (`field`). The",
        "limits of a connection (frame size, commands per second, unanswered commands) are settings of the server, and",
        "`connected.limits` tells them; see [configuration](../reference/configuration.md).\n",
        "| limit | value | unit | why |",
        "|---|---|---|---|",
    ]
    for node in ast.parse(source).body:
        if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Name):
            continue
        name = node.targets[0].id
        why, number = [], node.lineno - 1
        while number in comments:
            why.insert(0, comments[number])
            number -= 1
        value = getattr(limits, name)
        shown = f"{value:,}" if isinstance(value, int) else f"`{value}`"
        lines.append(f"| `{name}` | {shown} | {_unit(name)} | {' '.join(why)} |")
    return "\n".join(lines) + "\n"


def _unit(name: str) -> str:
    for part, unit in (("PATTERN", "pattern"), ("BYTES", "bytes"), ("LENGTH", "characters"), ("WAIT", "seconds")):
        if part in name:
            return unit
    return "count"


def permissions_page() -> str:
    """Every permission word, and who holds it by default."""
    lines = [
        NOTE.format(source="src/tidings/server/domain/permissions.py"),
        "# Permissions\n",
        "What the words mean and which built-in role holds them. How they add up:",
        "[permissions](../concepts/permissions.md).",
    ]
    for title, channel in (("Words of channels", True), ("Words of the app", False)):
        lines += [f"\n## {title}\n", "| word | allows to |", "|---|---|"]
        lines += [f"| `{word.value}` | {WORDS[word]} |" for word in Permission if (word in CHANNEL_WORDS) is channel]
    for scope, roles in BUILT_IN.items():
        held = [word for word in Permission if any(word in words for words in roles.values())]
        lines += [
            f"\n## {SCOPES[scope]}\n",
            "| word | " + " | ".join(f"`{role}`" for role in roles) + " |",
            "|---" * (len(roles) + 1) + "|",
        ]
        lines += [
            f"| `{word.value}` | " + " | ".join("yes" if word in words else "" for words in roles.values()) + " |"
            for word in held
        ]
    public = ", ".join(f"`{word.value}`" for word in Permission if word in PUBLIC_GRANTS)
    nobody = [
        f"`{word.value}`"
        for word in Permission
        if not any(word in words for roles in BUILT_IN.values() for words in roles.values())
        and word not in PUBLIC_GRANTS
    ]
    lines += [
        "\n## Everyone\n",
        f"In channels of a `public` type everyone in the app holds {public}.\n",
        "No built-in role holds " + ", ".join(nobody) + ": API keys do, or roles that the app defines.",
    ]
    return "\n".join(lines) + "\n"


PAGES: dict[str, Callable[[], str]] = {
    "reference/problems.md": problems_page,
    "reference/permissions.md": permissions_page,
    "protocol/limits.md": limits_page,
}


def main() -> None:
    """Write every page."""
    for path, page in PAGES.items():
        (DOCS / path).write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
