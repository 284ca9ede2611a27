#!/usr/bin/env bash
# The tests on aarch64 with a torch of one's choice, emulated: PyPI's torch 2.8 to 2.10 for aarch64 are CPU builds.
# usage: tests/aarch64.sh FOLDER TORCH [pytest arguments]; a FOLDER made before is used again. Needs root, a network,
# debootstrap, and qemu-user-static with its entry in binfmt_misc.
set -euo pipefail
[ $# -ge 2 ] || { sed -n 3,4p "$0" | cut -c3- >&2; exit 2; }
mkdir -p "$1"
root=$(cd "$1" && pwd) torch=$2
shift 2
cd "$(dirname "$0")/.."
export QEMU_CPU=neoverse-n1 OMP_NUM_THREADS=1 # without SVE, whose emulation is slow; torch 2.10 needs what it has

if [ ! -x "$root/usr/bin/python3" ]; then
  debootstrap --arch=arm64 --variant=minbase --include=python3-dev,python3-venv,g++,git,ca-certificates trixie "$root"
fi
cp /etc/hosts /etc/resolv.conf /etc/ssl/certs/ca-certificates.crt "$root/root/"
inside() { # in namespaces of its own, so that nothing stays mounted
  unshare --mount --propagation private bash -euc '
    mount -t proc proc "$0/proc"; mount --rbind /dev "$0/dev"; mount -t tmpfs tmpfs "$0/dev/shm"
    cp "$0/root/hosts" "$0/root/resolv.conf" "$0/etc/"; cp "$0/root/ca-certificates.crt" "$0/etc/ssl/certs/"
    exec chroot "$0" "$@"' "$root" env PATH=/usr/bin:/bin HOME=/root GRADEXT_CUDA=0 "$@"
}

rm -rf "$root/root/gradext"
mkdir -p "$root/root/gradext"
git ls-files -co --exclude-standard -z | xargs -0 cp --parents -t "$root/root/gradext"
inside python3 -m venv "/root/torch-$torch"
inside "/root/torch-$torch/bin/pip" install --quiet "torch==$torch" "/root/gradext[test]"
inside env -C /root/gradext "/root/torch-$torch/bin/python" -m pytest "$@"
