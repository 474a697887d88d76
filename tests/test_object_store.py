"""A store in S3: the same tokens, shared by replicas, and a dead one costs little."""

import time
from typing import Any

import numpy as np
import pytest

from cachedattn_jax.engine.request import Request
from cachedattn_jax.store.objects.guard import StorageFailure
from cachedattn_jax.store.objects.io_config import IoConfig
from cachedattn_jax.store.placement.tier import Tier
from cachedattn_jax.store.record_writer import RecordConflict
from tests.engines import (
    ask,
    assert_nothing_leaked,
    assert_same_reply,
    greedy_reply,
    make_engine,
    random_tokens,
    stored,
)
from tests.s3_server import S3Server, s3_environment


@pytest.fixture(scope="module")
def server():
    with s3_environment():
        server = S3Server()
        yield server
        server.kill()


def engine_at(url: str, server: S3Server, **io):
    config = IoConfig(**{"s3_endpoint": server.endpoint, "timeout_s": 20.0, **io})
    return make_engine(disk_pages=500, disk_root=url, io=config, loading="always")


def served(engine, name: str, tokens: list[int]):
    """One turn whose record is stored, and whose reply is right."""
    turn = ask(engine, name, tokens)
    stored(turn).result()
    assert_same_reply(turn.reply, *greedy_reply(turn.prompt, 4))
    return turn


def test_a_session_in_s3_survives_a_restart(server):
    url = server.bucket()
    with engine_at(url, server) as engine:
        first = served(engine, "a", random_tokens(np.random.default_rng(0), 30))
    with engine_at(url, server) as engine:
        turn = served(engine, "a", [5])
        assert turn.tokens_from.disk == len(first.prompt) + len(first.reply) - 1
        assert_nothing_leaked(engine)


def test_two_engines_take_turns_at_the_same_sessions(server):
    """Whoever is asked knows what was said last, whoever was asked then."""
    url, rng = server.bucket(), np.random.default_rng(0)
    said: dict[str, list[int]] = {name: [] for name in "abc"}
    with engine_at(url, server) as one, engine_at(url, server) as two:
        for number in range(18):
            engine = (one, two)[int(rng.integers(2))]
            name = "abc"[number % 3]
            turn = served(engine, name, random_tokens(rng, int(rng.integers(1, 10))))
            assert turn.prompt[: len(said[name])].tolist() == said[name]
            said[name] = [*turn.prompt.tolist(), *turn.reply]
            # What it has said must be on its way before the other can find it.
            engine.store.empty(Tier.DEVICE)
            engine.store.empty(Tier.HOST)
            assert_nothing_leaked(engine)
        found = sum(e.store.counters["pages_read"] for e in (one, two))
        assert found > 0


def test_of_two_turns_at_once_the_first_stored_wins_and_the_other_is_told(server):
    url = server.bucket()
    with engine_at(url, server) as one, engine_at(url, server) as two:
        served(one, "a", [1, 2, 3])
        # Both have seen one turn when they begin the second.
        mine, other = one.submit(request("a", [4])), two.submit(request("a", [9]))
        one.run_until_idle()
        stored(mine).result()
        two.run_until_idle()
        with pytest.raises(RecordConflict):
            stored(other).result()
        assert_same_reply(other.reply, *greedy_reply(other.prompt, 4))
        assert two.stats().others["record_conflicts"] == 1
        turn = served(two, "a", [5])
        assert turn.prompt.tolist() == [*mine.prompt.tolist(), *mine.reply, 5]


def request(name, tokens):
    return Request(session_id=name, token_ids=tokens, max_tokens=4)


