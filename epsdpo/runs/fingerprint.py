"""What the result of a stage depends on, as one short key.

Two runs of a stage with equal keys would compute the same thing: the key covers the settings that the stage uses, the
code that it reaches, and the keys of its inputs. It does not cover paths, times, or where and in how many processes a
run is computed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from epsdpo.experiment.values import flatten
from epsdpo.runs.reach import digest


def key_parts(settings: dict[str, Any], code: dict[str, str], inputs: Mapping[str, str]) -> dict[str, dict]:
    """Everything that the key of a stage covers, by name, so that two keys can be told apart in words.

    Args:
        settings: the part of the experiment that the stage uses, as nested keys and values.
        code: digests of what the stage reaches, by notebook and module.
        inputs: keys of the stages whose results it reads, by role.
    """
    return {"settings": flatten(settings), "code": code, "inputs": dict(inputs)}


def key_of(parts: Mapping[str, Any]) -> str:
    return digest(json.dumps(parts, sort_keys=True, ensure_ascii=False))


def differences(old: Mapping[str, dict], new: Mapping[str, dict]) -> list[str]:
    """In words, what changed between the parts of two keys; empty if nothing did."""
    reasons = []
    for kind in new:
        before, after = old.get(kind, {}), new[kind]
        for name in {**before, **after}:
            if before.get(name) == after.get(name) and (name in before) == (name in after):
                continue
            if kind == "settings":
                reasons.append(f"{name} was {before.get(name, 'not set')!r}, is {after.get(name, 'not set')!r}")
            elif kind == "code":
                reasons.append(f"{name} changed" if name in before and name in after else f"{name} came or went")
            else:
                reasons.append(f"its input {name} changed")
    return reasons
