"""Bounds of everything that crosses the network, each with its unit and its reason.

The server enforces them, the SDKs check them before sending, and the protocol pages are generated from them.
"""

from __future__ import annotations

# Identifiers are chosen by applications: e-mail addresses, UUIDs and database keys fit, URLs and prose do not.
ID_LENGTH_MAX = 128
ID_PATTERN = r"^[A-Za-z0-9_.:@+\-]{1,128}$"

# A page of dense prose is about 3,000 characters; six of them is a letter, and beyond that it is a file.
TEXT_LENGTH_MAX = 20_000
# A client key is a UUID or ULID with room for a prefix.
KEY_LENGTH_MAX = 128
# Custom data is for references and small state, not for documents: bytes of its JSON encoding.
CUSTOM_BYTES_MAX = 8_192
# More people than this are a group, for which there is `mention_all`.
MENTIONS_MAX = 50
# What a phone screen shows as one album.
ATTACHMENTS_MAX = 10
URL_LENGTH_MAX = 2_048
NAME_LENGTH_MAX = 256
DESCRIPTION_LENGTH_MAX = 2_000
# The longest emoji sequence in Unicode 15 has 10 code points; custom names such as `:party_parrot:` fit too.
EMOJI_LENGTH_MAX = 64
# Distinct reactions to one message, so that a message stays a message.
REACTIONS_PER_MESSAGE_MAX = 64
# Users named in a reaction's summary; the count is exact beyond that.
REACTION_USERS_SHOWN_MAX = 10
LABELS_MAX = 16
LABEL_NAME_LENGTH_MAX = 32
LABEL_VALUE_LENGTH_MAX = 64
# Largest text (20,000 characters of 4 bytes) plus custom data, attachments and the envelope.
FRAME_BYTES_MAX = 131_072
# Users in one bulk upsert, members in one addition: one transaction of a few milliseconds.
BULK_MAX = 100
PAGE_MAX = 200
PAGE_DEFAULT = 50
# Streams named in one `sync` command, heads in one page: about 64 KiB of JSON.
SYNC_STREAMS_MAX = 1_000
# People whose presence one connection watches: what a roster shows.
PRESENCE_WATCH_MAX = 500
# Longest wait of a long poll, seconds: below the 30 s after which common proxies cut idle requests.
POLL_WAIT_MAX = 25
DEVICES_PER_USER_MAX = 32
# Beyond this many members a channel's receipts and typing are not told one by one: at one read each per message they
# would be the square of the membership. Positions are kept all the same and counted (`GET …/receipts`), and of typing
# the number is told.
RECEIPTS_MEMBERS_MAX = 1_000
# A direct conversation has two people; a group made in one request has at most this many.
MEMBERS_AT_CREATION_MAX = 100
EDITS_PER_MESSAGE_MAX = 100
TOKEN_BYTES_MAX = 8_192
