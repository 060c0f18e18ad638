"""What can go wrong, as a tree.

`Refusal` is an answer: an entry of the catalogue in `tidings.wire.problems`, caused by what was asked, by whom or
when. Only `rest` and `gateway` turn it into a response. Everything else that is raised is our bug or a broken
machine: it is logged with its trace and answered as `internal`.
"""

from __future__ import annotations

from tidings.wire.problems import CATALOGUE, Problem, ProblemDocument, problem_document


class TidingsError(Exception):
    """Root of what this server raises on purpose."""


class Refusal(TidingsError):
    """A request that is answered with a problem.

    `code` is the catalogue's, `detail` a sentence for people (identifiers only, never content), `field` the path of
    the offending field, `bound` the limit that was hit, `retry_after_ms` how long to wait.
    """

    def __init__(
        self,
        code: str,
        detail: str,
        *,
        field: str | None = None,
        bound: int | None = None,
        retry_after_ms: int | None = None,
    ) -> None:
        super().__init__(f"{code}: {detail}")
        self.problem: Problem = CATALOGUE[code]
        self.code = code
        self.detail = detail
        self.field = field
        self.bound = bound
        self.retry_after_ms = retry_after_ms

    def document(self) -> ProblemDocument:
        """The RFC 9457 shape of this refusal."""
        return problem_document(
            self.code, self.detail, field=self.field, bound=self.bound, retry_after_ms=self.retry_after_ms
        )


class NotFound(Refusal):
    """No such thing, or not for the one who asks: the two look alike."""

    def __init__(self, what: str, *, field: str | None = None) -> None:
        super().__init__("not_found", f"There is no such {what}, or you may not see it.", field=field)


class Forbidden(Refusal):
    """The thing is visible, the permission for this is missing."""

    def __init__(self, permission: str) -> None:
        super().__init__("forbidden", f"This needs the permission {permission}.")


class StoreUnavailable(Refusal):
    """The store could not commit: nothing of the request was stored, or (`unknown`) it cannot be known whether it was,
    because the way to the database broke while the commit was on it. A retry with the same key tells."""

    def __init__(self, why: str, *, unknown: bool = False) -> None:
        stored = "It is not known whether it was stored; retry with the same key." if unknown else "Nothing was stored."
        super().__init__("unavailable", f"The store could not commit: {why}. {stored}", retry_after_ms=1000)


class UnsafeStore(TidingsError):
    """The store is set up such that acknowledged writes could be lost."""


class StoreCorrupt(TidingsError):
    """What was read is not what was written."""


class DataMoved(TidingsError):
    """The data is on its way to another database, or has moved there: the message says what to do."""


class BusUnavailable(TidingsError):
    """The bus between nodes cannot be reached: the message says what was tried."""
