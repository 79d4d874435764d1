"""Settings are typed by people, into shells, YAML files and Kubernetes manifests: mistakes must be told,
not swallowed."""

from __future__ import annotations

import ast
import inspect
import os
import traceback
from pathlib import Path

import pytest

from streamjobs import config
from streamjobs.config import SECRETS, Settings, from_text, load_settings, secrets_of, tenant_keys
from streamjobs.errors import ConfigError

DOCS = Path(__file__).parents[2] / "docs" / "settings.md"

HEAD = """# Settings

Each has a default. They are read, later ones winning, from a file (`--config settings.yaml`, YAML or JSON),
from variables (`STREAMJOBS_<NAME>`, upper case), and from the command line (`--set name=value`, and the
options of a command). An unknown name is an error that says which one was probably meant. Durations are
seconds, sizes bytes.

A secret (`redis_url`, `redis_password`, `openai_api_key`, `anthropic_api_key`, `smtp_url`) may be named
instead of written: `env:NAME` is the variable NAME, `file:/run/secrets/key` what that file holds, without a
line break at its end. Both are read once, at the start. Prefer files: command lines are seen by everybody on
a machine, variables by every process that ours starts.

In Kubernetes set `enableServiceLinks: false` for our pods: otherwise the variables that it injects for a
Service named `streamjobs` look like settings, and the program refuses to start.

This page is made from `config.py` by its test: `STREAMJOBS_TEST_WRITE=1 pytest tests/unit/test_config.py`.
"""


def meanings() -> dict[str, dict[str, str]]:
    """Group -> setting -> the string under it, as config.py has them."""
    source = inspect.getsource(config)
    lines = source.splitlines()
    body = next(node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)).body
    groups: dict[str, dict[str, str]] = {}
    for field, meaning in zip(body, [*body[1:], None], strict=True):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            headings = [line for line in lines[: field.lineno] if line.strip().startswith("# --- ")]
            text = ast.literal_eval(meaning.value) if isinstance(meaning, ast.Expr) else ""
            groups.setdefault(headings[-1].strip("# -"), {})[field.target.id] = " ".join(text.split())
    return groups


def shown(value: object) -> str:
    text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return f"`{text.removesuffix('.0')}`" if text else ""


def page() -> str:
    defaults = Settings()
    parts = [HEAD]
    for group, settings in meanings().items():
        rows = [
            f"| `{name}` | {shown(getattr(defaults, name))} | {meaning} |"
            for name, meaning in settings.items()
        ]
        parts.append(
            "\n".join(
                [f"## {group.capitalize()}", "", "| setting | default | meaning |", "|---|---|---|", *rows]
            )
        )
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def test_the_page_of_settings_is_what_the_program_has():
    """People would set what does nothing any more, and not find what would help them."""
    if os.environ.get("STREAMJOBS_TEST_WRITE"):
        DOCS.write_text(page())
    assert DOCS.read_text() == page()


def test_every_setting_has_a_default_and_a_meaning():
    """Somebody would have to read the source to run the program."""
    assert Settings() == load_settings(env={})
    found = {name: text for group in meanings().values() for name, text in group.items()}
    assert tuple(found) == Settings.__struct_fields__
    assert [name for name, text in found.items() if not text.endswith(".")] == []


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("leese", "lease"),
        ("concurency", "concurrency"),
        ("redis_ulr", "redis_url"),
        ("heartbeat_intervall", "heartbeat_interval"),
    ],
)
def test_a_typo_is_answered_with_what_was_meant(wrong: str, meant: str):
    """The default would be used in silence, and found out in production."""
    for load in (
        lambda: load_settings(env={}, **{wrong: "1"}),
        lambda: load_settings(env={f"STREAMJOBS_{wrong.upper()}": "1"}),
    ):
        with pytest.raises(ConfigError, match=f"unknown setting '{wrong}', did you mean '{meant}'"):
            load()


