"""Several servers behind one address: what each of them needs of the others, and what none of them can do."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import Any, NamedTuple

from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from server.settings import Settings, named

Others = Callable[..., Awaitable[list[Any]]]
"""Calls a method, given by its name and arguments, of every other replica; their answers. Raises Unavailable."""


class Replicas(NamedTuple):
    """The replicas of a deployment, seen from one of them."""

    name: str  # of this one, the label `replica` in metrics
    others: Others


async def no_others(_: str, *__: Any) -> list[Any]:
    """`Others` of a server that is alone."""
    return []


NO_STORE = "responses are not kept: each replica has a memory of its own"
REFUSED = {
    "data_dir": "files and batches need one server that has their folder",
    "max_stored_responses": NO_STORE,
    "max_stored_bytes": NO_STORE,
    **dict.fromkeys(
        (
            *("header_timeout", "body_timeout", "max_connections", "uds"),
            *("ssl_certfile", "ssl_keyfile", "ssl_keyfile_password", "ssl_ca_certs", "ssl_cert_reqs"),
            *("proxy_headers", "forwarded_allow_ips"),
        ),
        "connections are Ray's",
    ),
}
"""Settings that do not go with `ray_replicas`, and why."""


def check_replicated(settings: Settings) -> None:
    """Raises ValueError where a setting was given that replicas cannot honour; the message names it."""
    for name, reason in REFUSED.items():
        if name in settings.origins:
            raise ValueError(f"{named(name)}: does not go with --ray-replicas: {reason}")
    if settings.device not in ("cpu", "cuda"):
        raise ValueError(
            f"{named('device')}: with --ray-replicas it is cpu or cuda: Ray gives each replica its own GPU"
        )


def labelled(replica: str, families: Iterable[Metric]) -> list[Metric]:
    """The metrics of one replica, with its name as a label of each sample."""
    found = []
    for family in families:
        copy = Metric(family.name, family.documentation, family.type, family.unit)
        copy.samples = [sample._replace(labels={**sample.labels, "replica": replica}) for sample in family.samples]
        found.append(copy)
    return found


class Merged(Collector):
    """The metrics of several replicas as one page: each name once, with the samples of all."""

    def __init__(self, pages: Iterable[Iterable[Metric]]) -> None:
        self._families: dict[str, Metric] = {}
        for page in pages:
            for family in page:
                known = self._families.setdefault(
                    family.name, Metric(family.name, family.documentation, family.type, family.unit)
                )
                known.samples.extend(family.samples)

    def collect(self) -> Iterable[Metric]:
        """Every metric."""
        return self._families.values()
