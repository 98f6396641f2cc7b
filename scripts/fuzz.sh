#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# scripts/fuzz.sh [SECONDS [TARGET…]] — runs the fuzz targets of fuzz/ for SECONDS (60),
# side by side, beginning with the committed corpus. A finding ends its target's run,
# and the input that caused it is kept and named. The last line sums up: N passed,
# N failed, N skipped.
#
# Coverage comes from LLVM's own pass, which the stable compiler has, so that no
# nightly toolchain and no cargo-fuzz are needed; both work with fuzz/ as well.
# shellcheck source=scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

instrument=(
    -Cpasses=sancov-module
    -Cllvm-args=-sanitizer-coverage-level=4
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters
    -Cllvm-args=-sanitizer-coverage-pc-table
    -Cllvm-args=-sanitizer-coverage-trace-compares
    --cfg=fuzzing
    -Ccodegen-units=1
)

main() {
    local seconds=${1:-60} target built failed=0 runs=()
    [[ $seconds =~ ^[0-9]+$ ]] || die "usage: scripts/fuzz.sh [SECONDS [TARGET…]]"
    shift || true
    (($#)) || set -- message session
    "$repo/scripts/setup.sh" fuzz
    built=${CARGO_TARGET_DIR:-$repo/target}/fuzz
    # A target of its own keeps the flags off build scripts.
    step "the fuzz targets" env RUSTFLAGS="${instrument[*]}" CARGO_TARGET_DIR="$built" \
        cargo build --locked --release --manifest-path "$repo/fuzz/Cargo.toml" \
        --target x86_64-unknown-linux-gnu
    say "  fuzzing for $seconds s: $*"
    for target; do
        fuzz "$target" >"$built/$target.log" 2>&1 </dev/null &
        runs+=($!)
    done
    for target; do
        if wait "${runs[0]}"; then
            say "    $target: $(tail -n 1 "$built/$target.log")"
        else
            failed=$((failed + 1))
            say "    $target: FAILED"
            tail -n 40 "$built/$target.log" >&2
        fi
        runs=("${runs[@]:1}")
    done
    printf '%d passed, %d failed, 0 skipped\n' $(($# - failed)) "$failed"
    ((!failed))
}

fuzz() {
    # New inputs go into the first folder, which is not the committed one.
    local target=$1 work=$built/corpus/$1
    mkdir -p "$work" "$built/findings"
    "$built/x86_64-unknown-linux-gnu/release/$target" \
        -max_total_time="$seconds" -timeout=10 -max_len=4096 -print_final_stats=1 \
        -artifact_prefix="$built/findings/$target-" "$work" "$repo/fuzz/corpus/$target"
    awk -v kept="$(find "$work" -type f | wc -l)" -v work="$work" \
        '/number_of_executed_units/ { print $2 " inputs tried, " kept " kept in " work }' \
        "$built/$target.log"
}

main "$@"
