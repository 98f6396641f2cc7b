#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# scripts/bench.sh [soft|vm|soft-vm|all|smoke] [--turns N] [SELECTOR…] — measures this module
# beside upstream's C module, in the same server build, and beside TCP, in turns, and writes
# docs/performance.md with its plots. soft is the software fabric, vm Soft-RoCE in a virtual
# machine; soft-vm, which has room for 10,000 connections, the software fabric there; all, the
# default, is all three. Leave the machine alone meanwhile.
#
# What was measured is kept until the module changes: an interrupted benchmark goes on where
# it was, and a SELECTOR measures cells of tests/bench/cells.toml alone: parts of their names
# (get/64B/c50), or `memory`, `crowd`, `bare`. Six turns are the default, and the fewest for
# 95 % intervals.
#
# smoke takes a minute, looks only at whether all requests are served, and keeps nothing.
#
# The last line sums up: N passed, N failed, N skipped.
# shellcheck source=scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

main() {
    local what=all start=$SECONDS options=()
    case ${1:-} in
    soft | vm | soft-vm | all | smoke) what=$1; shift ;;
    -h | --help) sed -n '4,18s/^# \{0,1\}//p' "$0"; return ;;
    esac
    options=("$@")
    cd "$repo"
    say "Setting up"
    case $what in
    vm | soft-vm | all) "$repo/scripts/setup.sh" build bench guest ;;
    *) "$repo/scripts/setup.sh" build bench ;;
    esac
    build_environment=$("$repo/scripts/setup.sh" env)
    eval "$build_environment"
    say "Building"
    build_all
    step "the software fabric" "$repo/scripts/softrdma.sh" true
    bench=${CARGO_TARGET_DIR:-$repo/target}/release/bench
    kept=$cache/bench
    # Thousands of connections take a server as many descriptors.
    ulimit -n "$(ulimit -Hn)"
    mkdir -p "$kept"

    passed=0 failed=0 skipped=0
    case $what in
    smoke) smoke ;;
    *)
        [[ $what != @(soft|all) ]] || on_soft "${options[@]}"
        [[ $what != @(vm|all) ]] || on_vm "${options[@]}"
        [[ $what != @(soft-vm|all) ]] || on_soft_vm "${options[@]}"
        report
        say "docs/performance.md is written"
        ;;
    esac
    say "Done in $((SECONDS - start)) s"
    printf '%d passed, %d failed, %d skipped\n' "$passed" "$failed" "$skipped"
    ((!failed && passed))
}

smoke() {
    local folder
    folder=$(mktemp -d "${TMPDIR:-/tmp}/valkey-rdma-bench.XXXXXX")
    say "A few short runs on the software fabric"
    run "$folder" env SOFTRDMA_NO_BUILD=1 "$repo/scripts/softrdma.sh" \
        "$bench" run --place soft --results "$folder/soft.json" --smoke --turns 1
    # The report is part of what has to work.
    "$bench" report --results "$folder/soft.json" "$folder/performance.md"
    rm -r "$folder"
}

on_soft() {
    say "On the software fabric"
    run "$kept" env SOFTRDMA_NO_BUILD=1 "$repo/scripts/softrdma.sh" \
        "$bench" run --place soft --results "$kept/soft.json" "$@"
}

on_vm() {
    say "In a virtual machine with Soft-RoCE"
    in_guest "$bench" run --place vm --results "$kept/vm.json" "$@"
}

# There, root may give each process as many descriptors as the kernel counts.
on_soft_vm() {
    say "On the software fabric in a virtual machine"
    # shellcheck disable=SC2016
    in_guest bash -c 'ulimit -n "$(cat /proc/sys/fs/nr_open)" && exec "$@"' bash \
        env SOFTRDMA_NO_BUILD=1 "$repo/scripts/softrdma.sh" \
        "$bench" run --place soft-vm --results "$kept/soft-vm.json" "$@"
}

in_guest() {
    run "$kept" "$repo/scripts/guest.sh" --timeout 28800 --memory 8G --rw "$kept" "$@"
}

# The report keeps what it says of a place where nothing was measured here.
report() {
    local place file results=()
    for place in soft vm soft-vm; do
        file=$kept/$place.json
        [[ -e $file ]] || file=docs/performance/$place.json
        results+=(--results "$file")
    done
    "$bench" report "${results[@]}" docs/performance.md
}

# run FOLDER COMMAND… — runs it, shows what it prints, and adds up its last line; without one
# something failed.
run() {
    local log=$1/log
    shift
    "$@" </dev/null | tee "$log" >&2 || true
    add_sum "$log" 1
}

main "$@"
