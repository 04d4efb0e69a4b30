"""From prompts to groups of completions: collection over engines, the journal, reward models beside them.

Knows engines by their protocols only (engines/base.py). Rewards and advantages are not here.
"""
