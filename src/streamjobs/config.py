"""Settings: one frozen struct, read once, strict, and kind about typos.

Rule 1: what an error says of a setting never quotes a value: it may be a secret, or the one beside it.
Rule 2: a secret may be named instead, `env:NAME` or `file:/path`; it is read here, once.

Sources, later ones win: the defaults here, a YAML or JSON file, environment variables
(`STREAMJOBS_<NAME>`, upper case), command line options. Durations are float seconds, sizes bytes.
"""

from __future__ import annotations

import difflib
import functools
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import msgspec
import yaml

from streamjobs.errors import ConfigError
from streamjobs.retention import parse_policies

PREFIX = "STREAMJOBS_"
_FROM_KUBERNETES = re.compile(r"(.*_)?(SERVICE_(HOST|PORT(_.*)?)|PORT_\d+_(TCP|UDP|SCTP)(_.*)?)", re.ASCII)
_LINK = re.compile(r"(tcp|udp|sctp)://", re.ASCII)
_QUEUE = re.compile(r"[A-Za-z0-9._-]{1,64}", re.ASCII)
_MAX_PARTITIONS = 9999
_MAX_PORT = 65535
_MAX_WATCHED = 64
_MAX_JSON_DEPTH = 100
_FOREVER = 10 * 365 * 86400.0
_OTHER_VARIABLES = frozenset(
    {
        "STREAMJOBS_URL",
        "STREAMJOBS_TOKEN",
        "STREAMJOBS_FAULT",
        "STREAMJOBS_TEST_REDIS",
        "STREAMJOBS_SERVE_SLOT",
    }
)
"""Ours, but no settings: the gateway of the client commands and the credential for it, an armed fault point,
the tests' server, and which of the processes of one port this is."""


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Every setting, its default, and what it means."""

    # --- Redis
    redis_url: str = ""
    """Where Redis is; empty: an embedded one is started (`streamjobs dev` and `demo` only)."""
    redis_password: str = ""
    """The password, where `redis_url` has none: `redis://streamjobs@redis:6379`."""
    redis_tls_ca: str = ""
    """With `rediss://`: a file of the certificates that may vouch for Redis's, beside the system's."""
    redis_tls_cert: str = ""
    """With `rediss://`: a file with our own certificate, for a Redis that asks for one."""
    redis_tls_key: str = ""
    """The file of its private key; empty: it is in the same file."""
    data_dir: str = ".streamjobs"
    """Folder of the embedded Redis."""
    partitions: int = 1
    """Units of atomicity, fixed when a store is created: 1 for one Redis, two per primary for a cluster."""
    redis_timeout: float = 2.0
    """How long a command may take; connections in use are waited for as long."""
    redis_connect_timeout: float = 1.0
    """How long connecting to Redis may take."""
    redis_max_connections: int = 64
    """Connections of one process for reading and writing; loops that block have their own."""

    # --- jobs
    queues: tuple[str, ...] = ("default",)
    """The declared queues; a submission to another one is refused. As text: separated by commas."""
    retention: float = 7 * 86400.0
    """How long an ended job is kept that no policy names, where its history is not sealed."""
    retention_sealed: float = 30 * 86400.0
    """The same where the projections `snapshot` and `retention` run: what is sealed takes little room."""
    retention_policies: tuple[str, ...] = ()
    """By kind and outcome, the first that fits: `chat:failed=90d,*:completed=12h`. As text: with commas."""
    idempotency_ttl: float = 86400.0
    """An Idempotency-Key is remembered this long, or for the job's life if that is longer."""
    owner_limit: int = 50
    """Jobs of one owner that run at once; 0: no limit."""
    owner_rate: int = 0
    """Submissions of one owner a minute; those over it wait their turn (`held: owner_limit`). 0: no limit."""
    owner_waiting: int = 100_000
    """Jobs of one owner that may wait: queued, held or delayed; children are never refused. 0: no limit."""
    max_depth: int = 8
    """How deep children may have children."""
    max_children: int = 1000
    """Children that one job may have."""
    dead_cap: int = 100_000
    """Failed jobs that the dead list names; the oldest leave it first."""
    job_timeout: float = 3600.0
    """From first start to end; 0: no limit. A submission may ask for less or more."""
    max_attempts: int = 3
    """How often a failing job is tried. A submission, and a workflow, may say otherwise."""
    max_crashes: int = 3
    """Workers a job may bring down in a row before it is `failed: poisoned`."""
    max_events: int = 200_000
    """Events that one job's log may hold; the terminal one is exempt."""
    max_bytes: int = 64 * 1024 * 1024
    """Bytes that one job's log may hold; the terminal event is exempt."""
    max_event_bytes: int = 1024 * 1024
    """The most that one event may hold."""
    inline_output: int = 64 * 1024
    """A step's output or a job's result over this many bytes is kept as an artifact."""
    max_artifact: int = 16 * 1024 * 1024
    """The most that one artifact may hold."""
    max_artifacts: int = 64 * 1024 * 1024
    """The most that all artifacts of a job may hold."""
    retry_base: float = 1.0
    """The delay before the second attempt of a job or a turn; it doubles with each."""
    retry_cap: float = 300.0
    """The longest delay between attempts of a job."""
    crash_base: float = 1.0
    """The delay after the second crash in a row, none after the first; it doubles with each."""
    crash_cap: float = 60.0
    """The longest delay after a crash."""

    # --- feeds
    feed_cap: int = 200_000
    """Notes for projections that are kept; a projection that falls further behind rebuilds from the logs."""
    feed_bytes: int = 4096
    """Bytes of deltas of one job after which projections are told of them."""
    owner_feed_cap: int = 10_000
    """Events that an owner's own feed keeps."""
    owner_feed_ttl: float = 7 * 86400.0
    """How long an owner's feed is kept after its last event."""
    owner_feed_bytes: int = 2048
    """Contents over this size are left out of the owner's feed; they are in the job's log."""

    # --- views and sealed history
    view_text: int = 1024 * 1024
    """Characters of text, and of reasoning, that a view shows; the newest, the log has all."""
    view_log_lines: int = 1000
    """Log lines that a view shows."""
    view_steps: int = 1000
    """Steps that a view shows, and tool calls, turns, artifacts, approvals and children."""
    view_output: int = 64 * 1024
    """Bytes of one step's or tool's output that a view shows."""
    seal_events: int = 500
    """A live job's log is sealed when more than this many of its events are not."""
    seal_bytes: int = 64 * 1024
    """Or when more than this many bytes of its events are not; and more than a quarter of its snapshot."""
    snapshot_min_events: int = 2000
    """Logs up to this many events have no stored snapshot; they are folded when somebody asks."""

    # --- projections
    projections: tuple[str, ...] = ("snapshot", "index", "stats", "notify", "retention")
    """Those that a projector runs (also within `dev` and `demo`). As text: separated by commas."""
    projector_concurrency: int = 16
    """Jobs that one projector folds at once."""

    # --- archive
    archive_url: str = ""
    """Ended jobs are kept there as files, for good: a folder, or an address of fsspec's; empty: nowhere."""
    archive_timeout: float = 30.0
    """How long one step of reading or writing a file may take there."""

    # --- encryption
    encryption_keys: tuple[str, ...] = ()
    """Master keys, each `name:base64` of 32 bytes: the first wraps the data keys of new jobs, all unwrap.
    With one, what jobs are given and make is encrypted. As text: separated by commas."""
    encryption_keys_file: str = ""
    """A file with more of them, one a line, behind those of `encryption_keys`."""
    encryption_new_jobs: bool = True
    """Whether jobs get data keys that have none; false while keys are rolled out, or to stop encrypting."""
    encryption_cache: int = 10_000
    """Data keys that a process keeps unwrapped."""
    encryption_cache_ttl: float = 60.0
    """After this long a process that writes asks again for a job's data key."""

    # --- worker
    concurrency: int = 400
    """Jobs that one worker process runs at once."""
    priority_weights: tuple[int, int, int] = (8, 4, 1)
    """Shares of takes that begin with high, default and low. As text: separated by commas."""
    lease: float = 15.0
    """A worker that is silent this long loses its jobs."""
    sweep_interval: float = 1.0
    """How often each process looks for what is due: expired leases, timers, held jobs."""
    take_block: float = 1.0
    """How long an idle worker blocks on Redis in one call."""
    drain_grace: float = 20.0
    """How long a draining worker lets jobs run on before it hands them back."""
    cancel_timeout: float = 10.0
    """Code that ignores its cancellation this long is left behind; its job goes on without it."""
    park_after: float = 2.0
    """A job that only waits (for a timer, a signal, children) gives its slot up after this long."""
    replay_timeout: float = 5.0
    """How long a workflow may take to ask again for what its log holds before it counts as changed."""
    coalesce_interval: float = 0.02
    """Deltas of a job are written at most this often; the first one at once."""
    coalesce_bytes: int = 1024
    """This many bytes of deltas are written without waiting for the interval."""
    recorder_bytes: int = 256 * 1024
    """What one job may have waiting for Redis before reading from its provider stops."""
    inline_bytes: int = 16 * 1024
    """A `job.queued` up to this size travels in the ticket: the worker need not read the log."""
    worker_ttl: float = 30.0
    """A worker not heard of for this long is no longer listed."""

    # --- chat and tools
    default_model: str = ""
    """The model of chats that name none."""
    max_rounds: int = 10
    """Model calls in one chat."""
    max_tool_calls: int = 16
    """Tool calls in one round; more are answered with an error that the model sees."""
    tool_timeout: float = 10.0
    """How long a tool may run that does not say otherwise."""
    max_tool_output: int = 64 * 1024
    """Bytes of a tool's output that the model sees; the rest is cut, and it is told so."""
    files_root: str = ""
    """The folder that `read_file` and `list_files` may see; empty: they are not offered."""

    # --- isolated tools
    isolated_tools: tuple[str, ...] = ()
    """Tools that run in a process of their own beside those declared so; `*`: all. As text: with commas."""
    tool_processes: int = 8
    """Isolated calls that one worker runs at once; others wait for their turn."""
    tool_process_memory: int = 512 * 1024 * 1024
    """Address space that an isolated tool's process may take, beyond what its imports have."""
    tool_process_file: int = 64 * 1024 * 1024
    """The largest file that it may write."""
    tool_process_files: int = 256
    """Files and connections that it may have open."""
    tool_process_output: int = 4 * 1024 * 1024
    """Bytes that it may send in all, progress included; one that sends more is killed."""
    tool_process_env: tuple[str, ...] = ("PATH", "LANG", "LC_ALL", "TZ", "SSL_CERT_FILE", "SSL_CERT_DIR")
    """The variables of the worker's environment that it sees. As text: with commas."""
    tool_process_start_timeout: float = 30.0
    """How long its start may take, where the modules of isolated tools must be imported first."""
    # --- requests of tools
    fetch_timeout: float = 20.0
    """How long one request of a tool's `context.http` may take in all, redirects included."""
    fetch_max_bytes: int = 4 * 1024 * 1024
    """The largest answer to one; a larger one is an error."""
    fetch_max_redirects: int = 5
    """How often one may be sent on; each place is checked as the first one was."""
    fetch_http: bool = False
    """Whether they may be `http://`: for tests and networks of your own."""
    fetch_allow: tuple[str, ...] = ()
    """Hosts, and networks as 10.1.0.0/16, that they may reach though they are not public."""

    # --- providers
    provider: str = ""
    """`openai` or `anthropic`, for models named without one; empty: whichever has a key."""
    openai_base_url: str = "https://api.openai.com/v1"
    """Where the OpenAI-compatible API is."""
    openai_api_key: str = ""
    """Its key; also read from `OPENAI_API_KEY`."""
    anthropic_base_url: str = "https://api.anthropic.com"
    """Where Anthropic's API is."""
    anthropic_api_key: str = ""
    """Its key; also read from `ANTHROPIC_API_KEY`."""
    provider_keys: tuple[str, ...] = ()
    """Keys of single tenants, in place of the common one: `acme/openai=env:ACME_KEY`, or the key itself.
    As text: with commas."""
    provider_connect_timeout: float = 10.0
    """How long connecting to a provider may take."""
    provider_first_byte_timeout: float = 60.0
    """How long a provider may think before its answer begins."""
    provider_idle_timeout: float = 60.0
    """How long it may pause within an answer."""
    provider_total_timeout: float = 900.0
    """How long one answer may take in all."""
    provider_attempts: int = 4
    """Tries of one turn's request while nothing of its answer has been seen."""
    provider_max_retry_after: float = 60.0
    """The longest wait between tries of a request, whatever the provider asks for."""
    provider_connections: int = 1000
    """Connections to providers that one worker holds at most."""
    provider_max_bytes: int = 16 * 1024 * 1024
    """The most that is read of one response."""

    # --- gateway
    host: str = "127.0.0.1"
    """The address that the gateway listens on."""
    port: int = 8400
    """Its port."""
    ops_port: int = 0
    """Probes and metrics on a port of their own; 0: on the API's port."""
    serve_workers: int = 1
    """Gateway processes that share the ports (`streamjobs serve` only; also `--workers`)."""
    serve_hang_timeout: float = 30.0
    """One of several gateway processes whose event loop stands still this long is replaced; 0: never."""
    serve_restart_cap: float = 5.0
    """The longest pause before a gateway process is replaced that ended soon; a first time there is none."""
    max_body: int = 1024 * 1024
    """The largest request body, in bytes."""
    max_json_items: int = 100_000
    """Values (elements and members) that the JSON of a request's body may have."""
    max_json_depth: int = 100
    """How deep it may nest, at most 100."""
    max_input: int = 512 * 1024
    """Bytes of a job's input, as JSON."""
    max_metadata: int = 16 * 1024
    """Bytes of a job's metadata, as JSON."""
    max_prompt: int = 256 * 1024
    """Bytes of a chat's prompt, or of all its messages."""
    max_messages: int = 1000
    """Messages of a chat's input."""
    max_signal: int = 256 * 1024
    """Bytes of a signal's payload, as JSON."""
    owner_streams: int = 20_000
    """Streams and WebSockets that one owner may hold open in one process; 0: no limit."""
    max_wait: float = 60.0
    """The most that `Prefer: wait` or `?wait=` may ask for."""
    flush_interval: float = 0.04
    """New events of a job reach its viewers at most this often; after a pause at once."""
    flush_max: float = 5.0
    """The most that a viewer may ask for between two writes to it."""
    watch_limit: int = 16
    """Jobs that one stream of an owner's events may watch in full, at most 64."""
    ring_bytes: int = 256 * 1024
    """Bytes of a watched job's newest frames that are kept in memory for its viewers."""
    heartbeat_interval: float = 15.0
    """A silent stream gets a comment line this often."""
    send_timeout: float = 30.0
    """A viewer that accepts nothing for this long is closed; it may resume."""
    send_buffer: int = 64 * 1024
    """Bytes that the kernel may hold for one viewer's socket."""
    unacknowledged_timeout: float = 15.0
    """How long the other end may acknowledge nothing, or take nothing, until the kernel breaks the connection
    (Linux). A link that died while a stream was silent shows this long after the next heartbeat."""
    max_head: int = 64 * 1024
    """Bytes that the head of a request may hold, about."""
    max_headers: int = 100
    """Headers that a request may have."""
    max_url: int = 8 * 1024
    """Bytes that a request's URL may hold."""
    head_timeout: float = 15.0
    """How long the head of a request may take, from connecting or from its first byte."""
    body_timeout: float = 30.0
    """How long the body of a request may take."""
    position_interval: float = 5.0
    """How often positions of watched jobs are compared with the log: pub/sub may lose."""
    max_connection_age: float = 1800.0
    """A stream is handed over after about this long, so that load moves to new gateways."""
    ws_subscriptions: int = 64
    """Jobs that one WebSocket may be subscribed to at once."""
    ws_max_message: int = 4096
    """Bytes of one message from a WebSocket's client."""
    ws_message_rate: int = 20
    """Messages a second that a WebSocket's client may send, after a burst of `ws_subscriptions` more."""
    ws_idle_timeout: float = 60.0
    """A WebSocket without subscriptions is closed when its client has said nothing for this long."""
    ws_pong_timeout: float = 10.0
    """A WebSocket's client that leaves a ping (one each silent `heartbeat_interval`) unanswered is gone."""
    ready_timeout: float = 0.0
    """`/readyz` turns false when Redis has been away this long; 0: an outage does not take gateways out."""
    page_events: int = 500
    """Events in one page of a log, at most 500."""
    page_bytes: int = 256 * 1024
    """Bytes in one page of a log, about."""

    # --- who asks
    auth: tuple[str, ...] = ()
    """How the gateway knows who asks, in this order: `keys`, `jwt`, `proxy`, `module:function`; as text with
    commas. Empty: everybody may do everything, and only this machine can reach it; `open`: anybody can."""
    auth_cookie: str = ""
    """A cookie that may carry the credential, for pages of our own origin; empty: none."""
    auth_cache: float = 5.0
    """How long a gateway believes what it read of an API key: a revoked one works on for this long."""
    cors_origins: tuple[str, ...] = ()
    """Origins whose pages may use the API, such as `https://app.example`. As text: with commas."""
    jwt_secrets: tuple[str, ...] = ()
    """Shared secrets for HS256; with two, one can be replaced. As text: with commas."""
    jwt_jwks_url: str = ""
    """Where the public keys for RS256 and ES256 are."""
    jwt_jwks_ttl: float = 300.0
    """How long they are used before they are fetched again."""
    jwt_issuer: str = ""
    """What a token's `iss` must be; empty: anything. Needed with `jwt_jwks_url`."""
    jwt_audience: str = ""
    """What a token's `aud` must hold; empty: anything. Needed with `jwt_jwks_url`."""
    jwt_leeway: float = 30.0
    """How far the issuer's clock may be from ours."""
    jwt_tenant_claim: str = "tenant"
    """The claim that names the tenant; who has none is of the tenant `default`."""
    jwt_scope_claim: str = "scope"
    """The claim that names scopes; who has none may read and write his own jobs."""
    token_keys: tuple[str, ...] = ()
    """What stream tokens are signed with, as `name:secret`; the first signs, all verify.
    Empty: Redis keeps one."""
    token_ttl: float = 300.0
    """How long a stream token is good for; a stream that was opened with one is sent the next in time."""
    token_max_age: float = 12 * 3600.0
    """How long that goes on, until a real credential is needed again."""
    access_log: bool = False
    """Whether each request is logged: its route's template, never its path or query."""

    # --- notifications
    notice_cap: int = 1000
    """Notices that an owner's feed keeps; the oldest leave it first."""
    notice_ttl: float = 30 * 86400.0
    """How long a notice is kept."""
    public_url: str = ""
    """Where people reach the gateway, for the links in webhooks and mail; empty: links are paths."""
    webhook_timeout: float = 10.0
    """How long one try of a delivery may take, connecting included."""
    webhook_connections: int = 20
    """Deliveries that one process has under way at once."""
    webhook_grace: float = 86400.0
    """How long the secret before stays good after a rotation."""
    webhook_http: bool = False
    """Whether a webhook may be `http://`: for tests and networks of your own."""
    webhook_allow: tuple[str, ...] = ()
    """Hosts, and networks as 10.1.0.0/16, that webhooks may reach though they are not public."""
    smtp_url: str = ""
    """`smtp://` (STARTTLS where it is offered) or `smtps://`, `user:password@host:port`; empty: no mail."""
    notify_from: str = ""
    """The sender's address of mail."""

    # --- logs
    log_level: str = "info"
    """`debug`, `info`, `warning`, `error` or `critical`."""
    log_format: str = "auto"
    """`json`, `console`, or `auto`: console on a terminal."""

    def __repr__(self) -> str:
        """Say nothing of what they are: among them are secrets, and tracebacks show what is near."""
        return f"<{type(self).__name__}>"


