#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# tests/softrdma/programs.sh [quick|full] — programs that nobody here wrote, unmodified,
# on the software fabric: rdma-core's own, perftest, and valkey's clients against the
# upstream C module in the server that it was built with. full is the default; quick
# does nearly the same with fewer rounds. Every program has a time limit.
#
# Programs of what the fabric does not have must fail, and soon.
#
# The last line is "N passed, N failed, 0 skipped": what is not there fails.
# shellcheck source=scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/../../scripts/lib.sh"

limit=120
# Runs a client whose every connect() is 0.3 s late, and no other call. With -R perftest's
# server closes its listener after a first connection and listens anew for a second one,
# for which its client does not wait: a race that a busy machine decides the wrong way.
slowly=(strace -f --seccomp-bpf -o /dev/null -e trace=connect
    -e inject=connect:delay_enter=300000)
passed=0 failed=0
# Beside the ports that the kernel hands out.
port=$((10000 + BASHPID % 20000))

main() {
    local rounds requests more i ip program words bytes=(64 40960 1048576)
    case ${1:-full} in
    quick) rounds=100 requests=(10000 2000 100) more=() ;;
    full) rounds=1000 requests=(100000 20000 1000) more=("ib_write_bw -R -a") ;;
    *) sed -n '4,11s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
    esac
    need_packages rdmacm-utils ibverbs-utils perftest strace
    "$repo/scripts/setup.sh" clients
    "$repo/scripts/softrdma.sh" --path >/dev/null
    export SOFTRDMA_NO_BUILD=1
    work=$(mktemp -d "${TMPDIR:-/tmp}/softrdma-programs.XXXXXX")
    trap clean EXIT

    works "ibv_devinfo -v" on_fabric ibv_devinfo -v
    for ip in 127.0.0.1 ::1; do
        works "rping -C $rounds -v, $ip" both \
            rping -s -C "$rounds" -v -a "$ip" -p PORT -- rping -c -C "$rounds" -v -a "$ip" -p PORT
    done
    works "ucmatose" both ucmatose -p PORT -- ucmatose -p PORT -s 127.0.0.1
    words=(ucmatose -c 20 -C "$rounds" -S 4000)
    works "${words[*]}" both "${words[@]}" -p PORT -- "${words[@]}" -p PORT -s 127.0.0.1
    works "rdma_server, rdma_client" both rdma_server -p PORT -- rdma_client -s 127.0.0.1 -p PORT
    works "rdma_xserver, rdma_xclient" both rdma_xserver -p PORT -- rdma_xclient -s 127.0.0.1 -p PORT
    for program in ibv_rc_pingpong "ibv_rc_pingpong -e" ibv_srq_pingpong; do
        read -ra words <<<"$program -g 0 -n $rounds"
        works "${words[*]}" both "${words[@]}" -p PORT -- "${words[@]}" -p PORT 127.0.0.1
    done
    for program in ib_{send,write,read}_{lat,bw}{" -R",""} "${more[@]}"; do
        read -ra words <<<"$program -n $rounds"
        works "${words[*]}" both "${words[@]}" -F -p PORT -- "${slowly[@]}" "${words[@]}" -F -p PORT 127.0.0.1
    done

    works "valkey-server with the C module" start_server
    for i in 0 1 2; do
        works "valkey-benchmark --rdma -n ${requests[i]} -d ${bytes[i]}" \
            benchmark "${requests[i]}" "${bytes[i]}"
    done
    works "valkey-cli --rdma" command_line

    for program in "udaddy -s 127.0.0.1" "mckey -m 239.1.1.1" "udpong -s 127.0.0.1" \
        "rstream -s 127.0.0.1" "riostream -s 127.0.0.1" "rcopy $0 127.0.0.1" \
        "ibv_uc_pingpong -g 0" "ibv_ud_pingpong -g 0" "ibv_xsrq_pingpong -g 0"; do
        read -ra words <<<"$program"
        works "refused: $program" refused "${words[@]}"
    done
    printf '%d passed, %d failed, 0 skipped\n' "$passed" "$failed"
    ((!failed))
}

clean() {
    jobs -p | xargs -r kill 2>/dev/null || true
    rm -r "$work"
}

