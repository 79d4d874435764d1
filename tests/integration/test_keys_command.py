"""`streamjobs keys`: API keys from a shell, against a real Redis and a gateway that asks for them."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from tests.conftest import RedisProcess
from tests.integration.gateway import serving


def keys(redis: RedisProcess, *words: str, status: int = 0) -> str:
    command = [sys.executable, "-m", "streamjobs", "keys", *words, "--redis-url", redis.url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == status, done.stderr
    return done.stdout if status == 0 else done.stderr


async def test_a_key_from_birth_to_end(redis: RedisProcess):
    """The first key of an installation could not be made, or the last one not be ended."""
    text = keys(redis, "create", "--tenant", "acme", "--subject", "anna", "--label", "laptop").strip()
    made = json.loads(keys(redis, "create", "--subject", "olga", "--scope", "admin", "--days", "1", "--json"))
    assert made["key"].startswith(f"sjk_{made['id']}_")
    assert made["expires_ms"] - made["created_ms"] == 86_400_000
    shown = keys(redis, "list")
    assert "acme/anna" in shown
    assert "laptop" in shown
    assert "default/olga" in shown
    assert text.split("_")[2] not in shown
    async with serving(redis.url, auth=("keys",), auth_cache=0.0) as served:
        headers = {"authorization": f"Bearer {text}"}
        assert (await served.client.get("/v1/jobs", headers=headers)).status_code == 200
        env = os.environ | {"STREAMJOBS_TOKEN": text}
        listed = [sys.executable, "-m", "streamjobs", "list", "--url", served.url, "--json"]
        # the gateway is in this loop: the command must not keep it from answering
        process = subprocess.Popen(listed, env=env, stdout=subprocess.PIPE, text=True)
        while process.poll() is None:
            assert (await served.client.get("/livez")).status_code == 200
        assert process.stdout is not None
        assert json.loads(process.stdout.read())["jobs"] == []
        process.stdout.close()
        assert keys(redis, "revoke", text.rpartition("_")[0]) == "revoked\n"
        assert keys(redis, "revoke", text.split("_")[1]) == "it was revoked before\n"
        assert (await served.client.get("/v1/jobs", headers=headers)).status_code == 401
    assert "revoked" in keys(redis, "list")
    assert keys(redis, "forget", text.split("_")[1]) == "forgotten\n"
    assert "acme/anna" not in keys(redis, "list")
    assert "none of" in keys(redis, "create", "--subject", "x", "--scope", "jobs:raed", status=1)
    assert "no such key" in keys(redis, "revoke", "abc", status=1)
