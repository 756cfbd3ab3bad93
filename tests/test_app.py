"""What happens around requests: keys, origins, ids, and refusals of every kind in OpenAI's shape."""

from __future__ import annotations

import html
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from lpa_model.config import Architecture
from server.errors import Unauthorized
from server.keys import Keys, keys_of
from server.routes.body import MAX_DEPTH, parse_json
from server.settings import load_settings
from tests.serving import Served, serving

COMPLETIONS = "/v1/completions"
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def served(tiny_checkpoints: dict[Architecture, Path]) -> Iterator[Served]:
    with serving(tiny_checkpoints["setting2"], served_model_name="tiny,small", cors_origins="https://a.org") as server:
        yield server


@pytest.fixture(scope="module")
def locked(tiny_checkpoints: dict[Architecture, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text("# a comment\nthird\n")
    flags: dict[str, Any] = {"api_key": "first,second", "api_key_file": file, "admin_api_key": "boss"}
    with serving(tiny_checkpoints["setting2"], metrics_key=True, cors_origins="*", **flags) as server:
        yield server


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error object of a refusal, in whose shape every refusal comes."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert isinstance(body["error"]["code"], str | None)
    error: dict[str, Any] = body["error"]
    return error


# --- keys ------------------------------------------------------------------------------------------------------------


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.mark.parametrize("key", ["first", "second", "third", "boss"])
def test_each_key_opens_the_server(locked: Served, key: str) -> None:
    for path in ("/v1/models", "/metrics", "/docs/", "/openapi.json", "/version", "/tokenizer_info"):
        assert locked.client.get(path, headers=bearer(key)).status_code == 200
    body = {"model": "tiny", "prompt": "x", "max_tokens": 1}
    assert locked.client.post(COMPLETIONS, json=body, headers={"authorization": f"bearer  {key}"}).status_code == 200


@pytest.mark.parametrize("wrong", [{}, bearer("firs"), bearer("firstt"), bearer("first,second"), bearer("# a comment")])
def test_without_a_key_there_are_only_probes(locked: Served, wrong: dict[str, str]) -> None:
    for path in ("/health", "/ready"):
        assert locked.client.get(path, headers=wrong).status_code == 200
    for path in ("/metrics", "/v1/models", "/nothing", "/health/", "/%2Fhealth", "/docs/nothing", "/tokenizer_info"):
        response = locked.client.get(path, headers=wrong)
        assert error_of(response, 401)["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer"
        assert "first" not in response.text
    for path in (COMPLETIONS, "/tokenize", "/v1/requests/x/cancel"):
        assert error_of(locked.client.post(path, json={}, headers=wrong), 401)["type"] == "authentication_error"


def test_other_schemes_and_bytes_are_no_keys(locked: Served) -> None:
    for value in ("first", "Basic first", "Bearer", b"Bearer \xff", "Bearer first second"):
        headers: dict[Any, Any] = {"authorization": value}  # bytes as they are, which httpx's types do not expect
        assert locked.client.get("/version", headers=headers).status_code == 401


def test_control_routes_need_an_admins_key(locked: Served, served: Served) -> None:
    path = "/v1/requests/x/cancel"
    assert error_of(locked.client.post(path, headers=bearer("first")), 403)["code"] == "admin_key_required"
    assert error_of(locked.client.post(path, headers=bearer("boss")), 404)["code"] == "request_not_found"
    # a server without admin keys says how to get one
    assert "--admin-api-key" in error_of(served.client.post(path), 403)["message"]


def test_admins_without_clients_keys_leave_the_server_open() -> None:
    keys = keys_of(load_settings(admin_api_key="boss"), frozenset())
    keys.check("/v1/models", keys.role(""))
    with pytest.raises(Unauthorized):
        keys.check_admin(keys.role("Bearer other"))
    keys.check_admin(keys.role("Bearer boss"))


def test_every_key_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[bytes] = []
    monkeypatch.setattr("hmac.compare_digest", lambda a, b: compared.append(b) or a == b)
    keys: Keys = keys_of(load_settings(api_key="a,b,c", admin_api_key="d"), frozenset())
    for given in ("a", "c", "other"):
        compared.clear()
        keys.role(f"Bearer {given}")
        assert compared == [*keys.client, *keys.admin]


def test_keys_are_not_logged(locked: Served, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    locked.client.get("/v1/models", headers=bearer("a-wrong-secret"))
    locked.client.get("/v1/models", headers=bearer("first"))
    assert len(caplog.records) >= 2
    assert not any("secret" in record.getMessage() or "first" in record.getMessage() for record in caplog.records)


# --- origins ---------------------------------------------------------------------------------------------------------

PREFLIGHT = {
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type,x-stainless-lang",
}


def test_a_preflight_needs_no_key(locked: Served) -> None:
    answer = locked.client.options(COMPLETIONS, headers={"origin": "https://any.org", **PREFLIGHT})
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == "*"
    assert "x-stainless-lang" in answer.headers["access-control-allow-headers"]
    assert answer.headers["x-request-id"]
    # and a page can read what went wrong
    refused = locked.client.get("/v1/models", headers={"origin": "https://any.org"})
    error_of(refused, 401)
    assert refused.headers["access-control-allow-origin"] == "*"
    assert "x-request-id" in refused.headers["access-control-expose-headers"]


def test_only_the_origins_that_were_named_are_let_in(served: Served) -> None:
    for path, status in (("/v1/models", 200), ("/nothing", 404)):
        answer = served.client.get(path, headers={"origin": "https://a.org"})
        assert answer.status_code == status
        assert answer.headers["access-control-allow-origin"] == "https://a.org"
        assert "access-control-allow-origin" not in served.client.get(path, headers={"origin": "https://b.org"}).headers
    assert served.client.options(COMPLETIONS, headers={"origin": "https://a.org", **PREFLIGHT}).status_code == 200
    refused = served.client.options(COMPLETIONS, headers={"origin": "https://b.org", **PREFLIGHT})
    assert "origin" in error_of(refused, 400)["message"]
    assert "access-control-allow-origin" not in refused.headers


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "status", "allowed"),
    [
        ("GET", "/v1/nothing", 404, None),
        ("GET", "/docs/nothing", 404, None),
        ("GET", "/redoc", 404, None),
        ("GET", "/v1/models/", 404, None),
        ("GET", "/v1/models/%2e%2e/%ff", 404, None),
        ("POST", "//v1/completions", 404, None),
        ("GET", COMPLETIONS, 405, "POST"),
        ("PUT", COMPLETIONS, 405, "POST"),
        ("OPTIONS", COMPLETIONS, 405, "POST"),
        ("TRACE", COMPLETIONS, 405, "POST"),
        ("HEAD", COMPLETIONS, 405, "POST"),
        ("DELETE", "/v1/models", 405, "GET"),
        ("PATCH", "/v1/models/tiny", 405, "GET"),
        ("PROPFIND", "/health", 405, "GET"),
        ("GET", "/v1/requests/x/cancel", 405, "POST"),
        ("OPTIONS", "/v1/files", 405, "GET, POST"),
        ("POST", "/v1/files/file-1", 405, "DELETE, GET"),
        ("PUT", "/v1/responses/resp_1", 405, "DELETE, GET"),
    ],
)
def test_unknown_routes_and_wrong_methods(
    served: Served, method: str, path: str, status: int, allowed: str | None
) -> None:
    response = served.client.request(method, path)
    assert response.headers.get("allow") == allowed
    if method == "HEAD":
        assert (response.status_code, response.content) == (status, b"")
    else:
        assert error_of(response, status)["type"] == "invalid_request_error"


def test_head_is_get_without_the_body(served: Served) -> None:
    for path in ("/health", "/v1/models", "/metrics", "/docs/"):
        head, get = served.client.head(path), served.client.get(path)
        assert head.status_code == get.status_code == 200
        assert head.content == b""
        assert head.headers["content-type"] == get.headers["content-type"]


PROMPT = b'{"model": "tiny", "prompt": "x", "max_tokens": 1'


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        (b'{"model": "tiny", "prompt": "x', None, "not valid JSON"),
        (b"{} {}", None, "not valid JSON"),
        (b"\xef\xbb\xbf{}", None, "not valid JSON"),
        (b'{"model": "tiny", "prompt": "\xff"}', None, "UTF-8"),
        (json.dumps({"model": "tiny"}).encode("utf-16"), None, "UTF-8"),
        (b"[" * 60_000, None, "nests"),
        (b'{"a":' * 5_000 + b"1" + b"}" * 5_000, None, "nests"),
        (PROMPT + b', "later": ' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}", None, "nests"),
        (PROMPT + b', "temperature": NaN}', None, "NaN"),
        (PROMPT + b', "later": [-Infinity]}', None, "Infinity"),
        (PROMPT + b', "temperature": 1e999}', None, "1e999"),
        (PROMPT + b', "later": {"x": -1e400}}', None, "1e400"),
        (PROMPT + b', "seed": ' + b"9" * 5_000 + b"}", None, "digits"),
        (PROMPT + b', "prompt": "y"}', "prompt", "twice"),
        (PROMPT + b', "logit_bias": {"5": 1, "5": 2}}', "5", "twice"),
        (b"[1]", None, "object"),
        (b"null", None, "object"),
        (b'"x"', None, "object"),
        (b"", None, "object"),
    ],
)
def test_a_body_that_cannot_be_taken_is_a_400(served: Served, body: bytes, param: str | None, words: str) -> None:
    for path in (COMPLETIONS, "/v1/perplexity", "/tokenize"):
        error = error_of(served.client.post(path, content=body, headers=JSON), 400)
        assert error["type"] == "invalid_request_error"
        if path == COMPLETIONS:
            assert error["param"] == param
            assert words in error["message"]


