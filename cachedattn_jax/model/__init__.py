"""The Llama family: its configuration, its layers, its checkpoints."""
