"""Where people can be woken, what they want to be told of, and how an app reaches its push providers."""

from __future__ import annotations

from tidings.server.domain.templates import CONTENT_VARIABLES, unknown_name
from tidings.server.errors import Refusal
from tidings.wire.notifications import PushSettings


def check_push_settings(settings: PushSettings) -> None:
    """Refuse templates that name what may not be said, and a fallback that asks one provider twice. Raises Refusal."""
    for event, languages in settings.templates.items():
        for language, template in languages.items():
            for part in ("title", "body"):
                wrong = unknown_name(getattr(template, part), content=settings.content)
                if wrong is not None:
                    raise Refusal(
                        "invalid_field",
                        f"A template may not name {wrong}"
                        + (" unless content is switched on." if wrong.strip("{}") in CONTENT_VARIABLES else "."),
                        field=f"settings.push.templates.{event}.{language}.{part}",
                    )
    providers = [step.provider for step in settings.fallback]
    if len(set(providers)) != len(providers):
        raise Refusal("invalid_field", "Each provider stands in the chain once.", field="settings.push.fallback")
    minutes = [step.after_minutes for step in settings.fallback]
    if minutes != sorted(minutes):
        raise Refusal("invalid_field", "The chain goes forward in time.", field="settings.push.fallback")
