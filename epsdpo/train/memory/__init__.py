"""How much memory a run will need, and what to change when that is too much.

`setting` says what decides it, `estimate` counts the bytes, `advice` compares them with the machine and names remedies.
"""

from epsdpo.train.memory.advice import MemoryOutlook, OutOfMemory, is_out_of_memory
from epsdpo.train.memory.estimate import MemoryEstimate, estimate_memory
from epsdpo.train.memory.setting import ModelShape, Setting, Sharding, longest_pair

__all__ = [
    "MemoryEstimate",
    "MemoryOutlook",
    "ModelShape",
    "OutOfMemory",
    "Setting",
    "Sharding",
    "estimate_memory",
    "is_out_of_memory",
    "longest_pair",
]
