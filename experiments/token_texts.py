"""Texts and lines to be found again as tokens: bytes, or those of a tokenizer.

Knows tokens. Does not know models or what is done with them.
"""

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from experiments.training_text import as_bytes, crop, make_lines


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line to be asked for.

    Attributes:
        token_ids: int32, of the line.
        value: [start, stop) of those that are its value.
    """

    token_ids: np.ndarray
    value: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Question:
    """A conversation that ends with a line that it had before.

    Attributes:
        token_ids: int32, up to the end of the value that is asked for.
        num_answer: of the last of them, tokens of that value.
    """

    token_ids: np.ndarray
    num_answer: int


class Encoding(Protocol):
    """How text becomes tokens, and what a line of the retrieval task looks like."""

    token: str

    def encode(self, text: str) -> np.ndarray:
        """int32 [tokens]."""
        ...

    def lines(self, rng: np.random.Generator, count: int) -> list[Line]:
        """Lines with different names."""
        ...


class Bytes:
    """A token a byte, and the lines that the byte-level model was trained on."""

    token = "byte"

    def encode(self, text: str) -> np.ndarray:
        return as_bytes(text).astype(np.int32)

    def lines(self, rng: np.random.Generator, count: int) -> list[Line]:
        return [
            Line(token_ids=line.astype(np.int32), value=(1, 2))
            for line in make_lines(rng, count)
        ]


class Subwords:
    """The tokens of a Hugging Face `tokenizer.json`, and the lines of LongEval."""

    token = "token"

    def __init__(self, file: Path) -> None:
        try:
            tokenizers = importlib.import_module("tokenizers")
        except ImportError as error:
            raise ValueError(
                "a checkpoint's tokenizer needs the package tokenizers:"
                " pip install 'cachedattn_jax[hf]'"
            ) from error
        try:
            self._tokenizer: Any = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # its own class is Exception
            raise ValueError(f"{file} cannot be read: {error}") from error

    def encode(self, text: str) -> np.ndarray:
        encoded = self._tokenizer.encode(text, add_special_tokens=False)
        return np.asarray(encoded.ids, np.int32)

    def lines(self, rng: np.random.Generator, count: int) -> list[Line]:
        names = rng.choice(np.arange(1000, 10000), count, replace=False)
        values = rng.integers(10000, 100000, count)
        return [self._line(*pair) for pair in zip(names, values, strict=True)]

    def _line(self, name: int, value: int) -> Line:
        before = f"line {name}: REGISTER_CONTENT is <"
        text = f"{before}{value}>\n"
        encoded = self._tokenizer.encode(text, add_special_tokens=False)
        stops_at = len(before) + len(str(value))
        (start, *_), (*_, last) = [
            [i for i, (a, b) in enumerate(encoded.offsets) if b > len(before)],
            [i for i, (a, b) in enumerate(encoded.offsets) if a < stops_at],
        ]
        ids = np.asarray(encoded.ids, np.int32)
        return Line(token_ids=ids, value=(start, last + 1))


def make_question(
    rng: np.random.Generator,
    encoding: Encoding,
    text: np.ndarray,
    window: int,
    num_lines: int,
) -> Question:
    """Text, lines, text, and one of the lines up to its value.

    The window overflows between the lines and the question; the lines stay, if half of
    it does.

    Args:
        text: int32 [tokens], to take pieces of.
    """
    lines = encoding.lines(rng, num_lines)
    num_tokens = sum(len(line.token_ids) for line in lines)
    before = crop(rng, text, window // 2 + int(rng.integers(1, 17)))
    room = window - len(before) - num_tokens
    if room < 0:
        raise ValueError(
            f"{num_lines=} are {num_tokens} tokens; a window of {window} has room for"
            f" {window - len(before)} behind the text that is dropped"
        )
    between = crop(rng, text, room + int(rng.integers(1, 33)))
    asked = lines[rng.integers(num_lines)]
    start, stop = asked.value
    parts = [before, *(line.token_ids for line in lines), between]
    return Question(
        token_ids=np.concatenate([*parts, asked.token_ids[:stop]]),
        num_answer=stop - start,
    )
