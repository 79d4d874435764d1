"""What is taken for a secret in texts of others, and what must stay readable."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import pytest

from streamjobs import redaction
from streamjobs.events import ErrorInfo, ToolFailed, decode_event, encode_event
from streamjobs.redaction import learn, redacted

SECRET = "Zq7-canary.Xy9_end"


@pytest.fixture(autouse=True)
def knows_nothing() -> Iterator[None]:
    """What one test has a process learn, another one would find hidden."""
    before, values = set(redaction._known), redaction._values
    redaction._known.clear()
    redaction._values = None
    yield
    redaction._known.clear()
    redaction._known.update(before)
    redaction._values = values


@pytest.mark.parametrize(
    "text",
    [
        "Client error '401 Unauthorized' for url 'https://api.example/v1?key=%s'",
        "https://h/p?a=1&api_key=%s#x",
        "https://h/p?X-Amz-Signature=%s&b=2",
        "https://h/p?sig=%s",
        "https://h/v1/events?token=%s",
        "cannot connect to redis://user:%s@redis:6379/0",
        "postgres://%s@db/x failed",
        "Authorization: Bearer %s",
        "authorization: Basic %s",
        '{"authorization": "Bearer %s"}',
        "{'Authorization': '%s'}",
        '"{\\"authorization\\": \\"%s\\"}"',
        "x-api-key: %s",
        "Cookie=%s",
        "the header was Bearer %s, which is no good",
        "api_key=%s is invalid",
        "OPENAI_API_KEY=%s",
        "password=%s",
        "client_secret=%s;",
    ],
)
def test_what_stands_where_secrets_stand_is_hidden(text: str):
    """A tool's failed request would put its key into the log of the job, for ever, and before the model."""
    clean = redacted(text % SECRET)
    assert SECRET not in clean
    assert "canary" not in clean
    assert redaction.HIDDEN in clean
    assert len(clean) >= len(text) - 5, "the rest stays, or nobody can tell what failed"


@pytest.mark.parametrize(
    "token",
    [
        "sk-proj-abcdefABCDEF123456", "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "ghp_" + "a1" * 18,
        "xoxb-123456789012-abcdef", "AKIAIOSFODNN7EXAMPLE",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2lnbmF0dXJl",
    ],
)  # fmt: skip
def test_what_looks_like_a_key_is_hidden_wherever_it_stands(token: str):
    """Providers quote the key that they refuse in the middle of a sentence."""
    assert redacted(f"Incorrect API key provided: {token}.") == "Incorrect API key provided: [hidden]."


@pytest.mark.parametrize(
    "text",
    [
        "Basic authentication is needed",
        "Bearer authentication required",
        "unexpected token: '}' at line 3",
        "the password must have eight characters",
        "key error: 'token'",
        "https://h/p?page=2&design=x&monkey=1x",
        "see https://example.org/keys?next=5 and mail a@b.example",
        "job j0-abcdefghijklmnopqrstuvwxyz failed: tokens=1234",
        "max_tokens=4096 is too large",
        "skip-this-long-word-please",
        "\u2028 \x00 \ud800 Zürich 𝄞",
        "",
    ],
)
def test_other_words_stay(text: str):
    """An error that says nothing helps nobody."""
    assert redacted(text) == text


@pytest.mark.parametrize("secret", ["s3cret", 'q"uo\\te', "p@ss/w:rd#?", "Schlüssel-ä", "a\nb-c-d-e"])
def test_what_the_process_was_given_is_hidden_however_it_is_written(secret: str):
    """A password that looks like none, in a traceback, a URL or a JSON document."""
    learn([secret])
    url = redaction.quote(secret, safe="")
    for text in (f"a {secret} b", f"x://{url}", json.dumps({"k": secret})):
        clean = redacted(text)
        assert secret not in clean
        assert json.dumps(secret)[1:-1] not in clean
        assert url not in clean


def test_short_stand_ins_are_not_looked_for():
    """`x`, the key that local servers are given, would be struck out of every word."""
    learn(["x", "none", ""])
    assert redacted("no exit: none") == "no exit: none"


@pytest.mark.parametrize(
    "value",
    [
        {"authorization": None, "cookie": {"a": 1}, "x-api-key": 7, "Authorization": ["Bearer x1y2z3"]},
        {
            "error": "Authorization: Bearer abc123def",
            "url": "http://u:p@h/?token=abc&x=1",
            "n": "password=abc\ndef",
        },
        {"nested": json.dumps({"authorization": f"Bearer {SECRET}", "after": 1})},
    ],
)
def test_json_stays_json(value: object):
    """A line of the log that no parser reads is one that nobody finds."""
    clean = json.loads(redacted(json.dumps(value)))
    assert list(clean) == list(value)  # type: ignore[call-overload]


@pytest.mark.parametrize("piece", ["eyJ-", "://a", "a_api_key_", "cookie=!", "Bearer a", "&x."])
def test_a_text_made_to_be_slow_is_not(piece: str):
    """One error of a tool's, long and of the right letters, would stop a worker for minutes."""
    began = time.process_time()
    redacted(piece * (400_000 // len(piece)))
    assert time.process_time() - began < 20, "a pattern that begins anywhere takes minutes, this milliseconds"


def test_no_error_is_recorded_with_a_secret():
    """What is in a job's log is there for everybody who may read the job, and in backups and archives."""
    told = f"GET https://api.example/v1?key={SECRET}: 401"
    info = ErrorInfo("exception", told)
    assert info.message == "GET https://api.example/v1?key=[hidden]: 401"
    recorded = encode_event(ToolFailed(call_id="c", error=info))
    assert SECRET.encode() not in recorded
    old = recorded.replace(b"[hidden]", SECRET.encode())
    event = decode_event("tool.failed", old)
    assert isinstance(event, ToolFailed)
    assert SECRET not in event.error.message, "and what older releases recorded is not shown"
