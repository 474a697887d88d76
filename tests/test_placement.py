"""LRU order, and mistakes in names."""

import pytest

from cachedattn_jax.store.placement import LRU, QueueView, Tier, policy


def order(lru: LRU, tier: Tier) -> list[str]:
    return list(lru.victims(tier, QueueView(), 0.0))


def test_the_session_used_longest_ago_goes_first():
    lru = LRU()
    for now, session in enumerate("abcab"):
        lru.used(session, Tier.HOST, float(now))
    assert order(lru, Tier.HOST) == ["c", "a", "b"]


def test_tiers_have_their_own_order():
    lru = LRU()
    lru.used("a", Tier.HOST, 0.0)
    lru.used("b", Tier.DISK, 1.0)
    lru.used("a", Tier.DISK, 2.0)
    lru.left("a", Tier.HOST)
    assert order(lru, Tier.HOST) == []
    assert order(lru, Tier.DISK) == ["b", "a"]


def test_an_unknown_policy_names_the_nearest():
    with pytest.raises(ValueError, match="policy='lur'.*'lru'"):
        policy("lur")