def test_what_is_just_allowed_is_read() -> None:
    deep: Any = 1
    for _ in range(MAX_DEPTH - 1):
        deep = [deep]
    value = {"a": deep, "b": [{"c": 1}] * 100, "d": 1e308, "e": -0.0, "f": 10**300, "g": "\ud800"}
    assert parse_json(json.dumps(value).encode()) == value


@pytest.mark.parametrize("media", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "x"])
def test_another_content_type_is_a_400_that_says_so(served: Served, media: str | None) -> None:
    headers = {} if media is None else {"content-type": media}
    error = error_of(served.client.post(COMPLETIONS, content=PROMPT + b"}", headers=headers), 400)
    assert "application/json" in error["message"]
    for good in ("application/json; charset=utf-8", "Application/JSON"):
        headers = {"content-type": good}
        assert served.client.post(COMPLETIONS, content=PROMPT + b"}", headers=headers).status_code == 200


def test_an_integer_beyond_all_limits_is_compared_not_converted(served: Served) -> None:
    for field in ("max_tokens", "seed", "n", "min_tokens", "temperature", "logprobs", "priority"):
        body = b'{"model": "tiny", "prompt": "x", "' + field.encode() + b'": ' + b"9" * 4_000 + b"}"
        assert field in error_of(served.client.post(COMPLETIONS, content=body, headers=JSON), 400)["message"]
    assert served.client.post(
        COMPLETIONS, content=PROMPT + b', "top_k": ' + b"9" * 4_000 + b"}", headers=JSON
    ).is_success
    body = b'{"tokens": [' + b"9" * 4_000 + b"]}"
    assert error_of(served.client.post("/detokenize", content=body, headers=JSON), 400)["param"] == "tokens"


