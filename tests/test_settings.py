from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from server.engine.engine import EngineOptions
from server.key_file import client_key
from server.settings import Settings, SettingsError, embedded_checkpoint, load_settings


def test_a_flag_wins_over_a_variable_and_a_variable_over_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_settings().port == 8000
    monkeypatch.setenv("LPA_PORT", "9000")
    assert load_settings().port == 9000
    assert load_settings(port="9001").port == 9001
    assert load_settings(port=None).port == 9000


def test_an_empty_variable_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LPA_API_KEY", "")
    monkeypatch.setenv("LPA_MODEL", "")
    settings = load_settings()
    assert settings.client_keys == ()
    assert settings.model == embedded_checkpoint()
    assert settings.model_name == "lpa-tiny"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", "70000"),
        ("port", "http"),
        ("dtype", "float16"),
        ("device", "tpu"),
        ("threads", "0"),
        ("max_model_len", "0"),
        ("max_num_seqs", "0"),
        ("max_num_batched_tokens", "-1"),
        ("step_budget_ms", "0"),
        ("block_size", "0"),
        ("block_size", "16"),
        ("kv_cache_layout", "dense"),
        ("kv_cache_memory", "2GB"),
        ("enable_prefix_caching", "perhaps"),
        ("max_queue", "-1"),
        ("request_timeout", "nan"),
        ("drain_timeout", "-1"),
        ("max_body_bytes", "0"),
        ("log_format", "xml"),
        ("log_level", "loud"),
    ],
)
def test_an_invalid_value_is_named_with_its_flag_and_variable(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"LPA_{name.upper()}", value)
    with pytest.raises(SettingsError) as refused:
        load_settings()
    message = str(refused.value)
    assert f"--{name.replace('_', '-')}" in message
    assert f"LPA_{name.upper()}" in message
    assert repr(value) in message


def test_the_key_is_never_shown() -> None:
    settings = load_settings(api_key="secret-key,other", admin_api_key="secret-key")
    assert "secret-key" not in repr(settings)
    for name in ("api_key", "admin_api_key"):
        with pytest.raises(SettingsError, match=name.upper()) as refused:
            load_settings(**{name: {"secret-key": 1}})
        assert "secret-key" not in str(refused.value)


@pytest.mark.parametrize("name", ["served_model_name", "api_key", "admin_api_key", "cors_origins"])
def test_lists_come_as_repeated_flags_or_with_commas(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def shown(settings: Settings) -> list[str]:
        return [getattr(v, "get_secret_value", lambda v=v: v)() for v in getattr(settings, name)]

    assert shown(load_settings()) == []
    assert shown(load_settings(**{name: ["a", "b, c"]})) == ["a", "b", "c"]
    monkeypatch.setenv(f"LPA_{name.upper()}", "x,y,")
    assert shown(load_settings()) == ["x", "y"]
    with pytest.raises(SettingsError, match="has no entry"):  # a key that is empty by mistake must not open the server
        load_settings(**{name: " , "})


def test_keys_come_from_a_file_too(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# ours\none\n\n  two \n")
    settings = load_settings(api_key="zero", api_key_file=str(path))
    assert settings.client_keys == tuple(map(client_key, ["zero", "one", "two"]))
    path.write_text("# nobody yet\n")
    for wrong in (path, tmp_path / "nowhere", tmp_path):
        with pytest.raises(SettingsError, match="--api-key-file"):
            load_settings(api_key_file=str(wrong))


def test_the_first_of_several_names_is_the_models() -> None:
    settings = load_settings(served_model_name="first,second")
    assert settings.model_name == "first"
    assert settings.model_names == ("first", "second")
    assert load_settings().model_names == ("lpa-tiny",)


def test_every_engine_option_is_a_setting() -> None:
    settings = load_settings(dtype="float32", max_num_seqs=3, block_size=32, enable_prefix_caching=False, max_queue=5)
    assert settings.engine_options() == dataclasses.replace(
        load_settings().engine_options(),
        dtype="float32",
        max_num_seqs=3,
        block_size=32,
        enable_prefix_caching=False,
    )
    assert {field.name for field in dataclasses.fields(EngineOptions)} < set(Settings.model_fields)


def test_every_setting_says_what_it_is() -> None:
    assert all(field.description for field in Settings.model_fields.values())


def test_the_model_is_named_after_its_folder(tmp_path: Path) -> None:
    assert load_settings(model=str(tmp_path / "my-model")).model_name == "my-model"
    assert load_settings(model=str(tmp_path / "my-model"), served_model_name="other").model_name == "other"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("LPA_API_KEYS", r"LPA_API_KEYS: is a variable of no setting; LPA_API_KEY is one"),
        ("LPA_APIKEY", r"LPA_API_KEY is one"),
        ("LPA_MAX_NUM_SEQ", r"LPA_MAX_NUM_SEQS is one"),
        ("lpa_api_keys", r"lpa_api_keys: .*LPA_API_KEY is one"),
        ("LPA_XYZZY", r"LPA_XYZZY: is a variable of no setting; `lpa serve --help` lists all"),
    ],
)
def test_a_variable_of_no_setting_ends_the_start(name: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "secret")
    with pytest.raises(SettingsError, match=words) as caught:
        load_settings()
    assert "secret" not in str(caught.value)


