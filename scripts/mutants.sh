#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# scripts/mutants.sh [--none | PATTERN] — runs the models of crates/proto/src/model.rs; then
# weakens each memory ordering of that folder in turn (Acquire, Release and the like
# become Relaxed), in a copy, and runs them on it: they must fail. A mutant that
# survives is an ordering that is not needed, or one that no model needs; either is a
# failure, unless it stands in the list below with its reason. PATTERN chooses among
# the mutants by name ("send.rs take 2" is the second ordering in that function);
# --none leaves them all out. The last line sums up, models and mutants together:
# N passed, N failed, N skipped.
#
# The copy is of crates/proto, which needs nothing else.
# shellcheck source=scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

# Mutants that survive, and why they may.
in_order="loom runs each thread in order, so no load sees a store of the future; the language allows it, and forbids it only by this: an entry of 'ends' is stored again after it was read"
declare -A explained=(
    ["ledger.rs retire 3"]=$in_order
    ["ledger.rs credit_after 1"]=$in_order
)

# Seconds that the models have on one mutant.
limit=1200

main() {
    local pattern=${1:-} copy count killed=0 survived=0 start=$SECONDS file number name outcome
    copy=$(mktemp -d "${TMPDIR:-/tmp}/valkey-rdma-mutants.XXXXXX")
    # shellcheck disable=SC2064
    trap "rm -rf '$copy'" EXIT
    copy_proto "$copy"
    step "the models of the hand-overs, all interleavings" models_to "$copy/log" "$copy"
    count=$(awk '/^test result:/ { print $4 }' "$copy/log")
    if [[ $pattern == --none ]]; then
        sum "$count" 0
        return
    fi
    while read -r file number name; do
        [[ $name == *"$pattern"* ]] || continue
        weaken "$repo/crates/proto/src/window/$file" "$number" >"$copy/src/window/$file"
        printf '  %-58s ' "$name" >&2
        (compile "$copy") || die "the mutant does not compile"
        outcome=0
        models "$copy" >"$copy/log" 2>&1 || outcome=$?
        if ((outcome == 124)); then
            say "UNDECIDED within $limit s"
            survived=$((survived + 1))
        elif ((!outcome)); then
            if [[ ${explained[$name]:-} ]]; then
                say "survives: ${explained[$name]}"
            else
                say "SURVIVES"
                survived=$((survived + 1))
            fi
        else
            say "killed"
            killed=$((killed + 1))
            if [[ ${explained[$name]:-} ]]; then
                say "    is explained as a survivor: take it off the list"
                survived=$((survived + 1))
            fi
        fi
        cp "$repo/crates/proto/src/window/$file" "$copy/src/window/$file"
    done < <(mutants)
    say "$killed killed, $survived not as expected, in $((SECONDS - start)) s"
    sum $((count + killed)) "$survived"
    ((killed && !survived))
}

sum() { printf '%d passed, %d failed, 0 skipped\n' "$1" "$2"; }

in_copy() {
    cd "$1"
    RUSTFLAGS='--cfg loom' CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$repo/target}/mutants \
        timeout "$limit" cargo test --quiet --release --lib "${@:2}"
}

compile() { in_copy "$1" --no-run >&2; }
models() { (in_copy "$1" -- window model); }
models_to() { models "$2" | tee "$1"; }

# One line for each ordering: file, its number in the file, and a name of file,
# function and number in the function.
mutants() {
    local file
    for file in "$repo"/crates/proto/src/window/{ledger,peer_state,receive,send}.rs; do
        awk -v file="${file##*/}" '
            /^#\[cfg\(all\(test/ { exit }
            match($0, /fn [a-z_]+/) { name = substr($0, RSTART + 3, RLENGTH - 3); within = 0 }
            {
                line = $0
                while (match(line, /Ordering::(Acquire|Release|AcqRel|SeqCst)/)) {
                    print file, ++number, file " " name " " ++within
                    line = substr(line, RSTART + RLENGTH)
                }
            }' "$file"
    done
}

# weaken FILE NUMBER — FILE with its NUMBERth ordering relaxed.
weaken() {
    awk -v number="$2" '
        {
            rest = $0
            done = ""
            while (match(rest, /Ordering::(Acquire|Release|AcqRel|SeqCst)/)) {
                word = substr(rest, RSTART, RLENGTH)
                if (++count == number) word = "Ordering::Relaxed"
                done = done substr(rest, 1, RSTART - 1) word
                rest = substr(rest, RSTART + RLENGTH)
            }
            print done rest
        }' "$1"
}

main "$@"
