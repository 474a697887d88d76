"""The keys of a conversation's pages: each names all that was said and dropped before.

Pure: knows tokens, truncations and hashing. Does not know where pages are.

A chain can be built up to any moment of a conversation. So when a page is lost, it says
which pages are needed to compute it again, and from where on: the checkpoint.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from cachedattn_jax.store.layout import Layout
from cachedattn_jax.store.page import APPEND, PageKey, Tail, page_key
from cachedattn_jax.store.truncation import Context, Truncation


@dataclass(frozen=True, order=True)
class Checkpoint:
    """A moment of a conversation from which computing can start.

    Attributes:
        num_truncations: that had happened.
        position: tokens of the context, as it was then, that had keys and values.
    """

    num_truncations: int
    position: int


@dataclass(frozen=True)
class ChainPage:
    """A full page of the context.

    Attributes:
        token: place in the conversation of its first token.
        begun: the moment at which its first token was computed.
    """

    key: PageKey
    token: int
    begun: Checkpoint


@dataclass(frozen=True, kw_only=True)
class Chain:
    """The pages of a conversation up to some moment.

    Attributes:
        pages: full ones that are in the context, in its order.
        position: tokens of the context up to there.
        parent: key of the page that was filled last, whether it is still there or not.
        event: what happened since, for the key of the next page.
        begun: when the partly filled page at the end was begun, or will be.
    """

    layout: Layout
    salt: bytes
    pages: tuple[ChainPage, ...] = ()
    position: int = 0
    context: Context = Context()
    num_truncations: int = 0
    parent: PageKey = b""
    event: str = APPEND
    begun: Checkpoint = Checkpoint(0, 0)

    @property
    def keys(self) -> list[PageKey]:
        return [page.key for page in self.pages]

    @property
    def num_tail_tokens(self) -> int:
        return self.position - len(self.pages) * self.layout.page_tokens

    def checkpoint(self, index: int) -> Checkpoint:
        """When a page, full or the one after them, was begun."""
        return self.begun if index == len(self.pages) else self.pages[index].begun

    def tail(self, token_ids: np.ndarray) -> Tail | None:
        """The partly filled page at the end."""
        if not self.num_tail_tokens:
            return None
        tokens = self.context.of(token_ids, self._num_full, self.position)
        key = page_key(self.layout.digest, self.salt, self.parent, self.event, tokens)
        return Tail(index=len(self.pages), key=key, token_ids=tokens)

    def before(
        self, index: int, token_ids: np.ndarray, truncations: Sequence[Truncation]
    ) -> "Chain":
        """The chain when a page, full or the one after them, was begun."""
        begun = self.checkpoint(index)
        if self.num_truncations:
            return self.at(token_ids, truncations, begun)
        return replace(
            self,
            pages=self.pages[:index],
            position=index * self.layout.page_tokens,
            parent=self.pages[index - 1].key if index else b"",
            begun=begun,
        )

    def after(
        self,
        token_ids: np.ndarray,
        truncations: Sequence[Truncation],
        num_tokens: int,
    ) -> "Chain":
        """The chain when more was said and dropped.

        Args:
            token_ids: int32, of the whole conversation.
            truncations: all there were, those included that the chain knows.
            num_tokens: of the conversation, that have keys and values.
        """
        chain = self
        for truncation in truncations[self.num_truncations :]:
            until = chain.context.position(min(truncation.at, num_tokens))
            chain = chain._extended(token_ids, until)._truncated(token_ids, truncation)
        return chain._extended(token_ids, chain.context.position(num_tokens))

    def at(
        self,
        token_ids: np.ndarray,
        truncations: Sequence[Truncation],
        checkpoint: Checkpoint,
    ) -> "Chain":
        """The chain at an earlier moment, built from the beginning."""
        chain = Chain(layout=self.layout, salt=self.salt)
        for truncation in truncations[: checkpoint.num_truncations]:
            until = chain.context.position(truncation.at)
            chain = chain._extended(token_ids, until)._truncated(token_ids, truncation)
        return chain._extended(token_ids, checkpoint.position)

    @property
    def _num_full(self) -> int:
        return len(self.pages) * self.layout.page_tokens

    def _extended(self, token_ids: np.ndarray, position: int) -> "Chain":
        if position <= self.position:
            return self
        layout, pages = self.layout, list(self.pages)
        parent, event, begun = self.parent, self.event, self.begun
        for start in range(
            self._num_full, position - layout.page_tokens + 1, layout.page_tokens
        ):
            places = self.context.tokens(start, start + layout.page_tokens)
            tokens = token_ids[places]
            parent = page_key(layout.digest, self.salt, parent, event, tokens)
            pages.append(ChainPage(parent, int(places[0]), begun))
            event = APPEND
            begun = Checkpoint(self.num_truncations, start + layout.page_tokens)
        return replace(
            self,
            pages=tuple(pages),
            position=position,
            parent=parent,
            event=event,
            begun=begun,
        )

    def _truncated(self, token_ids: np.ndarray, truncation: Truncation) -> "Chain":
        context = self.context.without(truncation.dropped)
        number = self.num_truncations + 1
        if truncation.is_computed_anew:
            empty = Chain(layout=self.layout, salt=self.salt, context=context)
            return replace(empty, num_truncations=number, begun=Checkpoint(number, 0))
        name = truncation.name(self.layout.page_tokens, self.num_tail_tokens)
        if truncation.rewrites_pages:
            return self._rewritten(token_ids, truncation, context, name)
        ((start, stop),) = truncation.dropped
        step = self.layout.page_tokens
        pages = self.pages[: start // step] + self.pages[stop // step :]
        position = self.position - truncation.num_dropped
        # A page that was begun before goes on as it is.
        begun = self.begun if self.num_tail_tokens else Checkpoint(number, position)
        return replace(
            self,
            pages=pages,
            position=position,
            context=context,
            num_truncations=number,
            event=name if self.event == APPEND else f"{self.event} {name}",
            begun=begun,
        )

    def _rewritten(
        self, token_ids: np.ndarray, truncation: Truncation, context: Context, name: str
    ) -> "Chain":
        """From the first page on that changes, pages are new ones under new keys."""
        step, digest = self.layout.page_tokens, self.layout.digest
        tail = self.tail(token_ids)
        parent = tail.key if tail else self.parent
        before = Checkpoint(self.num_truncations, self.position)
        kept = self.pages[: first_rewritten(truncation, step)]
        position = self.position - truncation.num_dropped
        pages = list(kept)
        event = name
        for start in range(len(kept) * step, position - step + 1, step):
            places = context.tokens(start, start + step)
            parent = page_key(digest, self.salt, parent, event, token_ids[places])
            pages.append(ChainPage(parent, int(places[0]), before))
            event = APPEND
        number = self.num_truncations + 1
        is_between = position == len(pages) * step
        return replace(
            self,
            pages=tuple(pages),
            position=position,
            context=context,
            num_truncations=number,
            parent=parent,
            event=event,
            begun=Checkpoint(number, position) if is_between else before,
        )


def first_rewritten(truncation: Truncation, page_tokens: int) -> int:
    """The first page whose bytes a truncation changes."""
    if truncation.method == "naive":
        return 0
    return min(start for start, _ in truncation.dropped) // page_tokens
