"""Tenants share nothing, keep to their quotas, and can be erased."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from cachedattn_jax.store.placement.placement_config import PlacementConfig
from cachedattn_jax.store.placement.tier import Tier
from tests.engines import (
    ask,
    assert_nothing_leaked,
    assert_same_reply,
    finish_survey,
    greedy_reply,
    make_engine,
    random_tokens,
)

PROMPT = random_tokens(np.random.default_rng(0), 30)


def files_below(root, word):
    return [path for path in root.rglob("*") if path.is_file() and word in str(path)]


def test_the_same_prompt_of_another_tenant_is_computed_anew(tmp_path):
    """Neither the tier nor the counters tell one tenant what another has said."""
    options: dict[str, Any] = {
        "disk_pages": 500,
        "disk_root": str(tmp_path),
        "loading": "always",
    }
    with make_engine(**options) as engine:
        ask(engine, "s", PROMPT, tenant="one")
        for tier in (Tier.DEVICE, Tier.HOST):
            turn = ask(engine, f"s{tier}", PROMPT, tenant="two")
            engine.forget("two", f"s{tier}")
            assert turn.tokens_from.cached == 0
            engine.store.empty(tier)
        turn = ask(engine, "other", PROMPT, tenant="one")
        assert turn.tokens_from.disk > 0


def test_a_secret_keeps_others_from_computing_the_keys_of_a_tenant(tmp_path):
    (tmp_path / "secret").write_text("0123456789abcdef")
    (tmp_path / "other").write_text("fedcba9876543210")
    options: dict[str, Any] = {"disk_pages": 500, "disk_root": str(tmp_path / "root")}
    secret: dict[str, Any] = {"tenant_secret_file": str(tmp_path / "secret")}
    with make_engine(**options, **secret) as engine:
        ask(engine, "s", PROMPT)
    wrongs: list[dict[str, Any]] = [{}, {"tenant_secret_file": str(tmp_path / "other")}]
    for wrong in wrongs:
        with pytest.raises(ValueError, match="was written with another tenant_secret"):
            make_engine(**options, **wrong)
    with make_engine(**options, **secret) as engine:
        assert ask(engine, "s", [5]).tokens_from.disk > 0


@pytest.mark.parametrize(
    ("content", "sentence"),
    [(None, "cannot be read"), ("short", "holds 5 bytes; a secret has at least 16")],
)
def test_a_bad_secret_is_one_sentence(tmp_path, content, sentence):
    path = tmp_path / "secret"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=sentence):
        make_engine(tenant_secret_file=str(path))


def test_nothing_of_an_erased_tenant_is_readable_after_it(tmp_path):
    options: dict[str, Any] = {
        "disk_pages": 500,
        "disk_root": str(tmp_path),
        "loading": "always",
    }
    with make_engine(**options) as engine:
        for tenant in ("keep", "erase"):
            for name in "ab":
                ask(engine, name, PROMPT, tenant=tenant)
        engine.store.empty(Tier.DEVICE)
        engine.store.empty(Tier.HOST)
    # Some of its pages are known to a session after the restart, and others to none.
    with make_engine(**options) as engine:
        ask(engine, "a", [5], tenant="erase")
        assert files_below(tmp_path, "/erase/")
        engine.erase_tenant("erase").result()
        assert files_below(tmp_path, "/erase/") == []
        assert engine.session("a", tenant="erase").token_ids == []
        turn = ask(engine, "a", PROMPT, tenant="erase")
        assert turn.tokens_from.cached == 0 and len(turn.prompt) == len(PROMPT)
        assert_same_reply(turn.reply, *greedy_reply(PROMPT, 4))
        assert ask(engine, "a", [5], tenant="keep").tokens_from.disk > 0
        assert_nothing_leaked(engine)


def test_a_tenant_with_a_turn_under_way_is_not_erased():
    with make_engine() as engine:
        engine.session("a", tenant="t").submit([1, 2])
        with pytest.raises(ValueError, match="a turn of tenant 't' waits or runs"):
            engine.erase_tenant("t")
        engine.run_until_idle()
        engine.erase_tenant("t").result()
        assert engine.session("a", tenant="t").token_ids == []


def test_a_quota_holds_also_for_what_lay_on_disk_at_the_start(tmp_path):
    options: dict[str, Any] = {"disk_pages": 500, "disk_root": str(tmp_path)}
    with make_engine(**options) as engine:
        rng = np.random.default_rng(1)
        for name in "abcd":
            for tenant in ("small", "free"):
                ask(engine, name, random_tokens(rng, 40), tenant=tenant)
        page_bytes = engine.store.layout.page_bytes
    quota = 12 * page_bytes
    config = dataclasses.replace(PlacementConfig(), quotas={"small": quota})
    with make_engine(**options, placement=config) as engine:
        finish_survey(engine)
        ask(engine, "new", [1, 2, 3], tenant="free")
        held = {"small": 0, "free": 0}
        for standing in engine.store.placement.standings.values():
            below = sum(n for t, n in standing.num_bytes.items() if t != Tier.DEVICE)
            held[str(standing.session).partition("/")[0]] += below
        assert held["small"] <= quota < held["free"]
        assert engine.stats().evictions[("disk", "quota")] > 0
