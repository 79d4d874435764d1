"""Credentials: what is believed, and above all what is not."""

from __future__ import annotations

import base64
import json
import random
import time
from typing import Any

import jwt
import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from streamjobs.errors import ConfigError, IdentityUnavailable, Invalid, Unauthenticated
from streamjobs.identity import apikey
from streamjobs.identity.apikey import ApiKey, digest_of, new_key, parse_key
from streamjobs.identity.jwt import JwtRules, JwtVerifier, KeySet
from streamjobs.identity.principal import DEFAULT_SCOPES, Principal, scopes_of, subject_of, tenant_of
from streamjobs.identity.streamtoken import StreamTokens, parse_keys

SECRET, OTHER = "s" * 32, "t" * 32
ISSUER, AUDIENCE = "https://issuer.example", "streamjobs"
RSA_KEY = rsa.generate_private_key(65537, 2048)
EC_KEY = ec.generate_private_key(ec.SECP256R1())


# --- principals


def test_two_principals_have_one_owner_only_where_they_are_the_same():
    """Somebody could choose a name that makes him another tenant's user."""
    named = [("a", "b/c"), ("a", "b"), ("b", "c"), ("", "x"), ("a-b", "c"), ("a", "b-c")]
    owners = {Principal(tenant=tenant, subject=subject).owner for tenant, subject in named}
    assert len(owners) == len(named)
    for tenant in ("a/b", "", "-a", "a" * 65, "a b", "ä", None, 7):
        with pytest.raises(Invalid):
            tenant_of(tenant)
    for subject in ("", "a|b", "a\nb", "\x00", "s" * 129, "\ud800", None):
        with pytest.raises(Invalid):
            subject_of(subject)
    assert subject_of("Änne/7@x.example") == "Änne/7@x.example"


def test_scopes_that_nobody_knows():
    """A typo would make a key that can do nothing, or one day something."""
    assert scopes_of("jobs:read admin") == {"jobs:read", "admin"}
    assert scopes_of(["jobs:read"]) == {"jobs:read"}
    for wrong in ("jobs:raed", ["*"], 7, None):
        with pytest.raises(Invalid):
            scopes_of(wrong)


# --- API keys


def test_a_key_is_kept_as_a_digest():
    """Whoever reads a backup of Redis could use every key."""
    key_id, secret, text = new_key()
    assert parse_key(text) == (key_id, secret)
    kept = ApiKey(id=key_id, digest=digest_of(secret), tenant="a", subject="b", scopes=DEFAULT_SCOPES)
    assert secret not in msgspec.json.encode(kept).decode()
    assert kept.is_opened_by(secret)
    assert not kept.is_opened_by(secret[:-1] + ("a" if secret[-1] != "a" else "b"))
    assert key_id in kept.shown
    assert secret not in kept.shown
    assert len({new_key()[2] for _ in range(100)}) == 100


def test_a_key_ends():
    """Expired and revoked keys would go on working."""
    key = ApiKey(id="k", digest="d", tenant="a", subject="b", scopes=DEFAULT_SCOPES, expires_ms=1000)
    assert key.is_good(999)
    assert not key.is_good(1000)
    assert not msgspec.structs.replace(key, expires_ms=0, revoked_ms=1).is_good(5)


@pytest.mark.parametrize(
    "text", ["", "sjk_", "sjk_a_b", "sjk_" + "a" * 12 + "_" + "a" * 39, "SJK_" + "a" * 12]
)
def test_what_is_no_key(text: str):
    """Anything would be looked up in Redis."""
    assert parse_key(text) is None
    assert not text.startswith(apikey.PREFIX) or text.startswith("sjk_")


# --- stream tokens


def tokens(keys: dict[str, bytes] | None = None, ttl: float = 60.0, max_age: float = 600.0) -> StreamTokens:
    return StreamTokens(keys or {"one": SECRET.encode()}, ttl, max_age)


ANNA = Principal(tenant="acme", subject="anna", credential="key:abc")


def test_a_token_reads_one_job():
    """What is in a URL could cancel jobs, or read others."""
    signer = tokens()
    text = signer.sign(signer.issue(ANNA, "j0-x", 1000.0))
    principal = signer.verify(text, 1001.0).principal
    assert (principal.owner, principal.job, principal.scopes) == ("acme/anna", "j0-x", {"jobs:read"})
    assert principal.credential == "key:abc"


