#!/bin/bash
# Makes this checkout ready: missing Debian packages, .venv on the distribution's Python (its bcc and pyverbs
# are visible there), the CNI executable, the datapath artifact. Quick when there is nothing to do.
# Nothing else of the machine changes: no apt sources, no kernel or header packages.
set -euo pipefail
cd "$(dirname "$0")/.."
export DEBIAN_FRONTEND=noninteractive LC_ALL=C.UTF-8 APT_LISTCHANGES_FRONTEND=none NEEDRESTART_MODE=a
python=/usr/bin/python3
unset PYTHONHOME PYTHONPATH

say() { echo "setup: $*"; }

# step SENTENCE COMMAND...: says what happens while it happens, keeps the output for when it fails.
step() {
	local sentence=$1 began=$SECONDS log
	shift
	log=$(mktemp)
	say "$sentence ..."
	"$@" >"$log" 2>&1 </dev/null &
	local job=$! status=0
	while ! timeout 10 tail --pid="$job" -f /dev/null; do say "$sentence ... $((SECONDS - began)) s"; done
	wait "$job" || status=$?
	if [ "$status" -ne 0 ]; then
		tail -n 60 "$log"
		say "$sentence failed (status $status); the last lines are above"
		rm -f "$log"
		exit 1
	fi
	rm -f "$log"
	say "$sentence: $((SECONDS - began)) s"
}

packages() {
	# Python with eBPF and verbs; a compiler for the CNI executable
	echo python3 python3-venv python3-bpfcc python3-pyverbs gcc libc6-dev musl-tools make
	# user space of network and RDMA, and the unmodified programs that the tests run
	echo iproute2 iputils-ping kmod procps curl rdma-core ibverbs-providers ibverbs-utils rdmacm-utils perftest iperf3
	# UCX and MPI over it, and the tests of rdma-core itself (python3-pyverbs has them among its documentation)
	echo ucx-utils openmpi-bin python3-mpi4py
	# what benchmarks/ compares with, and chains behind our plugin
	echo containernetworking-plugins iptables ipvsadm
	# container runtimes, and what their test images are made of
	echo podman runc conmon containerd busybox-static mmdebstrap
	# the test kernel and its virtual machine
	if ! kernel_has_rxe; then echo qemu-system-x86 cpio zstd e2fsprogs; fi
}

# Only where the running kernel can give a namespace its own rxe is no virtual machine needed (7.1 and later).
kernel_has_rxe() {
	local major minor
	IFS=.- read -r major minor _ < <(uname -r)
	((major > 7 || (major == 7 && minor >= 1))) || return 1
	[ -d /sys/module/rdma_rxe ] || { command -v modprobe >/dev/null && modprobe -q rdma_rxe; }
}

missing_packages() {
	local package
	for package in $(packages); do
		[ "$(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || echo "$package"
	done
}

# Tests start the daemons that they need, hidden from the machine: none is started here (invoke-rc.d(8)).
install_packages() {
	local policy=/usr/sbin/policy-rc.d
	if [ ! -e "$policy" ]; then
		trap 'rm -f '"$policy" EXIT
		printf '#!/bin/sh\nexit 101\n' >"$policy"
		chmod 755 "$policy"
	fi
	apt-get install -q -y --no-install-recommends -o Dpkg::Use-Pty=0 -o DPkg::Lock::Timeout=300 -o Dpkg::Options::=--force-confold "$@"
}

virtual_environment() {
	rm -rf .venv
	"$python" -m venv --system-site-packages .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-input -e '.[dev]'
}

# made STAMP: whether the stamp says that it was made from what is here now.
made() { [ -f "$1" ] && [ "$(cat "$1")" = "$2" ]; }
hash_of() { cat "$@" | sha256sum | cut -d' ' -f1; }

if ! command -v dpkg-query >/dev/null; then
	say "this is not Debian: install the packages of testbed/setup.sh (packages()) in your distribution's way"
	exit 1
fi
mapfile -t missing < <(missing_packages)
if [ "${#missing[@]}" -gt 0 ]; then
	if [ "$(id -u)" -ne 0 ]; then
		say "missing packages, and only root can install them: ${missing[*]}"
		exit 1
	fi
	step "reading package lists" apt-get update -q
	say "missing packages: ${missing[*]}"
	step "installing ${#missing[@]} packages and what they need" install_packages "${missing[@]}"
fi

mkdir -p build
stamp="$("$python" -V) $(pwd) $(hash_of pyproject.toml testbed/setup.sh)"
if ! made .venv/made-from "$stamp"; then
	step "making .venv with rdmanet and its tools" virtual_environment
	echo "$stamp" >.venv/made-from
fi

step_if_changed() { # SENTENCE STAMP HASH COMMAND...
	local sentence=$1 file=$2 hash=$3
	shift 3
	made "$file" "$hash" && return
	step "$sentence" "$@"
	echo "$hash" >"$file"
}

# Slim systems leave /usr/share/doc out: then from the package itself.
unpack_rdma_core_tests() {
	local scratch=build/rdma-core-tests.new
	rm -rf "$scratch"
	mkdir "$scratch"
	(
		cd "$scratch"
		apt-get download -q python3-pyverbs || { apt-get update -q && apt-get download -q python3-pyverbs; }
		dpkg-deb -x python3-pyverbs_*.deb tree
	)
	rm -rf build/rdma-core-tests
	mv "$scratch/tree/usr/share/doc/rdma-core/tests" build/rdma-core-tests
	rm -rf "$scratch"
}
build_cni() { make -C cni OUT=../build/cni; }
build_load() { make -C benchmarks OUT=../build/bench; }
build_artifact() {
	local source
	source=$(.venv/bin/python -m testbed.headers)
	BCC_KERNEL_SOURCE=$source .venv/bin/python -m rdmanet.datapath.compiler --output build/artifact
}

[ -x build/cni/rdmanet ] || rm -f build/cni.made-from
[ -x build/bench/netload ] || rm -f build/bench.made-from
[ -d build/artifact ] || rm -f build/artifact.made-from
step_if_changed "compiling the CNI executable" build/cni.made-from "$(hash_of cni/*.[ch] cni/Makefile)" build_cni
step_if_changed "compiling the benchmarks' load program" build/bench.made-from \
	"$(hash_of benchmarks/*.c benchmarks/Makefile)" build_load
step_if_changed "compiling the datapath" build/artifact.made-from \
	"$(hash_of bpf/*.[ch] rdmanet/datapath/*.py)" build_artifact
[ -e /usr/share/doc/rdma-core/tests/run_tests.py ] ||
	step_if_changed "unpacking rdma-core's tests" build/rdma-core-tests.made-from \
		"$(dpkg-query -W python3-pyverbs)" unpack_rdma_core_tests
