"""Time to live: since when sessions are idle. Knows no bytes."""

from sortedcontainers import SortedList

from cachedattn_jax.store.placement.standing import Standing


class Rests:
    """Idle sessions, the longest idle first, if their time is limited at all.

    Args:
        ttl_s: how long they live; None for ever.
    """

    def __init__(self, ttl_s: float | None) -> None:
        self._ttl_s = ttl_s
        self._since: dict[Standing, float] = {}
        # Of (since, born, standing).
        self._order = SortedList()

    def begin(self, standing: Standing, now: float) -> None:
        if self._ttl_s is not None:
            self.end(standing)
            self._since[standing] = now
            self._order.add((now, standing.born, standing))

    def end(self, standing: Standing) -> None:
        since = self._since.pop(standing, None)
        if since is not None:
            self._order.remove((since, standing.born, standing))

    def resume(self, standing: Standing) -> None:
        """A session's time goes on since its last turn, if it does not run already."""
        if standing not in self._since:
            self.begin(standing, standing.used_at)

    def expired(self, now: float) -> list[Standing]:
        """Those whose time is over, each told once."""
        found: list[Standing] = []
        if self._ttl_s is None:
            return found
        while self._order and self._order[0][0] + self._ttl_s <= now:
            _, _, standing = self._order.pop(0)
            del self._since[standing]
            found.append(standing)
        return found