def test_a_token_that_is_not_good():
    """Somebody could make one, change one, or use one for ever."""
    signer = tokens()
    text = signer.sign(signer.issue(ANNA, "j0-x", 1000.0))
    head, _, mac = text.partition(".")
    payload = head.removeprefix("sjt_")
    said = json.loads(base64.urlsafe_b64decode(payload + "==="))
    forged = base64.urlsafe_b64encode(json.dumps(said | {"j": "j0-y"}).encode()).decode().rstrip("=")
    nameless = base64.urlsafe_b64encode(json.dumps(said | {"k": "none"}).encode()).decode().rstrip("=")
    for wrong in (
        "", "sjt_", "sjt_.", text[:-1], text + "A", text + "=", head, f"sjt_{forged}.{mac}",
        f"sjt_{nameless}.", f"sjt_{payload}.", f"sjt_{payload}.{mac[::-1]}", text.replace("sjt_", "sjk_"),
        "sjt_" + "a" * 5000, f"sjt_{payload}.{mac}.{mac}", f"sjt_{payload}\n.{mac}", "sjt_é.é",
    ):  # fmt: skip
        with pytest.raises(Unauthenticated):
            signer.verify(wrong, 1001.0)
    with pytest.raises(Unauthenticated, match="expired"):
        signer.verify(text, 1060.0)
    with pytest.raises(Unauthenticated):
        tokens({"one": OTHER.encode()}).verify(text, 1001.0)


def test_no_changed_byte_is_good():
    """A single weak place in the format is all that is needed."""
    signer, chance = tokens(), random.Random(7)
    text = signer.sign(signer.issue(ANNA, "j0-x", 1000.0))
    for _ in range(3000):
        at, byte = chance.randrange(len(text)), chance.choice("abcXYZ019-_.=")
        changed = text[:at] + byte + text[at + 1 :]
        if changed != text:
            with pytest.raises(Unauthenticated):
                signer.verify(changed, 1001.0)


def test_renewal_ends():
    """A token that leaked once would be good for ever."""
    signer = tokens(ttl=60.0, max_age=100.0)
    first = signer.issue(ANNA, "", 1000.0)
    second = first.renewed(1050.0, 60.0)
    assert (first.expires, second.expires, second.until) == (1060, 1100, 1100)
    assert second.renewed(1099.0, 60.0).expires == 1100
    with pytest.raises(Unauthenticated):
        signer.verify(signer.sign(second), 1100.0)


def test_keys_are_replaced_one_at_a_time():
    """A new key would break all streams, or the old one could never go."""
    old, both = tokens(), tokens({"two": OTHER.encode(), "one": SECRET.encode()})
    text = old.sign(old.issue(ANNA, "", 1000.0))
    known = both.verify(text, 1001.0)
    after = both.sign(known.renewed(1001.0, 60.0))
    assert tokens({"two": OTHER.encode()}).verify(after, 1002.0).subject == "anna"
    assert list(parse_keys((f"a:{SECRET}", f"b:{OTHER}"))) == ["a", "b"]
    for wrong in ("a", f":{SECRET}", "a:short"):
        with pytest.raises(ConfigError) as error:
            parse_keys((wrong,))
        assert "short" not in str(error.value)


# --- JSON Web Tokens


def signed(key: Any = SECRET, algorithm: str = "HS256", kid: str = "", **claims: Any) -> str:
    said = {"sub": "anna", "exp": time.time() + 60, "iss": ISSUER, "aud": AUDIENCE} | claims
    said = {name: value for name, value in said.items() if value is not None}
    return jwt.encode(said, key, algorithm, headers={"kid": kid} if kid else None)


def shared(**rules: Any) -> JwtVerifier:
    return JwtVerifier(
        JwtRules(**({"secrets": (SECRET,), "issuer": ISSUER, "audience": AUDIENCE} | rules)), None
    )


class Published:
    """A key set at some URL, and how often it was fetched."""

    def __init__(self, *keys: dict[str, Any]) -> None:
        self.body = json.dumps({"keys": keys}).encode()
        self.fetches = 0
        self.error: Exception | None = None

    async def __call__(self) -> bytes:
        self.fetches += 1
        if self.error is not None:
            raise self.error
        return self.body


def public(kid: str, key: Any, **more: Any) -> dict[str, Any]:
    algorithm = (
        jwt.algorithms.RSAAlgorithm if isinstance(key, rsa.RSAPrivateKey) else jwt.algorithms.ECAlgorithm
    )
    return {**algorithm.to_jwk(key.public_key(), as_dict=True), "kid": kid, "use": "sig"} | more


def by_keys(published: Published, ttl: float = 300.0, **rules: Any) -> JwtVerifier:
    return JwtVerifier(JwtRules(issuer=ISSUER, audience=AUDIENCE, **rules), KeySet(published, ttl))


