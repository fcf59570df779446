#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Runs the tests on a Debian 12 or 13 machine: installs what is missing, builds with warnings as errors (GCC for what is
# shipped, clang with sanitizers for unit tests), runs the unit tests of both, then the integration tests.
#
#     scripts/test.sh               everything; on Debian 12, as root, and then --part in a Debian 13 (in-debian13.sh)
#     scripts/test.sh --part        a choice of what depends on libraries, compiler, VMM and programs
#     scripts/test.sh --debian13    as root on Debian 12: everything in the Debian 13 only
#
# The last line is the sum:
#
#     N passed, N failed, N skipped
#
# Before it come the tests that failed or were skipped, each with its reason. Non-zero exit if anything failed.
# Build directories: build, build-part, build-sanitize, build-debian13. Reports: build/test-results.
set -u
exec < /dev/null
cd "$(dirname "$0")/.." || exit 1

part='' debian13=too
case "${1:-}" in
    "") ;;
    --part) part=yes debian13='' ;;
    --debian13) debian13=only ;;
    *) echo "test.sh: unknown option $1; see the head of $0" >&2; exit 2 ;;
esac

results=$PWD/build/test-results
outcomes=()  # NAME=STATUS=REPORT of each step, for sum-results.py
# A machine may be half as fast as the one this takes 40 minutes on; by then there is a sum, whatever hangs.
last_integration_s=4900
last_debian13_s=5100
debian13_needs_s=1200

title() { printf '\n== %s\n' "$1"; }

finish() {
    wait  # for the Debian 13 that is being made, if there was no way on
    title "Summary"
    mkdir -p "$results"
    printf '%s\n' "${outcomes[@]}" > "$results/outcomes"
    exec /usr/bin/python3 scripts/sum-results.py "${outcomes[@]}"
}

# What later steps need. Without it there is no point in going on, so the sum is made of what there is.
must() {
    local name=$1
    shift
    "$@" && return
    outcomes+=("$name=$?=")
    finish
}

# Sets up a build directory once; ninja sees by itself what changed afterwards.
configure() {
    local directory=$1
    shift
    [ -e "$directory/build.ninja" ] || meson setup "$directory" -Dwerror=true "$@"
}

# catch_tests NAME DIRECTORY: runs the unit tests, whose own report counts each test case (to meson they are one test).
catch_tests() {
    local name=$1 directory=$2
    # From the build directory, as they were compiled there: one test finds a document by its own source file's name.
    (cd "$directory" && tests/unit_tests -r junit -o "$results/$name.xml")
    local status=$?
    if [ "$status" = 0 ]; then
        echo "$(grep -c '<testcase ' "$results/$name.xml") test cases passed"
    else
        (cd "$directory" && tests/unit_tests -r compact)  # once more, for whoever reads this
    fi
    outcomes+=("$name=$status=$results/$name.xml")
}