def test_a_name_like_no_other_is_refused_too():
    """A setting of another program in our file would seem to be in force."""
    with pytest.raises(ConfigError, match=r"unknown setting 'zzzz'$"):
        load_settings(env={"STREAMJOBS_ZZZZ": "1"})


def test_a_variable_of_another_program_is_none_of_ours():
    """Starting would depend on whatever else a machine's environment holds."""
    assert (
        load_settings(env={"PATH": "/bin", "STREAM": "1", "streamjobs_lease": "9", "STREAMJOB_LEASE": "1"})
        == Settings()
    )


def test_our_variables_that_are_no_settings_are_passed_over():
    """`STREAMJOBS_URL=… streamjobs worker` would not start, nor would a run with an armed fault."""
    assert load_settings(env={"STREAMJOBS_URL": "http://x", "STREAMJOBS_FAULT": "after_take"}) == Settings()


def test_later_sources_win(tmp_path: Path):
    """The one value typed on the command line would lose to a forgotten file."""
    file = tmp_path / "settings.yaml"
    file.write_text("lease: 5\nconcurrency: 7\nport: 1\n")
    env = {"STREAMJOBS_LEASE": "6", "STREAMJOBS_CONCURRENCY": "8"}
    settings = load_settings(env=env, file=file, lease="9.5", host=None)
    assert (settings.lease, settings.concurrency, settings.port) == (9.5, 8, 1)
    assert settings.host == Settings().host


@pytest.mark.parametrize(
    "text",
    ['{"lease": 5, "queues": ["a", "b"]}', "lease: 5\nqueues: [a, b]\n", "lease: '5'\nqueues:\n- a\n- b\n"],
)
def test_files_are_yaml_or_json(tmp_path: Path, text: str):
    """A configuration made by a tool, as JSON, could not be used."""
    file = tmp_path / "settings"
    file.write_text(text)
    settings = load_settings(env={}, file=file)
    assert (settings.lease, settings.queues) == (5.0, ("a", "b"))


def test_an_empty_file_says_nothing(tmp_path: Path):
    """Commenting out the last line of a file would break the start."""
    file = tmp_path / "settings.yaml"
    file.write_text("# nothing\n")
    assert load_settings(env={}, file=file) == Settings()


@pytest.mark.parametrize(
    "content",
    [b"- a\n- b\n", b"just words", b"a: [", b"\xff\xfe", b"!!python/object:os.system {}", b"lese: 1"],
)
def test_a_file_that_is_none_is_refused(tmp_path: Path, content: bytes):
    """A traceback of a YAML parser, or worse, code run from a settings file."""
    file = tmp_path / "settings.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError):
        load_settings(env={}, file=file)
    with pytest.raises(ConfigError, match="nowhere"):
        load_settings(env={}, file=tmp_path / "nowhere.yaml")


def test_lists_come_from_variables():
    """Queues could be declared in files only."""
    settings = load_settings(
        env={
            "STREAMJOBS_QUEUES": "default, bulk,,slow ",
            "STREAMJOBS_PRIORITY_WEIGHTS": "1,2,3",
            "STREAMJOBS_TOOL_PROCESS_ENV": "PATH,HOME",
        }
    )
    assert settings.tool_process_env == ("PATH", "HOME")
    assert settings.queues == ("default", "bulk", "slow")
    assert settings.priority_weights == (1, 2, 3)


def test_keys_are_read_from_where_everybody_has_them():
    """The demo would not find the key that is already in the shell; ours wins where both are set."""
    env = {"OPENAI_API_KEY": "theirs", "ANTHROPIC_API_KEY": "a", "STREAMJOBS_OPENAI_API_KEY": "ours"}
    settings = load_settings(env=env)
    assert (settings.openai_api_key, settings.anthropic_api_key) == ("ours", "a")


