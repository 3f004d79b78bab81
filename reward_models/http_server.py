"""A server for `http` (see http_scorer.py), over any reward of the table: python -m diffalign.reward_models.http_server NAME [--port 8111].

It listens on this machine alone unless told otherwise, scores one request at a time, and answers item by item: one broken picture costs one
score. Meant for a reward on another graphics card or in another environment, not for the open internet.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import logging
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import torch
from PIL import Image

from diffalign import reward_models

logger = logging.getLogger(__name__)

MOST_BYTES = 1 << 28  # of a request


def serve(score: Callable[[torch.Tensor, list[str]], torch.Tensor], host: str = "127.0.0.1", port: int = 0) -> ThreadingHTTPServer:
    """A server that answers once `serve_forever` is called; port 0 takes a free one. score: (images "1 3 h w", [prompt]) -> "1"."""
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            try:
                items = read_items(self.rfile.read(self._length()))
            except ValueError as error:
                self._reply(400, {"error": str(error)})
                return
            with lock:
                results = [answer(score, item) for item in items]
            self._reply(200, {"results": results})

        def _length(self) -> int:
            length = int(self.headers.get("Content-Length") or 0)
            if not 0 < length <= MOST_BYTES:
                raise ValueError(f"Content-Length must be between 1 and {MOST_BYTES}, got {length}")
            return length

        def _reply(self, status: int, content: dict[str, Any]) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            logger.debug(format, *args)

    return ThreadingHTTPServer((host, port), Handler)


def read_items(body: bytes) -> list[Any]:
    """The items of a request. Raises ValueError where it is not of the schema."""
    try:
        request = json.loads(body)
    except ValueError as error:
        raise ValueError("the request is not JSON") from error
    items = request.get("items") if isinstance(request, dict) else None
    if not isinstance(items, list):
        raise ValueError('the request must be {"items": [{"prompt": ..., "image": ...}, ...]}')
    return items


@torch.no_grad()
def answer(score: Callable[[torch.Tensor, list[str]], torch.Tensor], item: Any) -> dict[str, float | str]:
    """{"score": ...} or {"error": ...} for one item."""
    try:
        prompt, encoded = item["prompt"], item["image"]
        if not isinstance(prompt, str) or not isinstance(encoded, str):
            raise TypeError("prompt and image must be strings")
        picture = Image.open(io.BytesIO(base64.b64decode(encoded, validate=True)), formats=["PNG"]).convert("RGB")
        image = torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255).permute(2, 0, 1).unsqueeze(0)
        value = float(score(image, [prompt])[0])
    except Exception as error:  # whatever it is, the other items still get their scores
        return {"error": f"{type(error).__name__}: {error}"}
    return {"score": value} if np.isfinite(value) else {"error": f"the score is {value}"}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m diffalign.reward_models.http_server", description="Serve a reward over HTTP.")
    parser.add_argument("name", help="a reward of the table")
    parser.add_argument("--source", help="where its weights lie")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8111)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    reward = reward_models.load(options.name, source=options.source, device=options.device)
    server = serve(lambda images, prompts: reward(images.to(options.device), prompts), options.host, options.port)
    logger.info("%s at http://%s:%d", options.name, *server.server_address[:2])
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()


if __name__ == "__main__":
    main()
