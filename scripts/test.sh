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
    outcomes+=("$name=$?=/dev/null")
    finish
}

# Sets up a build directory once; ninja sees by itself what changed afterwards.
configure() {
    local directory=$1
    shift
    [ -e "$directory/build.ninja" ] || meson setup "$directory" -Dwerror=true "$@"
}

# meson_tests NAME DIRECTORY [ARGUMENT...]: runs the tests registered in meson, and keeps their report.
meson_tests() {
    local name=$1 directory=$2
    shift 2
    rm -f "$directory/meson-logs/testlog.junit.xml"
    meson test -C "$directory" --no-rebuild --print-errorlogs "$@"
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
meson_tests unit build

title "Unit tests under AddressSanitizer and UndefinedBehaviorSanitizer"
# b_lundef: clang's sanitizer runtime is only linked into programs, so a shared library has undefined symbols.
CC=clang-14 CXX=clang++-14 must sanitizer-build configure build-sanitize --buildtype=debugoptimized \
    -Db_sanitize=address,undefined -Db_lundef=false
must sanitizer-build ninja -C build-sanitize
UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 meson_tests unit-sanitized build-sanitize --suite unit

title "Integration tests"
must guest tests/guests/linux/build-guest.sh build/guest
# All in all at most half an hour. SIGINT when time is up: pytest then still writes its report of what it had done, and
# its exit status says that it did not finish.
PYTHONDONTWRITEBYTECODE=1 timeout --signal=INT --kill-after=30 $((1740 - SECONDS)) \
    /usr/bin/python3 -m pytest -p no:cacheprovider -q -rs --durations=10 --junitxml="$results/integration.xml" \
    tests --ignore=tests/bench
outcomes+=("integration=$?=$results/integration.xml")

finish
