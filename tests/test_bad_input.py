"""A user's mistake is one sentence with the value and the limit; nothing changes."""

import os

import numpy as np
import pytest

from cachedattn_jax.engine.engine_config import EngineConfig
from cachedattn_jax.engine.request import Request, SamplingParams
from cachedattn_jax.engine.truncation import TruncationConfig
from cachedattn_jax.store.budget import StoreConfig
from cachedattn_jax.store.byte_count import parse_bytes
from tests.engines import ask, assert_nothing_leaked, make_engine, tiny_model

WINDOW = tiny_model()[0].window
REFUSE = TruncationConfig(policy="refuse")


@pytest.fixture(scope="module")
def engine():
    engine = make_engine(truncation=REFUSE)
    ask(engine, "a", [1, 2, 3], max_tokens=2)
    return engine


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"token_ids": []}, "the prompt is empty"),
        ({"token_ids": [256]}, "token id 256 is outside the vocabulary of 256"),
        ({"token_ids": [3, -1]}, "token id -1 is outside"),
        ({"token_ids": [1] * WINDOW}, rf"has {WINDOW + 5} tokens.*window of {WINDOW}"),
        ({"max_tokens": 0}, "max_tokens=0 must be at least 1"),
    ],
)
def test_a_turn_that_cannot_be_served_is_refused_and_changes_nothing(
    engine, change, sentence
):
    before = engine.session("a").token_ids
    with pytest.raises(ValueError, match=sentence) as caught:
        engine.session("a").send(**{"token_ids": [1], **change})
    assert "\n" not in str(caught.value)
    assert engine.session("a").token_ids == before
    assert_nothing_leaked(engine)


@pytest.mark.parametrize(
    ("token_ids", "sentence"),
    [
        ([2**32 + 5], "token id 4294967301 is outside every vocabulary"),
        (np.array([7, -(2**31) - 1]), "token id -2147483649 is outside every"),
        ([2**70], "whole numbers of 64 bits, not larger ones"),
        (np.zeros((2, 3), np.int32), "token_ids has 2 axes"),
        ([1.5, 2.0], "whole numbers of 64 bits, not float64"),
        (np.array([np.nan]), "whole numbers of 64 bits, not float64"),
        ([[1, 2], [3]], "one row of whole numbers"),
        ("12", "whole numbers of 64 bits, not <U1"),
        ([], "the prompt is empty"),
    ],
)
def test_token_ids_that_int32_would_change_are_refused(token_ids, sentence):
    with pytest.raises(ValueError, match=sentence):
        Request(session_id="a", token_ids=token_ids)


@pytest.mark.parametrize("kind", [list, np.int64, np.int32])
def test_a_request_keeps_the_tokens_it_was_made_with(kind):
    said = kind([0, 1, 2, 3, 4])
    request = Request(session_id="a", token_ids=said)
    said[0] = 9
    assert isinstance(request.token_ids, np.ndarray)
    assert request.token_ids.dtype == np.int32
    assert request.token_ids.tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="read-only"):
        request.token_ids[0] = 9


def test_a_queued_turn_whose_history_grew_too_long_fails_alone():
    engine = make_engine(truncation=REFUSE)
    session = engine.session("a")
    first = session.submit([1] * (WINDOW - 10), max_tokens=9)
    second = session.submit([1] * 5, max_tokens=9)
    other = engine.session("b").submit([1], max_tokens=2)
    engine.run_until_idle()
    assert first.finish_reason == "length" and other.finish_reason == "length"
    assert second.finish_reason == "error"
    assert f"window of {WINDOW}" in str(second.error)
    assert session.token_ids == [*first.prompt, *first.reply]
    assert_nothing_leaked(engine)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_sampling_parameters_out_of_range_are_refused(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        SamplingParams(**change)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"page_tokens": 0}, "page_tokens=0"),
        ({"page_tokens": "16"}, "page_tokens='16'"),
        ({"max_batch": 0}, "max_batch=0"),
        ({"chunk_tokens": ()}, r"chunk_tokens=\(\)"),
        ({"reuse": "cache"}, "reuse='cache'"),
        ({"decode_kernel": "cuda"}, "decode kernel 'cuda' is not one of auto, xla"),
    ],
)
def test_engine_settings_out_of_range_are_refused(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        EngineConfig(**change)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"device_bytes": -5}, "device_bytes=-5 must be a number of bytes"),
        ({"host_bytes": "much"}, "host_bytes='much' must be a number of bytes"),
        ({"host_bytes": float("nan")}, "host_bytes=nan"),
        (
            {"host_bytes": "900 TiB"},
            r"host_bytes=\d+ is more than the \d+ bytes of mem",
        ),
        ({"disk_bytes": 10**18, "disk_root": "here"}, "of the disk that holds"),
    ],
)
def test_budgets_out_of_range_are_refused(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        StoreConfig(**change)


def test_bytes_are_read_as_people_write_them():
    assert parse_bytes("x", "1.5 GiB") == 3 * 2**29
    assert parse_bytes("x", "500MB") == 500_000_000
    assert parse_bytes("x", "12") == parse_bytes("x", 12) == 12


def test_a_device_budget_below_one_window_names_what_is_needed():
    with pytest.raises(
        ValueError, match=r"holds 5 pages; one window of 96 .* 24 pages"
    ):
        make_engine(device_pages=5)


def test_group_sizes_must_divide_the_layers():
    with pytest.raises(ValueError, match="layers_per_group=3 must divide the 4 layers"):
        make_engine(layers_per_group=3)


def test_a_disk_budget_without_a_root_is_refused():
    with pytest.raises(ValueError, match="needs a disk_root"):
        make_engine(disk_pages=10)


def test_a_root_that_cannot_be_used_is_refused(tmp_path):
    file = tmp_path / "file"
    file.write_text("not a folder")
    with pytest.raises(ValueError, match="disk_root=.*cannot be used"):
        make_engine(disk_pages=10, disk_root=str(file))
    with pytest.raises(ValueError, match="disk_root='nope://x'.*unsupported"):
        make_engine(disk_pages=10, disk_root="nope://x")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_root_that_is_not_writable_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="not writable"):
        make_engine(disk_pages=10, disk_root=str(tmp_path))


def test_a_root_of_another_layout_is_refused_and_left_alone(tmp_path):
    root = str(tmp_path)
    first = make_engine(page_tokens=4, disk_pages=100, disk_root=root)
    ask(first, "a", list(range(1, 20)))
    first.close()
    before = sorted(path.name for path in tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="its page_tokens is 4, this engine's is 16"):
        make_engine(page_tokens=16, disk_pages=100, disk_root=root)
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("session_id", ["", "x" * 201, "\N{PILE OF POO}" * 30])
def test_a_session_id_that_cannot_be_a_name_is_refused(engine, session_id):
    with pytest.raises(ValueError, match="session_id=.*must take 1 to 200 bytes"):
        engine.session(session_id)


def test_rewinding_past_the_end_is_refused(engine):
    with pytest.raises(ValueError, match="to 99 tokens; it has 5"):
        engine.session("a").rewind(99)
