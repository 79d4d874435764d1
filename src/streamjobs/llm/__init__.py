"""Model providers: which one a model's name means, and one connection pool for each.

Rule 1: a prefix counts only if it is exactly `openai:` or `anthropic:`; OpenRouter's names hold slashes
and Ollama's hold colons, and both belong to the model.
"""

from __future__ import annotations

from collections.abc import Callable

from streamjobs.config import Settings
from streamjobs.errors import ProviderError
from streamjobs.llm.anthropic import Anthropic
from streamjobs.llm.base import (
    Answer,
    Message,
    ModelRequest,
    Piece,
    Provider,
    ReasoningPiece,
    TextPiece,
    ToolSpec,
)
from streamjobs.llm.openai import OpenAI

__all__ = [
    "Answer",
    "Anthropic",
    "Message",
    "ModelRequest",
    "OpenAI",
    "Piece",
    "Provider",
    "Providers",
    "ReasoningPiece",
    "TextPiece",
    "ToolSpec",
]

_KINDS: dict[str, Callable[[Settings], Provider]] = {"openai": OpenAI, "anthropic": Anthropic}
_DEFAULTS = Settings()


class Providers:
    """The providers of one process, made when first asked for."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._made: dict[str, Provider] = {}

    def resolve(self, model: str) -> tuple[Provider, str]:
        """Find the provider for a model, and the name by which it knows the model.

        `model` is `openai:<name>`, `anthropic:<name>` or a bare name, which goes to the `provider` setting,
        else to whichever has a key, else to OpenAI; empty: the `default_model` setting. Raises
        `ProviderError` where no model is named, or a public API would be called without a key.
        """
        model = (model or self._settings.default_model).strip()
        prefix, _, rest = model.partition(":")
        name, model = (prefix, rest) if prefix in _KINDS else (self._default(), model)
        if not model:
            raise ProviderError("no model is named: set `default_model`, or name one in the request")
        return self._provider(name), model

    async def aclose(self) -> None:
        """Close all connections."""
        made, self._made = self._made, {}
        for provider in made.values():
            await provider.aclose()

    def _default(self) -> str:
        with_key = (name for name in _KINDS if self._has_key(name))
        return self._settings.provider or next(with_key, "openai")

    def _provider(self, name: str) -> Provider:
        if name not in self._made:
            self._require_usable(name)
            self._made[name] = _KINDS[name](self._settings)
        return self._made[name]

    def _has_key(self, name: str) -> bool:
        return bool(getattr(self._settings, f"{name}_api_key").strip())

    def _require_usable(self, name: str) -> None:
        base_url = f"{name}_base_url"
        is_public = getattr(self._settings, base_url) == getattr(_DEFAULTS, base_url)
        if is_public and not self._has_key(name):
            raise ProviderError(
                f"{name}: no API key: set {name.upper()}_API_KEY, "
                f"or STREAMJOBS_{base_url.upper()} for a server without keys"
            )
