#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# From a fresh Debian 12 to a virtual machine that was killed and runs on: installs what is missing, builds, boots
# Linux in QEMU under `vmckpt launch`, checkpoints it, kills it with SIGKILL, restarts it from the image. Two or three
# minutes, most of them installing and compiling. Leaves nothing behind but the build directory and the packages.
set -eu
exec < /dev/null
repository=$(cd "$(dirname "$0")/.." && pwd)
cd "$repository"

vmckpt=$repository/build/vmckpt
directory=$(mktemp -d "${TMPDIR:-/tmp}/vmckpt-demo.XXXXXX")
ticks=$directory/ticks.log
# A control directory of its own, so that the demo sees, and ends, no target but its own.
export VMCKPT_RUNTIME_DIR="$directory/run"

demo_pid() {
    "$vmckpt" list --json 2> /dev/null | /usr/bin/python3 -c '
import json, sys
print(*[target["pid"] for target in json.load(sys.stdin) if target["name"] == "demo"])'
}

clean_up() {
    status=$?
    trap - EXIT
    pid=$(demo_pid 2> /dev/null || true)
    [ -z "$pid" ] || kill -9 "$pid" 2> /dev/null || true
    if [ "$status" != 0 ] && [ -s "$directory/output.log" ]; then
        echo "demo: failed; what vmckpt and QEMU said last:" >&2
        tail -n 20 "$directory/output.log" >&2
    fi
    rm -rf "$directory"
    exit "$status"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' HUP TERM

title() { printf '\n== %s\n' "$1"; }

# Shows a command as one would type it.
show() { printf '$ %s\n' "$*" | sed "s|$vmckpt|vmckpt|; s|$directory/||g"; }

# The same, and runs it. What it reports goes to the file $1.
run_reporting() {
    report=$1
    shift
    show "$@"
    "$@" > "$report" 2>> "$directory/output.log"
}

# Runs a noisy step; its output is only shown if it fails.
quietly() {
    "$@" > "$directory/step.log" 2>&1 || { cat "$directory/step.log" >&2; echo "demo: failed: $*" >&2; exit 1; }
}

# A time from what a command reported as JSON, in milliseconds: ms FILE FIELD
ms() {
    /usr/bin/python3 -c '
import json, sys
print("%.1f ms" % (json.load(open(sys.argv[1]))[sys.argv[2]] / 1000))' "$1" "$2"
}

tick_count() { if [ -e "$ticks" ]; then wc -l < "$ticks"; else echo 0; fi; }

# Waits until the guest has said so many lines more than $1.
wait_for_ticks() {
    waited_steps=0
    while [ "$(tick_count)" -lt $(($1 + $2)) ]; do
        waited_steps=$((waited_steps + 1))
        [ "$waited_steps" -le 1200 ] || { echo "demo: the guest is silent" >&2; exit 1; }
        sleep 0.1
    done
}

# A tick is "TICK counter nonce monotonic_us realtime_us".
say_ticks() { awk '/^TICK/ { printf "    guest: counter %5d   nonce %s   up %.1f s\n", $2, $3, $4 / 1000000 }'; }
counter_of() { sed -n "$1p" "$ticks" | cut -d ' ' -f 2; }
nonce_of() { sed -n "$1p" "$ticks" | cut -d ' ' -f 3; }

title "Installing what is missing (scripts/install-packages.sh)"
quietly scripts/install-packages.sh
title "Building (one to two minutes) and making the guest (Debian's kernel, busybox)"
[ -e build/build.ninja ] || quietly meson setup build --buildtype=release
quietly ninja -C build vmckpt libvmckpt.so
quietly tests/guests/linux/build-guest.sh build/guest

title "Booting Linux in QEMU, unmodified, under vmckpt launch"
show vmckpt launch -n demo --detach -- qemu-system-x86_64 -accel tcg -m 1024 -smp 2 -kernel vmlinuz ...
"$vmckpt" launch -n demo -d "$directory" --detach -- \
    qemu-system-x86_64 -nodefaults -no-reboot -display none -accel tcg,thread=multi -m 1024 -smp 2 \
    -kernel build/guest/vmlinuz -initrd build/guest/initramfs.cpio.gz \
    -append 'console=ttyS0 quiet panic=-1 tick_ms=100' -serial null -device virtio-serial-pci \
    -chardev "file,id=tick,path=$ticks,append=on" -device virtserialport,chardev=tick,name=tick \
    -device virtio-rng-pci -netdev user,id=net -device virtio-net-pci,netdev=net \
    > "$directory/launched" 2> "$directory/output.log"
cat "$directory/launched"
wait_for_ticks 0 20
echo "The guest counts ten times a second. Counter and nonce are in its memory and nowhere else:"
tail -n 3 "$ticks" | say_ticks

title "Checkpoint: the guest pauses for milliseconds and runs on"
before=$(counter_of "$(tick_count)")
run_reporting "$directory/checkpointed" "$vmckpt" checkpoint demo -o "$directory/demo.ckpt" --json
pause=$(ms "$directory/checkpointed" pause_us)
after=$(counter_of "$(tick_count)")
echo "It was paused for $pause; the image was on disk after $(ms "$directory/checkpointed" total_us)."
wait_for_ticks "$after" 10
tail -n 3 "$ticks" | say_ticks

title "Kill QEMU with SIGKILL"
pid=$(demo_pid)
show kill -9 "$pid"
kill -9 "$pid"
while [ -n "$(demo_pid)" ]; do sleep 0.1; done
at_kill=$(tick_count)
sleep 1
[ "$(tick_count)" = "$at_kill" ]
echo "Dead. Its last words:"
tail -n 1 "$ticks" | say_ticks

title "Restart from the image"
run_reporting "$directory/restarted" "$vmckpt" restart "$directory/demo.ckpt" -n demo --detach --json
restart=$(ms "$directory/restarted" restart_us)
echo "It ran again after $restart, as process $(demo_pid). Its first words:"
wait_for_ticks "$at_kill" 10
sed -n "$((at_kill + 1)),$((at_kill + 3))p" "$ticks" | say_ticks

title "Result"
killed=$(counter_of "$at_kill")
restarted=$(counter_of "$((at_kill + 1))")
megabytes=$(($(stat -c %s "$directory/demo.ckpt") / 1000000))
echo "pause $pause, image $megabytes MB (of a guest with 1074 MB), restart $restart"
echo "counter $before before the checkpoint, $after after it, $killed when killed, $restarted first after the restart"
if [ "$(nonce_of "$((at_kill + 1))")" != "$(nonce_of 1)" ]; then
    echo "WRONG: the nonce changed, so this is not the guest that was checkpointed"
    exit 1
fi
if [ "$restarted" -le "$before" ] || [ "$restarted" -gt $((after + 1)) ]; then
    echo "WRONG: the counter did not go on from the checkpoint"
    exit 1
fi
echo "Same nonce, and the counter went on from the checkpoint: the same Linux runs on."
