"""A session's keys and values as a zarr3 array. Knows TensorStore's zarr3 driver."""

from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import tensorstore as ts

from cachedattn_jax.store.audit import Audit
from cachedattn_jax.store.catalog import SessionRecord
from cachedattn_jax.store.layout import Layout
from cachedattn_jax.store.page import BadPage

_DIMENSIONS = ("token", "layer", "kv_head", "key_or_value", "head_dim")
_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def export_session(
    audit: Audit, tenant: str, session_id: str, output: Path
) -> Iterator[int]:
    """Writes [tokens, layers, kv_heads, 2, head_dim] in float32, a chunk a page.

    Yields:
        How many pages there are, then the index of each that was written.

    Raises:
        ValueError: no such session, one of its pages is not stored or bad, or `output`
            exists.
    """
    record = audit.record(tenant, session_id)
    if record is None:
        raise ValueError(f"tenant {tenant!r} has no session {session_id!r}")
    if output.exists():
        raise ValueError(f"{str(output)!r} exists")
    layout = audit.layout
    yield len(audit.pages_of(record))
    array = ts.open(_spec(layout, record, output)).result()
    start = 0
    try:
        for index, page in enumerate(audit.array(record, _DTYPES[layout.dtype])):
            stop = start + len(page)
            array[start:stop].write(page.astype(np.float32)).result()
            start = stop
            yield index
    except BadPage as error:
        raise ValueError(
            f"session {session_id!r} cannot be exported: {error}; a turn of it, or"
            " closing its engine, stores what is missing"
        ) from error


def _spec(layout: Layout, record: SessionRecord, output: Path) -> dict[str, object]:
    """The array, as TensorStore makes it."""
    rest = (layout.num_layers, layout.num_kv_heads, 2, layout.head_dim)
    chunk_shape = [layout.page_tokens, *rest]
    return {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{output.absolute()}/"},
        "metadata": {
            "shape": [record.cached_length, *rest],
            "data_type": "float32",
            "dimension_names": _DIMENSIONS,
            "chunk_grid": {
                "name": "regular",
                "configuration": {"chunk_shape": chunk_shape},
            },
            "attributes": {
                "tenant": record.tenant,
                "session_id": record.session_id,
                "token_ids": record.token_ids.tolist(),
                "layout": layout.describe(),
                "rotation": "keys by their offset inside their page",
            },
        },
        "create": True,
    }
