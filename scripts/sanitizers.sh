#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# scripts/sanitizers.sh [address|thread|valgrind]… — tests that run where mistakes with
# memory and between threads are found at once. All of them by default.
#
#   address   AddressSanitizer: a 9.1 server, built from Debian's sources with it, the
#             module built with it, and cells on the software fabric
#   thread    ThreadSanitizer: the tests of windows and session
#   valgrind  memcheck: eleven short cells on the stock 8.0 server
#
# Each job has to find planted bugs first. The last line sums up, as test.sh does.
# shellcheck source=scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

passed=0 failed=0 skipped=0

main() {
    local job
    case ${1:-} in -h | --help) sed -n '4,12s/^# \{0,1\}//p' "$0"; return ;; esac
    (($#)) || set -- address thread valgrind
    cd "$repo"
    build_environment=$("$repo/scripts/setup.sh" env)
    eval "$build_environment"
    built=${CARGO_TARGET_DIR:-$repo/target}
    work=$(mktemp -d "${TMPDIR:-/tmp}/valkey-rdma-sanitizers.XXXXXX")
    for job; do
        case $job in address | thread | valgrind) "job_$job" ;; *) die "unknown job '$job'" ;; esac
    done
    ((failed)) || rm -r "$work"
    printf '%d passed, %d failed, %d skipped\n' "$passed" "$failed" "$skipped"
    ((!failed))
}

# --- AddressSanitizer --------------------------------------------------------

# A server that is built with a sanitizer loads modules without RTLD_DEEPBIND, which
# its interceptors need. The quarantine is small since cells watch resident memory.
address_options=detect_leaks=0:quarantine_size_mb=4:allocator_release_to_os_interval_ms=100:exitcode=99
address_cases=(
    commands sizes-edges odd-windows pipeline last-words deadlock-40kb
    stalled-unpolled stalled-leaves kill shutdown output-limit
    hostile-messages hostile-immediates hostile-windows hostile-announcements hostile-floods
    hostile-deaf hostile-rights hostile-handshakes hostile-leaving limit-registered
    outgoing-connect outgoing-sync outgoing-lost soak removal removal-address device-limits
    crowd-ends refused-linger idle-ends left-behind
)

job_address() {
    local lab=$cache/sanitizers/address/valkey-rdma blunder server
    server=$lab/servers/9.1/usr/bin/valkey-server
    say "AddressSanitizer"
    "$repo/scripts/setup.sh" clients
    mkdir -p "$lab/servers"
    ln -sfn "$cache/clients" "$lab/clients"
    [[ $server -nt $cache/stamps/unpack_source_9.1_forky ]] ||
        step "the 9.1 server with AddressSanitizer" address_server "$server"
    manifest "$lab" 9.1 "$server"
    step "cells, clients and fabric" plain_build
    step "the module with AddressSanitizer" sanitized address cargo build --locked --release \
        --package valkey-rdma --lib --target "$target"
    step "a module that blunders" sanitized address rustc -O --edition 2024 \
        --crate-type cdylib -o "$work/blunder.so" tests/sanitizers/blunder.rs
    export ASAN_OPTIONS=$address_options
    for blunder in use-after-free:heap-use-after-free overrun:heap-buffer-overflow; do
        caught "planted: ${blunder%:*}" "AddressSanitizer: ${blunder#*:}" \
            env BLUNDER="${blunder%:*}" "$server" --port 0 --loadmodule "$work/blunder.so"
    done
    cells "${lab%/*}" "$built/$target/release/libvalkey_rdma.so" \
        "${address_cases[@]/%//9.1/soft/4}"
    unset ASAN_OPTIONS
}

address_server() {
    local tree=$cache/src/9.1.address
    rm -rf "$tree"
    cp -a "$cache/src/9.1" "$tree"
    make -C "$tree/src" -j"$(nproc)" SANITIZER=address OPTIMIZATION=-O1 valkey-server
    install -D "$tree/src/valkey-server" "$1"
    rm -r "$tree"
}

# --- ThreadSanitizer ---------------------------------------------------------

# The standard library comes without instrumentation: what it orders by its own means (a
# Mutex that is contended, a channel, the end of an Arc) is not seen. The windows use atomics
# alone, and their tests too. The software fabric lives by std's Mutex, and would be accused
# hundreds of times of what is none.
thread_options="halt_on_error=1:exitcode=66:suppressions=$repo/tests/sanitizers/thread.supp"

job_thread() {
    local copy=$work/windows mutant
    say "ThreadSanitizer"
    export TSAN_OPTIONS=$thread_options
    copy_proto "$copy"
    for mutant in 'receive.rs:self.tail.store(tail + u64::from(count), Ordering::Release)' \
        'ledger.rs:self.ledger.busy.store(false, Ordering::Release)'; do
        cp "$repo/crates/proto/src/window/"*.rs "$copy/src/window/"
        weaken "$copy/src/window/${mutant%%:*}" "${mutant#*:}"
        caught "planted: ${mutant%%:*} without its release" "ThreadSanitizer: data race" in_copy "$copy" --test hand_over
    done
    cp "$repo/crates/proto/src/window/"*.rs "$copy/src/window/"
    passes "windows and session" in_copy "$copy" --lib --test hand_over
    unset TSAN_OPTIONS
}

weaken() {
    grep -qF -- "$2" "$1" || die "$1 has no '$2' any more: plant another bug"
    awk -v from="$2" '
        { at = index($0, from) }
        at { $0 = substr($0, 1, at - 1) relaxed substr($0, at + length(from)) }
        { print }' relaxed="${2/Ordering::Release/Ordering::Relaxed}" "$1" >"$1.new"
    mv "$1.new" "$1"
}

