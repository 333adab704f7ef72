#!/usr/bin/env bash
# The README's commands on a minimal Debian, from nothing: a root with python3, python3-venv, make, git and certificates.
#
#   tests/bare.sh [--tests] [--keep] [bookworm] [trixie] [...]
#
# Makes a root per suite with debootstrap and clones the committed project into it. There it runs the set-up of
# `make demo`, the smoke run, `make setup-vllm` and a test of real vLLM, and with --tests also `make test`. The host lends
# nothing but its kernel, its certificates and its name server: no package setting, no compiler, no library. Set-up has
# the network; what runs after it has a loopback of its own and no network at all. Prints the seconds of each step and
# the sizes. Needs root, debootstrap and about 8 GB a suite under ${BARE_DIR:-/tmp}; --keep leaves the roots there.
# TORCH=cpu in the environment asks make for the CPU build of torch.
set -euo pipefail

project=$(cd "$(dirname "$0")/.." && pwd)
base=${BARE_DIR:-/tmp}
tests=no keep=no suites=()
for word in "$@"; do
	case $word in
	--tests) tests=yes ;;
	--keep) keep=yes ;;
	-*) echo "bare.sh: $word: --tests or --keep" >&2; exit 2 ;;
	*) suites+=("$word") ;;
	esac
done
[ ${#suites[@]} -gt 0 ] || suites=(bookworm trixie)
[ "$(id -u)" = 0 ] || { echo "bare.sh: needs root for debootstrap and chroot" >&2; exit 2; }
command -v debootstrap >/dev/null || { echo "bare.sh: apt-get install debootstrap" >&2; exit 2; }

# inside ROOT host|alone COMMAND...: run as in a container. Nothing of the host's environment or file system is there.
inside() {
	local root=$1 network=$2
	shift 2
	local spaces=(--mount --pid --ipc --uts --fork --kill-child)
	[ "$network" = host ] || spaces+=(--net)
	# shellcheck disable=SC2016
	unshare "${spaces[@]}" bash -ec '
		root=$1; shift
		[ "$1" = host ] || ip link set lo up
		shift
		echo bare >/proc/sys/kernel/hostname
		mount --make-rprivate /
		mount -t proc proc "$root/proc"
		mount -t sysfs -o ro sysfs "$root/sys"
		mount -t tmpfs -o mode=755 tmpfs "$root/dev"
		for node in null:3 zero:5 full:7 random:8 urandom:9; do
			mknod -m 666 "$root/dev/${node%:*}" c 1 "${node#*:}"
		done
		mknod -m 666 "$root/dev/tty" c 5 0
		ln -s /proc/self/fd "$root/dev/fd"
		ln -s fd/0 "$root/dev/stdin"; ln -s fd/1 "$root/dev/stdout"; ln -s fd/2 "$root/dev/stderr"
		mkdir "$root/dev/pts" "$root/dev/shm"
		mount -t devpts -o newinstance,ptmxmode=0666,mode=620 devpts "$root/dev/pts"
		ln -s pts/ptmx "$root/dev/ptmx"
		mount -t tmpfs -o mode=1777 tmpfs "$root/dev/shm"
		exec chroot "$root" /usr/bin/env -i HOME=/root PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
			LANG=C.UTF-8 TERM=dumb PIP_CONFIG_FILE=/dev/null "$@"
	' inside "$root" "$network" "$@" </dev/null
}

# step NAME COMMAND...: run it, print its seconds, stop at the first failure.
step() {
	local name=$1 began=$SECONDS
	shift
	"$@" || { echo "$suite: FAILED $name after $((SECONDS - began)) s" >&2; exit 1; }
	echo "$suite: ok $name, $((SECONDS - began)) s"
}

make_root() {
	# mktemp's folder is its owner's alone, and other users of the root, such as PostgreSQL's, could not enter "/".
	chmod 755 "$root"
	debootstrap --variant=minbase --include=python3,python3-venv,make,git,ca-certificates "$suite" "$root" >"$root.log" 2>&1 \
		|| { tail -n 20 "$root.log" >&2; return 1; }
	# The host may trust more authorities than Debian does, and has the names' server.
	cat /etc/ssl/certs/ca-certificates.crt >"$root/etc/ssl/certs/ca-certificates.crt"
	cat /etc/resolv.conf >"$root/etc/resolv.conf"
	echo "127.0.0.1 localhost bare" >"$root/etc/hosts"
	rm "$root.log"
}

for suite in "${suites[@]}"; do
	root=$(mktemp -d "$base/bare-$suite-XXXXXX")
	[ $keep = yes ] || trap 'rm -rf --one-file-system "$root"' EXIT
	in_project() { inside "$root" "$1" sh -ec "cd /root/mopd && $2"; }
	step "minimal root" make_root
	step "clone" git clone --quiet --no-hardlinks "$project" "$root/root/mopd"
	inside "$root" alone sh -c '. /etc/os-release; echo "$PRETTY_NAME, $(python3 --version)"; ! command -v gcc'
	step "set-up of make demo" in_project host "make setup ${TORCH:+TORCH=$TORCH}"
	step "smoke run" in_project alone ".venv/bin/mopd run flows/runs/smoke.yaml"
	du -sh "$root/root/mopd/.venv" | sed "s/^/$suite: /"
	step "make setup-vllm" in_project host "make setup-vllm"
	step "one test of real vLLM" in_project alone \
		"HF_HUB_OFFLINE=1 .venv/bin/python -m pytest -q tests/integration/vllm/test_vllm_engine.py"
	if [ $tests = yes ]; then
		step "set-up of make test" in_project host "make setup-vllm setup-harness setup-stores setup-bitsandbytes setup-browser"
		step "make test" in_project alone "make test"
	fi
	du -sh "$root" "$root/root/mopd/.venv" | sed "s/^/$suite: /"
	[ $keep = yes ] && echo "$suite: kept at $root" || { rm -rf --one-file-system "$root"; trap - EXIT; }
done
