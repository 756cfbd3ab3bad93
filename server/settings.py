"""Every setting of the server: flag, environment variable and default have their one home here."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import ipaddress
import os
import re
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PrivateAttr, SecretStr, ValidationError
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from server.key_file import ClientKey, client_key, read_key_file

if TYPE_CHECKING:  # the engine imports torch, which the command line must not wait for
    from server.engine.engine import EngineOptions

ENV_PREFIX = "LPA_"
OF_KERNELS = ("LPA_CPU", "LPA_CUDA")  # which kernels may be used: `features.instruction_sets`, `features.cuda_kernels`
OF_KUBERNETES = re.compile(r"LPA_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_\w+)?)|LPA_\w+_PORT")
"""What it sets in every container beside a service whose name begins with "lpa"."""


class SettingsError(ValueError):
    """A setting is invalid; the message names its flag and variable."""


def _split(value: Any) -> list[str]:
    """The entries of a list that was given as flags, as text with commas, or both."""
    parts = [value] if isinstance(value, str) else value
    if not isinstance(parts, list | tuple) or not all(isinstance(part, str) for part in parts):
        raise ValueError("must be text, or a list of texts")
    found = [entry.strip() for part in parts for entry in part.split(",") if entry.strip()]
    if not found:
        raise ValueError("has no entry")
    return found


def _check_keys(path: Path | None) -> Path | None:
    try:
        found = path is None or read_key_file(path)
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError("cannot be read: not UTF-8") from None
    if not found:  # it would leave the server open
        raise ValueError("has no key in it")
    return path


def _number_of(*numbers: int) -> BeforeValidator:
    """Flags and variables are text, which a Literal of numbers does not read."""
    texts = {str(number): number for number in numbers}
    return BeforeValidator(lambda value: texts.get(value, value) if isinstance(value, str) else value)


BlockSize = Annotated[Literal[32, 64, 128], _number_of(32, 64, 128)]
CertReqs = Annotated[Literal[0, 1, 2], _number_of(0, 1, 2)]


def _check_prefix(path: str) -> str:
    if path and not re.fullmatch(r"(/[\w.~-]+)+", path, re.ASCII):
        raise ValueError("must begin with / and not end with it, as /lpa")
    return path


def _check_proxies(proxies: tuple[str, ...]) -> tuple[str, ...]:
    for proxy in proxies:
        try:
            if proxy != "*":
                ipaddress.ip_network(proxy)
        except ValueError as error:
            raise ValueError(f"{error}; * trusts all") from None
    if "*" in proxies and len(proxies) > 1:
        raise ValueError("* trusts all, and stands alone")
    return proxies


def _check_threads(threads: int | None) -> int | None:
    processors = len(os.sched_getaffinity(0))
    if threads is not None and threads > processors:
        raise ValueError(f"is more than the {processors} processors that this process may use")
    return threads


def _check_replicas(value: Any) -> str:
    """ "2" or "1:4"."""
    found = re.fullmatch(r"(\d{1,6})(?::(\d{1,6}))?", str(value))
    if found is None or not 1 <= int(found[1]) <= int(found[2] or found[1]):
        raise ValueError("must be a number of replicas, or the fewest and the most as 1:4")
    return found[0]


Names = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)]
Keys = Annotated[tuple[SecretStr, ...], NoDecode, BeforeValidator(_split)]


def embedded_checkpoint() -> Path:
    """Folder of the model that comes with the package."""
    spec = importlib.util.find_spec("lpa_model")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / "checkpoints" / "lpa-tiny"


class Settings(BaseSettings):
    """Field `max_num_seqs` is the flag --max-num-seqs and the variable LPA_MAX_NUM_SEQS; an empty variable is none.

    A setting with several entries takes them with commas between them, as a flag several times too.
    """

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, env_ignore_empty=True, frozen=True, validate_default=False, extra="forbid"
    )

    _origins: dict[str, str] = PrivateAttr(default_factory=dict)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        *_: PydanticBaseSettingsSource,
        **__: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags, then variables; pydantic would look for files of variables and of secrets, too."""
        return init_settings, env_settings

    model: Path = Field(
        default_factory=embedded_checkpoint,
        description="Model folder, or a model of the Hugging Face hub as OWNER/NAME: an LPA model, or one that `lpa "
        "convert llama` reads (default: the embedded lpa-tiny).",
    )
    config: Path | None = Field(
        None,
        description="TOML file with settings by their names (max_num_seqs = 8), without tables. Flags and variables "
        "come before it.",
    )
    host: str = Field("127.0.0.1", min_length=1, description="Address to listen on; 0.0.0.0 is every interface.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    uds: Path | None = Field(
        None,
        description="Unix socket to listen on, instead of host and port. It is removed at the end; one that a killed "
        "server has left is replaced.",
    )
    served_model_name: Names = Field(
        (),
        description="Names of the model in the API, with commas between them or the flag repeated; answers carry the "
        "first (default: the folder's name).",
    )
    chat_template: str | None = Field(
        None,
        min_length=1,
        description="Jinja file, or the template itself, instead of the model folder's (default of a model without "
        "one: turns of User: and Assistant:).",
    )
    generation_config: Literal["auto", "none"] = Field(
        "none",
        description="Whose sampling defaults hold where a request names none. none: the API's own, so that a request "
        "means the same with every model. auto: those of the model folder's generation_config.json (temperature, "
        "top_p, top_k, min_p, repetition_penalty), as vLLM does. A text ends at its EOS tokens either way.",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="Type of activations, and of a cache that is not int8; auto is bfloat16 where the processor has it "
        "in hardware.",
    )
    weights: Literal["auto", "float32", "bfloat16", "int8", "int4"] = Field(
        "auto",
        description="Type that weights are held in; fewer bits are faster and less exact. auto: the dtype, if one is "
        "named, else bfloat16 where the backend is fast with it. int4 leaves the output head in int8.",
    )
    device: str = Field("cpu", pattern=r"^(cpu|cuda(:\d+)?)$", description="cpu, cuda or cuda:N.")
    threads: Annotated[int | None, AfterValidator(_check_threads)] = Field(
        None, ge=1, description="Threads of the matrix products, at most one per processor (default: as many)."
    )
    max_model_len: int | None = Field(
        None, ge=1, description="Longest prompt and completion together, in tokens (default: the model's context)."
    )
    max_num_seqs: int = Field(64, ge=1, description="Sequences that run at once; more of them wait.")
    max_num_batched_tokens: int = Field(2048, ge=1, description="Most tokens in one step.")
    step_budget_ms: float = Field(
        200.0,
        gt=0,
        allow_inf_nan=False,
        description="Most milliseconds of prompt and scoring work in a step while completions stream; less where that "
        "would make the step more than about twice (scoring) or 2.6 times (prompts) as long as its decodes alone.",
    )
    block_size: BlockSize = Field(64, description="Tokens in a block of the cache.")
    kv_cache_layout: Literal["auto", "latent", "mixed", "full"] = Field(
        "auto", description="What the cache stores: latents, latents of values only, or full keys and values."
    )
    kv_cache_dtype: Literal["auto", "int8"] = Field(
        "auto",
        description="Type of the cache's numbers. int8: half the bytes of bfloat16, a quarter of float32, and less "
        "exact; a scale for each token and head, or latent. auto: the dtype.",
    )
    kv_cache_memory: int | None = Field(
        None, ge=1, description="Bytes of the cache (default: a modest share of the free memory)."
    )
    batch_invariant: bool | None = Field(
        None,
        description="Texts and log-probabilities depend on nothing else in the batch, to the bit; a preempted request "
        "recomputes its generated tokens one by one (default: where the backend allows it).",
    )
    enable_prefix_caching: bool = Field(True, description="Reuse the cache of a prompt's beginning between requests.")
    ignore_unknown_fields: bool = Field(
        False,
        description="Ignore fields of requests that the server does not know, and log each once; else they are 400s.",
    )
    max_queue: int = Field(1024, ge=0, description="Sequences that may wait; one more is answered with 429.")
    request_timeout: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="Seconds after which a request is cut off (default: never)."
    )
    waiting_comment_interval: float = Field(
        10.0,
        gt=0,
        allow_inf_nan=False,
        description="Seconds between comments (: waiting) in a stream that has not begun, as its request waits in "
        "the queue or its prompt is computed.",
    )
    drain_timeout: float = Field(
        30.0,
        ge=0,
        allow_inf_nan=False,
        description="Seconds that running requests get to finish when the server stops.",
    )
    max_body_bytes: int = Field(
        4 << 20,
        ge=1,
        description="Largest request body in bytes, or line of a body of lines (application/x-ndjson), which may have "
        "any number of them; a larger one gets a 413.",
    )
    max_header_bytes: int = Field(
        16 << 10, ge=256, description="Largest head of a request (request line and headers) in bytes; else a 431."
    )
    max_header_fields: int = Field(100, ge=1, description="Most headers of a request; more of them get a 431.")
    header_timeout: float = Field(
        20.0,
        gt=0,
        allow_inf_nan=False,
        description="Seconds in which a request's headers must be complete; else a 408.",
    )
    body_timeout: float = Field(
        60.0,
        gt=0,
        allow_inf_nan=False,
        description="Seconds that a body, but not one of lines, may stand still before all of it has come; else a 408.",
    )
    keep_alive_timeout: float = Field(
        75.0,
        gt=0,
        allow_inf_nan=False,
        description="Seconds that a connection may be idle between requests; more than a load balancer's own.",
    )
    max_connections: int = Field(
        4096,
        ge=1,
        description="Most connections at once, if there are descriptors for them; beyond, the one that is idle longest "
        "is closed, or, where none is, the new one gets a 503.",
    )
    max_body_values: int = Field(
        1 << 18,
        ge=1,
        description="Most values in a JSON body; an object or a list counts as four, a name as eight.",
    )
    max_sequences: int = Field(4096, ge=1, description="Most prompts times n (or best_of) of a request.")
    max_messages: int = Field(2048, ge=1, description="Most messages of a conversation.")
    max_stored_responses: int = Field(
        1024, ge=0, description="Most responses that are kept in memory; beyond, the one unused for longest goes."
    )
    max_stored_bytes: int = Field(
        64 << 20,
        ge=0,
        description="Most bytes of JSON that stored responses have together, each with the whole conversation before "
        "it; beyond, those unused for longest go.",
    )
    max_list_entries: int = Field(
        1024, ge=1, description="Most entries of bad_words, of stop_token_ids and of logit_bias."
    )
    max_stop_bytes: int = Field(4096, ge=1, description="Most bytes of a request's stop texts together.")
    max_bad_words_bytes: int = Field(1 << 16, ge=1, description="Most bytes of a request's bad_words together.")
    data_dir: Path | None = Field(
        None,
        description="Folder for files and batch jobs, which outlive the process; one server at a time has it (default: "
        "none, and /v1/files and /v1/batches are off).",
    )
    max_file_bytes: int = Field(200 << 20, ge=1, description="Largest file of /v1/files in bytes; else a 413.")
    max_batch_lines: int = Field(50_000, ge=1, description="Most lines of a batch's input file.")
    ray_replicas: Annotated[str | None, BeforeValidator(_check_replicas)] = Field(
        None,
        description="Replicas of the server on a Ray cluster, or the fewest and the most as 1:4, between which Ray "
        "chooses by the load; needs the extra ray (default: one server, without Ray).",
    )
    api_key: Keys = Field(
        (),
        description="Keys of which clients must send one as 'Authorization: Bearer KEY', with commas between them or "
        "the flag repeated (default: none is needed).",
    )
    api_key_file: Annotated[Path | None, AfterValidator(_check_keys)] = Field(
        None,
        description="File with more such keys, one a line, or sha256: and a key's digest; name=, requests_per_minute= "
        "and concurrent_sequences= may follow. Lines that begin with # are comments.",
    )
    admin_api_key: Keys = Field(
        (),
        description="Keys that may do everything, and alone may use the control routes, such as cancelling other "
        "requests (default: those routes are shut).",
    )
    metrics_key: bool = Field(False, description="Ask for a key at /metrics too.")
    cors_origins: Names = Field(
        (),
        description="Origins whose web pages may call the server, as https://example.org, with commas between them or "
        "the flag repeated; * is every origin (default: none).",
    )
    ssl_certfile: Path | None = Field(
        None, description="PEM file with the certificate, and the chain behind it; the server then speaks https only."
    )
    ssl_keyfile: Path | None = Field(
        None, description="PEM file with the certificate's key (default: it is in ssl_certfile)."
    )
    ssl_keyfile_password: SecretStr | None = Field(None, description="Password of an encrypted key.")
    ssl_ca_certs: Path | None = Field(
        None, description="PEM file with the authorities that clients' certificates are checked by."
    )
    ssl_cert_reqs: CertReqs = Field(
        0, description="Clients' certificates: 0 requests none, 1 checks one that is sent, 2 requires one."
    )
    root_path: Annotated[str, AfterValidator(_check_prefix)] = Field(
        "",
        description="Prefix that a proxy serves the server under, as /lpa; paths are taken with it and without it.",
    )
    proxy_headers: bool = Field(
        True, description="Take scheme and client from X-Forwarded-Proto and X-Forwarded-For of a trusted proxy."
    )
    forwarded_allow_ips: Annotated[Names, AfterValidator(_check_proxies)] = Field(
        (),
        description="Addresses and networks of trusted proxies, with commas between them or the flag repeated; * is "
        "every one, and the way to trust one behind a Unix socket (default: 127.0.0.1 and ::1).",
    )
    log_format: Literal["text", "json"] = Field("text", description="Log lines as text or as JSON objects.")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least level that is logged.")
    log_requests: bool = Field(True, description="Log a line for every request.")
    metrics_prefix: Literal["lpa", "vllm"] = Field(
        "lpa",
        description="Prefix of the names at /metrics. vllm: vLLM's own names, older ones too, for dashboards and "
        "routers that were made for it.",
    )
    otlp_traces_endpoint: str | None = Field(
        None,
        pattern=r"^https?://\S+$",
        description="URL that a trace of each request is sent to by OTLP over HTTP, as "
        "http://localhost:4318/v1/traces; needs the extra otel (default: none is made).",
    )

    def given(self) -> list[str]:
        """What is not a default, with where it comes from; keys are not told."""
        shown = {name: "..." if name in SECRET else str(getattr(self, name)) for name in self._origins}
        return [f"{name} = {shown[name]} ({origin})" for name, origin in self._origins.items()]

    @property
    def origins(self) -> Mapping[str, str]:
        """Where each setting that was given comes from, by its name."""
        return self._origins

    @property
    def replicas(self) -> tuple[int, int]:
        """The fewest and the most of them."""
        fewest, _, most = (self.ray_replicas or "1").partition(":")
        return int(fewest), int(most or fewest)

    @property
    def model_names(self) -> tuple[str, ...]:
        """All of the model's names in the API, at least one."""
        return self.served_model_name or (self.model.resolve().name,)

    @property
    def model_name(self) -> str:
        """The model's name in answers."""
        return self.model_names[0]

    @property
    def client_keys(self) -> tuple[ClientKey, ...]:
        """The keys that clients may send, beside the admin's; without any, none is needed."""
        of_flags = (client_key(key.get_secret_value()) for key in self.api_key)
        return (*of_flags, *(() if self.api_key_file is None else read_key_file(self.api_key_file)))

    def engine_options(self) -> EngineOptions:
        """The settings that the engine is built from."""
        from server.engine.engine import EngineOptions

        return EngineOptions(**{field.name: getattr(self, field.name) for field in dataclasses.fields(EngineOptions)})


