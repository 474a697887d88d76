"""A restart finds what was stored, reads no page for it, and cleans up after itself."""

import dataclasses
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest

from cachedattn_jax.store.audit import orphan_bytes
from cachedattn_jax.store.catalog import Catalog, SessionRecord, _encode
from cachedattn_jax.store.layout import Layout
from cachedattn_jax.store.objects.root import Root
from cachedattn_jax.store.page import decode_header, encode_page, payload_offset
from cachedattn_jax.store.page_index import is_unclaimed
from cachedattn_jax.store.placement.placement_config import PlacementConfig
from cachedattn_jax.store.placement.tier import Tier
from tests.engines import (
    ask,
    assert_nothing_leaked,
    assert_same_reply,
    finish_survey,
    greedy_reply,
    make_engine,
)
from tests.test_tiered_store import objects, served_and_closed

LAYOUT = Layout(
    num_layers=1,
    layers_per_group=1,
    num_kv_heads=1,
    head_dim=8,
    page_tokens=4,
    dtype="float32",
    rope="",
    weights="w",
)


def test_100_000_sessions_are_listed_in_10_seconds(tmp_path):
    with_no_sessions = Root(str(tmp_path), LAYOUT)
    with_no_sessions.close()
    record = SessionRecord(
        session_id="s",
        tenant="t",
        token_ids=np.arange(5, dtype=np.int32),
        num_turns=1,
        used_at=0.0,
    )
    folder = tmp_path / "sessions" / "t"
    folder.mkdir(parents=True)
    data = _encode(record)
    for index in range(100_000):
        (folder / f"s{index}").write_bytes(data)
    started_s = time.monotonic()
    root = Root(str(tmp_path), LAYOUT)
    catalog = Catalog(root)
    taken_s = time.monotonic() - started_s
    assert catalog.num_sessions == 100_000
    # The layout is all that is read.
    assert root.kv.counters["read_operations"] == 0
    root.close()
    # Or every later run of the tests would wait for their removal.
    shutil.rmtree(folder)
    assert taken_s < 10


