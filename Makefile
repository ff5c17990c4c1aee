# The two commands of a newcomer: `make demo` and `make test` (./make.sh demo where make is not installed yet).
# Both set up what they need first; CONTRIBUTING.md and docs/testing.md tell more.
PYTHON := .venv/bin/python

# More for podman build, such as another base or pip's settings: docs/testing.md, "The image".
IMAGE_FLAGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo test check format bench accept image clean distclean

help:
	@echo "make setup    install what is missing (Debian packages, .venv, compiled parts)"
	@echo "make demo     two RDMA pods, end to end"
	@echo "make test     the whole test suite, with make check"
	@echo "make check    ruff, mypy, clang-format"
	@echo "make format   let ruff and clang-format write"
	@echo "make bench    every path against what else there is: [ONLY=cni,rdma] [QUICK=1: 10 minutes] [KEEP=1: into RESULTS.md]"
	@echo "make accept   the slow proofs, at full size: [ONLY=rdma] [ROWS=pool,ucx]"
	@echo "make image    the container image of agent and command line"
	@echo "make clean    remove what was built, keep downloads; make distclean removes those too"

setup:
	@bash testbed/setup.sh

demo: setup
	@$(PYTHON) -m testbed.demo

test: setup
	@$(PYTHON) -m testbed.suite

check: setup
	@$(PYTHON) -m testbed.suite --only check

format: setup
	@.venv/bin/ruff format . && .venv/bin/ruff check --fix . && .venv/bin/clang-format -i bpf/*.[ch] cni/*.[ch] benchmarks/*.c

bench: setup
	@$(PYTHON) -m benchmarks.bench --only "$(ONLY)" --effort $(if $(QUICK),quick,full) $(if $(KEEP),--keep)

accept: setup
	@$(PYTHON) -m benchmarks.accept --only "$(ONLY)" --rows "$(ROWS)"

image:
	podman build --format docker --network host --cap-add CAP_SYS_ADMIN $(IMAGE_FLAGS) -t rdmanet:test .

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
	find build -mindepth 1 -maxdepth 1 ! -name cache -exec rm -rf {} + 2>/dev/null || true

distclean: clean
	rm -rf build
