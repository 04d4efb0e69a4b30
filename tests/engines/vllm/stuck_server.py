"""A process that answers HTTP as a vLLM server does, slowly or never: python stuck_server.py MOVES ANSWERS.

Its counter of tokens grows for MOVES seconds and then stands still; a POST is answered ANSWERS seconds after the start.
POST /set/paused and /set/running, answered at once, set what /is_paused says; /set/refusing is paused as in vLLM 0.33,
where other POSTs are answered 503. Prints its port.
"""

from __future__ import annotations

import json
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

BEGUN = time.monotonic()
MOVES, ANSWERS = float(sys.argv[1]), float(sys.argv[2])
CHOICE = {
    "index": 0,
    "finish_reason": "stop",
    "token_ids": [7],
    "logprobs": {"content": [{"logprob": -0.5}]},
    "weight_versions": [{"version": "3"}],
}
STATE = {"is_paused": False, "refuses": False}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.path == "/metrics":
            tokens = int(10 * min(time.monotonic() - BEGUN, MOVES))
            self.answer(f'# HELP vllm:x\nvllm:generation_tokens_total{{engine="0"}} {tokens}\n')
        else:
            self.answer(json.dumps(STATE))

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path.startswith("/set/"):
            STATE["is_paused"] = not self.path.endswith("running")
            STATE["refuses"] = self.path.endswith("refusing")
            self.answer("null")
            return
        if STATE["refuses"]:
            self.answer("{}", 503)
            return
        time.sleep(max(0.0, ANSWERS - (time.monotonic() - BEGUN)))
        self.answer(json.dumps({"choices": [CHOICE]}))

    def answer(self, text: str, status: int = 200) -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None: ...


server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(server.server_address[1], flush=True)
server.serve_forever()
