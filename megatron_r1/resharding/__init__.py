"""Which bytes of the trainer's weights go from which rank to which worker of which server, and when.

Pure functions over numbers: no torch, no processes. A large model has millions of parts, so they are columns of numbers
(parts.py), and Python objects are made only of what a rank or worker asks for. boxes.py: parts of a tensor. takes.py:
what servers take at a time, and who holds it. senders.py: the choice among ranks that hold the same. rounds.py: the
order. plan.py: all of it, to messages in rounds. What a rank holds is told by weights/regions.py, what a worker wants
by vLLM (engines/vllm/recorded.py).
"""
