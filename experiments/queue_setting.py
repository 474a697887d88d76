"""A machine that keeps up: short queues, idle conversations, and whose times they have.

Knows workloads, machines and memory. Does not know policies.

At 70 % load few turns wait, so the queue says little of who comes next. Conversations
have ShareGPT's lengths and lognormal think times, or the arrivals of a real trace.
"""

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cachedattn_jax.simulator.hardware import MACHINES, MODELS
from cachedattn_jax.simulator.system import System
from cachedattn_jax.simulator.trace import Trace
from cachedattn_jax.store.placement.placement_config import PlacementConfig
from experiments import mooncake
from experiments.arrivals import Arrivals
from experiments.columns import as_trace, generate_trace
from experiments.generator import GeneratorConfig


@dataclass(frozen=True, kw_only=True)
class QueueSetting:
    """One workload on one machine.

    Attributes:
        trace: "sharegpt" for generated conversations, "mooncake" for the shipped
            trace, or the path of a file: raw requests in Mooncake's format, or, where
            its name contains "sessions", sessions that are linked already.
        num_sessions, think_mu, think_sigma, load: of generated conversations; the load
            counts half of all history as recomputed.
        host_share: of the capacity that is host memory; the rest is disk.
        warm_up: share of the time of arrivals that is not measured.
    """

    model: str = "llama-3-8b"
    machine: str = "1xh200"
    trace: str = "sharegpt"
    num_sessions: int = 10_000
    think_mu: float = 4.9
    think_sigma: float = 1.0
    load: float = 0.7
    max_batch: int = 24
    host_share: float = 0.25
    warm_up: float = 0.25
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in (("model", MODELS), ("machine", MACHINES)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is not one of {', '.join(known)}"
                )
        for name in ("load", "host_share", "warm_up"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(
                    f"{name}={getattr(self, name)} must lie between 0 and 1"
                )

    @property
    def is_generated(self) -> bool:
        return self.trace == "sharegpt"

    def columns(self) -> Trace:
        """The workload."""
        return _columns(self)

    @property
    def measured_s(self) -> tuple[float, float]:
        """Turns that come between these times are measured."""
        last_s = float(self.columns().arrival_s[-1])
        return self.warm_up * last_s, last_s

    def system(
        self,
        capacity_bytes: float,
        policy: str = "predictive",
        *,
        device_bytes: int | None = None,
        is_deciding: bool = False,
        token_weight: float = PlacementConfig().token_weight,
        is_whole: bool = False,
    ) -> System:
        """The machine with so much memory and disk together.

        Args:
            is_whole: whether sessions leave a tier whole, as in the paper.
        """
        model = MODELS[self.model]
        host_bytes = int(self.host_share * capacity_bytes)
        return System(
            model=model,
            constants=MACHINES[self.machine].constants(model, batch=self.max_batch),
            host_bytes=host_bytes,
            disk_bytes=int(capacity_bytes) - host_bytes,
            device_bytes=device_bytes,
            placement=PlacementConfig(
                policy=policy,
                token_weight=token_weight,
                granularity="sessions" if is_whole else "pages",
            ),
            max_batch=self.max_batch,
            keeps_copies=False,
            is_deciding=is_deciding,
        )


@functools.lru_cache(maxsize=2)
def _columns(setting: QueueSetting) -> Trace:
    if not setting.is_generated:
        return as_trace(_read(setting.trace))
    arrivals = Arrivals(
        think_mu=setting.think_mu, think_sigma=setting.think_sigma, sessions_per_s=1.0
    )
    config = GeneratorConfig(
        num_sessions=setting.num_sessions,
        seed=setting.seed,
        arrivals=arrivals,
        reply_scale=1.7,
    )
    trace = generate_trace(config)
    rate = _sessions_per_s(setting, trace)
    return generate_trace(config, sessions_per_s=rate)


def _read(name: str):
    if name == "mooncake":
        return mooncake.shipped_sessions()
    if not Path(name).is_file():
        raise ValueError(f"trace={name!r} is neither sharegpt, mooncake nor a file")
    if "sessions" in Path(name).name:
        return mooncake.read_linked_sessions(name)
    return mooncake.read_trace(name)


def _sessions_per_s(setting: QueueSetting, trace: Trace) -> float:
    """Arrivals that keep the machine busy for the share `load` of the time."""
    model = MODELS[setting.model]
    constants = MACHINES[setting.machine].constants(model, batch=setting.max_batch)
    added = trace.new_tokens + trace.output_tokens
    before = np.cumsum(added) - added
    starts = np.repeat(before[trace.first_row[:-1]], trace.turns_per_session)
    history = np.minimum(before - starts, model.window)
    computed = float(np.mean(trace.new_tokens) + np.mean(history) / 2)
    prefill_s = constants.prefill[1].base_s * computed
    reply_tokens = float(np.mean(trace.output_tokens))
    decode_s = constants.decode_step_s * reply_tokens / setting.max_batch
    turns_per_s = setting.load / (prefill_s + decode_s)
    return turns_per_s * trace.num_sessions / trace.num_turns
