"""Time to live: since when sessions are idle. Knows no bytes."""

from collections import OrderedDict

from cachedattn_jax.store.placement.standing import Standing


class Rests:
    """Idle sessions, the longest idle first, if their time is limited at all.

    Args:
        ttl_s: how long they live; None for ever.
    """

    def __init__(self, ttl_s: float | None) -> None:
        self._ttl_s = ttl_s
        self._since: OrderedDict[Standing, float] = OrderedDict()

    def begin(self, standing: Standing, now: float) -> None:
        if self._ttl_s is not None:
            self._since[standing] = now

    def end(self, standing: Standing) -> None:
        self._since.pop(standing, None)

    def resume(self, standing: Standing) -> None:
        """A session's time goes on that was over while it could not go."""
        if self._ttl_s is not None:
            self._since.setdefault(standing, standing.used_at)
            self._since.move_to_end(standing, last=False)

    def expired(self, now: float) -> list[Standing]:
        """Those whose time is over, each told once."""
        found: list[Standing] = []
        if self._ttl_s is None:
            return found
        while self._since:
            standing, since = next(iter(self._since.items()))
            if since + self._ttl_s > now:
                break
            del self._since[standing]
            found.append(standing)
        return found
