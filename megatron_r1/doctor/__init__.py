"""megatron-r1 doctor: what this machine and environment can run."""