@pytest.mark.parametrize("name", sorted(set(SECRETS) - {"provider_keys"}))
def test_a_secret_may_be_named_instead_of_written(tmp_path: Path, name: str):
    """Keys would stand in manifests, in repositories, and in command lines that every user sees."""
    file = tmp_path / "key"
    file.write_text("from-the-file\n")
    env = {"KEY": "from-the-variable", f"STREAMJOBS_{name.upper()}": "env:KEY"}
    changes = {"notify_from": "jobs@example.org"}
    by_env = load_settings(env=env | {"KEY": f"smtp://{env['KEY']}"}, **changes)
    assert as_one(getattr(by_env, name)) == "smtp://from-the-variable"
    file.write_text("smtp://from-the-file\r\n")
    by_file = load_settings(env={}, **changes, **{name: from_text(name, f"file:{file}")})
    assert as_one(getattr(by_file, name)) == "smtp://from-the-file"


def test_keys_of_tenants(tmp_path: Path):
    """One customer's requests would be on another one's bill; or their keys stand in a manifest."""
    (tmp_path / "key").write_text("sk-file\n")
    text = f"acme/openai=env:ACME,acme/anthropic=sk-written,globex/openai=file:{tmp_path}/key"
    settings = load_settings(env={"ACME": "sk-variable", "STREAMJOBS_PROVIDER_KEYS": text})
    assert tenant_keys(settings) == {
        ("acme", "openai"): "sk-variable",
        ("acme", "anthropic"): "sk-written",
        ("globex", "openai"): "sk-file",
    }
    assert secrets_of(settings) == ["sk-variable", "sk-written", "sk-file"]
    for wrong in ("sk-canary", "acme=sk-canary", "acme/other=sk-canary", "/openai=sk-canary", "acme/openai="):
        with pytest.raises(ConfigError, match="provider_keys") as caught:
            load_settings(env={"STREAMJOBS_PROVIDER_KEYS": wrong})
        assert "canary" not in "".join(traceback.format_exception(caught.value))


def as_one(value: str | tuple[str, ...]) -> str:
    """A setting, or the only one of a list."""
    return value if isinstance(value, str) else ",".join(value)


def test_a_key_from_where_everybody_has_it_may_be_a_reference_too(tmp_path: Path):
    """One of two ways to give the same key would send `file:/run/…` to the provider, as the key."""
    (tmp_path / "key").write_text("sk-1")
    assert load_settings(env={"OPENAI_API_KEY": f"file:{tmp_path}/key"}).openai_api_key == "sk-1"


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("env:NOWHERE", "there is no variable NOWHERE"),
        ("file:/nowhere/key", "/nowhere/key: No such file"),
        ("file:/", "/: Is a directory"),
    ],
)
def test_a_reference_to_nothing_is_told(reference: str, said: str):
    """The reference itself would be used as the key, and refused much later, by somebody else."""
    with pytest.raises(ConfigError, match=f"setting 'openai_api_key': {said}"):
        load_settings(env={}, openai_api_key=reference)


def test_other_settings_are_what_they_say():
    """`file:///var/jobs` is an archive's address, not what the file there holds."""
    settings = load_settings(env={}, archive_url="file:///var/jobs", default_model="env:HOME")
    assert (settings.archive_url, settings.default_model) == ("file:///var/jobs", "env:HOME")


def test_settings_do_not_say_what_they_are():
    """A failed assertion, a dump or a debugger's log would hold every key."""
    settings = Settings(openai_api_key="sk-canary", redis_url="redis://u:canary@h")
    assert "canary" not in f"{settings!r} {settings} {[settings]} {(settings,)!s}"


def test_every_secret_of_the_settings_is_known():
    """Logs hide the values that they know of."""
    settings = Settings(
        redis_url="redis://u:p%40ss@h", redis_password="r", openai_api_key="o", smtp_url="smtps://u:m@h:465"
    )
    assert sorted(secrets_of(settings)) == ["m", "o", "p@ss", "r"]
    assert secrets_of(Settings(redis_url="redis://u:canary[@h")) == ["redis://u:canary[@h"]


