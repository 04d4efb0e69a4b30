"""Which bytes of the trainer's weights go from which rank to which worker of which server, and when.

Pure functions over numbers: no torch, no processes. boxes.py: parts of a tensor. plan.py: from who holds what and who
wants what to messages in rounds. senders.py: the choice among ranks that hold the same. rounds.py: the order. What a
rank holds is told by weights/regions.py, what a worker wants by vLLM (engines/vllm/recorded.py).
"""
