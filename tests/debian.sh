#!/bin/sh
# Installs the FreeDict dictionaries and the Slurm that tests use, where that takes no more than asking: root and apt-get.
set -eu
missing=""
for pair in swh-eng fra-eng; do
    [ -e "/usr/share/dictd/freedict-$pair.index" ] || missing="$missing dict-freedict-$pair"
done
for program in sbin/munged:munge sbin/slurmctld:slurmctld sbin/slurmd:slurmd bin/sbatch:slurm-client; do
    [ -e "/usr/${program%:*}" ] || missing="$missing ${program#*:}"
done
[ -n "$missing" ] || exit 0

install() { # unquoted on purpose: one word a package
    DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $missing >/dev/null 2>&1
}

if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    install && exit 0
    if apt-get update -qq >/dev/null 2>&1 && install; then exit 0; fi
fi
echo "tests/debian.sh: not installed:$missing; the tests that read FreeDict or use Slurm will be skipped"
