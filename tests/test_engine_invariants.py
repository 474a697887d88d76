"""Invariants 1, 2, 4 and 5: where a page was never shows in a token."""

import dataclasses
import functools
import tempfile

import numpy as np
import pytest

from cachedattn_jax.engine.request import Request
from cachedattn_jax.store.placement.tier import Tier
from tests.engines import (
    LAYERS_PER_GROUP,
    PAGE_TOKENS,
    ask,
    assert_budgets_kept,
    assert_nothing_leaked,
    assert_same_reply,
    greedy_reply,
    make_engine,
    random_tokens,
    tiny_model,
)

WINDOW = tiny_model()[0].window


@functools.cache
def engine_of(page_tokens: int, layers_per_group: int):
    return make_engine(
        page_tokens=page_tokens,
        layers_per_group=layers_per_group,
        disk_pages=1000,
        disk_root=tempfile.mkdtemp(),
    )


def histories(page_tokens: int) -> list[int]:
    full = WINDOW - 4  # one more sampled, one new, one reply token
    return [0, 1, page_tokens - 1, page_tokens, page_tokens + 1, full]


def move_down(engine, tier: Tier) -> None:
    if tier is not Tier.DEVICE:
        engine.store.empty(Tier.DEVICE)
    if tier is Tier.DISK:
        engine.store.empty(Tier.HOST)


@pytest.mark.parametrize("tier", list(Tier))
@pytest.mark.parametrize("layers_per_group", LAYERS_PER_GROUP)
@pytest.mark.parametrize("page_tokens", PAGE_TOKENS)
def test_tokens_do_not_depend_on_the_tier_a_page_came_from(
    page_tokens, layers_per_group, tier
):
    engine = engine_of(page_tokens, layers_per_group)
    for length in histories(page_tokens):
        rng = np.random.default_rng([length, page_tokens, list(Tier).index(tier)])
        session = f"{tier}-{length}"
        if length:
            ask(engine, session, random_tokens(rng, length), max_tokens=1)
            move_down(engine, tier)
        num_reply = min(6, WINDOW - length - 2)
        turn = ask(engine, session, random_tokens(rng, 1), max_tokens=num_reply)

        found = dataclasses.asdict(turn.tokens_from)
        assert found[tier.value] == length
        assert turn.tokens_from.recomputed == 0
        assert_same_reply(turn.reply, *greedy_reply(turn.prompt, len(turn.reply)))
    assert_nothing_leaked(engine)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    ("max_batch", "chunk_tokens", "page_tokens"),
    [(2, (8, 32), 4), (5, (8,), 16), (1, (4, 16, 64), 4)],
)
def test_tokens_equal_recomputation_whatever_the_batch_and_the_chunks(
    seed, max_batch, chunk_tokens, page_tokens, tmp_path
):
    """Tiers so small that pages move all the time; several turns at once."""
    cached = make_engine(
        page_tokens=page_tokens,
        max_batch=max_batch,
        chunk_tokens=chunk_tokens,
        device_pages=(max_batch + 1) * WINDOW // page_tokens,
        host_pages=2 * WINDOW // page_tokens,
        disk_pages=3 * WINDOW // page_tokens,
        disk_root=str(tmp_path),
    )
    rng = np.random.default_rng(seed)
    said: dict[str, list[int]] = {}
    for _ in range(4):
        requests = []
        for name in rng.permutation(8)[: rng.integers(2, 9)]:
            session = f"s{name}"
            room = WINDOW - len(said.get(session, [])) - 6
            if room < 1:
                continue
            new = random_tokens(rng, int(rng.integers(1, min(room, 25) + 1)))
            requests.append(Request(session_id=session, token_ids=new, max_tokens=5))
        turns = [cached.submit(request) for request in requests]
        while not cached.scheduler.is_idle:
            cached.step()
            assert_budgets_kept(cached)
        for turn in turns:
            session = turn.request.session_id
            whole = [*said.get(session, []), *turn.request.token_ids]
            assert turn.error is None
            assert turn.prompt.tolist() == whole
            assert turn.tokens_from.total == len(whole)
            assert_same_reply(turn.reply, *greedy_reply(whole, len(turn.reply)))
            said[session] = [*whole, *turn.reply]
    assert_nothing_leaked(cached)
    for session, tokens in said.items():
        assert cached.session(session).token_ids == tokens
    cached.close()


