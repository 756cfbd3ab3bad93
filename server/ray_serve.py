"""The same application as a deployment of Ray Serve: `lpa serve --ray-replicas N`, or `serve run server.ray_serve:app`.

Needs the extra `ray`. Each replica is an actor that loads the model and runs the whole application. Ray's proxies hold
the connections, choose the replica, and replace one that has died.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import re
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray
from fastapi import FastAPI
from prometheus_client.metrics_core import Metric
from ray import serve

from lpa_model.checkpoint import load_config
from server.app import create_app
from server.engine.async_engine import AsyncEngine
from server.engine.engine import build_engine
from server.errors import Unavailable
from server.listen import listeners
from server.logs import configure_logging
from server.metrics import Metrics
from server.replicas import Replicas, check_replicated, labelled
from server.routes.control import set_log_level
from server.serve import greeting, own_process
from server.settings import Settings, load_settings

logger = logging.getLogger(__name__)

APP = "lpa"
DEPLOYMENT = "LPA"
ANSWER_TIMEOUT = 5.0  # seconds that the other replicas get to answer
SPARE_REQUESTS = 64  # a replica takes so many more than its engine: probes, scrapes, and those that a 429 awaits
HEALTH_PERIOD = 2.0  # seconds; three failures in a row replace a replica
END_MARGIN = 5.0  # seconds that a replica gets beyond the drain
POLL_INTERVAL = 5.0  # seconds between looks at the cluster
OBJECT_STORE = 200 << 20  # bytes of a local cluster's; only bodies beyond 100 KB pass through it


class Replica:
    """One replica: the application, and what the others call of it."""

    def __init__(self, settings: Settings) -> None:
        """Load the model.

        Raises:
            CheckpointError, ValueError: the model or a setting cannot be used; the message names it.
        """
        configure_logging(settings)
        context = serve.get_replica_context()
        self._name = context.replica_id.unique_id
        self._handle = serve.get_deployment_handle(context.deployment, context.app_name)
        self._settings = settings
        self._metrics = Metrics(settings.model_name, settings.metrics_prefix)
        self._engine = AsyncEngine(
            build_engine(settings.model, settings.engine_options()), self._metrics.observe, max_queue=settings.max_queue
        )
        self._app = create_app(self._engine, settings, self._metrics, Replicas(self._name, self._others))
        self._collecting = ThreadPoolExecutor(1, "collect")  # a scrape must not wait for texts that are tokenized
        own_process()

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._app

    async def check_health(self) -> None:
        """Ray replaces the replica when this raises."""
        if not self._engine.alive:
            raise RuntimeError("the engine has died")

    async def _others(self, method: str, *arguments: Any) -> list[Any]:
        """The answers of a method of every other replica; one that dies meanwhile gives none."""
        asked = self._handle.broadcast("answer", self._name, method, *arguments)
        try:
            found = await asked.results_async(timeout_s=ANSWER_TIMEOUT, return_exceptions=True)
        except TimeoutError:
            raise Unavailable(f"a replica has not answered in {ANSWER_TIMEOUT:g} seconds") from None
        for error in found:
            if isinstance(error, Exception):
                logger.warning("a replica has not answered: %s", error)
        return [answer for answer in found if answer is not None and not isinstance(answer, Exception)]

    async def answer(self, asking: str, method: str, *arguments: Any) -> Any:
        """What another replica, or the process that has started them, wants to know; None for the asking one."""
        return None if asking == self._name else await getattr(self, method)(*arguments)

    async def cancel(self, request_id: str) -> int:
        """As `Running.cancel`."""
        found: int = self._app.state.running.cancel(request_id)
        return found

    async def reset_prefix_cache(self) -> int:
        """As `AsyncEngine.reset_prefix_cache`."""
        return await self._engine.reset_prefix_cache()

    async def set_log_level(self, level: str) -> str:
        """As the route's."""
        return set_log_level(level)

    async def metrics(self) -> list[Metric]:
        """All metrics, with this replica's name."""
        self._metrics.set_tasks(len(asyncio.all_tasks()))
        loop, registry = asyncio.get_running_loop(), self._metrics.registry
        return await loop.run_in_executor(self._collecting, lambda: labelled(self._name, registry.collect()))

    async def drain(self) -> int:
        """Refuse new requests and give the others `drain_timeout` seconds; the number that were cut off."""
        await self._engine.stop(self._settings.drain_timeout)
        return self._engine.num_cut_off


