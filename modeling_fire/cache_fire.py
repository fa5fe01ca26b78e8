"""The name of the KV cache: `cache` since transformers 5.24, which deprecates `past_key_values`, its name before."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.deprecation import deprecate_kwarg


# What transformers calls it, in outputs and in its own functions.
CACHE = "cache" if "cache" in inspect.signature(BaseModelOutputWithPast).parameters else "past_key_values"


def named(cache: Cache | None) -> dict[str, Any]:
    """The cache as a keyword argument of transformers' own functions and outputs."""
    return {CACHE: cache}


def takes_cache(function: Callable) -> Callable:
    """
    Lets a function with an argument `cache` be called with `past_key_values` as well. Whoever looks at its signature
    finds the name that goes with the installed transformers.
    """
    if CACHE == "cache":
        return deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")(function)
    signature = inspect.signature(function)
    parameters = [p.replace(name=CACHE) if p.name == "cache" else p for p in signature.parameters.values()]

    @functools.wraps(function)
    def renamed(*args, **kwargs):
        cache = kwargs.pop(CACHE, None)
        if cache is not None:
            kwargs["cache"] = cache
        return function(*args, **kwargs)

    renamed.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return renamed
