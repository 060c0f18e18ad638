"""How much to measure."""

from __future__ import annotations

import msgspec


class Plan(msgspec.Struct, frozen=True):
    """`runs`: repetitions. `quick`: a tenth of the work, to see that it runs. `long`: with 10^7."""

    runs: int = 5
    quick: bool = False
    long: bool = False

    def size(self, full: int, quick: int) -> int:
        return quick if self.quick else full

    def seconds(self, full: float, quick: float = 1.0) -> float:
        return quick if self.quick else full