def test_every_body_is_read_strictly(served: Served) -> None:
    for path, item in served.client.get("/openapi.json").json()["paths"].items():
        if "application/json" in item.get("post", {}).get("requestBody", {}).get("content", ()):
            error = error_of(served.client.post(path, content=b'{"x": NaN}', headers=JSON), 400)
            assert "NaN" in error["message"], path


def test_the_id_of_a_request_is_on_every_answer(tiny_checkpoints: dict[Architecture, Path], served: Served) -> None:
    mine = {"x-request-id": "of-mine.1:2_3"}
    for method, path in (
        ("GET", "/health"),
        ("HEAD", "/health"),
        ("GET", "/v1/nothing"),
        ("GET", COMPLETIONS),
        ("OPTIONS", "/"),
        ("POST", COMPLETIONS),
        ("GET", "/metrics"),
        ("GET", "/docs/"),
    ):
        assert served.client.request(method, path, headers=mine).headers["x-request-id"] == mine["x-request-id"]
    answer = served.client.post(COMPLETIONS, content=PROMPT + b"}", headers={**JSON, **mine})
    assert answer.json()["id"] == "cmpl-of-mine.1:2_3"
    for strange in ("a b", "<x>", "é".encode(), "x" * 129, ""):
        headers: dict[Any, Any] = {"x-request-id": strange}  # bytes, too
        given = served.client.get("/health", headers=headers).headers["x-request-id"]
        assert len(given) == 32
    with serving(tiny_checkpoints["setting2"], max_body_bytes=100) as small:
        response = small.client.post(COMPLETIONS, content=b" " * 101, headers={**JSON, **mine})
        assert error_of(response, 413)["message"].endswith("100")
        assert response.headers["x-request-id"] == mine["x-request-id"]


