"""Pages survive a restart, damage is a counted miss, a full tier gives way."""

import os
from pathlib import Path

import numpy as np
import pytest

from cachedattn_jax.store.placement.tier import Tier
from tests.engines import (
    ask,
    assert_budgets_kept,
    assert_nothing_leaked,
    assert_same_reply,
    greedy_reply,
    make_engine,
    random_tokens,
)


def objects(root: Path) -> list[Path]:
    return [path for path in (root / "pages").rglob("*") if path.is_file()]


def served_and_closed(root: Path, num_tokens: int = 30) -> list[int]:
    """A session of one turn on disk; returns its tokens."""
    engine = make_engine(disk_pages=500, disk_root=str(root))
    turn = ask(engine, "a", random_tokens(np.random.default_rng(0), num_tokens))
    engine.close()
    return [*turn.prompt.tolist(), *turn.reply]


def test_a_restarted_engine_goes_on_where_it_ended(tmp_path):
    said = served_and_closed(tmp_path)
    engine = make_engine(disk_pages=500, disk_root=str(tmp_path))
    assert engine.store.catalog.sessions() == [("default", "a")]
    turn = ask(engine, "a", [5])
    assert turn.prompt.tolist() == [*said, 5]
    assert turn.tokens_from.disk == len(said) - 1
    assert turn.tokens_from.recomputed == 0
    assert_same_reply(turn.reply, *greedy_reply(turn.prompt, 4))
    assert_nothing_leaked(engine)


def damage_flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-100] ^= 4
    path.write_bytes(data)


def damage_tear(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def damage_empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (damage_flip, "checksum"),
        (damage_tear, "torn"),
        (damage_empty, "torn"),
        (os.remove, "missing"),
    ],
)
def test_a_damaged_page_is_a_counted_miss_and_is_recomputed(tmp_path, damage, reason):
    served_and_closed(tmp_path)
    engine = make_engine(disk_pages=500, disk_root=str(tmp_path))
    for path in objects(tmp_path)[::2]:
        damage(path)
    turn = ask(engine, "a", [5])
    assert engine.store.counters[f"miss_{reason}"] >= 1
    assert turn.tokens_from.recomputed > 0
    assert_same_reply(turn.reply, *greedy_reply(turn.prompt, 4))
    again = ask(engine, "a", [6])
    assert again.tokens_from.recomputed == 0
    assert_same_reply(again.reply, *greedy_reply(again.prompt, 4))
    assert_nothing_leaked(engine)


def test_swapped_pages_are_noticed(tmp_path):
    served_and_closed(tmp_path)
    first, second = objects(tmp_path)[:2]
    one, two = first.read_bytes(), second.read_bytes()
    first.write_bytes(two)
    second.write_bytes(one)
    engine = make_engine(disk_pages=500, disk_root=str(tmp_path))
    turn = ask(engine, "a", [5])
    assert engine.store.counters["miss_other_key"] >= 1
    assert_same_reply(turn.reply, *greedy_reply(turn.prompt, 4))


def test_a_damaged_record_is_a_new_conversation(tmp_path):
    served_and_closed(tmp_path)
    (record,) = (path for path in (tmp_path / "sessions").rglob("*") if path.is_file())
    damage_flip(record)
    engine = make_engine(disk_pages=500, disk_root=str(tmp_path))
    assert engine.session("a").token_ids == []
    turn = ask(engine, "a", [5])
    assert_same_reply(turn.reply, *greedy_reply([5], 4))


def test_a_disk_that_refuses_writes_costs_hits_and_nothing_else(tmp_path):
    engine = make_engine(
        device_pages=60, host_pages=10, disk_pages=500, disk_root=str(tmp_path)
    )
    # A file where the folder of the objects should be: every write fails, also as root.
    (tmp_path / "pages").write_text("in the way")
    rng = np.random.default_rng(0)
    for _ in range(3):
        for name in "abcdef":
            turn = ask(engine, name, random_tokens(rng, 15))
            assert_same_reply(turn.reply, *greedy_reply(turn.prompt, 4))
            assert_budgets_kept(engine)
    assert engine.store.counters["write_failures"] > 0
    assert_nothing_leaked(engine)


@pytest.mark.parametrize("host_pages", [0, 3, 40])
@pytest.mark.parametrize("disk_pages", [0, 5, 60])
def test_tiers_of_any_size_keep_their_budget_and_the_tokens(
    tmp_path, host_pages, disk_pages
):
    engine = make_engine(
        device_pages=48,
        host_pages=host_pages,
        disk_pages=disk_pages,
        disk_root=str(tmp_path) if disk_pages else None,
    )
    rng = np.random.default_rng(host_pages + disk_pages)
    for _ in range(3):
        for name in "abcde":
            turn = ask(engine, name, random_tokens(rng, 14), max_tokens=3)
            assert_same_reply(turn.reply, *greedy_reply(turn.prompt, 3))
            assert_budgets_kept(engine)
    assert_nothing_leaked(engine)
    engine.close()
    assert len(objects(tmp_path)) * engine.store.layout.page_bytes <= (
        disk_pages * (engine.store.layout.page_bytes + 2048)
    )


def test_the_old_tail_goes_when_a_longer_one_is_committed(tmp_path):
    engine = make_engine(page_tokens=16, disk_pages=500, disk_root=str(tmp_path))
    ask(engine, "a", [1] * 5, max_tokens=2)
    engine.store.empty(Tier.HOST)
    assert len(objects(tmp_path)) == 1
    ask(engine, "a", [1] * 2, max_tokens=2)
    engine.close()
    assert len(objects(tmp_path)) == 1


def test_a_forgotten_session_leaves_nothing(tmp_path):
    engine = make_engine(disk_pages=500, disk_root=str(tmp_path))
    ask(engine, "a", [1] * 30)
    engine.store.empty(Tier.HOST)
    engine.session("a").forget()
    assert len(engine.store.index) == 0
    engine.close()
    assert objects(tmp_path) == []
    assert (
        make_engine(disk_pages=5, disk_root=str(tmp_path)).session("a").token_ids == []
    )
