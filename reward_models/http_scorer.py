"""`http`: a reward that another process computes, asked over HTTP with JSON and PNG. No gradient.

    POST <url>   {"items": [{"prompt": "a red circle", "image": "<PNG, base64>"}, ...]}
    200          {"results": [{"score": 1.25}, {"error": "why there is no score"}, ...]}      one for each item, in order

Images travel as 8-bit PNG, which loses less than any file on a disk has lost already, and nothing is ever unpickled. Requests that fail in
passing (no connection, timeouts, 429, 5xx) are tried again, a few times and after a random pause; what a server says of an item is final.
`python -m diffalign.reward_models.http_server NAME` is such a server for any reward of the table.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import math
import random
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import torch
from PIL import Image

from diffalign.reward_models.base import Images, RewardModel, Scores, check_prompts
from diffalign.reward_models.sources import Source
from diffalign.reward_models.spec import Spec

MOST_BYTES = 1 << 24  # of a reply
PASSING = {408, 425, 429, 500, 502, 503, 504}  # HTTP's own words for "later"


class Passing(Exception):
    """A failure that another attempt may not have."""


class HTTPScorer(RewardModel):
    """Requests of at most `batch` items, `concurrency` of them at once, `timeout` seconds for each, `retries` further attempts.

    missing: "raise" makes an item without a score a RuntimeError that names its index and the reason; "nan" makes its score NaN.
    token: sent as "Authorization: Bearer <token>".
    """

    def __init__(
        self,
        spec: Spec,
        sources: Mapping[str, Source],
        *,
        batch: int = 8,
        concurrency: int = 4,
        timeout: float = 60.0,
        retries: int = 3,
        pause: float = 0.5,
        missing: str = "raise",
        token: str | None = None,
    ) -> None:
        super().__init__(spec)
        if missing not in ("raise", "nan"):
            raise ValueError(f'missing must be "raise" or "nan", got {missing!r}')
        if min(batch, concurrency) < 1 or timeout <= 0 or min(retries, pause) < 0:
            raise ValueError("batch and concurrency must be at least 1, timeout positive, retries and pause not negative")
        self.url = sources["server"].where
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"reward {self.name!r}: source must be the address of a server, http://host:port/path, got {self.url!r}")
        self.batch, self.concurrency, self.timeout, self.retries, self.pause = batch, concurrency, timeout, retries, pause
        self.missing, self.token = missing, token
        self.train(False)

    def prepare(self, prompts: Sequence[str]) -> None:
        """Nothing is computed here: prompts travel with the images."""
        check_prompts(self.name, prompts)

    def _scores(self, images: Images, prompts: Sequence[str]) -> Scores:
        """Raises RuntimeError for items without a score unless missing="nan"."""
        levels = (images.detach().float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        items = [{"prompt": prompt, "image": encode(Image.fromarray(picture))} for picture, prompt in zip(levels, prompts, strict=True)]
        chunks = [items[start : start + self.batch] for start in range(0, len(items), self.batch)]
        with ThreadPoolExecutor(self.concurrency) as pool:
            results = [result for chunk in pool.map(self._ask, chunks) for result in chunk]
        failed = [index for index, result in enumerate(results) if isinstance(result, str)]
        if failed and self.missing == "raise":
            more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
            raise RuntimeError(f"reward {self.name!r}: {self.url} gave images[{failed[0]}] no score: {results[failed[0]]}{more}")
        return torch.tensor([math.nan if isinstance(result, str) else result for result in results], device=images.device)

    def _ask(self, items: list[dict[str, str]]) -> list[float | str]:
        """For each item its score, or the reason why there is none."""
        for attempt in range(self.retries + 1):
            try:
                return read_results(self._post(json.dumps({"items": items}).encode()), len(items))
            except Passing as error:
                reason = f"{error}, {attempt + 1} attempts"
            except ValueError as error:
                return [str(error)] * len(items)
            if attempt < self.retries:
                time.sleep(self.pause * 2**attempt * random.uniform(0.5, 1.5))  # so that many clients do not come back at once
        return [reason] * len(items)

    def _post(self, body: bytes) -> bytes:
        """The body of the reply. Raises Passing, and ValueError for a refusal."""
        parts = urlsplit(self.url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(parts.hostname, parts.port, timeout=self.timeout)
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self.token:
            headers["Authorization"] = f"Bearer {self.token}"
        try:
            connection.request("POST", (parts.path or "/") + (f"?{parts.query}" if parts.query else ""), body, headers)
            reply = connection.getresponse()
            content = reply.read(MOST_BYTES + 1)
        except (OSError, http.client.HTTPException) as error:  # refused, reset, timed out, cut off
            raise Passing(str(error) or type(error).__name__) from error
        finally:
            connection.close()
        if reply.status in PASSING:
            raise Passing(f"status {reply.status} {reply.reason}")
        if reply.status != 200:
            raise ValueError(f"status {reply.status} {reply.reason}: {content[:200].decode(errors='replace')}")
        if len(content) > MOST_BYTES:
            raise ValueError(f"the reply is longer than {MOST_BYTES} bytes")
        return content


def encode(picture: Image.Image) -> str:
    """A picture as base64 of a PNG."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=1)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def read_results(content: bytes, count: int) -> list[float | str]:
    """For each item its score, or the reason why there is none. Raises ValueError where the reply as a whole is not of the schema."""
    try:
        reply = json.loads(content)
    except ValueError as error:  # also text that is not UTF-8
        raise ValueError(f"the reply is not JSON: {content[:80]!r}") from error
    results = reply.get("results") if isinstance(reply, dict) else None
    if not isinstance(results, list) or len(results) != count:
        raise ValueError(f'the reply must be {{"results": [...]}} with {count} entries, got {content[:80]!r}')
    return [_read_result(result) for result in results]


def _read_result(result: object) -> float | str:
    if isinstance(result, dict) and "error" in result:
        return str(result["error"])
    score = result.get("score") if isinstance(result, dict) else None
    if isinstance(score, bool) or not isinstance(score, (int, float)) or not math.isfinite(score):
        return f"an entry must hold a finite score or an error, got {str(result)[:80]}"
    return float(score)
