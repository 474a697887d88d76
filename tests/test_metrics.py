"""Counters add up, and Prometheus reads them."""

import json

import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from cachedattn_jax import prometheus_text
from cachedattn_jax.store.placement.tier import Tier
from tests.engines import ask, make_engine, random_tokens


def metrics_of(engine) -> dict[tuple, float]:
    return {
        (s.name, *sorted((k, v) for k, v in s.labels.items() if k != "model_name")): (
            s.value
        )
        for family in text_string_to_metric_families(prometheus_text(engine, "tiny"))
        for s in family.samples
    }


def test_sources_of_tokens_add_up_to_the_prompts(tmp_path):
    rng, prompts, replies = np.random.default_rng(0), 0, 0
    options = {"disk_pages": 500, "disk_root": str(tmp_path), "loading": "always"}
    with make_engine(**options) as engine:
        for tier in (Tier.DEVICE, Tier.HOST, None):
            for name in "ab":
                turn = ask(engine, name, random_tokens(rng, 12))
                prompts, replies = prompts + len(turn.prompt), replies + 4
            if tier is not None:
                engine.store.empty(Tier.DEVICE)
                if tier is Tier.HOST:
                    engine.store.empty(Tier.HOST)
        found, stats = metrics_of(engine), engine.stats()
        totals = engine.totals
    assert found[("cachedattn_prompt_tokens_total",)] == prompts
    assert found[("cachedattn_generation_tokens_total",)] == replies
    cached = [
        found[("cachedattn_cached_tokens_total", ("cache_source", tier))]
        for tier in ("device", "host", "disk")
    ]
    new = totals.prompt_tokens["new"]
    assert sum(cached) + new + totals.prompt_tokens["recomputed"] == prompts
    assert found[("cachedattn_prefix_cache_queries_total",)] == prompts - new
    assert all(count > 0 for count in cached[1:])
    assert found[("cachedattn_time_to_first_token_seconds_count",)] == 6
    assert found[("cachedattn_breaker_state", ("operation", "read"))] == 0
    for direction in ("d2h", "h2d", "read", "write"):
        assert found[("cachedattn_transfer_bytes_total", ("dir", direction))] > 0
    assert max(stats.seconds_moving.values()) > 0
    assert stats.used_bytes["disk"] <= stats.capacity_bytes["disk"]
    assert json.loads(json.dumps(stats.describe()))["sessions"] == 2


def test_reasons_of_evictions_and_misses_are_told(tmp_path):
    rng = np.random.default_rng(0)
    with make_engine(
        device_pages=60, host_pages=10, disk_pages=60, disk_root=str(tmp_path)
    ) as engine:
        for name in "abcdefghijkl":
            ask(engine, name, random_tokens(rng, 30))
        engine.store.empty(Tier.HOST)
        stats = engine.stats()
    assert stats.evictions[("host", "emptied")] > 0
    assert any(tier == "device" for tier, _ in stats.evictions)
    assert stats.operations["write"] > 0 and not stats.failures