FIELDS = Settings.__struct_fields__
SECRETS = (
    "redis_url", "redis_password", "openai_api_key", "anthropic_api_key", "smtp_url",
    "jwt_secrets", "token_keys", "encryption_keys", "provider_keys",
)  # fmt: skip
"""Settings that are secrets, or hold one. They may be references."""


def secrets_of(settings: Settings) -> list[str]:
    """Every secret in these settings; of an address its password."""
    found: list[str] = []
    for name in SECRETS:
        value: str | tuple[str, ...] = getattr(settings, name)
        named = _NAMED_SECRETS.get(name, "")
        found.extend(_secret_in(text, named) for text in ((value,) if isinstance(value, str) else value))
    return [secret for secret in found if secret]


_NAMED_SECRETS = {"token_keys": ":", "encryption_keys": ":", "provider_keys": "="}
"""Lists whose members have a name, and what is between that and the secret."""


@functools.lru_cache(maxsize=8)
def without_secrets(settings: Settings) -> Settings:
    """The same settings, their secrets as if they were not set."""
    defaults = Settings()
    return msgspec.structs.replace(settings, **{name: getattr(defaults, name) for name in SECRETS})


def _secret_in(value: str, named: str) -> str:
    if named:
        return value.partition(named)[2]
    try:
        return unquote(urlsplit(value).password or "") if "://" in value else value
    except ValueError:  # no address; who uses it will say so
        return value