def test_the_baseline_is_the_same_engine_and_keeps_nothing():
    engine = make_engine(reuse="recompute")
    rng = np.random.default_rng(0)
    for _ in range(3):
        turn = ask(engine, "a", random_tokens(rng, 10))
        assert turn.tokens_from.cached == 0
        assert_same_reply(turn.reply, *greedy_reply(turn.prompt, len(turn.reply)))
    assert turn.tokens_from.recomputed == 2 * 14 - 1
    assert engine.store.pool.num_free == engine.store.pool.num_slots


def test_sampled_tokens_do_not_depend_on_batch_mates():
    from cachedattn_jax.engine.request import SamplingParams

    rng = np.random.default_rng(0)
    sampling = SamplingParams(temperature=0.9, top_k=20, top_p=0.9, seed=7)
    prompt = random_tokens(rng, 12)
    alone = ask(make_engine(), "a", prompt, max_tokens=12, sampling=sampling).reply
    crowd = make_engine(max_batch=5)
    mates = [
        Request(
            session_id=f"m{index}",
            token_ids=random_tokens(rng, 9),
            max_tokens=8,
            sampling=SamplingParams(temperature=1.5, seed=index),
        )
        for index in range(6)
    ]
    ours = Request(session_id="a", token_ids=prompt, max_tokens=12, sampling=sampling)
    turns = crowd.run([*mates[:3], ours, *mates[3:]])
    assert turns[3].reply == alone
    other_seed = dataclasses.replace(sampling, seed=8)
    assert ask(crowd, "b", prompt, max_tokens=12, sampling=other_seed).reply != alone


def test_sessions_of_one_tenant_share_a_beginning_and_those_of_others_do_not():
    engine = make_engine(page_tokens=4)
    rng = np.random.default_rng(0)
    system = random_tokens(rng, 18)
    ask(engine, "a", system + [7])
    again = ask(engine, "b", system + [8])
    assert again.tokens_from.device == 16
    assert_same_reply(again.reply, *greedy_reply(again.prompt, 4))
    other = ask(engine, "b", system + [8], tenant="other")
    assert other.tokens_from.cached == 0
    assert other.reply == again.reply


def test_an_edited_conversation_branches_and_both_branches_are_right():
    engine = make_engine(page_tokens=4)
    rng = np.random.default_rng(0)
    first = ask(engine, "a", random_tokens(rng, 21), max_tokens=8)
    session = engine.session("a")
    session.rewind(14)
    branch = ask(engine, "a", [9, 9])
    assert branch.tokens_from.device == 12
    assert branch.tokens_from.recomputed == 1
    assert_same_reply(branch.reply, *greedy_reply(branch.prompt, 4))
    whole = [*first.prompt.tolist(), *first.reply, 5]
    back = ask(engine, "a", whole, is_whole_prompt=True)
    assert back.tokens_from.device >= 28
    assert_same_reply(back.reply, *greedy_reply(whole, 4))


def test_a_whole_prompt_that_was_served_before_is_computed_from_its_last_page_on():
    engine = make_engine(page_tokens=4)
    prompt = random_tokens(np.random.default_rng(0), 16)
    first = ask(engine, "a", prompt)
    again = ask(engine, "b", prompt, is_whole_prompt=True)
    assert again.tokens_from.device == 12
    assert again.reply == first.reply


def test_bfloat16_serves_the_same_tokens_from_every_tier(tmp_path):
    engine = make_engine(dtype="bfloat16", disk_pages=1000, disk_root=str(tmp_path))
    rng = np.random.default_rng(0)
    prompt, more = random_tokens(rng, 21), random_tokens(rng, 3)
    replies = {}
    for tier in Tier:
        ask(engine, tier, prompt, max_tokens=3)
        move_down(engine, tier)
        turn = ask(engine, tier, more)
        assert dataclasses.asdict(turn.tokens_from)[tier.value] >= 20
        replies[tier] = turn.reply
    assert replies[Tier.DEVICE] == replies[Tier.HOST] == replies[Tier.DISK]
