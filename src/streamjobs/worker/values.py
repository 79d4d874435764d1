"""Values on their way into the log and back.

Encoded once, and what code gets is what a replay will give it.
"""

from __future__ import annotations

import functools
import hashlib
import typing
from collections.abc import Callable
from typing import Any, cast

import msgspec

from streamjobs.events import UNENCODABLE, Json, clean_text, encode_json

_PLAIN = (type(None), bool, int)


def encode_clean(value: object) -> bytes:
    """The JSON of a value (NaN and infinity are null), without lone surrogates and NULs.

    Raises one of `UNENCODABLE`.
    """
    try:
        encoded = encode_json(value)
    except UnicodeEncodeError:
        return encode_json(_cleaned(msgspec.to_builtins(value, str_keys=True)))
    return encode_json(_cleaned(msgspec.json.decode(encoded))) if b"\\u0000" in encoded else encoded


def _cleaned(value: Json) -> Json:
    if isinstance(value, str):
        return clean_text(value)
    if isinstance(value, list | tuple):
        return [_cleaned(one) for one in cast("list[Json]", value)]
    if isinstance(value, dict):
        items = cast("dict[str, Json]", value).items()
        return {clean_text(name): _cleaned(one) for name, one in items}
    return value


def digest(value: object) -> str:
    """A short name of a value: 12 hexadecimal digits of its JSON. Raises one of `UNENCODABLE`."""
    return hashlib.blake2b(encode_json(value), digest_size=6).hexdigest()


def decode_as(hint: Any, encoded: bytes) -> Any:
    """Read a recorded value as the type that its function says it returns; as plain JSON without one.

    Raises `msgspec.ValidationError` where it does not fit.
    """
    return _decoder(hint).decode(encoded) if hint is not Any else msgspec.json.decode(encoded)


@functools.lru_cache(maxsize=1024)
def _decoder(hint: Any) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(hint)


def returned_type(function: Callable[..., Any]) -> Any:
    """What a function says it returns; Any where it says nothing, or what JSON does not know."""
    hint = getattr(function, "__annotations__", {}).get("return", Any)
    if not isinstance(hint, str):
        return _known_type(hint)
    # by name, not by the function itself: a cache must not keep closures alive
    name = (function.__module__, function.__qualname__, hint)
    if name not in _resolved:
        if len(_resolved) > _MOST_RESOLVED:
            _resolved.clear()
        _resolved[name] = _known_type(_resolve(function))
    return _resolved[name]


_MOST_RESOLVED = 4096
_resolved: dict[tuple[str, str, str], Any] = {}


def _resolve(function: Callable[..., Any]) -> Any:
    try:
        return typing.get_type_hints(function, include_extras=True).get("return", Any)
    except (NameError, TypeError, AttributeError):
        return Any


def _known_type(hint: Any) -> Any:
    try:
        msgspec.json.Decoder(hint)
    except (TypeError, ValueError, RecursionError):
        return Any
    return hint


def seen_again(hint: Any, value: Any, encoded: bytes) -> Any:
    """A fresh value as a replay would give it."""
    if type(value) in _PLAIN and (hint is Any or hint is type(value)):
        return value
    return decode_as(hint, encoded)


__all__ = ["UNENCODABLE", "decode_as", "digest", "encode_clean", "returned_type", "seen_again"]