def load_settings(
    env: Mapping[str, str] | None = None, file: Path | None = None, **overrides: Any
) -> Settings:
    """Read settings from `file`, then `env` (by default the process's own), then `overrides` but None.

    Raises `ConfigError` that names the setting, and the one that was probably meant.
    """
    values: dict[str, Any] = {}
    if file is not None:
        values |= _from_file(file)
    env = os.environ if env is None else env
    values |= _from_env(env)
    values |= {name: value for name, value in overrides.items() if value is not None}
    for name in values:
        _require_known(name)
    values |= {name: _fetched(name, values[name], env) for name in SECRETS if name in values}
    try:
        settings = msgspec.convert(values, Settings, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(f"setting {_path_of(error)}") from error
    _check(settings)
    return settings


def _from_file(file: Path) -> dict[str, Any]:
    try:
        loaded = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        mark = error.problem_mark if isinstance(error, yaml.MarkedYAMLError) else None
        where = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"settings file {file}{where}: neither YAML nor JSON") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"settings file {file}: {getattr(error, 'strerror', 'no UTF-8')}") from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ConfigError(f"settings file {file}: expected names and values")
    return {str(name): value for name, value in loaded.items()}  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]


def _from_env(env: Mapping[str, str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for variable, text in env.items():
        if variable.startswith(PREFIX) and variable not in _OTHER_VARIABLES:
            _refuse_links(variable, text)
            name = variable[len(PREFIX) :].lower()
            values[name] = from_text(name, text)
    for name in ("openai_api_key", "anthropic_api_key"):
        if name not in values and env.get(name.upper()):
            values[name] = env[name.upper()]
    return values


def _fetched(name: str, value: Any, env: Mapping[str, str]) -> Any:
    """What a reference refers to, or each of a list; any other value as it is."""
    if isinstance(value, list | tuple):
        return [_fetched(name, one, env) for one in value]  # pyright: ignore[reportUnknownVariableType]
    if name == "provider_keys" and isinstance(value, str) and "=" in value:
        whose, _, key = value.partition("=")
        return f"{whose}={_fetched('', key, env)}"
    kind, _, where = value.partition(":") if isinstance(value, str) else ("", "", "")
    if kind == "env":
        if where not in env:
            raise ConfigError(f"setting {name!r}: there is no variable {where}")
        return env[where]
    if kind != "file":
        return value
    try:
        return Path(where).read_text(encoding="utf-8").rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"setting {name!r}: {where}: {getattr(error, 'strerror', 'no UTF-8')}") from None


def _refuse_links(variable: str, text: str) -> None:
    """Kubernetes tells every pod of every service in variables; of one named streamjobs* in ours."""
    if _FROM_KUBERNETES.fullmatch(variable.removeprefix(PREFIX)) or _LINK.match(text):
        raise ConfigError(
            f"{variable} comes from Kubernetes, for a Service named like us: "
            "set enableServiceLinks: false in the pod's spec"
        )


_LISTS = frozenset(
    {"queues", "priority_weights", "projections", "retention_policies", "webhook_allow", "fetch_allow"}
    | {"isolated_tools", "tool_process_env", "auth", "cors_origins", "jwt_secrets", "token_keys"}
    | {"encryption_keys", "provider_keys"}
)


def from_text(name: str, text: str) -> str | list[str]:
    """A setting's text as `load_settings` takes it: split at commas where the setting is a list."""
    if name not in _LISTS:
        return text
    return [part.strip() for part in text.split(",") if part.strip()]


def _require_known(name: str) -> None:
    if name in FIELDS:
        return
    close = difflib.get_close_matches(name, FIELDS, n=1)
    raise ConfigError(f"unknown setting {name!r}" + (f", did you mean {close[0]!r}?" if close else ""))


def _path_of(error: msgspec.ValidationError) -> str:
    message, _, path = str(error).partition(" - at `$.")
    return f"{path.rstrip('`')!r}: {message}" if path else message


def _check(settings: Settings) -> None:
    for name in FIELDS:
        value = getattr(settings, name)
        if isinstance(value, float) and not 0 <= value <= _FOREVER:
            raise ConfigError(f"setting {name!r}: seconds, from 0 to {_FOREVER:.0f}")
        if isinstance(value, int) and value < 0:
            raise ConfigError(f"setting {name!r}: must be at least 0")
    for name in _POSITIVE:
        if getattr(settings, name) <= 0:
            raise ConfigError(f"setting {name!r}: must be more than 0")
    _check_choices(settings)


_POSITIVE = (
    "lease", "sweep_interval", "take_block", "redis_timeout", "redis_connect_timeout", "worker_ttl",
    "retention", "flush_interval", "flush_max", "heartbeat_interval", "send_timeout", "position_interval",
    "max_connection_age", "watch_limit", "max_head", "max_headers", "max_url",
    "head_timeout", "body_timeout", "max_json_items", "max_json_depth", "unacknowledged_timeout",
    "redis_max_connections", "partitions", "concurrency", "max_attempts",
    "page_events",
    "ws_subscriptions", "ws_max_message", "ws_message_rate", "ws_idle_timeout", "ws_pong_timeout",
    "max_body", "max_events", "max_bytes", "max_event_bytes", "feed_cap", "owner_feed_cap", "owner_feed_ttl",
    "retention_sealed", "notice_cap", "notice_ttl", "webhook_timeout", "webhook_connections",
    "provider_attempts", "view_text", "view_log_lines", "view_steps", "view_output",
    "serve_workers", "serve_restart_cap", "fetch_timeout", "fetch_max_bytes",
    "projector_concurrency", "archive_timeout", "encryption_cache", "encryption_cache_ttl",
    "jwt_jwks_ttl", "token_ttl", "token_max_age",
    "tool_processes", "tool_process_memory", "tool_process_file", "tool_process_files", "tool_process_output",
    "tool_process_start_timeout",
)  # fmt: skip


def tenant_keys(settings: Settings) -> dict[tuple[str, str], str]:
    """The keys of `provider_keys` by tenant and provider. Raises `ConfigError`, which quotes no key."""
    keys: dict[tuple[str, str], str] = {}
    for text in settings.provider_keys:
        whose, equals, key = text.partition("=")
        tenant, slash, provider = whose.partition("/")
        if not (equals and slash and tenant and key.strip()) or provider not in {"openai", "anthropic"}:
            raise ConfigError("setting 'provider_keys': <tenant>/openai=<key> or <tenant>/anthropic=<key>")
        keys[tenant, provider] = key.strip()
    return keys


def _check_origins(settings: Settings) -> None:
    if "*" in settings.cors_origins and settings.auth_cookie:
        raise ConfigError("setting 'cors_origins': not every origin (*) where auth_cookie is taken")


def _check_choices(settings: Settings) -> None:
    if settings.partitions > _MAX_PARTITIONS:
        raise ConfigError(f"setting 'partitions': at most {_MAX_PARTITIONS}")
    if settings.max_json_depth > _MAX_JSON_DEPTH:
        raise ConfigError(f"setting 'max_json_depth': at most {_MAX_JSON_DEPTH}")
    if settings.watch_limit > _MAX_WATCHED:
        raise ConfigError(f"setting 'watch_limit': at most {_MAX_WATCHED}")
    for name in ("port", "ops_port"):
        if getattr(settings, name) > _MAX_PORT:
            raise ConfigError(f"setting {name!r}: at most {_MAX_PORT}")
    _check_origins(settings)
    tenant_keys(settings)
    if not settings.queues or not all(_QUEUE.fullmatch(queue) for queue in settings.queues):
        raise ConfigError("setting 'queues': at least one name, each 1 to 64 of letters, digits and ._-")
    if sum(settings.priority_weights) < 1 or min(settings.priority_weights) < 0:
        raise ConfigError("setting 'priority_weights': three weights of 0 or more, not all 0")
    parse_policies(settings.retention_policies)
    if len(set(settings.projections)) != len(settings.projections):
        raise ConfigError("setting 'projections': each once")
    if settings.provider not in {"", "openai", "anthropic"}:
        raise ConfigError("setting 'provider': openai or anthropic")
    if settings.smtp_url and not settings.smtp_url.startswith(("smtp://", "smtps://")):
        raise ConfigError("setting 'smtp_url': smtp://host:port or smtps://host:port")
    if settings.smtp_url and "@" not in settings.notify_from:
        raise ConfigError("setting 'notify_from': mail needs a sender's address")
