"""Models and machines as data. Knows shapes, speeds and prices; runs nothing."""

from dataclasses import dataclass

from cachedattn_jax.engine.cost_constants import ChunkCost, Constants, Link


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What a model asks of a machine.

    Attributes:
        kv_bytes: of keys and values, a token.
        window: tokens.
        weight_bytes, num_parameters: that a step reads, and that a token passes.
    """

    name: str
    kv_bytes: int
    window: int
    num_layers: int
    num_parameters: float
    weight_bytes: float


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a replica runs on.

    Attributes:
        flops: bfloat16 or float16 operations per second of one accelerator.
        hbm_bytes, hbm_bytes_per_s: memory of one, and how fast it is read.
        host_link_bytes_per_s: to one accelerator and back, what is reached of it.
        disk_read_bytes_per_s, disk_write_bytes_per_s: of the whole machine.
        dollars_per_hour: for one accelerator.
    """

    name: str
    num_accelerators: int
    flops: float
    hbm_bytes: float
    hbm_bytes_per_s: float
    host_link_bytes_per_s: float
    disk_read_bytes_per_s: float
    disk_write_bytes_per_s: float
    dollars_per_hour: float

    def constants(
        self,
        model: ModelShape,
        *,
        prefill_share: float = 0.5,
        decode_share: float = 0.8,
        batch: int = 24,
        context: int = 2048,
    ) -> Constants:
        """Speeds from the shares of peak compute and bandwidth that are reached."""
        num = self.num_accelerators
        token_s = 2 * model.num_parameters / (num * self.flops * prefill_share)
        read = model.weight_bytes + batch * context * model.kv_bytes
        return linear_constants(
            prefill_s_per_token=token_s,
            decode_step_s=read / (num * self.hbm_bytes_per_s * decode_share),
            host_link_bytes_per_s=num * self.host_link_bytes_per_s,
            disk_read_bytes_per_s=self.disk_read_bytes_per_s,
            disk_write_bytes_per_s=self.disk_write_bytes_per_s,
        )


def linear_constants(
    *,
    prefill_s_per_token: float,
    decode_step_s: float,
    host_link_bytes_per_s: float,
    disk_read_bytes_per_s: float,
    disk_write_bytes_per_s: float,
    prefill_s_per_token_and_context: float = 0.0,
) -> Constants:
    """Constants of a machine whose prefill takes the same time for every token.

    Args:
        prefill_s_per_token_and_context: more for every token of context, per token.
    """
    host = Link(0.0, host_link_bytes_per_s)
    return Constants(
        host_to_device=host,
        device_to_host=host,
        disk_read=Link(0.0, disk_read_bytes_per_s),
        disk_write=Link(0.0, disk_write_bytes_per_s),
        prefill={1: ChunkCost(prefill_s_per_token, prefill_s_per_token_and_context)},
        decode_step_s=decode_step_s,
    )


def _model(name, kv_bytes, window, num_layers, num_parameters, item_bytes=2):
    return ModelShape(
        name=name,
        kv_bytes=kv_bytes,
        window=window,
        num_layers=num_layers,
        num_parameters=num_parameters,
        weight_bytes=item_bytes * num_parameters,
    )


# KV bytes of a token: 2 (K, V) x layers x KV heads x head size x 2 bytes. The paper
# rounds them to 0.78, 2.5, 0.31 and 0.12 MB. Falcon's window is not given; recomputing
# after overflows takes it as many hours, of its mean prefill, as the models with 4K.
MODELS = {
    model.name: model
    for model in (
        _model("llama-13b", 2 * 40 * 40 * 128 * 2, 4096, 40, 13.0e9),
        _model("llama-65b", 2 * 80 * 64 * 128 * 2, 2048, 80, 65.2e9),
        _model("llama-70b", 2 * 80 * 8 * 128 * 2, 4096, 80, 69.0e9),
        _model("falcon-40b", 2 * 60 * 8 * 64 * 2, 4096, 60, 41.3e9),
        _model("mistral-7b", 2 * 32 * 8 * 128 * 2, 32768, 32, 7.2e9),
        _model("llama-3-8b", 2 * 32 * 8 * 128 * 2, 8192, 32, 8.0e9),
        _model("llama-3.1-8b", 2 * 32 * 8 * 128 * 2, 131072, 32, 8.0e9),
    )
}


def _machine(name, num, tflops, hbm_gb, hbm_gbs, link_gbs, read_gbs, write_gbs, price):
    return Machine(
        name=name,
        num_accelerators=num,
        flops=tflops * 1e12,
        hbm_bytes=hbm_gb * 1e9,
        hbm_bytes_per_s=hbm_gbs * 1e9,
        host_link_bytes_per_s=link_gbs * 1e9,
        disk_read_bytes_per_s=read_gbs * 1e9,
        disk_write_bytes_per_s=write_gbs * 1e9,
        dollars_per_hour=price,
    )


# Host links: 26 GB/s is what the paper reaches over PCIe Gen4, 55 GB/s what was
# measured on one H200 (docs/overlap.md); those of TPUs are the PCIe of their hosts.
# Prices are on-demand list prices, the paper's for the A100.
MACHINES = {
    machine.name: machine
    for machine in (
        _machine("1xa100", 1, 312, 80, 2039, 26, 5.0, 5.0, 5.0),
        _machine("2xa100", 2, 312, 80, 2039, 26, 5.0, 5.0, 5.0),
        _machine("4xa100", 4, 312, 80, 2039, 26, 5.0, 5.0, 5.0),
        _machine("1xh200", 1, 989, 141, 4800, 55, 10.0, 5.0, 10.0),
        _machine("4xh200", 4, 989, 141, 4800, 55, 20.0, 10.0, 10.0),
        _machine("1xv5e", 1, 197, 16, 819, 13, 2.0, 1.0, 1.2),
        _machine("1xv6e", 1, 918, 32, 1640, 26, 2.0, 1.0, 2.7),
    )
}
