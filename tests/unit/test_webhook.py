"""What a webhook asks for and how it is signed: receivers verify it with the libraries they have."""

from __future__ import annotations

import time

import pytest
import standardwebhooks

from streamjobs.errors import Invalid
from streamjobs.webhook import (
    NOTICED,
    Webhook,
    address_of,
    check_choice,
    is_news,
    new_secret,
    signed_headers,
)

BODY = '{"type":"job.completed","data":{"kind":"prüfung"}}'.encode()


def test_receivers_verify_it_with_the_standards_own_library():
    """Nobody could check who sent it but with code of their own."""
    secret, now = new_secret(), int(time.time())
    headers = signed_headers([secret], "msg_1", now, BODY)
    verified = standardwebhooks.Webhook(secret).verify(BODY, headers)
    assert verified["data"]["kind"] == "prüfung"


def test_during_a_rotation_either_secret_verifies():
    """Every receiver would refuse everything between the rotation and its own change of the secret."""
    new, old = new_secret(), new_secret()
    headers = signed_headers([new, old], "msg_1", int(time.time()), BODY)
    for secret in (new, old):
        standardwebhooks.Webhook(secret).verify(BODY, headers)
    with pytest.raises(standardwebhooks.WebhookVerificationError):
        standardwebhooks.Webhook(new_secret()).verify(BODY, headers)


def test_a_changed_body_id_or_time_does_not_verify():
    """A stranger could send what was signed for something else."""
    secret, now = new_secret(), int(time.time())
    good = signed_headers([secret], "msg_1", now, BODY)
    webhook = standardwebhooks.Webhook(secret)
    for headers, body in (
        (good, BODY + b" "),
        (good | {"webhook-id": "msg_2"}, BODY),
        (good | {"webhook-timestamp": str(now - 1)}, BODY),
        (signed_headers([secret], "msg_1", now - 3600, BODY), BODY),
    ):
        with pytest.raises(standardwebhooks.WebhookVerificationError):
            webhook.verify(body, headers)


def test_secrets_are_long_and_never_the_same():
    """What can be guessed proves nothing."""
    assert len({new_secret() for _ in range(100)}) == 100
    assert all(secret.startswith("whsec_") and len(secret) == 38 for secret in [new_secret()])


@pytest.mark.parametrize(
    ("events", "kinds", "event", "kind", "wanted"),
    [
        (("job.failed",), (), "job.failed", "chat", True),
        (("job.failed",), (), "job.completed", "chat", False),
        (("job.failed",), ("chat",), "job.failed", "chat", True),
        (("job.failed",), ("review",), "job.failed", "chat", False),
        (("x.*",), (), "x.found", "chat", True),
        (("x.*",), (), "job.failed", "chat", False),
        (("x.found",), (), "x.found", "chat", True),
        (("x.found",), (), "x.lost", "chat", False),
    ],
)
def test_a_webhook_gets_what_it_asked_for(events: tuple[str, ...], kinds: tuple[str, ...], event: str,
                                          kind: str, wanted: bool):  # fmt: skip
    """A receiver would drown in what it did not ask for, or wait for what never comes."""
    assert Webhook(url="https://x.example", events=events, kinds=kinds).wants(event, kind) is wanted


@pytest.mark.parametrize("event", ["", "job.started", "text.delta", "x.", "x", "*", "job.*", "x.a b", "x.\n"])
def test_what_is_never_sent_cannot_be_asked_for(event: str):
    """A webhook with a typo in it would be made, and stay silent."""
    with pytest.raises(Invalid, match=r"^events: "):
        check_choice([event])


def test_what_is_sent_can_be_asked_for():
    """An event would be news that no webhook may have."""
    check_choice([*NOTICED, "x.*", "x.found"])
    assert all(map(is_news, [*NOTICED, "x.found"]))
    assert not is_news("job.progress")


@pytest.mark.parametrize(
    "url",
    [
        "mailto:",
        "mailto:anna",
        "mailto:anna@",
        "mailto:anna@a.example,bob@b.example",
        "mailto:anna@a.example?cc=bob@b.example",
        "mailto:anna@a.example%0abcc:bob@b.example",
        "mailto:anna@a.example\nbcc: bob@b.example",
        "mailto:Anna <anna@a.example>",
        'mailto:"a b"@a.example',
        "mailto:@a.example",
    ],
)
def test_mail_goes_to_one_plain_address(url: str):
    """A webhook would be a way to mail anybody anything."""
    with pytest.raises(Invalid):
        address_of(url)
    assert address_of("mailto:anna+jobs@mail.example") == "anna+jobs@mail.example"
