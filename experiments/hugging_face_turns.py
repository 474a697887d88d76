"""Serves conversations with `transformers`, one turn at a time, and prints the times.

A program of its own, so that its device memory is free when it ends: JSON comes in on
stdin and goes out as the last line. Knows torch and transformers, which the dev extra
leaves out; imports nothing of ours.
"""

import json
import sys
import time

import torch  # pyright: ignore[reportMissingImports]
from transformers import (  # pyright: ignore[reportMissingImports]
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
)


def main() -> None:
    asked = json.load(sys.stdin)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    needed = asked["weight_bytes"] * 1.15
    if device == "cuda" and torch.cuda.mem_get_info()[0] < needed:
        sys.exit(
            f"{torch.cuda.mem_get_info()[0] / 2**30:.1f} GiB of device memory are free,"
            f" {needed / 2**30:.1f} are needed; run with"
            " XLA_PYTHON_CLIENT_PREALLOCATE=false, and this part first"
        )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        config = LlamaConfig(**asked["config"], attn_implementation="sdpa")
        model = LlamaForCausalLM(config).eval()
    turns = {"recompute": [], "keeps its cache": []}
    with torch.inference_mode():
        for mode, rows in turns.items():
            # Once untimed: kernels are chosen by length, and loaded when first used.
            for _ in range(2):
                rows.clear()
                for conversation in asked["conversations"]:
                    rows += _converse(model, device, conversation, mode)
    version = __import__("transformers").__version__
    print(json.dumps({"transformers": version, "torch": torch.__version__, **turns}))


def _converse(model, device, conversation, mode) -> list[dict]:
    """Plays one conversation: of each reply some tokens, then those that are given."""
    said: list[int] = []
    cache = DynamicCache() if mode != "recompute" else None
    rows = []
    for message, num_tokens, rest in conversation:
        prompt = [*said, *message]
        row, reply = _turn(model, device, prompt, num_tokens, cache)
        rows.append({"prompt": len(prompt), "new": len(message), **row})
        said = [*prompt, *reply, *rest]
        if cache is not None and rest:
            ids = torch.tensor([said[cache.get_seq_length() :]], device=device)
            model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return rows


def _turn(model, device, prompt, num_tokens, cache) -> tuple[dict, list[int]]:
    """Seconds to the first token and to each one after it."""
    kept = cache.get_seq_length() if cache is not None else 0
    cache = cache if cache is not None else DynamicCache()
    _wait(device)
    started = time.perf_counter()
    ids = torch.tensor([prompt[kept:]], device=device)
    output = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    token = output.logits[:, -1:].argmax(-1)
    reply = [token.item()]
    first_s = time.perf_counter() - started
    started = time.perf_counter()
    later = []
    for _ in range(num_tokens - 1):
        output = model(token, past_key_values=cache, use_cache=True, logits_to_keep=1)
        token = output.logits[:, -1:].argmax(-1)
        later.append(token)
    reply += [token.item() for token in later]
    per_token = (time.perf_counter() - started) / max(1, num_tokens - 1)
    return {"ttft_s": first_s, "tpot_s": per_token}, reply


def _wait(device) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
