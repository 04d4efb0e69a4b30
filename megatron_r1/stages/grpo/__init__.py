"""GRPO and its relatives: sample, grade, compare within groups, train, push (docs/grpo.md). loop.py is the place to
start reading; the algorithms themselves are in algorithms/."""
