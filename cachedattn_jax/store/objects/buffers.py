"""Several pieces of memory that are read or written as if they were one.

Knows bytes. Does not know what they mean.
"""

from collections.abc import Sequence

Buffer = bytes | bytearray | memoryview
Buffers = Sequence[Buffer]


def num_bytes(buffers: Buffers) -> int:
    """Bytes of all pieces."""
    return sum(memoryview(buffer).nbytes for buffer in buffers)


def cut(buffers: Buffers, start: int, stop: int | None = None) -> list[memoryview]:
    """The pieces of a range of bytes; views, no copies."""
    pieces = []
    for buffer in buffers:
        view = memoryview(buffer)
        piece = view[max(0, start) : stop]
        if piece.nbytes:
            pieces.append(piece)
        start -= view.nbytes
        stop = None if stop is None else max(0, stop - view.nbytes)
    return pieces


def fill(buffers: Buffers, data: bytes) -> int:
    """Copies bytes into the pieces, one after the other; how many found room."""
    start = 0
    for buffer in buffers:
        view = memoryview(buffer)
        part = data[start : start + view.nbytes]
        view[: len(part)] = part
        start += len(part)
    return start