# meson_tests NAME DIRECTORY [SUITE]: runs the other tests that are registered in meson.
meson_tests() {
    local name=$1 directory=$2 suite=${3:-}
    local -a tests
    mapfile -t tests < <(meson introspect "$directory" --tests | /usr/bin/python3 -c '
import json, sys
for test in json.load(sys.stdin):
    suites = [suite.split(":")[-1] for suite in test["suite"]]
    if test["name"] != "unit" and (sys.argv[1] in ["", *suites]):
        print(test["name"])' "$suite")
    rm -f "$directory/meson-logs/testlog.junit.xml"
    meson test -C "$directory" --no-rebuild --print-errorlogs "${tests[@]}"
    local status=$?
    cp "$directory/meson-logs/testlog.junit.xml" "$results/$name.xml" 2> /dev/null
    outcomes+=("$name=$status=$results/$name.xml")
}

# Tests of these files run side by side: they are many and wait most of the time. All others have the machine for themselves:
# they boot virtual machines, or make steps fail at certain moments.
side_by_side_jobs=$((2 * $(nproc)))
side_by_side=()
for file in capabilities cli detached files memory_files resources sockets_and_watches surroundings waiting; do
    side_by_side+=("tests/integration/test_$file.py")
done

# What another Debian may change; all else depends on the kernel and on vmckpt only. Options are Boost's, threads, signals and the
# C++ runtime libc's, sanitizers the compiler's. A VMM has its ways to make and to discard guest RAM, its calls of KVM and AIO,
# and its sandbox.
part_side_by_side=(
    test_cli.py
    test_resources.py::test_a_process_is_what_it_was
    test_memory_files.py::test_a_program_under_a_sanitizer_starts_and_is_what_it_was
)
part_alone=(
    test_programs.py
    "test_aio.py::test_a_vm_with_native_aio_is_checkpointed_while_it_writes_its_disks[ordinary user-2]"
    "test_guest_ram.py::test_a_balloon_and_free_page_reporting_give_memory_back_after_a_restart[1]"
    "test_qemu_tcg.py::test_a_vm_killed_with_sigkill_goes_on_from_its_checkpoint[ordinary user-terminal-2]"
    test_qemu_tcg.py::test_ram_that_is_a_shared_file_is_that_of_the_checkpoint
    "test_qemu_tcg.py::test_qemu_in_its_own_seccomp_sandbox_is_restarted[ordinary user]"
    "test_qemu_tcg.py::test_a_qemu_that_daemonized_itself_is_adopted_checkpointed_and_restarted[ordinary user]"
    "test_qemu_kvm.py::test_a_restarted_machine_resets_itself_again_and_again[root-q35,hpet=on]"
)

# integration_tests NAME SECONDS WORD ...: pytest, given words that say which tests. SIGINT after SECONDS (since this script
# began): pytest then still writes its report, and its exit status says that it did not finish.
integration_tests() {
    local name=$1 last_s=$2
    shift 2
    VMCKPT_TEST_PATIENCE_S=${VMCKPT_TEST_PATIENCE_S:-60} PYTHONDONTWRITEBYTECODE=1 \
        timeout --signal=INT --kill-after=30 $((last_s > SECONDS ? last_s - SECONDS : 1)) \
        /usr/bin/python3 -m pytest -p no:cacheprovider -q -rs --durations=10 --junitxml="$results/$name.xml" "$@"
    outcomes+=("$name=$?=$results/$name.xml")
}

# What integration tests boot, unless it is named. Where there is no KVM, or no source of a kernel for it (Debian 13), tests that
# need it are skipped, and say so.
guests() {
    [ -n "${VMCKPT_GUEST:-}" ] || must guest tests/guests/linux/build-guest.sh build/guest
    [ -z "${VMCKPT_KVM_GUEST:-}" ] && [ -e /dev/kvm ] || return
    # Takes some minutes.
    [ ! -r "${VMCKPT_KVM_GUEST_SOURCE:-/usr/src/linux-source-6.1.tar.xz}" ] ||
        must kvm-guest tests/guests/kvm-linux/build-guest.sh build/kvm-guest
}

# Another libc, VMM and other programs: what depends on these. Its outcomes are counted with this Debian's.
debian13_part() {
    title "Debian 13: what depends on libraries, compiler, VMM and programs"
    if ! wait "$debian13_root"; then
        cat build/debian13-root.log
        skip debian13 "a Debian 13 in a directory: $(tail -n 1 build/debian13-root.log)"
        return
    fi
    if [ $((SECONDS + debian13_needs_s)) -gt "$last_debian13_s" ]; then
        skip debian13 "time for a Debian 13: the machine is slow, $SECONDS s have gone"
        return
    fi
    rm -f build-debian13/build/test-results/outcomes
    timeout --signal=INT --kill-after=30 $((last_debian13_s > SECONDS ? last_debian13_s - SECONDS : 1)) \
        scripts/in-debian13.sh scripts/test.sh --part 2>&1 | sed 's/^/Debian 13: /'
    local status=${PIPESTATUS[0]}
    if [ ! -e build-debian13/build/test-results/outcomes ]; then
        outcomes+=("debian13=$((status == 0 ? 1 : status))=")
        return
    fi
    local name step report
    while IFS='=' read -r name step report; do
        outcomes+=("debian13-$name=$step=${report/#\/vmckpt\/build/$PWD/build-debian13/build}")
    done < build-debian13/build/test-results/outcomes
}

# The Debian 13 in its directory and its packages are made while others build: dpkg mostly waits.
begin_debian13() {
    . /etc/os-release
    if [ "$(id -u)" != 0 ] || [ "${VERSION_ID:-}" != 12 ]; then
        debian13=''
        skip debian13 "a Debian 13 beside this one: takes root on a Debian 12"
        return
    fi
    mkdir -p build
    scripts/in-debian13.sh scripts/install-packages.sh --part > build/debian13-root.log 2>&1 &
    debian13_root=$!
}

# skip NAME REASON: a step that cannot be taken here counts as one skipped test.
skip() {
    mkdir -p "$results"
    /usr/bin/python3 -c 'import sys
from xml.sax.saxutils import quoteattr
print(f"<testsuite><testcase name={quoteattr(sys.argv[1])}><skipped message={quoteattr(sys.argv[2])}/></testcase></testsuite>")' \
        "$1" "$2" > "$results/$1.xml"
    outcomes+=("$1=0=$results/$1.xml")
}

title "Packages"
must packages scripts/install-packages.sh ${part:+--part}

if [ "$debian13" = only ]; then
    title "Guests"
    guests
    exec scripts/in-debian13.sh scripts/test.sh
fi

if [ -n "$part" ]; then
    title "Build"
    # Optimised less than what is shipped: that saves a quarter of the time. Only the programs that the tests below need.
    must build configure build-part --buildtype=release -Doptimization=1
    mapfile -t acts < <(cd tests/integration && PYTHONDONTWRITEBYTECODE=1 /usr/bin/python3 -c '
from test_resources import PROCESS_ACTS
for name in {act.name for act in PROCESS_ACTS} | {"address_sanitizer", "thread_sanitizer"}:
    print(f"tests/guests/act_{name}")')
    must build ninja -C build-part vmckpt libvmckpt.so tests/unit_tests "${acts[@]}"
    export VMCKPT=$PWD/build-part/vmckpt VMCKPT_ACTS=$PWD/build-part/tests/guests
    rm -rf "$results"
    mkdir -p "$results"

    title "Unit tests"
    catch_tests unit build-part
    meson_tests checks build-part symbols

    title "Integration tests of what depends on libraries, compiler, VMM and programs"
    cd tests/integration || exit 1
    integration_tests resources "$last_integration_s" -n "$side_by_side_jobs" "${part_side_by_side[@]}"
    integration_tests integration "$last_integration_s" "${part_alone[@]}"
    cd ../..
    finish
fi

title "Build"
rm -rf "$results"
mkdir -p "$results"
[ -z "$debian13" ] || begin_debian13
must build configure build --buildtype=release
must build ninja -C build

title "Unit tests"
catch_tests unit build
meson_tests checks build

title "Unit tests under AddressSanitizer and UndefinedBehaviorSanitizer"
# b_lundef: clang's sanitizer runtime is only linked into programs, so a shared library has undefined symbols.
CC=clang CXX=clang++ must sanitizer-build configure build-sanitize --buildtype=debugoptimized \
    -Db_sanitize=address,undefined -Db_lundef=false
# All but the programs of the integration tests, which are run without sanitizers only.
must sanitizer-build ninja -C build-sanitize vmckpt libvmckpt.so tests/unit_tests tests/fuzz_image_reader
export UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
catch_tests unit-sanitized build-sanitize
meson_tests checks-sanitized build-sanitize unit

title "Integration tests"
guests
integration_tests resources "$last_integration_s" -n "$side_by_side_jobs" "${side_by_side[@]}"
integration_tests integration "$last_integration_s" tests --ignore=tests/bench "${side_by_side[@]/#/--ignore=}"

[ "$debian13" != too ] || debian13_part

finish
