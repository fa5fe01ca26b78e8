"""The name of the KV cache: `past_key_values` in transformers up to 5.23, `cache` since."""

import functools
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast


# What transformers calls it, in outputs and in its own functions.
CACHE = "cache" if any(field.name == "cache" for field in fields(BaseModelOutputWithPast)) else "past_key_values"


def named(cache: Cache | None) -> dict[str, Any]:
    """The cache as a keyword argument of transformers' own functions and outputs."""
    return {CACHE: cache}


def takes_cache(function: Callable) -> Callable:
    """Lets a function with an argument `past_key_values` be called with `cache` as well."""

    @functools.wraps(function)
    def renamed(*args, **kwargs):
        if "cache" in kwargs:
            cache = kwargs.pop("cache")
            if cache is not None and kwargs.get("past_key_values") is not None:
                raise ValueError("`cache` and `past_key_values` are two names of one argument: give one of them.")
            if cache is not None:
                kwargs["past_key_values"] = cache
        return function(*args, **kwargs)

    return renamed