GROUPS = {
    "model": "Model and address",
    "dtype": "How it is computed",
    "max_model_len": "Steps and cache",
    "max_queue": "Limits and times",
    "data_dir": "Batches",
    "ray_replicas": "Replicas",
    "api_key": "Keys and origins",
    "ssl_certfile": "TLS and proxies",
    "log_format": "Log, metrics and traces",
}
"""Headings of the settings in help and documents, by the first of each group in the order of `Settings`."""


SECRET = frozenset({"api_key", "admin_api_key", "ssl_keyfile_password"})


def named(setting: str) -> str:
    """A setting as errors name it, by its flag and its variable."""
    return f"--{setting.replace('_', '-')} ({ENV_PREFIX}{setting.upper()})"


def load_settings(**flags: Any) -> Settings:
    """Settings from flags, then LPA_ variables, then the file `config`, then defaults; None is no flag.

    Raises:
        SettingsError: values are invalid, or an LPA_ variable or an entry of the file is none of ours; a line for each
            names the flag and the variable, or the file, and the limit.
        ValueError: a model of the hub cannot be fetched or converted.
    """
    check_variables(os.environ)
    flags = {name: value for name, value in flags.items() if value is not None}
    variables = {name.upper(): name for name, value in os.environ.items() if value}
    of_variables = {name for name in Settings.model_fields if f"{ENV_PREFIX}{name.upper()}" in variables}
    config = flags.get("config") or os.environ.get(variables.get(f"{ENV_PREFIX}CONFIG", ""))
    in_file = {} if config is None else _read_config(Path(config))
    of_file = {name: value for name, value in in_file.items() if name not in flags and name not in of_variables}
    origins = {
        **dict.fromkeys(of_file, str(config)),
        **{name: f"{ENV_PREFIX}{name.upper()}" for name in of_variables},
        **dict.fromkeys(flags, "flag"),
    }
    try:
        settings = Settings(**of_file, **flags)
    except ValidationError as invalid:
        lines = [_explain(error, str(config) if error["loc"][0] in of_file else "") for error in invalid.errors()]
        raise SettingsError("\n".join(lines)) from None
    if (folder := local_model(settings.model)) != settings.model:
        names = settings.served_model_name or (str(settings.model),)
        settings = settings.model_copy(update={"model": folder, "served_model_name": names})
    settings._origins.update({name: origins[name] for name in Settings.model_fields if name in origins})
    return settings