def test_a_list_of_secrets_may_have_references(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Keys that are rotated come in lists: their references would be taken for keys."""
    monkeypatch.setattr(config, "SECRETS", ("queues",))
    (tmp_path / "a").write_text("one\n")
    settings = load_settings(env={"B": "two", "STREAMJOBS_QUEUES": f"file:{tmp_path}/a,env:B,three"})
    assert settings.queues == ("one", "two", "three")
    assert secrets_of(settings) == ["one", "two", "three"]


@pytest.mark.parametrize(
    "content",
    ["openai_api_key: 'sk-canary\n", "a: [\nopenai_api_key: sk-canary: x", b"sk-canary: \xff", "sk-canary"],
)
def test_a_file_that_does_not_parse_is_not_quoted(tmp_path: Path, content: str | bytes):
    """A missing quote would print the key beside it, into the log of the orchestrator."""
    file = tmp_path / "settings.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError) as caught:
        load_settings(env={}, file=file)
    assert "canary" not in "".join(traceback.format_exception(caught.value))
    assert "settings.yaml" in str(caught.value)


@pytest.mark.parametrize("name", SECRETS)
def test_what_is_wrong_with_a_secret_is_told_without_it(tmp_path: Path, name: str):
    """A key in the wrong form, a list for a word, would be in the error that says so."""
    file = tmp_path / "settings.yaml"
    file.write_text(f"{name}: {{sk-canary: [sk-canary]}}\n")
    with pytest.raises(ConfigError) as caught:
        load_settings(env={}, file=file)
    assert "canary" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lease", "soon"),
        ("lease", "0"),
        ("lease", "-1"),
        ("lease", "nan"),
        ("lease", "inf"),
        ("lease", ""),
        ("concurrency", "0"),
        ("concurrency", "1.5"),
        ("concurrency", "many"),
        ("partitions", "0"),
        ("partitions", "100000"),
        ("max_attempts", "0"),
        ("port", "70000"),
        ("port", "-1"),
        ("queues", ""),
        ("queues", "a b"),
        ("queues", "a|b"),
        ("queues", "a:b"),
        ("queues", "a*"),
        ("priority_weights", "1,2"),
        ("priority_weights", "0,0,0"),
        ("priority_weights", "1,2,-3"),
        ("priority_weights", "a,b,c"),
        ("provider", "opneai"),
        ("owner_limit", "-1"),
        ("drain_grace", "-0.5"),
        ("send_timeout", "0"),
        ("redis_timeout", "1e400"),
        ("page_events", "0"),
        ("retention", "0"),
        ("tool_processes", "0"),
        ("tool_process_memory", "0"),
    ],
)
def test_a_bad_value_names_its_setting(name: str, value: str):
    """An error deep inside a worker, or a worker that spins, instead of one line at the start."""
    with pytest.raises(ConfigError, match=f"^setting '{name}"):
        load_settings(env={f"STREAMJOBS_{name.upper()}": value})


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("STREAMJOBS_SERVICE_HOST", "10.0.0.7"),
        ("STREAMJOBS_SERVICE_PORT", "8400"),
        ("STREAMJOBS_SERVICE_PORT_HTTP", "8400"),
        ("STREAMJOBS_PORT", "tcp://10.0.0.7:8400"),
        ("STREAMJOBS_PORT_8400_TCP", "tcp://10.0.0.7:8400"),
        ("STREAMJOBS_PORT_8400_TCP_ADDR", "10.0.0.7"),
        ("STREAMJOBS_GATEWAY_SERVICE_HOST", "10.0.0.7"),
        ("STREAMJOBS_GATEWAY_PORT_8400_TCP_PROTO", "tcp"),
    ],
)
def test_variables_that_kubernetes_injects_are_explained(variable: str, value: str):
    """A Service named streamjobs would stop every pod with `unknown setting 'service_host'`, and nobody
    knows from where."""
    with pytest.raises(ConfigError, match=rf"{variable} .*enableServiceLinks: false"):
        load_settings(env={variable: value})


def test_settings_are_frozen():
    """One role could change what another one in the same process was promised."""
    with pytest.raises(AttributeError):
        Settings().lease = 3.0  # pyright: ignore[reportAttributeAccessIssue]
