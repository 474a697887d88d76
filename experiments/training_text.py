"""Text to train a byte-level model on: what every Python installation carries.

Knows documentation, bytes and the lines of the retrieval task. Does not know models.

The retrieval task follows LongEval: lines with a name and a value, later one of them is
begun again, and its value is asked for. A name is a byte that no ASCII text has, so
that a question is told from text:

    \\x95k
    \\xa0c
    ... text ...
    \\x95k         <- the k is the answer
"""

import ast
import functools
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics

import numpy as np

_NAMES = np.arange(0x80, 0xC0, dtype=np.uint8)
_VALUES = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz", np.uint8)
LINE_BYTES = 3
_LONGEST_LIST = 24
# Every so manieth document is kept out of the training.
_HELD_OUT_EVERY = 20


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Bytes to train on, and documents that were kept out."""

    training: np.ndarray
    held_out: np.ndarray


@functools.cache
def read_corpus() -> Corpus:
    """The documentation topics, and the docstrings, of the standard library."""
    documents = [*topics.topics.values(), *_docstrings()]
    parts: tuple[list[str], list[str]] = ([], [])
    for number, text in enumerate(documents):
        parts[number % _HELD_OUT_EVERY == 0].append(text)
    training, held_out = (as_bytes("\n\n".join(texts)) for texts in parts)
    return Corpus(training=training, held_out=held_out)


def as_bytes(text: str) -> np.ndarray:
    """uint8, a token a byte."""
    return np.frombuffer(text.encode(), np.uint8)


def make_lines(rng: np.random.Generator, count: int) -> np.ndarray:
    """uint8 [count, LINE_BYTES], lines with different names."""
    names = rng.choice(_NAMES, count, replace=False)
    values = rng.choice(_VALUES, count)
    return np.stack([names, values, np.full(count, ord("\n"), np.uint8)], axis=1)


def retrieval_sample(
    rng: np.random.Generator, text: np.ndarray, num_bytes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Text, a list of lines, in half of all cases text again, and lines of the list.

    Returns:
        uint8 [num_bytes], and which of them are values that were there before.
    """
    lines = make_lines(rng, int(rng.integers(2, _LONGEST_LIST + 1)))
    room = max(0, num_bytes - 2 * lines.size)
    before, between = (
        crop(rng, text, int(rng.integers(0, room // 2 + 1))) for _ in range(2)
    )
    if rng.random() < 0.5:
        between = between[:0]
    again = lines[rng.integers(0, len(lines), num_bytes // LINE_BYTES + 1)]
    is_answer = np.zeros(again.shape, bool)
    is_answer[:, 1] = True
    tokens = np.concatenate([before, lines.ravel(), between, again.ravel()])
    start = len(tokens) - again.size
    answers = np.concatenate([np.zeros(start, bool), is_answer.ravel()])
    return tokens[:num_bytes], answers[:num_bytes]


def crop(rng: np.random.Generator, text: np.ndarray, num_bytes: int) -> np.ndarray:
    """A piece of the text from a random place."""
    start = int(rng.integers(0, len(text) - num_bytes + 1))
    return text[start : start + num_bytes]


def _docstrings() -> Iterator[str]:
    """Of the modules, classes and functions of the standard library, unimported."""
    folder = Path(sysconfig.get_path("stdlib"))
    for path in sorted([*folder.glob("*.py"), *folder.glob("[a-z]*/*.py")]):
        if path.parent.name in ("site-packages", "test", "idlelib"):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(
                node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
            ):
                text = ast.get_docstring(node)
                if text:
                    yield text
