"""As much of the Hugging Face hub as an upload of small files needs."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self


class Hub:
    """A server that keeps what is uploaded; `refuses` makes it answer as to a wrong token."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.tokens: set[str | None] = set()
        self.made: list[tuple[str, str, str]] = []
        self.refuses = False
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                hub.tokens.add(self.headers["Authorization"])
                status, answer = (401, {}) if hub.refuses else (200, hub.answer(self.path, body))
                content = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, path: str, body: bytes) -> dict[str, Any]:
        """Return what the hub says to a request."""
        if path == "/api/repos/create":
            asked = json.loads(body)
            self.made.append((asked["organization"], asked["name"], asked["visibility"]))
            return {"url": f"{self.address}/me/digits"}
        if path.endswith("/preupload/main"):
            names = [file["path"] for file in json.loads(body)["files"]]
            files = [
                {"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names
            ]
            return {"files": files}
        for line in body.decode().splitlines():
            item = json.loads(line)
            if item["key"] == "file":
                value = item["value"]
                self.files[value["path"]] = base64.b64decode(value["content"])
        return {"commitUrl": f"{self.address}/me/digits/commit/1234", "commitOid": "1234"}
