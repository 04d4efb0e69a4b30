"""Nobody without the token gets an answer, and nobody but the user gets the token; against a running
server.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import psutil
import pytest
import urllib3

from megatron_r1.engines.vllm.server import LocalEngine
from megatron_r1.engines.vllm.sync import WeightSync

OTHER_USER = 65534

needs_root = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("setpriv") is None,
    reason="acting as another user needs root and setpriv",
)


def routes(engine: LocalEngine) -> list[tuple[str, str]]:
    """Every (method, path) that the server names: its OpenAPI description and its log of routes."""
    described = engine.client.request("GET", "/openapi.json")["paths"]
    found = {(method.upper(), path) for path, methods in described.items() for method in methods}
    for path, methods in re.findall(r"Route: (\S+), Methods: (.+)", engine.log_path.read_text()):
        found |= {(method.strip(), path) for method in methods.split(",")}
    return sorted(found)


def processes(engine: LocalEngine) -> list[psutil.Process]:
    leader = psutil.Process(engine.pid)
    return [leader, *leader.children(recursive=True)]


@pytest.mark.parametrize(
    "header",
    [{}, {"Authorization": "Bearer "}, {"Authorization": "Bearer wrong"}, {"Authorization": "TOKEN"}],
)
def test_every_route_is_refused_without_the_token(engine: LocalEngine, header: dict[str, str]) -> None:
    header = {name: value.replace("TOKEN", engine.token) for name, value in header.items()}
    every = routes(engine)
    paths = {path for _, path in every}
    assert {"/health", "/metrics", "/pause", "/update_weights", "/collective_rpc", "/v1/completions"} <= paths
    pool = urllib3.PoolManager(retries=False)
    for method, path in [*every, ("GET", "/no/such/route")]:
        answer = pool.request(method, engine.client.base_url + path.replace("{", "").replace("}", ""), headers=header)
        assert answer.status == 401, f"{method} {path} answered {answer.status}"
    assert engine.client.request("GET", "/is_paused") == {"is_paused": False}


def test_websockets_are_refused_without_the_token(engine: LocalEngine) -> None:
    headers = {
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA==",
    }
    answer = urllib3.PoolManager(retries=False).request(
        "GET", engine.client.base_url + "/v1/realtime", headers=headers, preload_content=False
    )
    assert answer.status in (401, 403)


def test_the_token_is_on_no_command_line_and_in_no_log(engine: LocalEngine) -> None:
    # process_iter's attrs: a process that ended meanwhile, or a zombie, gives None instead of an error.
    processes = [process for process in psutil.process_iter(["cmdline"]) if process.pid != os.getpid()]
    seen = [" ".join(process.info["cmdline"] or []) for process in processes]
    assert any(str(engine.port) in line for line in seen)
    assert not [line for line in seen if engine.token in line]
    assert engine.token not in engine.log_path.read_text()


@needs_root
def test_another_user_is_refused_and_cannot_read_the_secrets(engine: LocalEngine, sync: WeightSync) -> None:
    sync.push(sync.version)
    assert engine.private_dir is not None and sync.private_dir is not None
    sockets = [os.path.join(engine.private_dir.name, name) for name in os.listdir(engine.private_dir.name)]
    meetings = [os.path.join(sync.private_dir.name, name) for name in os.listdir(sync.private_dir.name)]
    assert sockets and meetings
    secrets = [f"/proc/{process.pid}/environ" for process in processes(engine)] + sockets + meetings
    script = f"""
import socket, urllib.error, urllib.request
for path in {secrets!r}:
    try:
        if path.startswith("/proc"):
            open(path, "rb").read()
        else:
            socket.socket(socket.AF_UNIX).connect(path)
        print("READ", path)
    except PermissionError:
        pass
try:
    urllib.request.urlopen("{engine.client.base_url}/weight_info")
    print("ANSWERED")
except urllib.error.HTTPError as error:
    assert error.code == 401, error
print("done")
"""
    other = ["setpriv", f"--reuid={OTHER_USER}", f"--regid={OTHER_USER}", "--clear-groups"]
    python = os.path.realpath(sys.executable)
    if subprocess.run([*other, python, "-c", ""], capture_output=True).returncode != 0:
        python = "/usr/bin/python3"
    outcome = subprocess.run([*other, python, "-I", "-c", script], capture_output=True, text=True, cwd="/")
    assert outcome.stdout.split() == ["done"], outcome.stdout + outcome.stderr


def test_nothing_listens_beyond_loopback(engine: LocalEngine, sync: WeightSync) -> None:
    sync.push(sync.version)
    listening = [
        connection
        for process in [psutil.Process(), *processes(engine)]
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN or not connection.raddr
    ]
    assert engine.port in {connection.laddr.port for connection in listening}
    assert {connection.laddr.ip for connection in listening} == {"127.0.0.1"}
