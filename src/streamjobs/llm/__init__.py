"""Model providers: which one a model's name means, and one connection pool for each.

Rule 1: a prefix counts only if it is exactly `openai:` or `anthropic:`; OpenRouter's names hold slashes
and Ollama's hold colons, and both belong to the model.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from streamjobs.config import Settings, tenant_keys
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
    """The providers of one process, made when first asked for; tenants with keys have their own."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._made: dict[tuple[str, str], Provider] = {}
        self._tenants = _settings_of_tenants(settings)

    def resolve(self, model: str, owner: str = "") -> tuple[Provider, str]:
        """Find the provider for a model, and the name by which it knows the model.

        `model` is `openai:<name>`, `anthropic:<name>` or a bare name, which goes to the `provider` setting,
        else to whichever has a key, else to OpenAI; empty: the `default_model` setting. Raises
        `ProviderError` where no model is named, or a public API would be called without a key.
        What `owner`'s tenant has keys for is called with those.
        """
        tenant = owner.partition("/")[0] if "/" in owner else ""
        tenant = tenant if tenant in self._tenants else ""
        settings = self._tenants.get(tenant, self._settings)
        model = (model or self._settings.default_model).strip()
        prefix, _, rest = model.partition(":")
        name, model = (prefix, rest) if prefix in _KINDS else (_default(settings), model)
        if not model:
            raise ProviderError("no model is named: set `default_model`, or name one in the request")
        return self._provider(tenant, name, settings), model

    async def aclose(self) -> None:
        """Close all connections."""
        made, self._made = self._made, {}
        for provider in made.values():
            await provider.aclose()

    def _provider(self, tenant: str, name: str, settings: Settings) -> Provider:
        if (tenant, name) not in self._made:
            _require_usable(name, settings)
            self._made[tenant, name] = _KINDS[name](settings)
        return self._made[tenant, name]


def _settings_of_tenants(settings: Settings) -> dict[str, Settings]:
    found: dict[str, Settings] = {}
    for (tenant, provider), key in tenant_keys(settings).items():
        base = found.get(tenant, settings)
        found[tenant] = msgspec.structs.replace(base, **{f"{provider}_api_key": key})
    return found


def _default(settings: Settings) -> str:
    with_key = (name for name in _KINDS if _has_key(name, settings))
    return settings.provider or next(with_key, "openai")


def _has_key(name: str, settings: Settings) -> bool:
    return bool(getattr(settings, f"{name}_api_key").strip())


def _require_usable(name: str, settings: Settings) -> None:
    base_url = f"{name}_base_url"
    is_public = getattr(settings, base_url) == getattr(_DEFAULTS, base_url)
    if is_public and not _has_key(name, settings):
        raise ProviderError(
            f"{name}: no API key: set {name.upper()}_API_KEY, "
            f"or STREAMJOBS_{base_url.upper()} for a server without keys"
        )