def _read_config(path: Path) -> dict[str, Any]:
    """The settings of a TOML file; SettingsError if it cannot be read, or has an entry that is no setting."""
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise SettingsError(f"--config (LPA_CONFIG): {path}: {error.strerror}") from None
    except ValueError as error:  # of bytes that are not UTF-8, too
        raise SettingsError(f"--config (LPA_CONFIG): {path}: no TOML: {error}") from None
    known = set(Settings.model_fields) - {"config"}
    lines = []
    for name in found.keys() - known:
        close = difflib.get_close_matches(name.replace("-", "_"), known, 1)
        lines.append(f"{path}: {name} is no setting" + (f"; {close[0]} is one" if close else ""))
    if lines:
        raise SettingsError("\n".join(sorted(lines)))
    return found


def local_model(model: Path) -> Path:
    """The folder of a model: itself, or of one of the Hugging Face hub (OWNER/NAME) that in a cache.

    Raises:
        ValueError: it cannot be fetched or converted.
    """
    if model.exists():
        return model
    from lpa_model.convert.hub_name import check_available, hub_name

    if hub_name(str(model)) is None:
        return model
    check_available(str(model))
    from lpa_model.convert.hub import model_folder

    return model_folder(str(model), lambda line: print(f"lpa: {line}", file=sys.stderr))


def check_variables(environment: Mapping[str, str]) -> None:
    """Refuse LPA_ variables that name no setting: a misspelt LPA_API_KEY would leave the server open.

    Raises:
        SettingsError: there are some; each has a line, with the setting that may have been meant.
    """
    known = [f"{ENV_PREFIX}{name.upper()}" for name in Settings.model_fields] + [*OF_KERNELS]
    lines = []
    for name in sorted(environment):
        if name.upper().startswith(ENV_PREFIX) and name.upper() not in known and not OF_KUBERNETES.fullmatch(name):
            close = difflib.get_close_matches(name.upper(), known, 1)
            meant = f"; {close[0]} is one" if close else "; `lpa serve --help` lists all"
            lines.append(f"{name}: is a variable of no setting{meant}")
    if lines:
        raise SettingsError("\n".join(lines))


def _explain(error: Any, file: str = "") -> str:
    """An error of pydantic's about a setting, of a file if one is named."""
    name = str(error["loc"][0])
    value = "" if name in SECRET else f", not {error['input']!r}"
    message = error["msg"].removeprefix("Value error, ")
    reason = message[:1].lower() + message[1:]
    where = f"{file}: {name}" if file else named(name)
    return f"{where}: {reason}{value}"
