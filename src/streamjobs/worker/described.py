"""What the log says of an error that users' code raised."""

from __future__ import annotations

from collections.abc import Iterator

from streamjobs.errors import ProviderError, StepError, StreamjobsError
from streamjobs.events import ErrorInfo, clean_text

MAX_MESSAGE = 2000


def describe(error: BaseException) -> ErrorInfo:
    """Code, message and whether another try can help.

    A group of several is as its first, and retryable if all are.
    """
    infos = [_describe_one(leaf) for leaf in leaves(error)]
    if len(infos) == 1:
        return infos[0]
    message = clean_message(f"{_text(error)}: {'; '.join(info.message for info in infos[:5])}")
    return ErrorInfo(infos[0].code, message, all(info.retryable for info in infos))


def leaves(error: BaseException) -> Iterator[BaseException]:
    """An error, or all that a group of them holds."""
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType]
            yield from leaves(inner)  # pyright: ignore[reportUnknownArgumentType]
    else:
        yield error


def clean_message(message: str) -> str:
    """A message as the log can hold it."""
    return clean_text(message)[:MAX_MESSAGE]


def _describe_one(error: BaseException) -> ErrorInfo:
    text = _text(error)
    if isinstance(error, StreamjobsError):
        has_own_word = isinstance(error, ProviderError | StepError)
        return ErrorInfo(
            error.code, clean_message(text), error.is_retryable if has_own_word else error.retryable
        )
    name = type(error).__name__
    return ErrorInfo("exception", clean_message(f"{name}: {text}" if text else name), retryable=True)


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # noqa: BLE001 - the text of a foreign exception is foreign code
        return ""
