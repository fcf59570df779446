#!/bin/sh
# Makes the Linux guest (vmlinuz, initramfs.cpio.gz) in DIRECTORY, default build/guest of the repository. See README.md.
# Needs no root and no network: the kernel and its modules come from Debian's package as it is installed here.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
repository=$(cd "$here/../../.." && pwd)
directory=${1:-$repository/build/guest}

# What the guest drives, in the order in which init loads it (with what each needs before it).
modules="virtio_pci virtio_console virtio_blk virtio_net virtio_rng virtio_balloon"

fail() {
    echo "build-guest: $1" >&2
    exit 1
}

newest_kernel() {
    # Named by VMCKPT_GUEST_KERNEL, or the newest cloud kernel: it is small, and has ext4 built in.
    if [ -n "${VMCKPT_GUEST_KERNEL:-}" ]; then
        echo "$VMCKPT_GUEST_KERNEL"
    else
        for kernel in /boot/vmlinuz-*-cloud-amd64; do [ -r "$kernel" ] && echo "$kernel"; done | sort -V | tail -n 1
    fi
}

kernel=$(newest_kernel)
[ -n "$kernel" ] || fail "no /boot/vmlinuz-*-cloud-amd64; install linux-image-cloud-amd64 (scripts/install-packages.sh)"
version=${kernel##*/vmlinuz-}
module_directory=${VMCKPT_GUEST_MODULES:-/lib/modules/$version}
[ -r "$module_directory/modules.dep" ] || fail "no $module_directory/modules.dep; install the kernel's whole package"
busybox=$(command -v busybox || true)
[ -n "$busybox" ] || fail "no busybox here; install busybox-static (scripts/install-packages.sh)"

# The identity of all that goes in. The same inputs give the same guest, so an up-to-date one is left alone.
identity=$({ sha256sum "$here"/* "$busybox" "$module_directory/modules.dep"; stat -c '%n %s %Y' "$kernel"; } |
    sha256sum | cut -d ' ' -f 1)
if [ "$(cat "$directory/identity" 2>/dev/null)" = "$identity" ]; then exit 0; fi

mkdir -p "$directory"
# Two test runs may want it at once; the second one waits, and then finds the first one's guest.
exec 9> "$directory/lock"
flock 9
if [ "$(cat "$directory/identity" 2>/dev/null)" = "$identity" ]; then exit 0; fi
work=$(mktemp -d "$directory/making.XXXXXX")
trap 'rm -rf "$work"' EXIT
root=$work/root
mkdir -p "$root/bin" "$root/modules"

install -m 755 "$busybox" "$root/bin/busybox"
"$busybox" --list | while read -r applet; do
    [ "$applet" = busybox ] || ln -s busybox "$root/bin/$applet"
done
install -m 755 "$here/init" "$root/init"
install -m 755 "$here/open-disks" "$here/close-disks" "$here/check-memory" "$root/bin/"
"${CC:-gcc}" -std=c11 -O2 -Wall -Wextra -Wno-unused-result -static -o "$root/bin/guest-agent" "$here/guest-agent.c"

# modules.dep has a line "MODULE: what it needs ..." for each module, the farthest need last.
for module in $modules; do
    line=$(grep -E "/$(echo "$module" | sed 's/_/[-_]/g')\.ko[^:]*:" "$module_directory/modules.dep") ||
        fail "kernel $version has no module $module"
    echo "$line" | tr -d : | tr ' ' '\n' | sed '/^$/d' | tac
done | awk '!seen[$0]++' > "$work/needed"
while read -r path; do
    cp "$module_directory/$path" "$root/modules/"
    echo "${path##*/}"
done < "$work/needed" > "$root/modules/order"

# Owners and times are fixed, so that the archive does not depend on who builds it, and when.
find "$root" -exec touch -h -d @0 {} +
(cd "$root" && find . | LC_ALL=C sort | cpio --quiet -o -H newc -R 0:0 --reproducible) > "$work/initramfs.cpio"
gzip -1 -n "$work/initramfs.cpio"
cp "$kernel" "$work/vmlinuz"
mv "$work/vmlinuz" "$work/initramfs.cpio.gz" "$directory/"
echo "$identity" > "$work/identity"
mv "$work/identity" "$directory/identity"
