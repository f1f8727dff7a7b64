"""What each API key is using: requests at the moment, and requests of the last minute."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from gyrfalcon.http.keys import ApiKey


@dataclass(slots=True)
class _Use:
    """One key's use."""

    num_running: int = 0
    allowance: float = 0.0  # requests that may begin right now
    counted_s: float = -math.inf  # when the allowance was last brought up to date


@dataclass(frozen=True, slots=True)
class Refusal:
    """A request that its key has no room for. cause: for metrics."""

    cause: str
    message: str
    retry_after_s: int


class Quotas:
    """Counts by key; survives a key's being read again."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._uses: dict[bytes, _Use] = {}

    def begin(self, key: ApiKey) -> Refusal | None:
        """Charge a request to its key; `end` must follow unless it is refused. A refused one costs nothing."""
        use = self._uses.setdefault(key.digest, _Use())
        most, rate = key.limits.max_concurrent_requests, key.limits.requests_per_minute
        if most is not None and use.num_running >= most:
            text = f"this API key may have {most} requests at the same time"
            return Refusal("key_concurrency", text, 1)
        if rate is not None:
            # A bucket that holds a minute's requests and fills steadily.
            now = self._clock()
            use.allowance = min(float(rate), use.allowance + (now - use.counted_s) * rate / 60.0)
            use.counted_s = now
            if use.allowance < 1.0:
                wait_s = math.ceil((1.0 - use.allowance) * 60.0 / rate)
                return Refusal("key_rate", f"this API key may make {rate} requests in a minute", wait_s)
            use.allowance -= 1.0
        use.num_running += 1
        return None

    def end(self, key: ApiKey) -> None:
        self._uses[key.digest].num_running -= 1
