"""The `verl.plugins` entry point: importing this module is the whole contract.

verl 0.9.1 only imports the target of the entry point (`verl/__init__.py:56-80`), in every process
that imports verl and while that package is half executed, so nothing of verl, torch, Ray or vLLM
may be imported here unless the CPU platform was asked for.
"""

from pivottrace_verl import plugin

plugin.register_verl()
