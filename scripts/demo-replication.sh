#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# scripts/demo-replication.sh ADDRESS LINE — called by `scripts/demo.sh --replication` on a
# fabric: a primary with two replicas, one over RDMA and one over TCP. The primary is written to
# and killed; the replica over RDMA takes its place, and the other one follows it.
# In the end both have the same data.
# shellcheck source=scripts/lib.sh
. "${BASH_SOURCE[0]%/*}/lib.sh"

address=${1:?} line=${2:?}
module=${CARGO_TARGET_DIR:-$repo/target}/release/libvalkey_rdma.so
[[ -e $module ]] || die "no $module: run scripts/demo.sh --replication"
work=$(mktemp -d "${TMPDIR:-/tmp}/valkey-rdma-demo.XXXXXX")
declare -A pids=() ports=()
trap 'kill "${pids[@]}" 2>/dev/null || true; wait; rm -rf "$work"' EXIT

# at NAME COMMAND… — the answer of a server, over TCP.
at() { "$cache/clients/valkey-cli" -p "${ports[$1]}" "${@:2}"; }

# field NAME FIELD — one field of INFO.
field() { at "$1" info everything | tr -d '\r' | sed -n "s/^$2://p"; }

# until_true WHAT COMMAND… — waits until a command succeeds.
until_true() {
    local try
    for ((try = 0; try < 300; try++)); do
        "${@:2}" 2>/dev/null && return
        sleep 0.1
    done
    tail -n 5 "$work"/*/log >&2
    die "waited 30 s for $1"
}

# launch NAME prefer|no — a server whose RDMA port has the number of its TCP port.
launch() {
    local name=$1 port=$((20000 + RANDOM % 20000))
    ports[$name]=$port
    mkdir "$work/$name"
    # Unquoted: one address or two.
    # shellcheck disable=SC2046
    "$repo/scripts/chroot.sh" "$line" valkey-server --port "$port" \
        --bind $(printf '%s\n' 127.0.0.1 "$address" | sort -u) --save '' --protected-mode no \
        --enable-debug-command yes --repl-diskless-sync-delay 0 --dir "$work/$name" \
        --logfile "$work/$name/log" \
        --loadmodule "$module" "bind=$address" "port=$port" "replication=$2" >"$work/$name/out" 2>&1 &
    pids[$name]=$!
    until_true "the server $name" eval "at $name ping >/dev/null"
}

is_up() { [[ $(field "$1" master_link_status) == up ]]; }
has_last_write() { [[ $(at "$1" get last) == "$2" ]]; }

# tell NAME — what carries a replica's link, by itself.
tell() {
    local link
    link=$(field "$1" rdma_primary_link)
    say "  $1: link $(field "$1" master_link_status), over ${link:-TCP}"
}

launch primary prefer
launch by-rdma prefer
launch by-tcp no
say "A primary with 100 MB of data, a replica over RDMA and one over TCP (valkey-server of line $line)"
at primary debug populate 10000 key 10000 >/dev/null
for replica in by-rdma by-tcp; do
    at "$replica" replicaof "$address" "${ports[primary]}" >/dev/null
    until_true "the link of $replica" is_up "$replica"
    tell "$replica"
done
for ((n = 1; n <= 200; n++)); do at primary set last "$n" >/dev/null; done
for replica in by-rdma by-tcp; do until_true "the last write" has_last_write "$replica" 200; done
say "The primary is killed; the replica over RDMA takes its place, and the other one follows it"
# Or the shell would tell of its end.
disown "${pids[primary]}"
kill -9 "${pids[primary]}"
unset 'pids[primary]'
at by-rdma replicaof no one >/dev/null
at by-tcp replicaof "$address" "${ports[by-rdma]}" >/dev/null
at by-rdma set last failover >/dev/null
until_true "the link of by-tcp" is_up by-tcp
until_true "the last write" has_last_write by-tcp failover
tell by-tcp
left=$(at by-rdma debug digest) right=$(at by-tcp debug digest)
[[ $left == "$right" ]] || die "the data differ: $left and $right"
say "Both have the same data: $left"
