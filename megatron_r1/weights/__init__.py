"""Weights between Hugging Face and Megatron: one name table, used by loading, export and weight sync."""
