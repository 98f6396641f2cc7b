#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# scripts/test.sh [quick|full] [SELECTOR…] — all tests, with all that they need:
# unit tests, models, fuzzing, others' programs on the software fabric, then the
# cells of tests/matrix.toml on that fabric and in a virtual machine with Soft-RoCE,
# the benchmark in a few short runs, and last the Debian package in use. quick is the
# default. full runs every cell, picks up where it was interrupted (until the module
# changes), and writes docs/test-report.md.
#
# scripts/test.sh --server PATH [quick|full] [SELECTOR…] — the cells alone, on a server that
# somebody has: those of its line, named for its release. It says first what the server is:
# release, allocator, TLS, how it was built, hash. With full the next report has them too.
#
# A SELECTOR runs those cells alone, also those that quick leaves out: CASE, or
# CASE/SERVER/FABRIC/IO-THREADS with any of them left out, such as deadlock-10mb,
# 8.0/soft or 'sizes-*/vm/4'. One that selects nothing is an error. Only what they need is set
# up: commands/8.0/soft/4 wants neither root nor other servers, other programs or a guest.
#
# The last line sums up: N passed, N failed, N skipped.
# shellcheck source=scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

passed=0 failed=0 skipped=0 guests=0

main() {
    local level=quick log server='' parts=(fuzz servers clients guest)
    if [[ ${1:-} == --server ]]; then
        [[ -x ${2:-} ]] || die "--server takes the path of a valkey-server"
        server=$(realpath "$2")
        parts=(build clients guest)
        shift 2
    fi
    case ${1:-} in
    quick | full) level=$1; shift ;;
    -h | --help) sed -n '4,19s/^# \{0,1\}//p' "$0"; return ;;
    esac
    # What chosen cells need is set up once they are known.
    ((!$#)) || [[ -n $server ]] || parts=(build)
    local start=$SECONDS
    cd "$repo"
    say "Setting up"
    "$repo/scripts/setup.sh" "${parts[@]}"
    build_environment=$("$repo/scripts/setup.sh" env)
    eval "$build_environment"
    target=${CARGO_TARGET_DIR:-$repo/target}
    log=$(mktemp -d "${TMPDIR:-/tmp}/valkey-rdma-test.XXXXXX")

    say "Building"
    cells=("$target/release/cells" --level "$level")
    if ((!$#)); then
        build_variants deadlock-guard panics
        build_all
    else
        build_all
        local cases needs
        mapfile -t cases < <(chosen "$@" | cut -d / -f 1 | sort -u)
        mapfile -t needs < <(chosen "$@" | needs)
        [[ -n $server ]] || "$repo/scripts/setup.sh" "${needs[@]}"
        build_variants "${cases[@]}"
        step "cargo: the module" cargo build --locked --release --package valkey-rdma
    fi
    local module=$target/release/libvalkey_rdma.so built
    built=$(sha256sum <"$module")
    [[ -z $server ]] || cells+=(--server "$server")
    guest_limit=1800
    ((!$#)) || guest_limit=14400
    if [[ $level == full ]]; then
        mkdir -p "$cache/cells"
        cells+=(--state "$cache/cells/state.json")
        guest_limit=14400
    fi

    # Beside what follows: an emulated machine waits for much of its time. A process group of
    # its own, so that all of it ends with this script.
    set -m
    in_guests "$log" "$@" </dev/null &
    guests=$!
    set +m
    trap 'kill -- "-$guests" 2>/dev/null || true' EXIT
    if ((!$#)) && [[ -z $server ]]; then
        say "Unit tests"
        tests "cargo test" "$log/units" cargo test --locked --workspace --no-fail-fast
        say "All interleavings, many seeds, inputs that coverage finds"
        explorations "$level" "$log"
        say "Programs that nobody here wrote, on the software fabric"
        "$repo/tests/softrdma/programs.sh" "$level" </dev/null | tee "$log/programs" >&2 || true
        add_sum "$log/programs" 1
        package "$level" "$log/package"
        demo "$log/demo"
        acceptance "$log/accept"
    fi
    wait "$guests"
    trap - EXIT
    add_cells vm "$log" "$@"
    add_cells vm-new "$log" "$@"
    run_cells soft "$log" "$@"
    add_cells soft "$log" "$@"
    if ((!$#)) && [[ -z $server ]]; then
        say "The benchmark, in a few short runs"
        "$repo/scripts/bench.sh" smoke </dev/null >"$log/bench" || true
        add_sum "$log/bench" 3
    fi
    if [[ $level == full && -z $server ]] && ((!$#)); then
        acceptance_in_guest "$log/accept-vm"
        say "Sanitizers"
        "$repo/scripts/sanitizers.sh" </dev/null >"$log/sanitizers" || true
        add_sum "$log/sanitizers" 3
    fi
    if [[ $level == full && -z $server ]]; then
        "${cells[@]}" --report docs/test-report.md
        say "docs/test-report.md is written"
    fi
    if [[ $(sha256sum <"$module") != "$built" ]]; then
        ((++failed))
        say "$module is another one than at the beginning: what was tested is not what is there"
    fi
    rm -r "$log"
    say "Done in $((SECONDS - start)) s"
    printf '%d passed, %d failed, %d skipped\n' "$passed" "$failed" "$skipped"
    ((!failed && passed))
}

# build_variants CASE… — the faulty modules that these cases need, in the place of the module
# proper.
build_variants() {
    if [[ " $* " == *' deadlock-guard '* ]]; then
        step "cargo: the module without deferral, which has to fail" \
            build_variant test-handler-loop with-handler-loop
    fi
    if [[ " $* " =~ ' '(panics|watchdog) ]]; then
        step "cargo: the module with panics, which has to live on" \
            build_variant test-panics with-panics
    fi
}

# The cells that are chosen, on all fabrics.
chosen() {
    local fabric
    for fabric in soft vm vm-new; do "${cells[@]}" --fabric "$fabric" --list "$@"; done
}

# Cases that use no program but the server: their clients are the project's own.
own_clients='commands|waiting|reply-off|pipeline|listed|sizes-edges|odd-windows|small-server-window|last-words'

# The parts of scripts/setup.sh that the cells on stdin need.
needs() {
    awk -F / -v own="^($own_clients)$" '
        { need["server-" $2] }
        $1 !~ own { need["clients"] }
        $3 ~ /^vm/ { need["guest"] }
        $3 == "vm-new" { need["guest-new"] }
        END { for (part in need) print part }'
}

# The package and its documentation, in use on Debian 13; in full on all releases, with
# the builds on each of them.
package() {
    local level=$1 log=$2 releases=(13)
    [[ $level == quick ]] || releases=(12 13 forky --each-line)
    say "The package, installed, in use, and removed"
    "$repo/scripts/service.sh" "${releases[@]}" </dev/null >"$log" || true
    add_sum "$log" 1
    [[ $level == full ]] || return 0
    say "Builds on other releases"
    "$repo/scripts/build-on.sh" </dev/null >"$log" || true
    add_sum "$log" 3
    layouts "$log"
}

# The tables of the server's structures, against the headers of those releases.
layouts() {
    say "Layouts of the releases"
    if {
        "$repo/scripts/setup.sh" sources && "$repo/scripts/abi-check.sh" --fetched &&
            "$repo/scripts/abi-check.sh" --compare "$cache/src/9.1" "$cache/src/8.1"
    } </dev/null >"$1" 2>&1 && grep -q 'ConnectionType has 272 bytes instead of 256' "$1"; then
        ((++passed))
    else
        ((++failed))
        tail -n 40 "$1" >&2
    fi
}

# The README's other command, with little to do; and with servers that replicate.
demo() {
    local log=$1 start=$SECONDS
    say "The demonstration"
    if "$repo/scripts/demo.sh" --fabric soft --clients 8 --size 1000000 --requests 200 </dev/null >"$log" 2>&1 &&
        "$repo/scripts/demo.sh" --fabric soft --replication </dev/null >>"$log" 2>&1; then
        ((++passed))
        say "  $((SECONDS - start)) s"
    else
        ((++failed))
        tail -n 40 "$log" >&2
    fi
}

# The acceptance run for hosts with devices, both its sides on the software fabric; and on a
# device that can't do what the protocol needs, which it has to find.
acceptance() {
    local log=$1 start=$SECONDS
    say "The acceptance run"
    if accept_both "$log" "$repo/scripts/softrdma.sh" 127.0.0.1 --quick --seconds 0.3; then
        ((++passed))
    else
        ((++failed))
        tail -n 40 "$log" >&2
    fi
    if SOFTRDMA_FAULTS=imm=none accept_both "$log" "$repo/scripts/softrdma.sh" 127.0.0.1 --quick; then
        ((++failed))
        say "it passed on a device without immediate data"
    elif grep -q '^FAIL PING over RDMA' "$log" && grep -q ' [1-9][0-9]* failed' "$log"; then
        ((++passed))
    else
        ((++failed))
        tail -n 40 "$log" >&2
    fi
    say "  $((SECONDS - start)) s"
}

# All of it, for as long as on hardware, on the kernel's Soft-RoCE; the device is reset, too,
# where the kernel can.
acceptance_in_guest() {
    local log=$1 start=$SECONDS
    say "The acceptance run in full, in the virtual machine"
    if accept_both "$log" "$repo/scripts/guest.sh --kernel new --timeout 3600" 10.9.9.1 --clients 100 \
        --reset 'rdma link delete rxe0; sleep 2; rdma link add rxe0 type rxe netdev d0'; then
        ((++passed))
    else
        ((++failed))
        tail -n 60 "$log" >&2
    fi
    say "  $((SECONDS - start)) s"
}

# accept_both LOG WHERE ADDRESS OPTION…
accept_both() {
    local log=$1 where=$2 status=0
    # shellcheck disable=SC2086 # a command with its options
    $where "$repo/scripts/accept.sh" both "${@:3}" --line 8.0 --out "$log.folder" \
        --port $((20000 + RANDOM % 20000)) </dev/null >"$log" 2>&1 || status=$?
    rm -rf "$log.folder" "$log.folder.tar.gz"
    return "$status"
}

# build_variant FEATURE FOLDER — the module with a fault that a test needs. In the same
# place as the module proper, so that what both need is built once; the module proper
# comes after it and takes its place.
build_variant() {
    local into=$target/release/$2
    cargo build --locked --release --package valkey-rdma --features "$1"
    mkdir -p "$into"
    # Moved into place: a hard link would be overwritten with the next build.
    cp "$target/release/libvalkey_rdma.so" "$into/new"
    mv "$into/new" "$into/libvalkey_rdma.so"
}

# tests TEXT LOG COMMAND… — tests that cargo runs, shown as one step.
tests() {
    local text=$1 log=$2 start=$SECONDS status=0 p f s
    shift 2
    printf '  %-58s ' "$text" >&2
    "$@" >"$log" 2>&1 </dev/null || status=$?
    read -r p f s < <(awk '/^test result:/ { p += $4; f += $6; s += $8 } END { print p+0, f+0, s+0 }' "$log")
    # What did not compile, or crashed, counts no test as failed.
    ((!status || f)) || f=1
    ((!f)) || tail -n 60 "$log" >&2
    say "$((SECONDS - start)) s: $p passed, $f failed, $s skipped"
    ((passed += p, failed += f, skipped += s)) || true
}

# The hand-overs under their models, the session under fuzzing; in full also under many
# more seeds than cargo test takes, and the models on every weakened ordering.
explorations() {
    local level=$1 log=$2 seconds=60 mutants=(--none)
    if [[ $level == full ]]; then
        seconds=1800 mutants=()
        tests "the simulation with 100,000 seeds" "$log/simulation" \
            env SIMULATION_SEEDS=100000 cargo test --locked --release -p valkey-rdma-proto --test simulation
    fi
    tests "the simulation, one seed again" "$log/seed" \
        env SIMULATION_SEED=17 cargo test --locked -p valkey-rdma-proto --test simulation
    "$repo/scripts/mutants.sh" "${mutants[@]}" </dev/null >"$log/models" || true
    add_sum "$log/models" 1
    "$repo/scripts/fuzz.sh" "$seconds" </dev/null >"$log/fuzz" || true
    add_sum "$log/fuzz" 2
}

# The cells in virtual machines, each line with the name of its fabric before it.
in_guests() {
    local log=$1 fabric
    shift
    for fabric in vm vm-new; do
        run_cells "$fabric" "$log" "$@" 2> >(sed -u "s/^/$fabric: /" >&2)
    done
}

# run_cells FABRIC LOG SELECTOR… — the chosen cells of a fabric, shown as they end.
run_cells() {
    local fabric=$1 log=$2 start=$SECONDS where=() jobs=1 shown=() told=() count
    shift 2
    [[ -z $server ]] || shown=(--ro "${server%/*}")
    count=$(count_cells "$fabric" "$@")
    ((count)) || return 0
    case $fabric in
    soft)
        say "Cells on the software fabric: $count"
        where=("$repo/scripts/softrdma.sh")
        told=(--junit "$target/cells.xml")
        # Most cells wait for most of their time.
        jobs=$((3 * $(nproc)))
        ;;
    vm)
        say "Cells in a virtual machine: $count"
        ! "${cells[@]}" --fabric vm --list "$@" | grep '^siw/' >/dev/null || "$repo/scripts/setup.sh" guest-siw
        where=("$repo/scripts/guest.sh" --timeout "$guest_limit" "${shown[@]}")
        [[ ! -d $cache/cells ]] || where+=(--rw "$cache/cells")
        ;;
    vm-new)
        say "Cells in a virtual machine with a newer kernel: $count"
        "$repo/scripts/setup.sh" guest-new
        where=("$repo/scripts/guest.sh" --kernel new --timeout "$guest_limit" "${shown[@]}")
        [[ ! -d $cache/cells ]] || where+=(--rw "$cache/cells")
        ;;
    esac
    "${where[@]}" "${cells[@]}" --fabric "$fabric" --jobs "$jobs" "${told[@]}" "$@" </dev/null |
        tee "$log/$fabric" >&2 || true
    say "  $((SECONDS - start)) s"
}

count_cells() { "${cells[@]}" --fabric "$1" --list "${@:2}" | wc -l; }

# add_cells FABRIC LOG SELECTOR… — counts how they ended. What their sum does not account for
# did not pass.
add_cells() {
    local fabric=$1 log=$2 count before=$((passed + failed + skipped))
    count=$(count_cells "$fabric" "${@:3}")
    ((count)) || return 0
    touch "$log/$fabric"
    add_sum "$log/$fabric" "$count"
    ((failed += before + count - passed - failed - skipped)) || true
}

main "$@"
