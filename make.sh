#!/bin/sh
# make, also where it is not installed yet: ./make.sh TARGET is make TARGET.
set -eu
cd "$(dirname "$0")"
if ! command -v make >/dev/null 2>&1; then
	echo "make.sh: installing make"
	export DEBIAN_FRONTEND=noninteractive
	apt-get install -qq -y --no-install-recommends make >/dev/null 2>&1 || {
		apt-get update -qq
		apt-get install -qq -y --no-install-recommends make >/dev/null
	}
fi
exec make "$@"
