"""The commands `cachedattn store ...`: what they print, change and refuse."""

import json

import numpy as np
import pytest
import tensorstore as ts
from typer.testing import CliRunner

from cachedattn_jax.cli import app
from cachedattn_jax.store.placement.tier import Tier
from tests.engines import ask, make_engine
from tests.test_tiered_store import damage_flip, objects, served_and_closed


def store(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["store", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.output


def store_json(*arguments: object, code: int = 0):
    return json.loads(store(*arguments, "--json", code=code))


def test_sessions_and_bytes_are_listed(tmp_path):
    said = served_and_closed(tmp_path)
    (row,) = store_json("ls", tmp_path)
    assert (row["tenant"], row["session"], row["turns"]) == ("default", "a", 1)
    assert row["tokens"] == len(said) and row["pages"] == row["pages_stored"]
    stats = store_json("stats", tmp_path)
    assert stats["sessions"] == 1 and stats["pages"] == len(objects(tmp_path))
    assert stats["bytes"] == sum(p.stat().st_size for p in objects(tmp_path))
    assert "default" in store("ls", tmp_path) and "sessions: 1" in store(
        "stats", tmp_path
    )


def test_verify_finds_what_is_bad_and_repair_moves_it_away(tmp_path):
    served_and_closed(tmp_path)
    assert store_json("verify", tmp_path)["bad"] == []
    damage_flip(objects(tmp_path)[0])
    (bad,) = store_json("verify", tmp_path, code=1)["bad"]
    assert bad["reason"] == "checksum"
    store("verify", tmp_path, "--repair")
    assert store_json("verify", tmp_path)["bad"] == []
    assert store_json("stats", tmp_path)["quarantined"] == 1
    store("gc", tmp_path, "--quarantine")
    assert store_json("stats", tmp_path)["quarantined"] == 0


def test_gc_deletes_orphans_and_nothing_else(tmp_path):
    served_and_closed(tmp_path)
    orphan = tmp_path / "pages" / "default" / "ab" / ("cd" * 31)
    orphan.parent.mkdir(parents=True, exist_ok=True)
    orphan.write_bytes(objects(tmp_path)[0].read_bytes())
    before = len(objects(tmp_path))
    assert store_json("gc", tmp_path, "--dry_run")["objects"] == 1
    assert len(objects(tmp_path)) == before
    assert store_json("gc", tmp_path)["objects"] == 1
    assert not orphan.exists() and len(objects(tmp_path)) == before - 1


def test_rm_deletes_a_session_but_not_what_another_shares(tmp_path):
    with make_engine(disk_pages=500, disk_root=str(tmp_path)) as engine:
        for name in ("a", "b"):
            ask(engine, name, [1] * 20)
        ask(engine, "c", [9] * 20, tenant="other")
    store("rm", tmp_path, "--session", "a")
    with make_engine(disk_pages=500, disk_root=str(tmp_path)) as engine:
        assert engine.store.catalog.sessions() == [("default", "b"), ("other", "c")]
        assert ask(engine, "b", [5]).tokens_from.recomputed == 0
    store("rm", tmp_path, "--tenant", "default", "--all")
    assert [row["session"] for row in store_json("ls", tmp_path)] == ["c"]
    assert all("/other/" in str(path) for path in objects(tmp_path))


def test_an_exported_session_is_the_keys_and_values_of_its_pages(tmp_path):
    said = served_and_closed(tmp_path / "root")
    output = tmp_path / "kv"
    store("export", tmp_path / "root", "--session", "a", "--output", output)
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{output}/"}}
    exported = ts.open(spec, read=True).result().read().result()
    engine = make_engine(disk_pages=500, disk_root=str(tmp_path / "root"))
    layout = engine.store.layout
    assert exported.shape == (
        *(len(said) - 1, layout.num_layers, layout.num_kv_heads),
        *(2, layout.head_dim),
    )
    ask(engine, "a", [5])
    entries = [e for e in engine.store.index.in_tier(Tier.DEVICE) if e.slot is not None]
    full = [e for e in entries if e.token_ids is not None and len(e.token_ids) == 4]
    step, pool = layout.page_tokens, engine.store.pool
    starts = {tuple(said[i : i + step]): i for i in range(0, len(said) - step, step)}
    num_compared = 0
    for entry in full:
        assert entry.token_ids is not None
        start = starts.get(tuple(entry.token_ids.tolist()))
        if start is None or start + step >= len(said):
            continue
        num_compared += 1
        page = np.concatenate([np.asarray(g)[entry.slot] for g in pool.arrays])
        np.testing.assert_array_equal(
            np.moveaxis(exported[start : start + step], 0, 3), page
        )
    assert num_compared >= 5
    attributes = json.loads((output / "zarr.json").read_text())["attributes"]
    assert attributes["token_ids"] == said
    engine.close()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["ls", "nowhere"], "there is no such folder"),
        (["rm", "{root}"], "name a --session, or --all"),
        (["rm", "{root}", "--session", "x"], "has no session 'x'"),
        (["export", "{root}", "--session", "x", "--output", "y"], "no session 'x'"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, monkeypatch, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    served_and_closed(tmp_path / "root")
    words = [word.replace("{root}", str(tmp_path / "root")) for word in arguments]
    output = store(*words, code=2)
    assert sentence in output and "Traceback" not in output


def test_cleaning_beside_a_running_engine_is_refused_and_looking_is_not(tmp_path):
    served_and_closed(tmp_path)
    with make_engine(disk_pages=500, disk_root=str(tmp_path)):
        assert "is in use by process" in store("gc", tmp_path, code=2)
        assert store_json("ls", tmp_path)