async def test_a_token_of_a_known_issuer():
    """Users of other systems could not sign in."""
    principal = await shared().verify(signed(tenant="acme", scope="openid jobs:read admin"))
    assert (principal.owner, principal.scopes) == ("acme/anna", {"jobs:read", "admin"})
    assert (await shared().verify(signed())).owner == "default/anna"
    published = Published(public("r", RSA_KEY), public("e", EC_KEY))
    for key, algorithm, kid in ((RSA_KEY, "RS256", "r"), (EC_KEY, "ES256", "e")):
        assert (await by_keys(published).verify(signed(key, algorithm, kid))).subject == "anna"


@pytest.mark.parametrize(
    "changes",
    [
        {"exp": time.time() - 3600}, {"exp": None}, {"sub": None}, {"iss": "https://evil.example"},
        {"aud": "other"}, {"iss": None}, {"aud": None}, {"nbf": time.time() + 3600}, {"tenant": "a/b"},
        {"tenant": 7}, {"sub": "a|b"}, {"scope": 7}, {"key": OTHER},
        {"algorithm": "HS512", "key": SECRET * 2},
    ],
)  # fmt: skip
async def test_a_token_that_does_not_fit(changes: dict[str, Any]):
    """Somebody's token for something else, or for yesterday, would open this."""
    with pytest.raises(Unauthenticated):
        await shared().verify(signed(**changes))


async def test_the_key_decides_the_algorithm():
    """The classic: a token that says `none`, or that is signed with the public key as a shared secret."""
    published = Published(public("r", RSA_KEY))
    verifier = by_keys(published, secrets=(SECRET,))
    pem = RSA_KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    claims = {"sub": "anna", "exp": int(time.time()) + 60, "iss": ISSUER, "aud": AUDIENCE}
    body = base64.urlsafe_b64encode(json.dumps(claims).encode()).decode().rstrip("=")
    for head in ({"alg": "none"}, {"alg": "None"}, {"alg": "NONE", "kid": "r"}, {"typ": "JWT"}):
        encoded = base64.urlsafe_b64encode(json.dumps(head).encode()).decode().rstrip("=")
        for mac in ("", "AAAA"):
            with pytest.raises(Unauthenticated):
                await verifier.verify(f"{encoded}.{body}.{mac}")
    confused = jwt.PyJWS().encode(
        json.dumps(claims).encode(), base64.urlsafe_b64encode(pem), "HS256", headers={"kid": "r"}
    )
    for wrong in (
        confused,
        signed(EC_KEY, "ES256", "r"),
        signed(RSA_KEY, "RS512", "r"),
        "a.b.c",
        "",
        "a" * 9000,
    ):
        with pytest.raises(Unauthenticated):
            await verifier.verify(wrong)


async def test_keys_of_the_issuer_change():
    """After the issuer's next rotation nobody could sign in; or any key id would cost a fetch."""
    published = Published(public("old", RSA_KEY))
    verifier = by_keys(published)
    assert (await verifier.verify(signed(RSA_KEY, "RS256", "old"))).subject == "anna"
    for _ in range(20):
        with pytest.raises(Unauthenticated):
            await verifier.verify(signed(RSA_KEY, "RS256", "unknown"))
    assert published.fetches == 1, "strangers decide how often keys are fetched"
    published.body = Published(public("new", RSA_KEY)).body
    fresh = by_keys(published)
    assert (await fresh.verify(signed(RSA_KEY, "RS256", "new"))).subject == "anna"


async def test_keys_that_cannot_be_fetched():
    """The issuer's outage would be ours; or a broken key set would open everything."""
    published = Published(public("r", RSA_KEY))
    verifier = by_keys(published, ttl=0.0)
    await verifier.verify(signed(RSA_KEY, "RS256", "r"))
    published.error = ValueError("away")
    assert (await verifier.verify(signed(RSA_KEY, "RS256", "r"))).subject == "anna"
    for body in (b"", b"[]", b"{}", b'{"keys": 7}', b'{"keys": [7, {}, {"kty": "RSA"}]}', b'{"keys": []}'):
        broken = Published()
        broken.body = body
        with pytest.raises(IdentityUnavailable):
            await by_keys(broken).verify(signed(RSA_KEY, "RS256", "r"))


async def test_a_shared_secret_is_replaced():
    """Both sides would have to change it in the same second."""
    both = shared(secrets=(OTHER, SECRET))
    for key in (SECRET, OTHER):
        assert (await both.verify(signed(key))).subject == "anna"
    with pytest.raises(Unauthenticated):
        await both.verify(signed("u" * 32))
