"""Which tokens a truncation takes, and what the keys of the pages after it say."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachedattn_jax.engine.plan import plan_turn
from cachedattn_jax.engine.request import Request
from cachedattn_jax.engine.truncation import (
    TruncationConfig,
    pages_to_drop,
    plan_truncations,
)
from cachedattn_jax.store.catalog import SessionRecord
from cachedattn_jax.store.chain import Chain
from cachedattn_jax.store.truncation import Context, Truncation, context_after
from tests.test_page import LAYOUT

STEP = LAYOUT.page_tokens


def story_of(data) -> tuple[np.ndarray, tuple[Truncation, ...]]:
    """A conversation and truncations that could have happened in it."""
    draw = data.draw
    num_tokens = draw(st.integers(1, 120))
    tokens = np.arange(num_tokens, dtype=np.int32) % 7
    context, truncations, at = Context(), (), 0
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(at, num_tokens - 1))
        pages = context.position(at) // STEP
        if pages < 1:
            continue
        first = draw(st.integers(0, pages - 1))
        count = draw(st.integers(1, pages - first))
        span = (first * STEP, (first + count) * STEP)
        truncations += (Truncation(at=at, dropped=(span,)),)
        context = context.without((span,))
    return tokens, truncations


def brute_force(num_tokens: int, truncations) -> list[int]:
    """The tokens left, by taking them out of a list."""
    left: list[int] = []
    pending = list(truncations)
    for token in range(num_tokens + 1):
        while pending and pending[0].at == token:
            for start, stop in reversed(pending.pop(0).dropped):
                del left[start:stop]
        left.append(token)
    return left[:-1]


@given(st.data())
def test_a_context_is_what_a_list_would_be(data):
    tokens, truncations = story_of(data)
    context, left = context_after(truncations), brute_force(len(tokens), truncations)
    assert context.position(len(tokens)) == len(left)
    assert context.tokens(0, len(left)).tolist() == left
    start = data.draw(st.integers(0, len(left)))
    some = context.of(tokens, start, len(left))
    assert some.tolist() == [int(tokens[place]) for place in left[start:]]
    assert [context.token(place) for place in range(len(left))] == left
    assert [context.position(token) for token in left] == list(range(len(left)))


@given(st.data(), st.integers(0, 120))
def test_a_chain_does_not_depend_on_how_it_was_built(data, stop):
    tokens, truncations = story_of(data)
    empty = Chain(layout=LAYOUT, salt=b"")
    whole = empty.after(tokens, truncations, len(tokens))
    part = empty
    for place in range(min(stop, len(tokens))):
        past = tuple(item for item in truncations if item.at < place)
        part = part.after(tokens, past, place)
    assert part.after(tokens, truncations, len(tokens)) == whole
    assert len(set(whole.keys)) == len(whole.keys)


@given(st.data())
def test_a_checkpoint_gives_the_pages_that_a_page_was_computed_after(data):
    tokens, truncations = story_of(data)
    whole = Chain(layout=LAYOUT, salt=b"").after(tokens, truncations, len(tokens))
    for index in range(len(whole.pages) + 1):
        before = whole.before(index, tokens, truncations)
        assert before.position % STEP == 0 and not before.num_tail_tokens
        again = before.after(tokens, truncations, len(tokens))
        assert again == whole, "going on from a checkpoint leads elsewhere"
        if before.num_truncations == whole.num_truncations:
            assert before.keys == whole.keys[:index]


@given(st.data())
def test_keys_are_equal_only_after_equal_histories(data):
    one, other = story_of(data), story_of(data)
    chains = [
        Chain(layout=LAYOUT, salt=b"").after(tokens, truncations, len(tokens))
        for tokens, truncations in (one, other)
    ]
    for page in chains[0].pages:
        if page.key in chains[1].keys:
            twin = chains[1].pages[chains[1].keys.index(page.key)]
            assert twin.token == page.token
            past = [
                tuple(t for t in truncations if t.at < page.token + STEP)
                for _, truncations in (one, other)
            ]
            assert past[0] == past[1]


@pytest.mark.parametrize(
    ("num_cached", "num_tokens", "expected"),
    [
        (60, 64, []),
        (60, 65, [(60, 0, 32)]),
        (64, 65, [(64, 0, 32)]),
        (63, 100, [(63, 0, 36)]),
        (3, 70, [(64, 0, 32)]),
        (0, 200, [(64, 0, 32), (96, 0, 32), (128, 0, 32), (160, 0, 32), (192, 0, 32)]),
    ],
)
def test_a_prompt_takes_no_more_than_it_needs(num_cached, num_tokens, expected):
    config = TruncationConfig()
    planned = plan_truncations(config, 64, 4, (), Context(), num_cached, num_tokens)
    assert [(t.at, *t.dropped[0]) for t in planned] == expected
    assert context_after(planned).position(num_tokens) <= 64


@given(st.integers(8, 400), st.integers(1, 8), st.floats(0.01, 0.99))
def test_the_ratio_is_rounded_up_to_pages(window, page_tokens, ratio):
    pages = pages_to_drop(window, page_tokens, ratio)
    assert pages >= 1 and pages * page_tokens >= int(ratio * window)
    assert (pages - 1) * page_tokens < max(1, int(ratio * window))


@given(st.data())
def test_a_prompt_that_leaves_what_was_said_finds_the_pages_of_what_it_shares(data):
    """The keys a session kept are those that hashing it anew gives."""
    draw = data.draw
    said, truncations = story_of(data)
    num_shared = draw(st.integers(0, len(said)))
    prompt = np.concatenate([said[:num_shared], np.full(3, 9, np.int32)])
    num_cached = len(said) - 1
    chain = Chain(layout=LAYOUT, salt=b"s").after(said, truncations, num_cached)
    record = SessionRecord(
        session_id="a",
        tenant="t",
        token_ids=said,
        num_turns=1,
        used_at=0.0,
        truncations=tuple(item for item in truncations if item.at <= num_cached),
        chain=chain,
    )
    request = Request(
        session_id="a", token_ids=prompt.tolist(), max_tokens=2, is_whole_prompt=True
    )
    kept, anew = (
        plan_turn(LAYOUT, TruncationConfig(), 1000, request, known, b"s")
        for known in (record, dataclasses.replace(record, chain=None))
    )
    assert kept.stored.pages == anew.stored.pages
    assert kept.whole.pages == anew.whole.pages
    assert kept.stored.position == anew.stored.position
    assert (kept.tail is None) == (anew.tail is None)
