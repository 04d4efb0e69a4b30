"""The trainer: everything around Megatron-Core that a stage needs, and the only folder that steps it."""
