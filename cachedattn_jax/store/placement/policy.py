"""An order of sessions for each tier: who gives up room first.

A policy is told what happens and asked for an order. It ranks sessions, the paper's
unit; the store takes a victim's pages from its end, because a page is of no use without
the pages before it.
"""

import abc
from collections.abc import Iterator

from cachedattn_jax.store.placement.standing import Standing
from cachedattn_jax.store.placement.tier import Tier


class Policy(abc.ABC):
    """What a policy is told, and what it answers.

    It knows sessions while they may be given up. A session that begins to run, or is
    pinned, leaves all its tiers, as far as a policy sees it, and enters them again
    afterwards. While a policy knows it, its times and sizes stay as they are.
    """

    @abc.abstractmethod
    def entered(self, standing: Standing, tier: Tier) -> None:
        """The session has pages in the tier and may give them up."""

    @abc.abstractmethod
    def left(self, standing: Standing, tier: Tier) -> None:
        """The session has no page in the tier any more, or keeps them."""

    def queued(self, standing: Standing) -> None:  # noqa: B027  most do not look
        """A turn of a session of which none waited stands in the queue now."""

    def unqueued(self, standing: Standing, ticket: int) -> None:  # noqa: B027
        """That turn, which had this ticket, does not stand there any more."""

    def rested(self, standing: Standing, now: float) -> None:  # noqa: B027
        """A turn of the session ended and no other waits: it is idle from now on."""

    def returned(self, standing: Standing, now: float) -> None:  # noqa: B027
        """A turn of an idle session came; its times are still those of the last."""

    def closed(self, standing: Standing) -> None:  # noqa: B027
        """Nobody will come back to the session: what was learnt of it is not missed."""

    @abc.abstractmethod
    def victims(
        self, tier: Tier, now: float, first_ticket: int | float = 0
    ) -> Iterator[Standing]:
        """Sessions with pages in the tier, the one to give up first at the front.

        Lazy: nothing may be reported to the policy while the iterator is in use.

        Args:
            first_ticket: sessions with a waiting turn before this place in the queue
                are exempt; only policies that look at the queue heed it.
        """
