"""nchan: nginx with its pub/sub module, from the system's packages; one process serves it all."""

from __future__ import annotations

import shutil
from pathlib import Path

MODULES = (Path("/usr/lib/nginx/modules"), Path("/usr/lib64/nginx/modules"), Path("/usr/local/libexec/nginx"))
MODULE = "ngx_nchan_module.so"

CONFIG = """
load_module {module};
daemon off;
master_process off;
worker_rlimit_nofile 200000;
pid {folder}/pid;
error_log stderr warn;
events {{ worker_connections 30000; }}
http {{
  access_log off;
  client_body_temp_path {folder}; proxy_temp_path {folder}; fastcgi_temp_path {folder};
  uwsgi_temp_path {folder}; scgi_temp_path {folder};
  nchan_max_reserved_memory 256M;
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    keepalive_requests 10000000;
    location = /pub {{ nchan_publisher; nchan_channel_id $arg_id; nchan_message_buffer_length 2000; }}
    location = /sub {{ nchan_subscriber eventsource; nchan_channel_id $arg_id;
                      nchan_subscriber_first_message newest; nchan_eventsource_ping_interval 15; }}
  }}
}}
"""


def missing() -> str | None:
    """Why it cannot run, or None."""
    if find_nginx() is None:
        return "no nginx on the machine (Debian: nginx, libnginx-mod-nchan)"
    return None if _module() is not None else "nginx has no nchan module (Debian: libnginx-mod-nchan)"


def find_nginx() -> str | None:
    return shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")


def _module() -> Path | None:
    return next((folder / MODULE for folder in MODULES if (folder / MODULE).exists()), None)


def command(folder: Path, port: int) -> list[str]:
    """The child that is one nginx; its files are in `folder`."""
    nginx, module = find_nginx(), _module()
    assert nginx is not None and module is not None, "missing() has found them"
    config = folder / "nginx.conf"
    config.write_text(CONFIG.format(module=module, folder=folder, port=port), encoding="utf-8")
    return [nginx, "-p", str(folder), "-c", str(config)]