def test_what_kubernetes_sets_beside_a_service_is_no_misspelt_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LPA_SERVICE_HOST", "LPA_SERVICE_PORT_HTTP", "LPA_PORT_8000_TCP_ADDR", "LPA_SERVER_PORT_8000_TCP"):
        monkeypatch.setenv(name, "10.0.0.1")
    load_settings()


def test_threads_are_bounded_by_the_processors() -> None:
    processors = len(os.sched_getaffinity(0))
    assert load_settings(threads=processors).threads == processors
    for threads in (processors + 1, 10000):
        with pytest.raises(SettingsError, match=rf"--threads .*more than the {processors} processors.*{threads}"):
            load_settings(threads=threads)


def test_flags_come_before_variables_before_the_file_before_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "serve.toml"
    file.write_text(
        'max_num_seqs = 5\nport = 5\nmax_queue = 5\nserved_model_name = ["a", "b"]\nlog_requests = false\n'
        'step_budget_ms = 7\napi_key = "hidden"\n'
    )
    monkeypatch.setenv("LPA_PORT", "6")
    monkeypatch.setenv("LPA_MAX_QUEUE", "6")
    monkeypatch.setenv("LPA_LOG_LEVEL", "")  # empty: none
    settings = load_settings(config=file, max_queue="7", dtype=None)
    assert (settings.max_num_seqs, settings.port, settings.max_queue) == (5, 6, 7)
    assert (settings.model_names, settings.log_requests, settings.step_budget_ms) == (("a", "b"), False, 7.0)
    assert (settings.host, settings.dtype) == ("127.0.0.1", "auto")
    assert settings.given() == [
        f"config = {file} (flag)",
        "port = 6 (LPA_PORT)",
        f"served_model_name = ('a', 'b') ({file})",
        f"max_num_seqs = 5 ({file})",
        f"step_budget_ms = 7.0 ({file})",
        "max_queue = 7 (flag)",
        f"api_key = ... ({file})",
        f"log_requests = False ({file})",
    ]
    monkeypatch.setenv("LPA_CONFIG", str(file))
    assert load_settings().max_num_seqs == 5
    assert load_settings(config=None).given()[0] == f"config = {file} (LPA_CONFIG)"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("port = 70000", r"serve\.toml: port: .*65535, not 70000"),
        ("max_num_seq = 3", r"serve\.toml: max_num_seq is no setting; max_num_seqs is one"),
        ("[server]\nport = 1", r"serve\.toml: server is no setting"),
        ('config = "other.toml"', r"serve\.toml: config is no setting"),
        ("port =", r"--config \(LPA_CONFIG\): .*serve\.toml: no TOML: "),
        ("block_size = [64]", r"serve\.toml: block_size: .*32, 64 or 128, not \[64\]"),
        ("api_key = 3", r"serve\.toml: api_key: must be text, or a list of texts$"),
    ],
)
def test_a_mistake_in_the_file_names_the_file_and_the_setting(text: str, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "serve.toml"
    file.write_text(text)
    with pytest.raises(SettingsError, match=reason):
        load_settings(config=file)
    with pytest.raises(SettingsError, match=r"--config .*nowhere: No such file"):
        load_settings(config=tmp_path / "nowhere")
