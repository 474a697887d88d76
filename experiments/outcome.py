"""What a simulation of the paper's setting comes to, in the paper's measures.

Knows hours, hit rates and prices. Does not know policies.

Two accounts of GPU hours are given. The paper's decode bars contain the time that
decodes waited for prefills, and its totals add the prefills once more: for all four of
its models the decode bar shrinks by exactly what the prefill bar does. `gpu_h` counts
like that, `gpu_once_h` counts every second once.
"""

from dataclasses import dataclass

from cachedattn_jax.simulator.results import Simulated
from cachedattn_jax.simulator.simulation import Simulation
from cachedattn_jax.simulator.system import System
from experiments.paper_setting import GB, REPORTED, PaperSetting

# Section 4.1: dollars an hour of one A100, of 1 GB of DRAM, of 1 GB of SSD.
DRAM_DOLLARS, DISK_DOLLARS = 0.0088, 0.000082


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One system, over the turns that the paper measures.

    Attributes:
        hit, hit_host, hit_disk, hit_device: percent of turns, as the setting counts
            first turns.
        hit_all, hit_later: percent of all turns, and of those that have a history.
        hit_tokens: percent of history tokens.
        ttft_s: mean prefill time, which is the paper's TTFT.
        ttft_queue_s: with the wait in the queue: mean, p50, p95, p99.
        prefill_tokens_per_s: new tokens over prefill time, the paper's measure.
        prefill_h, decode_h, overflow_h: GPU hours, each second counted once.
        storage_h_dollars: price of an hour of the storage.
        cpu_s: that the simulation took.
    """

    hit: float
    hit_host: float
    hit_disk: float
    hit_device: float
    hit_all: float
    hit_later: float
    hit_tokens: float
    ttft_s: float
    ttft_percentiles_s: tuple[float, float, float]
    ttft_queue_s: tuple[float, float, float, float]
    prefill_tokens_per_s: float
    prefill_h: float
    decode_h: float
    overflow_h: float
    gpus: int
    storage_h_dollars: float
    dollars_per_gpu_h: float
    cpu_s: float

    @property
    def gpu_h(self) -> float:
        """Hours as the paper adds them up."""
        return self.gpu_once_h + self.prefill_h

    @property
    def gpu_once_h(self) -> float:
        return self.prefill_h + self.decode_h + self.overflow_h

    def cost(self, hours: float) -> float:
        """Dollars of so many hours of all accelerators and of the storage."""
        return hours * (self.gpus * self.dollars_per_gpu_h + self.storage_h_dollars)


def play(setting: PaperSetting, model: str, policy: str = "lookahead", **of_system):
    """Simulates one of the paper's systems; see `PaperSetting.system`."""
    system = setting.system(model, policy, **of_system)
    return outcome(Simulation(setting.trace(), system).run(), setting, model, system)


def outcome(
    played: Simulated, setting: PaperSetting, model: str, system: System
) -> Outcome:
    """The measures of a simulation."""
    window = played.measured(setting.num_warm_up, setting.num_measured)
    share = window.num_turns / len(played.turns)
    busy = played.busy[0]
    ttft = window.ttft(with_queue=False)
    queued = window.ttft(with_queue=True)
    prefill_s = float(window["prefill_s"].sum())

    def hit(tier: str | None = None) -> float:
        return 100 * window.hit_rate(tier, counts_first=setting.counts_first)

    machine_gpus = int(REPORTED[model].machine[0])
    is_storing = system.reuse == "cached"
    return Outcome(
        hit=hit(),
        hit_host=hit("host"),
        hit_disk=hit("disk"),
        hit_device=hit("device"),
        hit_all=100 * window.hit_rate(),
        hit_later=100 * window.hit_rate(counts_first=False),
        hit_tokens=100 * window.hit_rate(by="tokens", counts_first=False),
        ttft_s=ttft["mean"],
        ttft_percentiles_s=(ttft["p50"], ttft["p95"], ttft["p99"]),
        ttft_queue_s=(queued["mean"], queued["p50"], queued["p95"], queued["p99"]),
        prefill_tokens_per_s=float(window["new"].sum()) / max(1e-12, prefill_s),
        prefill_h=prefill_s / 3600,
        decode_h=share * busy.decode_s / 3600,
        overflow_h=share * busy.overflow_s / 3600,
        gpus=machine_gpus,
        storage_h_dollars=is_storing
        * (system.host_bytes * DRAM_DOLLARS + system.disk_bytes * DISK_DOLLARS)
        / GB,
        dollars_per_gpu_h=5.0,
        cpu_s=played.cpu_s,
    )
