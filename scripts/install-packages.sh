#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Installs all that building, testing and the demo need on Debian 12 or 13. Quick, and without sudo, when all is there.
#
#     scripts/install-packages.sh            installs
#     scripts/install-packages.sh --list     only says which packages
#     scripts/install-packages.sh --part     installs what building and `scripts/test.sh --part` need
set -eu

release=$(sed -n 's/^VERSION_ID="\{0,1\}\([0-9]*\).*/\1/p' /etc/os-release)

# The one list of packages, with a reason for each group. PACKAGE@RELEASE: on that release of Debian only.
list() {
    sed "s/#.*//; s/@$release\\b//g; s/[^ ]*@[0-9]*//g" <<'LIST'
    # Compiler and build system.
    g++ meson ninja-build pkg-config
    # Libraries; docs/architecture.md says why each.
    libboost-program-options-dev libprotobuf-dev protobuf-compiler libseccomp-dev libxxhash-dev libfmt-dev
    nlohmann-json3-dev libelf-dev
    # Unit tests.
    catch2
    # Integration tests: pytest, xdist to run tests side by side, and pexpect for all that happens on a terminal.
    python3 python3-pytest python3-pytest-xdist python3-pexpect
    # The virtual machine: VMM, tools for its disks.
    qemu-system-x86 qemu-utils e2fsprogs
    # Programs that tests checkpoint. qemu-user, dynamically linked: an emulated program has the recorder in its memory twice.
    qemu-user@12 redis-server python3-redis sqlite3 vim-tiny less perl-base bash
    # A statically linked one, which is refused; and all the commands of the guests.
    busybox-static
    # For looking at processes, networks of their own, and becoming another user.
    procps iproute2 util-linux
    --- From here on: what the whole suite needs.
    # Faults are put into the supervisor with strace; a debugger that was faster than it.
    strace gdb
    # A sandbox without capabilities, in which tests run the whole way.
    bubblewrap
    # clang builds the sanitizer tests, and is a second opinion on warnings.
    clang libclang-rt-dev
    # The guests: kernel and user space, and what they are made with.
    linux-image-cloud-amd64 gcc libc6-dev cpio
    # Guests for KVM: firmware and boot loaders, and what a small Linux kernel of one's own is built with.
    u-boot-qemu grub-pc-bin grub-common memtest86+
    linux-source-6.1@12 make flex bison bc libssl-dev xz-utils binutils
    # A Debian 13 in a directory, whose libc, VMM and programs are tried on a Debian 12 (scripts/in-debian13.sh).
    mmdebstrap@12
LIST
}

case "${1:-}" in
    --part) packages=$(list | sed '/---/,$d') ;;
    *) packages=$(list | sed '/---/d') ;;
esac

if [ "${1:-}" = --list ]; then
    printf '%s\n' $packages
    exit 0
fi

missing=
for package in $packages; do
    status=$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null || true)
    [ "$status" = installed ] || missing="$missing $package"
done
[ -n "$missing" ] || exit 0

if [ "$(id -u)" != 0 ]; then
    if ! command -v sudo > /dev/null; then
        echo "install-packages: these are missing:$missing; run $0 as root, or install sudo" >&2
        exit 1
    fi
    exec sudo "$0" "$@"
fi

# Packages with a service (redis-server) must not start it: tests start their own, and the machine may be anybody's.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    trap 'rm -f "$policy"' EXIT
    trap 'exit 1' HUP INT TERM
    printf '#!/bin/sh\nexit 101\n' > "$policy"
    chmod 755 "$policy"
fi

echo "install-packages: installing$missing"
export DEBIAN_FRONTEND=noninteractive
apt-get update -q < /dev/null
apt-get install -q -y --no-install-recommends $missing < /dev/null
