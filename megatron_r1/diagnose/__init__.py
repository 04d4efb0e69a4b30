"""megatron-r1 diagnose: which module of the servers' model and the trainer's departs first, on the same tokens."""
