#!/usr/bin/env bash
# Builds the image, runs it locked down, asks it everything once and stops it in the middle of a stream; prints "ok".
# Needs docker and python3. Variables:
#   DOCKER            the client (docker)
#   DOCKER_BUILD_ARGS more options for `docker build`, DOCKER_RUN_ARGS for `docker run`; on an engine without a bridge
#                     both are "--network=host"
#   PORT              port on 127.0.0.1 (8123)
# The image lpa-smoke and the container are removed at the end; the build cache stays.
set -euo pipefail
cd "$(dirname "$0")/.."

docker=${DOCKER:-docker}
port=${PORT:-8123}
image=lpa-smoke
container=lpa-smoke-$$
drain_timeout=90 # seconds; a slow machine may need them for the stream
stop_timeout=105
read -ra build_args <<<"${DOCKER_BUILD_ARGS:-}"
read -ra run_args <<<"${DOCKER_RUN_ARGS:-}"
export DOCKER_BUILDKIT=1 # the default of newer engines; the Dockerfile uses cache mounts

cleanup() {
    status=$?
    trap - EXIT
    if ((status != 0)); then
        echo "failed; the server's log:" >&2
        "$docker" logs --tail 50 "$container" >&2 || true
    fi
    "$docker" rm --force "$container" >/dev/null 2>&1 || true
    "$docker" rmi "$image" >/dev/null 2>&1 || true
    exit "$status"
}
trap cleanup EXIT
trap 'exit 130' INT TERM

fail() {
    echo "smoke: $*" >&2
    exit 1
}

"$docker" build ${build_args[@]+"${build_args[@]}"} -f docker/Dockerfile -t "$image" .

"$docker" run --detach --name "$container" --read-only --tmpfs /tmp --cap-drop ALL --security-opt no-new-privileges \
    --env LPA_PORT="$port" --env LPA_DRAIN_TIMEOUT="$drain_timeout" --publish "127.0.0.1:$port:$port" \
    ${run_args[@]+"${run_args[@]}"} "$image" >/dev/null

[[ $("$docker" exec "$container" id -u) != 0 ]] || fail "the container runs as root"
! "$docker" exec "$container" touch /opt/lpa/x 2>/dev/null || fail "the root is not read-only"

python3 - "http://127.0.0.1:$port" <<'PYTHON'
import json
import math
import sys
import time
import urllib.error
import urllib.request

url = sys.argv[1]


def get(path):
    with urllib.request.urlopen(url + path, timeout=60) as response:
        return response.read().decode()


def post(path, body):
    request = urllib.request.Request(url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)


deadline = time.monotonic() + 180
while True:
    try:
        get("/ready")
        break
    except (urllib.error.URLError, ConnectionError) as error:
        if time.monotonic() > deadline:
            sys.exit(f"smoke: not ready after 180 s: {error}")
        time.sleep(0.5)

model = json.loads(get("/v1/models"))["data"][0]["id"]
completion = post("/v1/completions", {"model": model, "prompt": "Once upon a time", "max_tokens": 16, "ignore_eos": True})
assert completion["usage"]["completion_tokens"] == 16, completion
print("completion:", repr(completion["choices"][0]["text"]))
scored = post("/v1/perplexity", {"model": model, "input": "There was a little girl who had a red ball."})["data"][0]
assert math.isclose(scored["perplexity"], math.exp(scored["nll_sum"] / scored["num_tokens"]), rel_tol=1e-3), scored
print("perplexity:", scored["perplexity"])
metrics = get("/metrics")
for name in ("lpa:num_requests_running", "lpa:kv_cache_usage_perc", "lpa:generation_tokens_total", "lpa:request_success_total"):
    assert name in metrics, f"{name} is not in /metrics"
PYTHON

for ((i = 0; i < 60; i++)); do
    health=$("$docker" inspect --format '{{.State.Health.Status}}' "$container")
    [[ $health == starting ]] || break
    sleep 1
done
[[ $health == healthy ]] || fail "Docker's health check says $health"

# a stream that is running when the container is told to stop comes to its end, and the server leaves with 0
python3 - "http://127.0.0.1:$port" "$docker" "$container" "$stop_timeout" <<'PYTHON'
import json
import subprocess
import sys
import time
import urllib.request

url, docker, container, stop_timeout = sys.argv[1:]
with urllib.request.urlopen(url + "/v1/models", timeout=60) as response:
    model = json.load(response)["data"][0]["id"]
body = {"model": model, "prompt": "Once upon a time", "max_tokens": 500, "ignore_eos": True, "stream": True}
request = urllib.request.Request(
    url + "/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
)
with urllib.request.urlopen(request, timeout=60) as stream:
    first = stream.readline()
    started = time.monotonic()
    stop = subprocess.Popen([docker, "stop", "--time", stop_timeout, container], stdout=subprocess.DEVNULL)
    lines = [first, *stream]
finished = time.monotonic() - started
assert b"data: [DONE]\n" in lines, f"the stream broke off after {len(lines)} lines: {lines[-1:]}"
assert stop.wait() == 0
print(f"the stream ended {finished:.1f} s and the container {time.monotonic() - started:.1f} s after `docker stop`")
PYTHON
code=$("$docker" inspect --format '{{.State.ExitCode}}' "$container")
[[ $code == 0 ]] || fail "the server left with exit code $code"

echo ok
