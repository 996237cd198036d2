#!/bin/sh
# Installs the Debian packages that tests need, where that takes no more than asking: root and apt-get.
set -eu
missing=""
need() { # package, and how to see that it is there
    package=$1
    shift
    "$@" >/dev/null 2>&1 || missing="$missing $package"
}
for pair in swh-eng fra-eng; do
    need "dict-freedict-$pair" test -e "/usr/share/dictd/freedict-$pair.index"
done
need chromium command -v chromium
need chromium-driver command -v chromedriver
need postgresql sh -c 'ls /usr/lib/postgresql/*/bin/initdb'
for program in sbin/munged:munge sbin/slurmctld:slurmctld sbin/slurmd:slurmd bin/sbatch:slurm-client; do
    need "${program#*:}" test -e "/usr/${program%:*}"
done
[ -n "$missing" ] || exit 0

install() { # unquoted on purpose: one word a package
    DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $missing >/dev/null 2>&1
}

if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    install && exit 0
    if apt-get update -qq >/dev/null 2>&1 && install; then exit 0; fi
fi
echo "tests/debian.sh: not installed:$missing; the tests that need them will be skipped"