in_copy() {
    (cd "$1" && sanitized thread timeout 900 \
        cargo test --release --target "$target" "${@:2}")
}

# --- valgrind ----------------------------------------------------------------

valgrind_cases=(
    commands last-words reply-off kill output-limit hostile-messages hostile-immediates
    hostile-announcements limit-registered stalled-leaves crowd-ends
)

job_valgrind() {
    local lab=$cache/sanitizers/valgrind/valkey-rdma server=$cache/servers/8.0/usr/bin/valkey-server
    local into=$cache/sanitizers/valgrind/valkey-rdma/servers/8.0/usr/bin blunder
    say "valgrind"
    need_packages valgrind
    "$repo/scripts/setup.sh" server-8.0 clients
    mkdir -p "$into"
    ln -sfn "$cache/clients" "$lab/clients"
    gcc -O1 -shared -fPIC -Wl,-soname,libjemalloc.so.2 -o "$lab/libjemalloc.so.2" \
        tests/sanitizers/jemalloc.c
    cat >"$into/valkey-server" <<SH
#!/bin/sh
export LD_LIBRARY_PATH='$lab'\${LD_LIBRARY_PATH:+:\$LD_LIBRARY_PATH}
exec valgrind --quiet --error-exitcode=99 --vgdb=no --fair-sched=yes \\
    --suppressions='$repo/tests/sanitizers/valgrind.supp' '$server' "\$@"
SH
    chmod +x "$into/valkey-server"
    manifest "$lab" 8.0 "$(dpkg -L valgrind | grep '/memcheck-amd64-linux$')"
    step "module, cells, clients and fabric" plain_build
    step "a module that blunders" rustc -O --edition 2024 --crate-type cdylib \
        -o "$work/blunder.so" tests/sanitizers/blunder.rs
    for blunder in 'use-after-free:Invalid read of size 1' 'overrun:Invalid write of size 1' \
        'uninitialised:depends on uninitialised value'; do
        caught "planted: ${blunder%%:*}" "${blunder#*:}" env BLUNDER="${blunder%%:*}" \
            "$into/valkey-server" --port 0 --loadmodule "$work/blunder.so"
    done
    cells "${lab%/*}" "$built/release/libvalkey_rdma.so" \
        "${valgrind_cases[@]/%//8.0/soft/1}"
}

# --- common ------------------------------------------------------------------

target=x86_64-unknown-linux-gnu

# sanitized NAME COMMAND… — with the sanitizer that the stable compiler has and keeps back.
# Naming the target keeps the flags off build scripts.
sanitized() {
    local flags="-Zsanitizer=$1 -Cunsafe-allow-abi-mismatch=sanitizer"
    if [[ $2 == rustc ]]; then
        # shellcheck disable=SC2086
        RUSTC_BOOTSTRAP=1 rustc $flags --target "$target" "${@:3}"
    else
        RUSTC_BOOTSTRAP=1 RUSTFLAGS=$flags CARGO_TARGET_DIR=$built "${@:2}"
    fi
}

plain_build() {
    build_all
    "$repo/scripts/softrdma.sh" --path
}

# manifest LAB LINE EXECUTABLE — tells the cells' runner by what hash it knows the server:
# its own, or that of the program which runs it.
manifest() {
    printf '["%s"]\nversion = "%s"\nsha256 = "%s"\n' "$2" "$2" \
        "$(sha256sum "$3" | cut -d' ' -f1)" >"$1/servers/manifest.toml"
}

# caught TEXT WORDS COMMAND… — COMMAND fails, and says WORDS.
caught() {
    local text=$1 words=$2 status=0 log=$work/log
    shift 2
    printf '  %-58s ' "${text:0:58}" >&2
    (cd "$work" && "$@") >"$log" 2>&1 </dev/null || status=$?
    if ((status)) && grep -qF -- "$words" "$log"; then
        say "caught"
        passed=$((passed + 1))
    else
        say "NOT CAUGHT (status $status)"
        tail -n 30 "$log" >&2
        failed=$((failed + 1))
    fi
}

# passes TEXT COMMAND… — tests that have to pass.
passes() {
    local text=$1 status=0 log=$work/log start=$SECONDS
    shift
    printf '  %-58s ' "$text" >&2
    "$@" >"$log" 2>&1 </dev/null || status=$?
    say "$((SECONDS - start)) s, $(awk '/^test result:/ { n += $4 } END { print n + 0 }' "$log") tests"
    if ((status)); then
        grep -A 40 'WARNING: ThreadSanitizer' "$log" >&2 || tail -n 40 "$log" >&2
        failed=$((failed + 1))
    else
        passed=$((passed + 1))
    fi
}

# cells CACHE MODULE SELECTOR… — cells on the servers of another cache. What a sanitizer
# said stands in a server's output, which is kept when its cell has failed.
cells() {
    local lab=$1 module=$2
    shift 2
    XDG_CACHE_HOME=$lab SOFTRDMA_NO_BUILD=1 TMPDIR=$work "$repo/scripts/softrdma.sh" \
        "$built/release/cells" --fabric soft --level full --module "$module" "$@" \
        </dev/null | tee "$work/cells" >&2 || true
    find "$work" -name output -size +0 -exec grep -lE 'AddressSanitizer|==[0-9]+== ' {} + |
        while read -r output; do
            say "$output:"
            head -n 60 "$output" >&2
        done || true
    add_sum "$work/cells" "$#"
}

main "$@"