def application(settings: Settings) -> serve.Application:
    """The deployment, with replicas as the settings have them.

    Raises:
        ValueError: a setting does not go with replicas, or the cluster has too few processors for them.
    """
    check_replicated(settings)
    fewest, most = settings.replicas
    threads = settings.threads or _share(most)
    # nothing is kept from one request to the next, which may reach another replica
    settings = settings.model_copy(update={"threads": threads, "max_stored_responses": 0})
    autoscaling = {
        "min_replicas": fewest,
        "max_replicas": most,
        "target_ongoing_requests": settings.max_num_seqs,  # of a replica; beyond them requests wait
    }
    replicas = {"num_replicas": fewest} if fewest == most else {"autoscaling_config": autoscaling}
    deployment = serve.deployment(
        serve.ingress()(Replica),
        name=DEPLOYMENT,
        ray_actor_options={"num_cpus": threads, "num_gpus": int(settings.device == "cuda")},
        max_ongoing_requests=settings.max_num_seqs + settings.max_queue + SPARE_REQUESTS,
        graceful_shutdown_timeout_s=settings.drain_timeout + END_MARGIN,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=HEALTH_PERIOD,
        max_constructor_retry_count=2,
        logging_config={"enable_access_log": False},  # the application has its own
        **replicas,
    )
    return deployment.bind(settings)


def app(arguments: dict[str, Any]) -> serve.Application:
    """For `serve run server.ray_serve:app NAME=VALUE ...` and the `args` of Serve's config file: settings by their
    names, before LPA_ variables. The address is that of Serve's own `http_options`."""
    settings = load_settings(**arguments)
    if settings.ray_replicas is None:
        settings = settings.model_copy(update={"ray_replicas": "1"})
    for name in {"host", "port", "keep_alive_timeout"} & settings.origins.keys():
        logger.warning("%s has no effect: Serve's http_options have it", name)
    return application(settings)


def _share(replicas: int) -> int:
    """Processors of each of so many replicas on the cluster's nodes."""
    nodes = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    for processors in range(max(nodes, default=0), 0, -1):
        if sum(node // processors for node in nodes) >= replicas:
            return processors
    raise ValueError(
        f"--ray-replicas (LPA_RAY_REPLICAS): the cluster has {sum(nodes)} processors, too few for {replicas} replicas; "
        "name fewer, or say by --threads how many each of them reserves, where the cluster grows by itself"
    )


def serve_replicas(settings: Settings) -> int:
    """Serve on the cluster that RAY_ADDRESS names, or else on one of its own, until a signal comes or the application
    is gone; returns the process's exit status.

    Raises:
        ValueError: a setting cannot be used, or no replica has started; the message says why.
    """
    configure_logging(settings)
    for line in settings.given():
        logger.info("setting: %s", line)
    port, own_cluster = _connect(settings)
    try:
        return _serve(settings, port)
    finally:
        if own_cluster:
            serve.shutdown()
        ray.shutdown()


def _connect(settings: Settings) -> tuple[int, bool]:
    """Start Serve; its port, and whether the cluster ends with this process."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address, port = os.environ.get("RAY_ADDRESS", ""), settings.port
    own_cluster = address in ("", "local")
    if own_cluster:
        load_config(settings.model)  # a mistake is told now, and not by each replica
        taken = listeners(settings.host, port)  # Ray would only log that the port is not free
        port = taken[0].getsockname()[1]
        for listener in taken:
            listener.close()
        ray.init("local", include_dashboard=False, object_store_memory=OBJECT_STORE)
    else:
        try:
            ray.init(address)
        except ConnectionError as error:
            raise ValueError(f"RAY_ADDRESS: there is no cluster at {address}: {error}") from None
    keep_alive = math.ceil(settings.keep_alive_timeout)
    serve.start(http_options={"host": settings.host, "port": port, "keep_alive_timeout_s": keep_alive})
    return port, own_cluster


def _serve(settings: Settings, port: int) -> int:
    try:
        handle = serve.run(application(settings), name=APP)
    except RuntimeError:  # its own message has nothing of what the replicas have met
        reason = _failure()
        serve.delete(APP)
        raise ValueError(reason) from None
    ended = threading.Event()
    _on_signals(ended)
    print(greeting(settings, port), flush=True)
    while not ended.wait(POLL_INTERVAL):
        if APP not in serve.status().applications:
            logger.error("the application is gone from the cluster")
            return 1
    draining = handle.broadcast("answer", "", "drain")
    try:
        cut_off = draining.results(timeout_s=settings.drain_timeout + END_MARGIN, return_exceptions=True)
    except TimeoutError:
        cut_off = ["a replica does not answer"]
    serve.delete(APP)
    return 0 if all(number == 0 for number in cut_off) else 1


def _on_signals(ended: threading.Event) -> None:
    """The first one sets the event, a second one ends the process at once."""

    def end(*_: object) -> None:
        if ended.is_set():
            logging.shutdown()
            os._exit(1)
        ended.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)


def _failure() -> str:
    """Why no replica has started: the last line of what Ray tells of it, the end of a traceback."""
    found = serve.status().applications.get(APP)
    told = [] if found is None else [found.message, *(deployment.message for deployment in found.deployments.values())]
    lines = [line.strip() for line in "\n".join(told).splitlines() if line.strip()]
    return re.sub(r"^[\w.]*Error: ", "", lines[-1]) if lines else "no replica has started; Ray's logs say why"
