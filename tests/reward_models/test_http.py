"""The HTTP scorer and its server over the loopback, with replies and requests of every wrong kind."""

from __future__ import annotations

import base64
import http.client
import io
import json
import math
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest
import torch
from PIL import Image

from diffalign import reward_models
from diffalign.reward_models.http_scorer import HTTPScorer, encode, read_results
from diffalign.reward_models.http_server import MOST_BYTES, answer, serve
from diffalign.reward_models.sources import sources_of

SPEC = reward_models.SPECS["http"]
ITEMS = ["a", "bb", "ccc"]


def scorer(address: str, **settings) -> HTTPScorer:
    return HTTPScorer(SPEC, sources_of(SPEC, address), **({"pause": 0.001, "timeout": 5.0} | settings))


@contextmanager
def running(server):
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield "http://{}:{}/score?x=1".format(*server.server_address[:2])
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Replies(ThreadingHTTPServer):
    """A server that replies as it is told: reply(number of the request, its items) -> (status, body), or None to hang up."""

    def __init__(self, reply) -> None:
        self.reply, self.requests, self.headers = reply, [], []
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()
        super().__init__(("127.0.0.1", 0), Handler)

    def handle_error(self, request, client_address) -> None:
        pass  # a client that gave up


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        items = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["items"]
        with self.server.lock:
            self.server.requests.append(items)
            self.server.headers.append(dict(self.headers))
            number = len(self.server.requests)
            self.server.at_once += 1
            self.server.most_at_once = max(self.server.most_at_once, self.server.at_once)
        reply = self.server.reply(number, items)
        with self.server.lock:
            self.server.at_once -= 1
        if reply is None:
            self.connection.close()
            return
        status, body = reply
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args) -> None:
        pass


def scored(items) -> tuple[int, bytes]:
    return 200, json.dumps({"results": [{"score": len(item["prompt"])} for item in items]}).encode()


def levels(*shape) -> torch.Tensor:
    """Images whose values are whole 8-bit levels, which travel without loss."""
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(4)).float() / 255


def test_scores_are_the_servers_own(load, server):
    images = levels(3, 3, 20, 31)
    prompts = ["a red circle", 'Ünïcode 🙂 "quoted"', ""]
    # The server has weights of its own; memory that is aligned differently is summed in another order.
    torch.testing.assert_close(load("http")(images, prompts), load("shapes-clip")(images, prompts), atol=1e-5, rtol=1e-5)


def test_many_images_in_order_a_few_requests_at_once():
    def slowly(number, items):
        time.sleep(0.05 if number % 2 else 0.0)  # so that replies arrive in another order
        return scored(items)

    prompts = ["x" * n for n in range(1, 24)]
    with running(replies := Replies(slowly)) as address:
        scores = scorer(address, batch=3, concurrency=3)(levels(23, 3, 4, 4), prompts)
    assert scores.tolist() == list(range(1, 24))
    assert sorted(map(len, replies.requests)) == [2, *[3] * 7]
    assert 1 < replies.most_at_once <= 3


def test_pictures_travel_as_png_without_loss():
    images = levels(1, 3, 5, 7)
    with running(replies := Replies(lambda number, items: scored(items))) as address:
        scorer(address, token="secret")(images, ["a"])
    picture = Image.open(io.BytesIO(base64.b64decode(replies.requests[0][0]["image"])))
    assert picture.format == "PNG"
    assert torch.equal(torch.tensor(list(picture.tobytes())).view(5, 7, 3).permute(2, 0, 1) / 255, images[0])
    assert replies.headers[0]["Authorization"] == "Bearer secret"


@pytest.mark.parametrize("passing", [(503, b"later"), (429, b""), None])
def test_what_fails_in_passing_is_tried_again(passing):
    with running(replies := Replies(lambda number, items: passing if number < 3 else scored(items))) as address:
        assert scorer(address)(levels(3, 3, 4, 4), ITEMS).tolist() == [1, 2, 3]
    assert len(replies.requests) == 3


MALFORMED = [
    ((200, b"<html>"), "the reply is not JSON: b'<html>'"),
    ((200, b"\xff\xfe"), "the reply is not JSON"),
    ((200, b"[1, 2, 3]"), "with 3 entries"),
    ((200, b'{"results": [{"score": 1}]}'), "with 3 entries"),
    ((200, b'{"results": {"a": 1, "b": 2, "c": 3}}'), "with 3 entries"),
    ((400, b"unknown reward"), "status 400 Bad Request: unknown reward"),
    ((404, b""), "status 404 Not Found"),
]


@pytest.mark.parametrize(("reply", "reason"), MALFORMED)
def test_a_reply_of_another_form_is_an_error_at_once(reply, reason):
    with running(replies := Replies(lambda number, items: reply)) as address:
        with pytest.raises(RuntimeError, match=r"gave images\[0\] no score: .*and 2 more") as caught:
            scorer(address)(levels(3, 3, 4, 4), ITEMS)
        assert reason in str(caught.value)
        assert scorer(address, missing="nan")(levels(3, 3, 4, 4), ITEMS).isnan().all()
    assert len(replies.requests) == 2  # no further attempts


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"error": "out of memory"}, "out of memory"),
        ({"score": float("nan")}, "an entry must hold a finite score or an error, got {'score': nan}"),
        ({"score": float("inf")}, "finite score"),
        ({"score": "1.5"}, "finite score"),
        ({"score": True}, "finite score"),
        ({}, "finite score"),
        (None, "finite score"),
        (7, "finite score"),
    ],
)
def test_one_item_without_a_score_costs_no_other(entry, reason):
    body = json.dumps({"results": [{"score": 1}, entry, {"score": 3}]}).encode()
    with running(Replies(lambda number, items: (200, body))) as address:
        with pytest.raises(RuntimeError, match=r"gave images\[1\] no score") as caught:
            scorer(address)(levels(3, 3, 4, 4), ITEMS)
        assert reason in str(caught.value)
        assert "more" not in str(caught.value)
        scores = scorer(address, missing="nan")(levels(3, 3, 4, 4), ITEMS)
    assert scores[[0, 2]].tolist() == [1, 3]
    assert scores[1].isnan()
    assert scores.dtype == torch.float32


