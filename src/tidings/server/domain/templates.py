"""What a push says: an app's templates, in the reader's language, filled with what may be said.

A template is text with names in braces. Nothing is evaluated: a name is one of a list or is refused when the template
is stored, and what is filled in is never looked at again, so that a user who is called `{text}` stays so.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Final

from tidings.wire.notifications import PushEvent, Template

# What a template may name. The second list is content: only where the app has switched it on.
VARIABLES: Final = ("app", "count")
CONTENT_VARIABLES: Final = ("sender", "channel", "text")
_NAME: Final = re.compile(r"\{([^{}]*)\}|[{}]")

# Without templates of its own, an app's pushes say this. It names nobody: a locked phone shows it to everybody.
DEFAULTS: Final[dict[str, Template]] = {
    "en": Template(title="{app}", body="You have a new message."),
    "de": Template(title="{app}", body="Sie haben eine neue Nachricht."),
    "fr": Template(title="{app}", body="Vous avez un nouveau message."),
    "es": Template(title="{app}", body="Tiene un mensaje nuevo."),
    "it": Template(title="{app}", body="Hai un nuovo messaggio."),
    "pt": Template(title="{app}", body="Você tem uma nova mensagem."),
    "nl": Template(title="{app}", body="Je hebt een nieuw bericht."),
    "pl": Template(title="{app}", body="Masz nową wiadomość."),
    "tr": Template(title="{app}", body="Yeni bir mesajınız var."),
    "ar": Template(title="{app}", body="لديك رسالة جديدة."),
    "he": Template(title="{app}", body="יש לך הודעה חדשה."),
    "ru": Template(title="{app}", body="У вас новое сообщение."),
    "uk": Template(title="{app}", body="У вас нове повідомлення."),
    "ja": Template(title="{app}", body="新しいメッセージがあります。"),
    "zh": Template(title="{app}", body="您有一条新消息。"),
    "hi": Template(title="{app}", body="आपके लिए एक नया संदेश है।"),
}
FALLBACK_LANGUAGE: Final = "en"


def unknown_name(text: str, *, content: bool) -> str | None:
    """The first name in braces, or lone brace, that a template may not have; None when all is well."""
    allowed = VARIABLES + (CONTENT_VARIABLES if content else ())
    for found in _NAME.finditer(text):
        name = found[1]
        if name not in allowed:
            return found[0]
    return None


def choose(templates: Mapping[PushEvent, Mapping[str, Template]], event: PushEvent, language: str | None) -> Template:
    """The template for an event in a language: `de-AT`, then `de`, then the app's first; of the app for this event,
    then for messages, then the built-in one."""
    languages = list(_wider(language or FALLBACK_LANGUAGE))
    for kind in dict.fromkeys((event, "message")):
        own = templates.get(kind)
        if own:
            by_name = {name.lower(): template for name, template in own.items()}
            for name in languages:
                if name in by_name:
                    return by_name[name]
            # An app that speaks one language speaks it to everybody.
            return next(iter(own.values()))
    for name in languages:
        if name in DEFAULTS:
            return DEFAULTS[name]
    return DEFAULTS[FALLBACK_LANGUAGE]


def fill(text: str, values: Mapping[str, str]) -> str:
    """The text with what the names stand for; a name without a value leaves nothing."""
    return _NAME.sub(lambda found: values.get(found[1] or "", ""), text)


def _wider(language: str) -> Iterator[str]:
    parts = language.lower().split("-")
    for length in range(len(parts), 0, -1):
        yield "-".join(parts[:length])