# works TEXT COMMAND… — one line of the result; what was printed if it failed.
works() {
    local text=$1 start=$SECONDS status=0
    shift
    ((port += 1))
    rm -f "$work"/*.out
    "$@" >"$work/client.out" 2>&1 || status=$?
    # What the loader says if a symbol lacks the version that the program was linked with.
    ! grep -q 'no version information' "$work"/*.out || status=version
    if [[ $status == 0 ]]; then
        ((passed += 1))
        printf 'pass  %s (%d s)\n' "$text" $((SECONDS - start))
        # Figures, where a program prints any.
        sed -n 's/^"\(SET\|GET\)","\([0-9]*\).*/        \1 \2 requests\/s/p' "$work/client.out"
    else
        ((failed += 1))
        printf 'FAIL  %s (%d s): %s\n' "$text" $((SECONDS - start)) "$status"
        tail -n 15 "$work"/*.out
    fi
}

on_fabric() { timeout "$limit" "$repo/scripts/softrdma.sh" "$@"; }

# both SERVER… -- CLIENT… — starts one, waits until it listens, runs the other; both have
# to end well. PORT stands for a port of their own.
both() {
    local server=() pid status=0
    while [[ $1 != -- ]]; do server+=("${1/#PORT/$port}"); shift; done
    shift
    on_fabric "${server[@]}" >"$work/server.out" 2>&1 &
    pid=$!
    listening "$pid" || status=$?
    ((status)) || on_fabric "${@/#PORT/$port}" || status=$?
    # Nobody will come any more.
    ((!status)) || kill "$pid" 2>/dev/null || true
    wait "$pid" || ((status)) || { status=$?; echo "the server ended with $status"; }
    return "$status"
}

# listening PROCESS — waits until somebody listens at the port, over the fabric or TCP.
listening() {
    local tries tcp fabric=" 00010000 .*@softrdma/$port/"
    printf -v tcp ':%04X 0*:0000 0A' "$port"
    for ((tries = 0; tries < 300; ++tries)); do
        ! grep -q "$fabric" /proc/net/unix || return 0
        ! grep -q "$tcp" /proc/net/tcp /proc/net/tcp6 || return 0
        kill -0 "$1" 2>/dev/null || break
        sleep 0.1
    done
    echo "nobody listens at $port" >&2
    return 1
}

# Programs of what the fabric does not have: an error, and no waiting.
refused() {
    local status=0
    timeout 10 "$repo/scripts/softrdma.sh" "$@" -p "$port" || status=$?
    # 124 is what timeout says of one that went on; from 126 on it did not start or crashed.
    ((status > 0 && status != 124 && status < 126 || status == 255))
}

start_server() {
    rdma_port=$port
    timeout 600 "$repo/scripts/softrdma.sh" "$cache/cmodule/9.1/valkey-server" --port 0 --save '' \
        --dir "$work" --loadmodule "$cache/cmodule/9.1/valkey-rdma.so" \
        --rdma-bind 127.0.0.1 --rdma-port "$port" >"$work/server.out" 2>&1 &
    served=$!
    listening "$served"
}

cli() { on_fabric "$cache/clients/valkey-cli" --rdma -h 127.0.0.1 -p "$rdma_port" "$@"; }

# benchmark REQUESTS BYTES — the server has to have done all of them, and failed none.
benchmark() {
    cli config resetstat
    on_fabric "$cache/clients/valkey-benchmark" --rdma -h 127.0.0.1 -p "$rdma_port" \
        -t set,get -n "$1" -d "$2" -r 100 --csv || return
    local command stats
    stats=$(cli info commandstats)
    for command in set get; do
        grep -E "^cmdstat_$command:calls=$1,.*rejected_calls=0,failed_calls=0" <<<"$stats" ||
            { echo "$stats"; return 1; }
    done
}

# Goes through the server byte by byte, and ends it.
command_line() {
    local text
    text=$(head -c 3000000 /dev/urandom | base64 -w 0)
    [[ $(cli -x set text <<<"$text") == OK ]] || return
    [[ $(cli get text) == "$text" ]] || { echo "not what was set"; return 1; }
    cli shutdown nosave
    wait "$served"
}

main "$@"
