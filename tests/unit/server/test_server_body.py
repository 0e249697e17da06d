"""Bodies: size, encoding, and JSON that Python's parser would let through."""

from __future__ import annotations

import socket

import pytest
from starlette.exceptions import HTTPException

from moe_engine.server.body import parse_json
from tests.unit.server.conftest import MODEL

JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"{", "Expecting"),
        (b"{'a': 1}", "Expecting"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": -Infinity}', "-Infinity"),
        (b'{"a": 1e999}', "1e999"),
        (b'{"a": "\xff"}', "UTF-8 at byte 7"),
        ('{"a": 1}'.encode("utf-16"), "UTF-8"),
        (b'{"a": "\\ud800"}', "surrogate"),
        (b'{"a": 1, "a": 2}', "'a' twice"),
        (b"[" * 100_000, "nested"),
        (b"1" * 5000, "digits"),
    ],
)
def test_json_is_refused_with_the_reason(live, body, reason):
    with pytest.raises(HTTPException) as caught:
        parse_json(body)
    assert caught.value.status_code == 400
    assert reason in caught.value.detail
    reply = live.http.post("/v1/completions", content=body, headers=JSON)
    assert reply.status_code == 400
    assert reason in reply.json()["error"]["message"]


def test_json_keeps_what_is_valid():
    assert parse_json(b'{"a": ["\\ud83d\\ude00", 1.5, 2, null, true]}') == {
        "a": ["😀", 1.5, 2, None, True]
    }


@pytest.mark.parametrize("content_type", [None, "text/plain", "application/x-www-form-urlencoded"])
def test_other_content_types_are_415(live, content_type):
    headers = {} if content_type is None else {"Content-Type": content_type}
    reply = live.http.post("/v1/completions", content=b"{}", headers=headers)
    assert reply.status_code == 415
    assert "application/json" in reply.json()["error"]["message"]


def test_content_type_may_name_a_charset(live):
    body = f'{{"model": "{MODEL}", "prompt": "x", "max_tokens": 1}}'.encode()
    headers = {"Content-Type": "application/json; charset=utf-8"}
    assert live.http.post("/v1/completions", content=body, headers=headers).status_code == 200


def test_ten_megabytes_are_413_whether_declared_or_chunked(live):
    block = b" " * (1 << 20)
    replies = [
        live.http.post("/v1/completions", content=block * 10, headers=JSON),
        live.http.post("/v1/completions", content=iter([block] * 10), headers=JSON),
    ]
    for reply in replies:
        assert reply.status_code == 413
        error = reply.json()["error"]
        assert error["code"] == "body_too_large"
        assert str(1 << 20) in error["message"]


def test_body_of_exactly_the_limit_is_read(live):
    body = f'{{"model": "{MODEL}", "prompt": "x", "max_tokens": 1}}'.encode().ljust(1 << 20)
    assert live.http.post("/v1/completions", content=body, headers=JSON).status_code == 200


def test_client_that_asks_first_is_refused_before_it_sends(live):
    host, port = live.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Expect: 100-continue\r\nContent-Length: 99999999\r\n\r\n"
        )
        assert connection.recv(1000).startswith(b"HTTP/1.1 413 ")
