"""How often: every request of a credential takes from its bucket, the one that its commands on sockets take from too.

The headers are those of draft-ietf-httpapi-ratelimit-headers-10: `RateLimit-Policy` tells the quota `q` (requests) and
the window `w` (seconds in which it comes back), `RateLimit` what remains `r` and in how many seconds `t` all is back.
"""

from __future__ import annotations

from typing import Final

from tidings.server.domain.limits import Rate, Verdict
from tidings.server.services.access import Actor

POLICY: Final = "requests"


def bucket_of(actor: Actor) -> tuple[int, str]:
    """Whose bucket an actor takes from: the credential's, whether it comes by REST or by socket."""
    return (actor.app.app, actor.via)


def policy_header(rate: Rate) -> bytes:
    """The value of `RateLimit-Policy`."""
    return b'"%b";q=%d;w=%d' % (POLICY.encode(), rate.burst, rate.window_seconds)


def limit_header(verdict: Verdict) -> bytes:
    """The value of `RateLimit`."""
    return b'"%b";r=%d;t=%d' % (POLICY.encode(), verdict.remaining, verdict.reset_seconds)
