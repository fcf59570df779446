#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Runs a command in a Debian 13 that lies in a directory, on this machine's kernel: its libc, VMM and programs are not
# Debian 12's. The checkout is at /vmckpt there; build directories are the root's own, and last between runs.
#
#     scripts/in-debian13.sh scripts/test.sh --part      what depends on libc, VMM and programs
#     scripts/in-debian13.sh scripts/test.sh             everything
#
# Needs root: for mmdebstrap, and for a mount namespace. Everything that is mounted goes with that namespace.
set -euo pipefail
cd "$(dirname "$0")/.."
repository=$PWD
root=$repository/build-debian13/root
own=$repository/build-debian13

fail() {
    echo "in-debian13: $1" >&2
    exit 1
}

[ "$(id -u)" = 0 ] || fail "only root can make another Debian's root directory and enter it; run it with sudo"
command -v mmdebstrap > /dev/null || fail "mmdebstrap is not installed; scripts/install-packages.sh installs it"

# Those of the checkout are what the root's own are mounted over.
builds=(build build-part build-sanitize)
mkdir -p "${builds[@]/#/$own/}" "${builds[@]}"
# Two runs may want it at once; the second one waits, and then finds the first one's.
exec 9> "$own/lock"
flock 9
if [ ! -e "$root/etc/vmckpt-made" ]; then
    echo "in-debian13: making $root"
    rm -rf "$root"
    # Whatever becomes of the machine meanwhile, it is made anew: so nothing is synced. And nobody reads manuals in it.
    mmdebstrap --variant=minbase --skip=cleanup/apt --dpkgopt=force-unsafe-io --dpkgopt='path-exclude=/usr/share/man/*' \
        --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
        trixie "$root" > "$own/mmdebstrap.log" 2>&1 ||
        fail "mmdebstrap failed: $(tail -n 3 "$own/mmdebstrap.log"); all of it is in $own/mmdebstrap.log"
    mkdir -p "$root/vmckpt"
    touch "$root/etc/vmckpt-made"
fi
cp /etc/resolv.conf "$root/etc/resolv.conf"
exec 9>&-

# Guests do not depend on the Debian whose VMM runs them: those of the checkout are the root's, too, if they are there.
unset VMCKPT_GUEST VMCKPT_KVM_GUEST
guests=()
[ ! -e build/guest/identity ] || { guests+=(guest); export VMCKPT_GUEST=/vmckpt/build/guest; }
[ ! -e build/kvm-guest/kernel.identity ] || { guests+=(kvm-guest); export VMCKPT_KVM_GUEST=/vmckpt/build/kvm-guest; }

# pivot_root rather than chroot: a process in a chroot may make no user namespace (user_namespaces(7)), and restart does.
exec unshare --mount --propagation private -- /bin/bash -c '
    set -e
    root=$1 repository=$2 own=$3 builds=$4 guests=$5
    shift 5
    mount --bind "$root" "$root"
    mount --bind "$repository" "$root/vmckpt"
    for build in $builds; do mount --bind "$own/$build" "$root/vmckpt/$build"; done
    for guest in $guests; do
        mkdir -p "$own/build/$guest"
        mount --bind "$repository/build/$guest" "$root/vmckpt/build/$guest"
    done
    for directory in dev sys; do mount --rbind "/$directory" "$root/$directory"; done
    mount -t proc proc "$root/proc"
    mount -t tmpfs -o mode=755 tmpfs "$root/run"
    cd "$root"
    mkdir -p .before
    pivot_root . .before
    umount -l /.before
    cd /vmckpt
    exec "$@"
' in-debian13 "$root" "$repository" "$own" "${builds[*]}" "${guests[*]}" "$@"
