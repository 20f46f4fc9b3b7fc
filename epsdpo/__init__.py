"""ε-DPO (arXiv 2502.13177) on current TRL: the public face of the library.

Only the two names below are meant for import from here. They are loaded on first use, so that commands which need no
model (`epsdpo --help`, reading a finished run) do not wait for torch and trl.
"""

import sys
from typing import TYPE_CHECKING

if getattr(sys, "argv", [])[:1] == ["-m"]:  # a command of this package, before it imports what may be missing
    from epsdpo.batch.startup import prepare

    prepare()

if TYPE_CHECKING:
    from epsdpo.methods.config import EpsilonDPOConfig
    from epsdpo.methods.trainer import EpsilonDPOTrainer

__version__ = "0.1.0"
__all__ = ["EpsilonDPOConfig", "EpsilonDPOTrainer"]


def __getattr__(name: str):
    if name == "EpsilonDPOConfig":
        from epsdpo.methods.config import EpsilonDPOConfig

        return EpsilonDPOConfig
    if name == "EpsilonDPOTrainer":
        from epsdpo.methods.trainer import EpsilonDPOTrainer

        return EpsilonDPOTrainer
    raise AttributeError(f"module 'epsdpo' has no attribute {name!r}; it offers {', '.join(__all__)}")
