#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Runs the tests on a Debian 12 or 13 machine: installs what is missing, builds with warnings as errors (GCC for what is
# shipped, clang with sanitizers for unit tests), runs the unit tests of both, then the integration tests.
#
#     scripts/test.sh                    everything
#     scripts/test.sh --with-debian13    as root on Debian 12: after it --part in a Debian 13 (in-debian13.sh)
#     scripts/test.sh --part             what depends on libc, VMM and programs
#     scripts/test.sh --debian13         everything in the Debian 13 only
#
# The last line is the sum:
#
#     N passed, N failed, N skipped
#
# Before it come the tests that failed or were skipped, each with its reason. Non-zero exit if anything failed.
# Build directories: build, build-sanitize, build-debian13. Reports: build/test-results.
set -u
exec < /dev/null
cd "$(dirname "$0")/.." || exit 1

part='' with_debian13=''
case "${1:-}" in
    "") ;;
    --with-debian13) with_debian13=yes ;;
    --part) part=yes ;;
    --debian13) exec scripts/in-debian13.sh scripts/test.sh ;;
    *) echo "test.sh: unknown option $1; see the head of $0" >&2; exit 2 ;;
esac

results=$PWD/build/test-results
outcomes=()  # NAME=STATUS=REPORT of each step, for sum-results.py
# A machine may be half as fast as the one this takes 40 minutes on; by then there is a sum, whatever hangs.
last_integration_s=4900
last_debian13_s=5100

title() { printf '\n== %s\n' "$1"; }

finish() {
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
    "$directory/tests/unit_tests" -r junit -o "$results/$name.xml"
    local status=$?
    if [ "$status" = 0 ]; then
        echo "$(grep -c '<testcase ' "$results/$name.xml") test cases passed"
    else
        "$directory/tests/unit_tests" -r compact  # once more, for whoever reads this
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
side_by_side=()
for file in capabilities cli detached files memory_files resources sockets_and_watches surroundings waiting; do
    side_by_side+=("tests/integration/test_$file.py")
done

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

# Another libc, VMM and other programs: what depends on these. Its outcomes are counted with this Debian's.
debian13() {
    title "Debian 13: what depends on libc, VMM and programs"
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

title "Packages"
must packages scripts/install-packages.sh ${part:+--part}

title "Build"
must build configure build --buildtype=release
must build ninja -C build
rm -rf "$results"
mkdir -p "$results"

title "Unit tests"
catch_tests unit build
meson_tests checks build

if [ -n "$part" ]; then
    title "Integration tests of what depends on libc, VMM and programs"
    integration_tests resources "$last_integration_s" -n "$(nproc)" -m "not same_on_every_debian" "${side_by_side[@]}"
    integration_tests integration "$last_integration_s" -m "not same_on_every_debian" tests/integration "${side_by_side[@]/#/--ignore=}"
    finish
fi

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
must guest tests/guests/linux/build-guest.sh build/guest
# Takes some minutes. Where there is no KVM, the tests that need it are skipped, and say so.
[ ! -e /dev/kvm ] || must kvm-guest tests/guests/kvm-linux/build-guest.sh build/kvm-guest
integration_tests resources "$last_integration_s" -n "$(nproc)" "${side_by_side[@]}"
integration_tests integration "$last_integration_s" tests --ignore=tests/bench "${side_by_side[@]/#/--ignore=}"

[ -z "$with_debian13" ] || debian13

finish
