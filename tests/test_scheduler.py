"""Order of turns."""

from dataclasses import dataclass

import pytest

from cachedattn_jax.engine.scheduler import Scheduler


@dataclass(eq=False)
class Item:
    session: str


def test_turns_start_in_the_order_they_came():
    scheduler: Scheduler[Item] = Scheduler(max_running=2)
    items = [Item(name) for name in "abc"]
    for item in items:
        scheduler.submit(item)
    for item in items[:2]:
        assert scheduler.next() is item
        scheduler.start(item)
    assert scheduler.next() is None
    assert [item.session for item in scheduler.waiting] == ["c"]
    scheduler.finish(items[0])
    assert scheduler.next() is items[2]


def test_turns_of_one_session_keep_their_order_and_let_others_pass():
    scheduler: Scheduler[Item] = Scheduler(max_running=2)
    first, second, other = Item("a"), Item("a"), Item("b")
    for item in (first, second, other):
        scheduler.submit(item)
    scheduler.start(first)
    assert scheduler.next() is other
    scheduler.finish(first)
    assert scheduler.next() is second


def test_a_finished_turn_leaves_the_queue_too():
    scheduler: Scheduler[Item] = Scheduler(max_running=1)
    item = Item("a")
    scheduler.submit(item)
    scheduler.finish(item)
    assert scheduler.is_idle


def test_no_room_for_any_turn_is_refused():
    with pytest.raises(ValueError, match="max_running=0"):
        Scheduler(max_running=0)
