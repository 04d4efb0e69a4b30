"""GRPO as pure functions of numpy arrays and tensors. No collectives, no Megatron, no I/O."""