def test_a_server_that_dies_costs_a_bounded_time_and_no_token(server):
    mortal = S3Server()
    url, rng = mortal.bucket(), np.random.default_rng(0)
    with engine_at(url, server=mortal) as engine:
        served(engine, "only stored", [1, 2, 3])
    limits = {"timeout_s": 1.0, "max_retries": 2, "breaker_failures": 2}
    engine = engine_at(url, mortal, **limits, breaker_rest_s=60.0)
    served(engine, "a", random_tokens(rng, 30))
    engine.store.empty(Tier.DEVICE)
    engine.store.empty(Tier.HOST)
    mortal.kill()
    started_s = time.monotonic()
    for name in ("a", "new", "a"):
        turn = ask(engine, name, [5, 6])
        assert_same_reply(turn.reply, *greedy_reply(turn.prompt, 4))
        assert isinstance(stored(turn).exception(timeout=20), StorageFailure)
    # Nobody can know what was said: an answer would be to another conversation.
    with pytest.raises(StorageFailure, match="'only stored' cannot be read now"):
        engine.submit(request("only stored", [5]))
    assert engine.stats().breakers == {"read": "open", "write": "open"}
    assert engine.stats().records_unstored == 2
    assert_nothing_leaked(engine)
    engine.close()
    assert time.monotonic() - started_s < 30


def test_a_folder_in_front_of_s3_serves_pages_that_were_there_before(server, tmp_path):
    url, rng = server.bucket(), np.random.default_rng(0)
    io = IoConfig(s3_endpoint=server.endpoint, timeout_s=20.0)
    options: dict[str, Any] = {
        "disk_pages": 500,
        "disk_root": url,
        "io": io,
        "loading": "always",
    }
    with make_engine(**options) as engine:
        served(engine, "a", random_tokens(rng, 30))
    near: dict[str, Any] = {"cache_root": str(tmp_path), "cache_bytes": "1 MiB"}
    found = []
    for _ in range(2):
        with make_engine(**options, **near) as engine:
            turn = served(engine, "a", [5])
            assert turn.tokens_from.disk > 0 and turn.tokens_from.recomputed == 0
            others = engine.stats().others
            found.append((others.get("cache_hits", 0), others.get("cache_fetches", 0)))
    assert found[0][0] == 0 and found[0][1] > 0
    assert found[1][0] > 0 and found[1][1] == 0


def test_a_folder_in_front_of_s3_keeps_its_budget_and_its_damage_is_found(
    server, tmp_path
):
    url, rng = server.bucket(), np.random.default_rng(0)
    io = IoConfig(s3_endpoint=server.endpoint, timeout_s=20.0)
    options: dict[str, Any] = {
        "disk_pages": 500,
        "disk_root": url,
        "io": io,
        "loading": "always",
    }
    near: dict[str, Any] = {"cache_root": str(tmp_path), "cache_bytes": 4 * 5000}
    with make_engine(**options, **near) as engine:
        for name in "abc":
            served(engine, name, random_tokens(rng, 20))
    files = [path for path in (tmp_path / "pages").rglob("*") if path.is_file()]
    assert 0 < sum(path.stat().st_size for path in files) <= 4 * 5000
    near["cache_bytes"] = "1 MiB"
    for is_damaged in (False, True):
        files = [path for path in (tmp_path / "pages").rglob("*") if path.is_file()]
        for path in files if is_damaged else ():
            data = bytearray(path.read_bytes())
            data[-1] ^= 1
            path.write_bytes(data)
        with make_engine(**options, **near) as engine:
            for name in "abc":
                served(engine, name, [5])
            misses = engine.stats().misses.get("checksum", 0)
            assert (misses > 0) == is_damaged


def test_a_dead_endpoint_is_one_clear_sentence_within_the_timeout(server):
    io = IoConfig(s3_endpoint="http://127.0.0.1:9", timeout_s=5.0, max_retries=1)
    started_s = time.monotonic()
    with pytest.raises(ValueError, match="disk_root='s3://nowhere/x' cannot be used"):
        make_engine(disk_pages=50, disk_root="s3://nowhere/x", io=io)
    assert time.monotonic() - started_s < 10
