"""What samples for the trainer: servers, their clients, and weights that follow the trainer. A folder an engine.

What every engine gets of the trainer lies here: weights under Hugging Face names (source.py), in buckets (buckets.py),
in FP8 (quantised.py). Rewards and advantages are not here.
"""
