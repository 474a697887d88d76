"""Runs of pages come from disk part by part, each page checked by itself."""

import numpy as np
import pytest
import tensorstore as ts

from cachedattn_jax.store import page_reader
from cachedattn_jax.store.layout import Layout
from cachedattn_jax.store.objects.folder_kv import FolderKv
from cachedattn_jax.store.objects.guard import guarded
from cachedattn_jax.store.objects.io_config import IoConfig
from cachedattn_jax.store.objects.object_kv import ObjectKv
from cachedattn_jax.store.page import encode_page, payload_offset
from cachedattn_jax.store.page_reader import PageReader, Wanted

MIB = 2**20


def layout_of(page_tokens: int, num_kv_heads: int = 2, head_dim: int = 8) -> Layout:
    return Layout(
        num_layers=8,
        layers_per_group=2,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        page_tokens=page_tokens,
        dtype="float32",
        rope="none",
        weights="w",
    )


LAYOUT = layout_of(4)


class Folder:
    """Page objects in a folder, and readers of them."""

    def __init__(self, folder):
        self.path = folder
        plain = ts.KvStore.open(f"file://{folder}/").result()
        self.raw = FolderKv(ObjectKv(plain), folder, is_synced=False)
        self.kv = guarded(self.raw, IoConfig())

    def write(self, num_pages: int, seed: int) -> tuple[list[Wanted], list[bytes]]:
        """Pages of noise: how to ask for them, and their layers."""
        rng = np.random.default_rng(seed)
        wanted, payloads = [], []
        for number in range(num_pages):
            tokens = rng.integers(0, 99, LAYOUT.page_tokens, np.int32)
            page = Wanted(f"pages/t/{number}", rng.bytes(32), tokens)
            payload = rng.bytes(LAYOUT.page_bytes)
            data = encode_page(LAYOUT, page.key, tokens, payload)
            self.kv.write(page.name, [data]).result()
            wanted.append(page)
            payloads.append(payload)
        return wanted, payloads

    def read(self, wanted: list[Wanted]) -> PageReader:
        reader = PageReader(self.kv, LAYOUT, np.dtype(np.float32), wanted)
        reader.run()
        return reader


@pytest.fixture
def folder(tmp_path):
    opened = Folder(tmp_path)
    yield opened
    opened.raw.close(10.0)


@pytest.fixture(params=[1, 2, 3, 4])
def groups_per_part(request, monkeypatch):
    """Layer groups of a part, of pages that are read together or alone."""
    least = request.param * LAYOUT.group_bytes
    monkeypatch.setattr(page_reader, "_LEAST_PART_BYTES", least)
    monkeypatch.setattr(page_reader, "_ALONE", 1)
    return request.param


def payload_of(reader: PageReader, page: int) -> bytes:
    parts = [part.result() for part in reader.parts]
    return b"".join(group[page].tobytes() for part in parts for group in part.groups)


@pytest.mark.parametrize("num_pages", [1, 2, 5])
def test_what_was_written_is_read_in_parts_of_any_size(
    folder, groups_per_part, num_pages
):
    wanted, payloads = folder.write(num_pages, seed=num_pages)
    reader = folder.read(wanted)
    assert len(reader.parts) == -(-LAYOUT.num_groups // groups_per_part)
    assert not reader.parts[-1].result().bad
    assert [payload_of(reader, page) for page in range(num_pages)] == payloads


@pytest.mark.parametrize("num_pages", [1, 3])
@pytest.mark.parametrize("group", range(LAYOUT.num_groups))
def test_a_flipped_bit_is_found_with_its_part_and_costs_no_other_page(
    folder, groups_per_part, num_pages, group
):
    wanted, payloads = folder.write(num_pages, seed=group)
    damaged = num_pages // 2
    path = folder.path / wanted[damaged].name
    data = bytearray(path.read_bytes())
    data[payload_offset(LAYOUT) + group * LAYOUT.group_bytes + 5] ^= 4
    path.write_bytes(data)
    reader = folder.read(wanted)
    bad = [part.result().bad for part in reader.parts]
    first = group // groups_per_part
    assert bad == [{}] * first + [{damaged: "checksum"}] * (len(bad) - first)
    others = [page for page in range(num_pages) if page != damaged]
    assert [payload_of(reader, page) for page in others] == [
        payloads[page] for page in others
    ]


@pytest.mark.parametrize(
    ("page_tokens", "num_pages", "part_mib"),
    [(16, 1, 2), (16, 2, 1), (16, 5, 1), (64, 1, 2), (64, 2, 2), (4, 1, 0.5)],
)
def test_a_page_alone_comes_in_larger_parts_than_pages_together(
    folder, page_tokens, num_pages, part_mib
):
    layout = layout_of(page_tokens, num_kv_heads=8, head_dim=256)  # 512 KiB for 4
    pages = [Wanted(f"pages/t/{n}", bytes(32), None) for n in range(num_pages)]
    reader = PageReader(folder.kv, layout, np.dtype(np.float32), pages)
    assert reader.groups_per_part * layout.group_bytes == part_mib * MIB
    parts = [reader.groups(part) for part in range(len(reader.parts))]
    assert [group for part in parts for group in part] == list(range(4))