def test_a_second_engine_on_a_folder_is_refused_in_words(tmp_path):
    engine = make_engine(disk_pages=50, disk_root=str(tmp_path))
    for url in (str(tmp_path), f"file://{tmp_path}"):
        with pytest.raises(ValueError, match=r"is in use by process \d+ on .* since"):
            make_engine(disk_pages=50, disk_root=url)
    engine.close()
    make_engine(disk_pages=50, disk_root=str(tmp_path)).close()


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    code = f"""
import os, pathlib, signal
from cachedattn_jax.store.objects.writer_lock import WriterLock
lock = WriterLock(pathlib.Path({str(tmp_path)!r}))
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert done.returncode == -9
    assert (tmp_path / "writer.lock").read_text()
    make_engine(disk_pages=50, disk_root=str(tmp_path)).close()


def test_orphans_and_leftovers_are_collected_and_pages_go_to_their_sessions(tmp_path):
    served_and_closed(tmp_path)
    template = objects(tmp_path)[0].read_bytes()
    for name in ("ab" * 32, "cd" * 32):
        path = tmp_path / "pages" / "default" / name[:2] / name[2:]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(template)
    leftover = objects(tmp_path)[0].with_suffix(".__lock")
    leftover.write_bytes(b"half a page")
    assert orphan_bytes(str(tmp_path)) == 2 * len(template) + len(b"half a page")
    engine = make_engine(disk_pages=500, disk_root=str(tmp_path))
    assert not leftover.exists()
    assert all(is_unclaimed(e.session) for e in engine.store.index.in_tier(Tier.DISK))
    finish_survey(engine)
    assert engine.store.counters["orphans_collected"] == 2
    pages = list(engine.store.index.in_tier(Tier.DISK))
    assert {entry.session for entry in pages} == {"default/a"}
    turn = ask(engine, "a", [5])
    assert turn.tokens_from.recomputed == 0
    assert_nothing_leaked(engine)
    engine.close()
    assert orphan_bytes(str(tmp_path)) == 0


def test_strange_files_in_a_root_are_passed_over(tmp_path):
    served_and_closed(tmp_path)
    for name in ("pages/note.txt", "pages/default/zz/zz", "sessions/loose", "readme"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("hello")
    engine = make_engine(disk_pages=500, disk_root=str(tmp_path))
    finish_survey(engine)
    assert engine.store.catalog.sessions() == [("default", "a")]
    assert ask(engine, "a", [5]).tokens_from.disk > 0
    engine.close()


def test_a_bad_page_is_kept_in_quarantine_for_people_to_look_at(tmp_path):
    served_and_closed(tmp_path)
    bad = objects(tmp_path)[0]
    data = bytearray(bad.read_bytes())
    data[-1] ^= 1
    bad.write_bytes(data)
    engine = make_engine(disk_pages=500, disk_root=str(tmp_path))
    ask(engine, "a", [5])
    engine.close()
    assert engine.stats().quarantined == 1
    (kept,) = (tmp_path / "quarantine" / "default").iterdir()
    assert kept.name.endswith(".checksum") and kept.read_bytes() == data


@pytest.mark.parametrize("reason", ["other_layout", "other_tokens", "other_key"])
def test_a_page_that_is_well_and_not_the_one_asked_for_is_refused(tmp_path, reason):
    """An object with good checksums in the wrong place, as a restored backup has."""
    served_and_closed(tmp_path)
    engine = make_engine(disk_pages=500, disk_root=str(tmp_path))
    layout = engine.store.layout
    for path in objects(tmp_path):
        data = path.read_bytes()
        key = bytes.fromhex(path.parent.name + path.name)
        tokens = decode_header(layout, key, data).token_ids
        if reason == "other_tokens":
            tokens = tokens + 1
        elif reason == "other_key":
            key = bytes(32)
        elif reason == "other_layout":
            layout = dataclasses.replace(layout, weights="of another model")
        payload = data[payload_offset(layout) :]
        path.write_bytes(encode_page(layout, key, tokens, payload))
        layout = engine.store.layout
    turn = ask(engine, "a", [5])
    assert engine.store.counters[f"miss_{reason}"] >= 1
    assert turn.tokens_from.cached == 0
    assert_same_reply(turn.reply, *greedy_reply(turn.prompt, 4))
    engine.close()


def test_a_pin_outlives_the_process_and_so_does_its_end(tmp_path):
    options = {"disk_pages": 500, "disk_root": str(tmp_path)}
    with make_engine(**options) as engine:
        engine.session("early").pin()  # it has no record yet
        ask(engine, "early", [1] * 9)
        ask(engine, "late", [2] * 9)
        engine.session("late").pin().result()
        ask(engine, "late", [3] * 9)
        ask(engine, "loose", [4] * 9)
    with make_engine(**options) as engine:
        finish_survey(engine)
        pinned = {
            s.session for s in engine.store.placement.standings.values() if s.is_pinned
        }
        assert pinned == {"default/early", "default/late"}
        engine.session("late").pin(False).result()
    with make_engine(**options) as engine:
        assert ask(engine, "early", [5]).tokens_from.recomputed == 0
        sessions = engine.store.sessions
        assert sessions.is_pinned("default", "early")  # known before the survey is over
        finish_survey(engine)
        assert not sessions.is_pinned("default", "late")


def test_what_the_survey_read_of_a_session_does_not_undo_what_was_said_since(tmp_path):
    options = {"disk_pages": 500, "disk_root": str(tmp_path)}
    with make_engine(**options) as engine:
        ask(engine, "a", [1] * 9)
    with make_engine(**options) as engine:
        survey = engine.store.survey
        assert survey is not None and survey._read is not None
        survey._read.result()  # all records were read, and none was taken in
        engine.session("a").pin()
        finish_survey(engine)
        assert engine.store.sessions.is_pinned("default", "a")


def test_time_to_live_counts_from_the_last_turn_and_not_from_the_restart(tmp_path):
    options = {"disk_pages": 500, "disk_root": str(tmp_path)}
    placement = PlacementConfig(ttl_s=3600.0)
    with make_engine(**options, placement=placement) as engine:
        ask(engine, "old", [1] * 9)
        ask(engine, "pinned", [2] * 9)
        ask(engine, "new", [3] * 9)
        engine.session("pinned").pin()
        for name in ("old", "pinned"):
            record = engine.store.catalog.known("default", name)
            assert record is not None
            aged = dataclasses.replace(record, used_at=record.used_at - 3601)
            engine.store.catalog.commit(aged).result()
    with make_engine(**options, placement=placement) as engine:
        finish_survey(engine)
        engine.store.settle()
        left = {entry.session for entry in engine.store.index.in_tier(Tier.DISK)}
        assert left == {"default/pinned", "default/new"}
        turn = ask(engine, "old", [5])
        assert turn.tokens_from.recomputed == len(turn.prompt) - 2
        engine.session("pinned").pin(False)
        engine.store.settle()
        left = {entry.session for entry in engine.store.index.in_tier(Tier.DISK)}
        assert "default/pinned" not in left


def test_a_damaged_record_is_counted_and_its_session_is_new(tmp_path):
    """Each of the three tries to read it, and what becomes of it."""
    served_and_closed(tmp_path)
    path = tmp_path / "sessions" / "default" / "a"
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)
    engine = make_engine(disk_pages=500, disk_root=str(tmp_path))
    assert engine.store.root is not None
    counters = engine.store.root.kv.counters
    finish_survey(engine)
    assert counters["corrupt_record"] == 1
    turn = ask(engine, "a", [5])
    assert counters["corrupt_record"] == 1 + 3
    assert counters["records_damaged"] == 1
    assert turn.prompt.tolist() == [5]
    assert_same_reply(turn.reply, *greedy_reply([5], 4))
    engine.close()
