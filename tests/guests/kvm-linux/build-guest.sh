#!/bin/sh
# Makes the KVM guest (vmlinux, initramfs.cpio) in DIRECTORY, default build/kvm-guest of the repository. See README.md.
# Needs no root and no network: the kernel's source is Debian's package linux-source-6.1. The first time takes some
# minutes, all of them for the kernel.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
repository=$(cd "$here/../../.." && pwd)
directory=${1:-$repository/build/kvm-guest}
shared=$here/../linux  # the guest that needs no KVM: its agent and its commands are used here too

# The commands that the guest has; all of busybox's names would cost the emulated kernel half a second of boot.
applets="ash awk cat chmod cp cut date dd df dmesg echo env false find free grep head hexdump hostname httpd ifconfig ip
    kill killall ln ls md5sum mkdir mount mv nc netstat nproc od ping poweroff printf ps pwd reboot rm sed seq sh
    sha256sum sleep sort stat stty sync tail taskset tee test touch top tr true tty umount uname uptime usleep vi wc
    wget which xxd"

fail() {
    echo "build-guest: $1" >&2
    exit 1
}

source=${VMCKPT_KVM_GUEST_SOURCE:-/usr/src/linux-source-6.1.tar.xz}
[ -r "$source" ] || fail "no $source; install linux-source-6.1 (scripts/install-packages.sh)"
busybox=$(command -v busybox || true)
[ -n "$busybox" ] || fail "no busybox here; install busybox-static (scripts/install-packages.sh)"
compiler=${CC:-gcc}

# The identity of all that goes into each. The same inputs give the same guest, so what is up to date is left alone.
kernel_identity=$({ cat "$here/defconfig" "$here/edit-source.sh"; "$compiler" --version
    stat -c '%n %s %Y' "$source"; } | sha256sum | cut -d ' ' -f 1)
initramfs_identity=$(cat "$here/init.c" "$here/build-guest.sh" "$shared"/* "$busybox" | sha256sum |
    cut -d ' ' -f 1)
up_to_date() {
    [ "$(cat "$directory/$1.identity" 2>/dev/null)" = "$2" ]
}
all_up_to_date() {
    up_to_date kernel "$kernel_identity" && up_to_date initramfs "$initramfs_identity"
}

if all_up_to_date; then exit 0; fi
mkdir -p "$directory"
# Two test runs may want it at once; the second one waits, and then finds the first one's guest.
exec 9> "$directory/lock"
flock 9
if all_up_to_date; then exit 0; fi
work=$(mktemp -d "$directory/making.XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM

# keep FILE NAME IDENTITY: puts a finished file in its place, then notes what it was made of.
keep() {
    rm -f "$directory/$2.identity"
    mv "$1" "$directory/"
    echo "$3" > "$work/identity"
    mv "$work/identity" "$directory/$2.identity"
}

make_kernel() {
    tree=$work/linux
    mkdir "$tree"
    # Other architectures and the largest driver are not built, so but for their Kconfig they need not be unpacked.
    tar -xf "$source" -C "$tree" --strip-components=1 --exclude='*/drivers/gpu/drm/amd/include' \
        --exclude='*/arch/[!x]*/*.[chS]' --exclude='*/boot/dts'
    sh "$here/edit-source.sh" "$tree"
    cp "$here/defconfig" "$tree/.config"
    # Builder, host and time are fixed, so that the kernel does not depend on them.
    if ! { make -C "$tree" olddefconfig && make -C "$tree" -j "$(nproc)" CC="$compiler" KBUILD_BUILD_USER=guest \
        KBUILD_BUILD_HOST=guest KBUILD_BUILD_TIMESTAMP='1970-01-01' vmlinux; } > "$directory/kernel.log" 2>&1; then
        tail -n 30 "$directory/kernel.log" >&2
        fail "the kernel does not build; all of it is in $directory/kernel.log"
    fi
    strip -o "$work/vmlinux" "$tree/vmlinux"
    rm -rf "$tree"
}

make_initramfs() {
    root=$work/root
    mkdir -p "$root/bin" "$root/proc" "$root/sys" "$root/dev" "$root/run" "$root/tmp" "$root/disk" "$root/etc"
    install -m 755 "$busybox" "$root/bin/busybox"
    for applet in $applets; do ln -s busybox "$root/bin/$applet"; done
    ln -s /proc/mounts "$root/etc/mtab"
    install -m 755 "$shared/open-disks" "$shared/close-disks" "$shared/check-memory" "$root/bin/"
    flags="-std=c11 -O2 -Wall -Wextra -Wno-unused-result"
    "$compiler" $flags -Dmain=agent_main -c -o "$work/agent.o" "$shared/guest-agent.c"
    # Stripped, since the emulated kernel copies every byte of this archive.
    "$compiler" $flags -static -s -o "$root/init" "$here/init.c" "$work/agent.o"
    ln -s /init "$root/bin/guest-agent"
    # Owners and times are fixed, so that the archive does not depend on who builds it, and when. It is not compressed:
    # inflating it would take an emulated kernel longer than the whole boot.
    find "$root" -exec touch -h -d @0 {} +
    (cd "$root" && find . | LC_ALL=C sort | cpio --quiet -o -H newc -R 0:0 --reproducible) > "$work/initramfs.cpio"
}

# The initramfs first: what is wrong in it shows in a second.
if ! up_to_date initramfs "$initramfs_identity"; then
    make_initramfs
    keep "$work/initramfs.cpio" initramfs "$initramfs_identity"
fi
if ! up_to_date kernel "$kernel_identity"; then
    make_kernel
    keep "$work/vmlinux" kernel "$kernel_identity"
fi
