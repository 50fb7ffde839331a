"""A stub of an OpenAI-compatible endpoint, served by this process: no model, only the protocol.

What it answers is decided by the question's last message, so that tests see every way in which a
real endpoint fails.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, dict[str, Any]]
"""Status and body."""


@dataclass
class Endpoint:
    """Where it is, and what it was asked: bodies with the key they came with."""

    base_url: str
    asked: list[dict[str, Any]] = field(default_factory=list)


def say(content: str | None, **message: Any) -> Reply:
    """A chat completion of ten tokens read and two written."""
    finish_reason = message.pop("finish_reason", "stop")
    return 200, {
        "model": "stub-2026",
        "choices": [
            {"message": {"content": content, **message}, "finish_reason": finish_reason, "index": 0}
        ],
        "usage": {"prompt_tokens": 10, "completion_tokens": 2},
    }


@contextlib.contextmanager
def serve(answer: Callable[[str, int], Reply | float]) -> Iterator[Endpoint]:
    """Serve until the end of the block.

    Args:
        answer: gives the reply to a question, from its text and the times it came before; a number
            makes the client wait that many seconds, for nothing.
    """
    lock, times = threading.Lock(), dict[str, int]()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            question = body["messages"][-1]["content"]
            with lock:
                before = times.get(question, 0)
                times[question] = before + 1
                endpoint.asked.append({**body, "key": self.headers["Authorization"]})
            reply = answer(question, before)
            if isinstance(reply, float):
                time.sleep(reply)
                self.close_connection = True
                return
            status, content = reply
            data = json.dumps(content).encode()
            self.send_response(status)
            if status == 429:
                self.send_header("Retry-After", "0")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    endpoint = Endpoint(f"http://127.0.0.1:{server.server_port}/v1")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield endpoint
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
