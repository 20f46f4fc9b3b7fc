"""Code that a GPU runs compiled, and rounding that compiled code cannot lose."""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch


@torch.library.custom_op("epsdpo::round", mutates_args=())
def rounded(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`values` in another dtype. An operation of its own, since compilers take out a rounding that is widened again."""
    return values.to(dtype, copy=True)


@rounded.register_fake
def _(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty_like(values, dtype=dtype)


def fused(function: Callable) -> Callable:
    """`function` compiled, for a GPU: it then reads a tile once or twice and not once per operation.

    Each operation rounds as it does without. Where nothing can be compiled, `function` runs as it is, with a warning.
    """

    @functools.cache
    def compiled() -> Callable:  # at its first use, since the compiler takes seconds to import
        return torch.compile(function, dynamic=True, options={"emulate_precision_casts": True})

    failed = False

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        nonlocal failed
        if not failed:
            try:
                return compiled()(*arguments)
            except RuntimeError as error:
                if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                    raise
                failed = True
                reason = str(error).strip().partition("\n")[0]
                warnings.warn(
                    f"torch.compile failed, so that steps are slower than they need be ({reason}). It wants a C "
                    "compiler: install gcc, or name one in the environment variable CC",
                    stacklevel=2,
                )
        return function(*arguments)

    return call
