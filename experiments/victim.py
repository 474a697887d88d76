"""A process that serves conversations from a store root until it is killed.

What it says on its pipe is what its parent holds it to: a line `done S N` means that
the record of session S with N turns is stored. The conversations are the same in every
life, so that their tokens can be compared with a run that had no store.
"""

import dataclasses
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from cachedattn_jax.engine.engine import Engine
from cachedattn_jax.engine.engine_config import EngineConfig
from cachedattn_jax.engine.request import Request
from cachedattn_jax.model.config import preset
from cachedattn_jax.model.llama import init_params
from cachedattn_jax.store.audit import orphan_bytes
from cachedattn_jax.store.budget import StoreConfig

WINDOW = 192
_SMALLEST_MARGIN = 1e-3


@dataclass(frozen=True, kw_only=True)
class Script:
    """What is said in a conversation, and the replies that are right.

    Attributes:
        prompts, replies: tokens of each turn.
    """

    prompts: list[list[int]]
    replies: list[list[int]]

    def said(self, num_turns: int) -> list[int]:
        """All tokens after so many turns."""
        pairs = zip(self.prompts[:num_turns], self.replies, strict=False)
        return [token for prompt, reply in pairs for token in (*prompt, *reply)]


def make_engine(store: StoreConfig, **options: object) -> Engine:
    """An engine on the tiny model in float32, the same in every process."""
    model = preset("tiny", window=WINDOW, dtype="float32")
    settings = {"page_tokens": 4, "layers_per_group": 2, "chunk_tokens": (8, 32)}
    settings |= {"max_batch": 4, "loading": "always"}
    config = EngineConfig(**{**settings, **options})  # pyright: ignore
    return Engine(model, init_params(model, seed=0), config, store, weights="victim")


def write_scripts(path: Path, num_sessions: int, num_turns: int, seed: int) -> None:
    """Conversations whose every choice is clear, replied to without a store.

    A choice between two tokens whose logits nearly tie may fall either way with the
    order of additions; such conversations are not used.
    """
    rng = np.random.default_rng(seed)
    store = StoreConfig(device_bytes="8 MiB", host_bytes=0)
    scripts: list[Script] = []
    with make_engine(store, reuse="recompute") as engine:
        for index in range(8 * num_sessions):
            script = _script(engine, f"s{index}", num_turns, rng)
            if script is not None:
                scripts.append(script)
            if len(scripts) == num_sessions:
                break
    assert len(scripts) == num_sessions
    path.write_text(json.dumps([dataclasses.asdict(script) for script in scripts]))


def read_scripts(path: Path) -> list[Script]:
    return [Script(**fields) for fields in json.loads(path.read_text())]


def _script(engine: Engine, name: str, num_turns: int, rng) -> Script | None:
    prompts, replies = [], []
    for _ in range(num_turns):
        prompt = rng.integers(1, 256, int(rng.integers(1, 12))).tolist()
        (turn,) = engine.run([_request(name, prompt, int(rng.integers(1, 6)))])
        if turn.error is not None:
            raise turn.error
        if min(turn.margins) < _SMALLEST_MARGIN:
            return None
        prompts.append(prompt)
        replies.append(turn.reply)
    return Script(prompts=prompts, replies=replies)


def _request(name: str, prompt: Sequence[int], max_tokens: int) -> Request:
    return Request(session_id=name, token_ids=prompt, max_tokens=max_tokens)


class Victim:
    """Serves scripts from a store, again and again from where they stand.

    Args:
        out: is told what was found, done, forgotten, and what was wrong.
        is_patient: whether it waits until records are stored, and says so.
    """

    def __init__(
        self,
        engine: Engine,
        scripts: list[Script],
        out: IO[str],
        *,
        is_patient: bool = True,
    ) -> None:
        self.engine = engine
        self._is_patient = is_patient
        self.scripts = scripts
        self.num_turns = [0] * len(scripts)
        self.num_wrong = 0
        self.longest_batch_s = 0.0
        self._out = out

    def look_around(self) -> None:
        """Holds every session that is stored against its script."""
        for index, script in enumerate(self.scripts):
            said = self.engine.session(f"s{index}").token_ids
            turns = (
                n for n in range(len(script.prompts) + 1) if script.said(n) == said
            )
            found = next(turns, None)
            if found is None:
                self._wrong(f"session {index} holds {said}")
            self.num_turns[index] = found or 0
            self._say("found", index, found or 0)
        self._say("ready")

    def serve(self, rng: np.random.Generator) -> int:
        """One turn of some sessions at once; those at their end are forgotten.

        Returns:
            How many turns were served.
        """
        chosen = rng.permutation(len(self.scripts))[: int(rng.integers(1, 5))].tolist()
        turns = []
        for index in chosen:
            script, done = self.scripts[index], self.num_turns[index]
            if done == len(script.prompts):
                self._forget(index)
                done = 0
            request = _request(
                f"s{index}", script.prompts[done], len(script.replies[done])
            )
            turns.append((index, done, self.engine.submit(request)))
        started_s = time.monotonic()
        self.engine.run_until_idle()
        taken_s = time.monotonic() - started_s
        self.longest_batch_s = max(self.longest_batch_s, taken_s)
        for index, done, turn in turns:
            if turn.error is not None:
                raise turn.error
            if turn.reply != self.scripts[index].replies[done]:
                self._wrong(f"turn {done} of session {index}: {turn.reply}")
            self.num_turns[index] = done + 1
            if self._is_patient and turn.stored.exception() is None:
                self._say("done", index, done + 1)
        return len(turns)

    def _forget(self, index: int) -> None:
        self._say("forgetting", index)
        forgotten = self.engine.forget("default", f"s{index}")
        self.num_turns[index] = 0
        if self._is_patient:
            forgotten.exception()
        self._say("forgot", index)

    def _wrong(self, what: str) -> None:
        self.num_wrong += 1
        self._say("wrong", what)

    def _say(self, *words: object) -> None:
        self._out.write(" ".join(map(str, words)) + "\n")
        self._out.flush()


def live(root: Path, scripts: Path, pipe: int, seed: int, store: StoreConfig) -> None:
    """Serves until the process is killed."""
    with os.fdopen(pipe, "w") as out:
        store = dataclasses.replace(store, disk_root=str(root))
        victim = Victim(make_engine(store), read_scripts(scripts), out)
        victim.look_around()
        rng = np.random.default_rng(seed)
        while True:
            victim.serve(rng)


def look_and_leave(root: Path, scripts: Path, pipe: int, store: StoreConfig) -> None:
    """Looks around, lets orphans be collected, ends well, and tells what is left."""
    with os.fdopen(pipe, "w") as out:
        store = dataclasses.replace(store, disk_root=str(root))
        with make_engine(store) as engine:
            Victim(engine, read_scripts(scripts), out).look_around()
            if engine.store.survey is not None:
                engine.store.survey.finish()
        out.write(f"orphans {orphan_bytes(str(root))}\n")
