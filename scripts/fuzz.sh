#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# scripts/fuzz.sh [SECONDS [TARGET…]] — runs the fuzz targets of fuzz/ for SECONDS
# each (60), beginning with the committed corpus. A finding ends the run, and the
# input that caused it is kept and named.
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
    local seconds=${1:-60} target work built
    [[ $seconds =~ ^[0-9]+$ ]] || die "usage: scripts/fuzz.sh [SECONDS [TARGET…]]"
    shift || true
    (($#)) || set -- message session
    built=${CARGO_TARGET_DIR:-$repo/target}/fuzz
    # A target of its own keeps the flags off build scripts.
    step "the fuzz targets" env RUSTFLAGS="${instrument[*]}" CARGO_TARGET_DIR="$built" \
        cargo build --locked --release --manifest-path "$repo/fuzz/Cargo.toml" \
        --target x86_64-unknown-linux-gnu
    for target; do
        # New inputs go into the first folder, which is not the committed one.
        work=$built/corpus/$target
        mkdir -p "$work" "$built/findings"
        step "$target for $seconds s" "$built/x86_64-unknown-linux-gnu/release/$target" \
            -max_total_time="$seconds" -timeout=10 -max_len=4096 -print_final_stats=1 \
            -artifact_prefix="$built/findings/$target-" "$work" "$repo/fuzz/corpus/$target"
        say "    $(find "$work" -type f | wc -l) inputs in $work"
    done
}

main "$@"