def test_a_body_that_never_comes_ends_with_its_client(served: Served) -> None:
    with socket.create_connection(("127.0.0.1", served.server.port)) as connection:
        connection.sendall(b"POST /tokenize HTTP/1.1\r\nhost: x\r\ncontent-length: 50\r\n" + b"\r\n{")
    assert served.client.get("/health").status_code == 200


# --- the model's names -----------------------------------------------------------------------------------------------


def test_every_name_is_served_and_the_first_is_answered(served: Served) -> None:
    cards = served.client.get("/v1/models").json()
    assert cards["object"] == "list"
    assert [card["id"] for card in cards["data"]] == ["tiny", "small"]
    for card in cards["data"]:
        assert served.client.get(f"/v1/models/{card['id']}").json() == card
        assert (card["object"], card["root"], card["max_model_len"]) == ("model", "tiny", 128)
        answer = served.client.post(COMPLETIONS, json={"model": card["id"], "prompt": "x", "max_tokens": 1}).json()
        assert answer["model"] == "tiny"
    error = error_of(served.client.get("/v1/models/large"), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert "'small'" in error["message"]


# --- the documentation -----------------------------------------------------------------------------------------------


def test_the_page_shows_every_route_and_field_and_loads_nothing(served: Served) -> None:
    answer = served.client.get("/docs/reference")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    page = html.unescape(answer.text)
    for forbidden in ("<script", "<link", "src=", "http://fonts", "https://", "@import", "url("):
        assert forbidden not in page
    document = served.client.get("/openapi.json").json()
    for path, item in document["paths"].items():
        assert path in page
        for operation in item.values():
            assert operation["summary"] in page
    for name, schema in document["components"]["schemas"].items():
        assert f'id="{name}"' in page
        for field in schema.get("properties", {}):
            assert f"<code>{field}</code>" in page


def test_the_document_describes_every_field_and_status(served: Served) -> None:
    document = served.client.get("/openapi.json").json()
    assert document["info"]["title"] == "LPA inference server"
    tags = {tag["name"] for tag in document["tags"]}
    for path, item in document["paths"].items():
        for operation in item.values():
            assert operation["summary"]
            assert set(operation["tags"]) <= tags
            assert {"200", "401", "500"} <= set(operation["responses"]), path
            assert "422" not in operation["responses"]
            if "requestBody" in operation:
                assert {"400", "404", "413"} <= set(operation["responses"]), path
            for status, answer in operation["responses"].items():
                if status != "200":
                    assert answer["content"]["application/json"]["schema"]["$ref"].endswith("/ErrorResponse")
    for item in document["paths"].values():
        content = item.get("post", {}).get("requestBody", {}).get("content", {})
        if "application/json" in content:
            name = content["application/json"]["schema"]["$ref"].rpartition("/")[2]
            for field, schema in document["components"]["schemas"][name]["properties"].items():
                assert schema.get("description"), f"{name}.{field}"
    # what a client may send as the model is what this server has
    assert document["components"]["schemas"]["CompletionRequest"]["properties"]["model"]["anyOf"][0]["enum"] == [
        "tiny",
        "small",
    ]


def test_the_document_asks_for_keys_where_the_server_does(served: Served, locked: Served) -> None:
    opened = served.client.get("/openapi.json").json()
    assert "security" not in opened["paths"]["/v1/models"]["get"]
    shut = locked.client.get("/openapi.json", headers=bearer("first")).json()
    assert shut["paths"]["/v1/requests/{request_id}/cancel"]["post"]["security"] == [{"AdminKey": []}]
    assert shut["paths"]["/v1/models"]["get"]["security"] == [{"ApiKey": []}]
    assert shut["paths"]["/metrics"]["get"]["security"] == [{"ApiKey": []}]
    assert "security" not in shut["paths"]["/health"]["get"]
    assert set(shut["components"]["securitySchemes"]) == {"ApiKey", "AdminKey"}
