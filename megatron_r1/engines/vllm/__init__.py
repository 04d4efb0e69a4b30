"""vLLM: its servers in processes of their own (server.py, attached.py), what is asked of them (client.py), and how
they get the trainer's weights (sync.py).

vLLM is imported in its own processes only (launch.py, plugin.py and what that names), and in the trainer for nccl.
"""