def test_a_server_that_does_not_answer_in_time():
    release = threading.Event()

    def hang(number, items):
        release.wait(60)
        return scored(items)

    with running(replies := Replies(hang)) as address:
        began = time.monotonic()
        with pytest.raises(RuntimeError, match="timed out, 2 attempts"):
            scorer(address, timeout=0.1, retries=1)(levels(1, 3, 4, 4), ["a"])
        assert time.monotonic() - began < 30
        release.set()
    assert len(replies.requests) == 2


def test_no_server_at_all():
    server = Replies(lambda number, items: None)
    address = "http://{}:{}".format(*server.server_address[:2])
    server.server_close()
    with pytest.raises(RuntimeError, match=r"gave images\[0\] no score: .*refused, 2 attempts"):
        scorer(address, retries=1)(levels(1, 3, 4, 4), ["a"])


def test_replies_without_end_are_not_read_to_it(monkeypatch):
    monkeypatch.setattr("diffalign.reward_models.http_scorer.MOST_BYTES", 1000)
    with running(Replies(lambda number, items: (200, b" " * 2000))) as address, pytest.raises(RuntimeError, match="longer than 1000 bytes"):
        scorer(address)(levels(1, 3, 4, 4), ["a"])


@pytest.mark.parametrize("address", ["ftp://host/x", "localhost:8000", "/some/folder", "http://"])
def test_addresses(address):
    with pytest.raises(ValueError, match="source must be the address of a server, http://host:port/path"):
        reward_models.load("http", source=address)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"missing": "zero"}, 'missing must be "raise" or "nan"'), ({"batch": 0}, "at least 1"), ({"timeout": 0.0}, "timeout positive")],
)
def test_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        scorer("http://127.0.0.1:1", **settings)


def test_preparing_asks_nothing_and_checks_the_prompts():
    reward = scorer("http://127.0.0.1:1")
    reward.prepare(["a"])
    with pytest.raises(TypeError, match="prompts must be a list of strings"):
        reward.prepare("a")


# ---- the server ------------------------------------------------------------------------------------------------------------------


def post(address: str, body: bytes, **headers: str) -> tuple[int, dict]:
    parts = urlsplit(address)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=5)
    connection.request("POST", parts.path, body, headers)
    reply = connection.getresponse()
    content = json.loads(reply.read())
    connection.close()
    return reply.status, content


def test_one_broken_item_costs_one_score(server):
    whole = {"prompt": "a red circle", "image": encode(Image.new("RGB", (9, 9), "red"))}
    jpeg = io.BytesIO()
    Image.new("RGB", (9, 9)).save(jpeg, "JPEG")
    broken = [
        {"prompt": "a"},
        {"prompt": 3, "image": whole["image"]},
        {"prompt": "a", "image": "not base64!"},
        {"prompt": "a", "image": whole["image"][:40]},
        {"prompt": "a", "image": base64.b64encode(jpeg.getvalue()).decode()},
        "text",
        None,
    ]
    status, reply = post(server, json.dumps({"items": [whole, *broken, whole]}).encode())
    assert status == 200
    first, *middle, last = reply["results"]
    assert first == last
    assert math.isfinite(first["score"])
    assert all(set(result) == {"error"} for result in middle)


def test_a_score_that_is_not_finite_is_an_error():
    item = {"prompt": "a", "image": encode(Image.new("RGB", (2, 2)))}
    assert answer(lambda images, prompts: torch.tensor([torch.nan]), item) == {"error": "the score is nan"}
    assert answer(lambda images, prompts: torch.tensor([1.5]), item) == {"score": 1.5}


@pytest.mark.parametrize("body", [b"{", b"[]", b'{"items": 3}', b"\x80\x04pickle"])
def test_requests_of_another_form_are_refused(server, body):
    status, reply = post(server, body)
    assert status == 400
    assert reply["error"].startswith("the request")


def test_a_request_must_say_how_long_it_is(server):
    status, reply = post(server, b"", **{"Content-Length": str(MOST_BYTES + 1)})
    assert status == 400
    assert "Content-Length must be between 1 and" in reply["error"]


def test_it_listens_on_this_machine_alone():
    server = serve(lambda images, prompts: torch.zeros(1))
    try:
        assert server.server_address[0] == "127.0.0.1"
    finally:
        server.server_close()


def test_the_schema_is_read_strictly():
    assert read_results(b'{"results": [{"score": 2}, {"error": "no"}]}', 2) == [2.0, "no"]
    with pytest.raises(ValueError, match="with 1 entries"):
        read_results(b'{"results": []}', 1)


def test_errors_name_the_reward():
    renamed = replace(SPEC, name="mine")
    with pytest.raises(ValueError, match="reward 'mine'"):
        HTTPScorer(renamed, sources_of(renamed, "nowhere"))
