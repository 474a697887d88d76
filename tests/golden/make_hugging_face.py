"""Writes the golden folders: tiny Hugging Face Llamas and the logits they compute.

    python -m tests.golden.make_hugging_face

from the repository root, with torch and transformers installed. Each folder holds
config.json and *.safetensors as transformers saves them, and logits.npz: token ids, and
logits computed in float32. The committed files: torch 2.13.0, transformers 5.23.0.
"""

import shutil
from pathlib import Path

import numpy as np
import torch
import transformers

GOLDEN = Path(__file__).parent / "hugging_face"

_COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    # Large enough for attention to be far from uniform.
    "initializer_range": 0.3,
    "attn_implementation": "eager",
}

# Theta 100 gives wavelengths of 6, 20, 63 and 199 tokens: with an original window of
# 32, llama3 scaling has a fast, a blended and two slow ones.
CASES = {
    "default": {"num_key_value_heads": 2},
    "linear": {
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "linear",
            "rope_theta": 10000.0,
            "factor": 4.0,
        },
    },
    "llama3": {
        "num_key_value_heads": 2,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 100.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
}


def build(case: str, seed: int) -> transformers.LlamaForCausalLM:
    """A random Llama with norm scales away from 1."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(**_COMMON, **CASES[case])
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
    return model


def compute_logits(
    model: transformers.LlamaForCausalLM, token_ids: np.ndarray
) -> np.ndarray:
    """Logits of `model` over a batch of token ids, in float32."""
    with torch.no_grad():
        return model(torch.from_numpy(token_ids).long()).logits.float().numpy()


def _write(case: str, seed: int) -> None:
    directory = GOLDEN / case
    shutil.rmtree(directory, ignore_errors=True)
    model = build(case, seed)
    if case == "llama3":  # One folder in bfloat16, as published models are.
        model = model.to(torch.bfloat16)
    # One folder in several files, as published models are.
    shard_size = "30KB" if case == "default" else "1MB"
    model.save_pretrained(directory, max_shard_size=shard_size)
    (directory / "generation_config.json").unlink()
    token_ids = np.random.RandomState(seed).randint(0, 64, (1, 40)).astype(np.int32)
    # Read back, since .to(bfloat16) rounds the rotary frequencies too.
    model = transformers.LlamaForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    logits = compute_logits(model, token_ids)
    np.savez_compressed(directory / "logits.npz", token_ids=token_ids, logits=logits)


if __name__ == "__main__":
    for index, name in enumerate(CASES):
        _write(name, seed=index)
