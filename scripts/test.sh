#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Runs all tests on a Debian 12 machine: installs what is missing, builds with warnings as errors (GCC for what is
# shipped, clang with sanitizers for unit tests), runs the unit tests of both, then the integration tests.
# The last line is the sum:
#
#     N passed, N failed, N skipped
#
# Before it come the tests that failed or were skipped, each with its reason. Non-zero exit if anything failed.
# Build directories: build, build-sanitize. Reports: build/test-results.
set -u
exec < /dev/null
cd "$(dirname "$0")/.." || exit 1

results=$PWD/build/test-results
outcomes=()  # NAME=STATUS=REPORT of each step, for sum-results.py

title() { printf '\n== %s\n' "$1"; }

finish() {
    title "Summary"
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

title "Packages"
must packages scripts/install-packages.sh

title "Build"
must build configure build --buildtype=release
must build ninja -C build
rm -rf "$results"
mkdir -p "$results"

title "Unit tests"
catch_tests unit build
meson_tests checks build

title "Unit tests under AddressSanitizer and UndefinedBehaviorSanitizer"
# b_lundef: clang's sanitizer runtime is only linked into programs, so a shared library has undefined symbols.
CC=clang-14 CXX=clang++-14 must sanitizer-build configure build-sanitize --buildtype=debugoptimized \
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
# Usually less than half an hour in all. SIGINT should that become three quarters: pytest then still writes its report, and
# its exit status says that it did not finish.
PYTHONDONTWRITEBYTECODE=1 timeout --signal=INT --kill-after=30 $((2700 - SECONDS)) \
    /usr/bin/python3 -m pytest -p no:cacheprovider -q -rs --durations=10 --junitxml="$results/integration.xml" \
    tests --ignore=tests/bench
outcomes+=("integration=$?=$results/integration.xml")

finish
