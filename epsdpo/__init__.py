"""ε-DPO (arXiv 2502.13177) on current TRL: the public face of the library.

The names below are meant for import from here. They are loaded on first use, so that commands which need no model
(`epsdpo --help`, reading a finished run) do not wait for torch and trl.
"""

import importlib
import sys
from typing import TYPE_CHECKING

# Pythons that are too old for this package have no `orig_argv`.
_command = " ".join(["", *getattr(sys, "orig_argv", ["-m", "epsdpo"])])
if getattr(sys, "argv", [])[:1] == ["-m"] and " -m epsdpo" in _command:
    # A command of this package, before it imports what may be missing.
    if sys.argv[1:] == ["doctor"]:  # it says what is missing, and needs none of it
        from epsdpo.batch.doctor import doctor

        sys.exit(doctor())
    from epsdpo.batch.startup import prepare

    prepare()

if TYPE_CHECKING:
    from epsdpo.methods.config import EpsilonDPOConfig
    from epsdpo.methods.record import read_pairs, read_steps
    from epsdpo.methods.trainer import EpsilonDPOTrainer

__version__ = "0.1.0"
__all__ = ["EpsilonDPOConfig", "EpsilonDPOTrainer", "read_pairs", "read_steps"]

_MODULES = {
    "EpsilonDPOConfig": "epsdpo.methods.config",
    "EpsilonDPOTrainer": "epsdpo.methods.trainer",
    "read_pairs": "epsdpo.methods.record",
    "read_steps": "epsdpo.methods.record",
}


def __getattr__(name: str):
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'epsdpo' has no attribute {name!r}; it offers {', '.join(__all__)}")
