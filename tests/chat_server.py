"""A server that speaks as much of OpenAI's chat API as a judge is asked for, and judges as a test tells it to."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@contextmanager
def chat_server(reply: Callable[[str, int], str | int]) -> Iterator[tuple[str, list[dict]]]:
    """Answers a prompt with `reply(prompt, seed)`, text or an HTTP status, as the models "judge" and "other". Gives the
    API's root and the requests so far."""
    requests: list[dict] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = 65_536  # head and body in one packet: two wait for each other for 40 ms

        def do_GET(self):
            self.send(200, {"data": [{"id": "judge"}, {"id": "other"}]} if self.path == "/v1/models" else {})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append({"path": self.path, "token": self.headers.get("Authorization"), **body})
            said = reply(body["messages"][0]["content"], body["seed"])
            if isinstance(said, int):
                self.send(said, {"error": "refused"})
            else:
                self.send(200, {"choices": [{"message": {"role": "assistant", "content": said}}]})

        def send(self, status, content):
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # a client that has stopped waiting
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", requests
    finally:
        server.shutdown()
        server.server_close()
