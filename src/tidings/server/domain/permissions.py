"""Who may do what: permission words, roles as sets of words, and the built-in roles.

Words are granted at three levels and add up; nothing is ever denied by a word.

* **app** roles are held by a user everywhere in the app,
* **channel** roles are held by a member in one channel,
* **relation** grants are held towards every channel that has someone in it to whom the user is related.

A word of the channel's kind (`message.send`) in an app role holds in every channel of the app, membership or not:
built-in app roles therefore hold hardly any of them.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final, NewType


class Permission(StrEnum):
    """Every permission there is, in one list."""

    # What concerns one channel.
    CHANNEL_READ = "channel.read"
    CHANNEL_JOIN = "channel.join"
    CHANNEL_LEAVE = "channel.leave"
    CHANNEL_UPDATE = "channel.update"
    CHANNEL_FREEZE = "channel.freeze"
    CHANNEL_DELETE = "channel.delete"
    MEMBER_READ = "member.read"
    MEMBER_ADD = "member.add"
    MEMBER_REMOVE = "member.remove"
    MEMBER_UPDATE = "member.update"
    MESSAGE_SEND = "message.send"
    MESSAGE_SEND_FROZEN = "message.send_frozen"
    MESSAGE_SYSTEM = "message.system"
    MESSAGE_SILENT = "message.silent"
    MESSAGE_MENTION_ALL = "message.mention_all"
    MESSAGE_EDIT_OWN = "message.edit_own"
    MESSAGE_EDIT_ANY = "message.edit_any"
    MESSAGE_DELETE_OWN = "message.delete_own"
    MESSAGE_DELETE_ANY = "message.delete_any"
    MESSAGE_DELETE_HARD = "message.delete_hard"
    MESSAGE_VERSIONS = "message.versions"
    REACTION_ADD = "reaction.add"
    RECEIPT_SEND = "receipt.send"
    TYPING_SEND = "typing.send"
    # What concerns the app.
    CHANNEL_CREATE = "channel.create"
    CHANNEL_CREATE_DIRECT = "channel.create_direct"
    CHANNEL_LIST_ANY = "channel.list_any"
    USER_READ = "user.read"
    USER_CREATE = "user.create"
    USER_UPDATE_OWN = "user.update_own"
    USER_UPDATE_ANY = "user.update_any"
    USER_DEACTIVATE = "user.deactivate"
    USER_DELETE = "user.delete"
    USER_ACT_AS = "user.act_as"
    TOKEN_MINT = "token.mint"  # noqa: S105 - a permission word, not a secret
    TOKEN_REVOKE = "token.revoke"  # noqa: S105 - a permission word, not a secret
    DEVICE_MANAGE_ANY = "device.manage_any"
    APP_READ = "app.read"
    APP_UPDATE = "app.update"
    ROLE_MANAGE = "role.manage"
    KEY_MANAGE = "key.manage"
    AUDIT_READ = "audit.read"
    JOB_MANAGE = "job.manage"
    TRACE_READ = "trace.read"
    PUSH_MANAGE = "push.manage"
    WEBHOOK_MANAGE = "webhook.manage"
    HOOK_MANAGE = "hook.manage"


# A set of permissions as a bit mask: one machine word's worth of work to check on the hot path.
Grants = NewType("Grants", int)
NONE: Final = Grants(0)
_BIT: Final[dict[str, int]] = {word.value: 1 << place for place, word in enumerate(Permission)}
EVERYTHING: Final = Grants((1 << len(_BIT)) - 1)

CHANNEL_WORDS: Final = frozenset(list(Permission)[: list(Permission).index(Permission.CHANNEL_CREATE)])


def grants_of(words: frozenset[str] | set[str] | list[str] | tuple[str, ...]) -> Grants:
    """The mask of a set of words; `*` is all of them. Raises KeyError(word) on an unknown word."""
    mask = 0
    for word in words:
        mask |= EVERYTHING if word == "*" else _BIT[word]
    return Grants(mask)


def words_of(grants: Grants) -> list[str]:
    """The words of a mask, in the order of the list."""
    return [word for word, bit in _BIT.items() if grants & bit]


def has(grants: Grants, permission: Permission) -> bool:
    """Whether the mask holds the permission."""
    return bool(grants & _BIT[permission])


def bit(permission: Permission) -> int:
    """The permission's bit, for code that tests a mask many thousand times a second."""
    return _BIT[permission]


P = Permission

_READER: Final = frozenset({P.CHANNEL_READ, P.MEMBER_READ, P.CHANNEL_LEAVE, P.RECEIPT_SEND})
_MEMBER: Final = _READER | {
    P.MESSAGE_SEND,
    P.MESSAGE_SILENT,
    P.MESSAGE_EDIT_OWN,
    P.MESSAGE_DELETE_OWN,
    P.REACTION_ADD,
    P.TYPING_SEND,
}
_MODERATOR: Final = _MEMBER | {
    P.CHANNEL_FREEZE,
    P.CHANNEL_UPDATE,
    P.MEMBER_ADD,
    P.MEMBER_REMOVE,
    P.MESSAGE_SEND_FROZEN,
    P.MESSAGE_MENTION_ALL,
    P.MESSAGE_DELETE_ANY,
    P.MESSAGE_VERSIONS,
}
_OWNER: Final = _MODERATOR | {P.CHANNEL_DELETE, P.MEMBER_UPDATE}

CHANNEL_ROLES: Final[dict[str, frozenset[Permission]]] = {
    "reader": _READER,
    "member": _MEMBER,
    "moderator": _MODERATOR,
    "owner": _OWNER,
}

_GUEST: Final = frozenset({P.USER_READ, P.USER_UPDATE_OWN})
_USER: Final = _GUEST | {P.CHANNEL_CREATE, P.CHANNEL_CREATE_DIRECT}

APP_ROLES: Final[dict[str, frozenset[Permission]]] = {
    # Talks where they were put, starts nothing.
    "guest": _GUEST,
    "user": _USER,
    # Keeps order in every channel of the app.
    "moderator": _USER | _MODERATOR | {P.CHANNEL_LIST_ANY, P.USER_DEACTIVATE},
    # Runs the app and reads the audit trail, without seeing any message.
    "admin": _USER
    | {
        P.CHANNEL_LIST_ANY,
        P.MEMBER_READ,
        P.USER_CREATE,
        P.USER_UPDATE_ANY,
        P.USER_DEACTIVATE,
        P.USER_DELETE,
        P.TOKEN_REVOKE,
        P.DEVICE_MANAGE_ANY,
        P.APP_READ,
        P.APP_UPDATE,
        P.ROLE_MANAGE,
        P.AUDIT_READ,
        P.JOB_MANAGE,
        P.TRACE_READ,
        P.PUSH_MANAGE,
        P.WEBHOOK_MANAGE,
        P.HOOK_MANAGE,
    },
}

# Towards a channel in a type that is open to everyone in the app.
PUBLIC_GRANTS: Final = frozenset({P.CHANNEL_READ, P.CHANNEL_JOIN, P.MEMBER_READ})

RELATION_ROLES: Final[dict[str, frozenset[Permission]]] = {
    # A clinician towards the conversations of the patients on their panel.
    "panel": _MEMBER,
}

BUILT_IN: Final[dict[str, dict[str, frozenset[Permission]]]] = {
    "app": APP_ROLES,
    "channel": CHANNEL_ROLES,
    "relation": RELATION_ROLES,
}
