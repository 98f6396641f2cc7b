#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# scripts/demo.sh [OPTION…] — a stock valkey-server with the module serves RDMA
# clients: valkey-benchmark SETs and GETs large values, over RDMA and then over TCP,
# while a TCP client asks all the time whether the server still answers. Ends with a
# table of both.
#
#   --fabric F      hw: this machine's RDMA device; soft: the software fabric, which
#                   needs neither device nor root; vm: Soft-RoCE in a virtual machine.
#                   hw where there is a device, else soft
#   --address A     the device's address (hw only; its first one unless given)
#   --line L        the server's release line: 8.0 unless given (8.1 and 9.1 need root)
#   --clients N     50 unless given
#   --size BYTES    10485760 unless given
#   --requests N    of each kind; 500 unless given, in the virtual machine 50
#   --io-threads N  as many as there are processors unless given, at least 2 and at most
#                   8: these threads spin, and on fewer processors they take the time of
#                   the main thread and of the clients
#   --replication   instead of that a primary with two replicas, one over RDMA and one over
#                   TCP; the primary is killed, and one replica takes its place
# shellcheck source=scripts/lib.sh
. "${BASH_SOURCE[0]%/*}/lib.sh"

fabric='' address='' line=8.0 clients=50 size=$((10 << 20)) requests='' threads='' inside=0 replication=0
declare -A figures=()

main() {
    while (($#)); do
        case $1 in
        --inside) inside=1; shift; continue ;;
        --replication) replication=1; shift; continue ;;
        --fabric | --address | --line | --clients | --size | --requests) ;;
        --io-threads) threads=${2:?}; shift 2; continue ;;
        *) sed -n '4,21s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
        esac
        printf -v "${1#--}" %s "${2:?$1 needs a value}"
        shift 2
    done
    if [[ -z $threads ]]; then
        threads=$(nproc)
        threads=$((threads < 2 ? 2 : threads > 8 ? 8 : threads))
    fi
    target=${CARGO_TARGET_DIR:-$repo/target}
    module=$target/release/libvalkey_rdma.so
    if ((inside)); then
        demonstrate
    else
        prepare
    fi
}

# --- outside: what the fabric needs ------------------------------------------

prepare() {
    local start=$SECONDS parts=(build "server-$line" clients) where=()
    if [[ -z $fabric ]]; then
        fabric=soft
        [[ -z $(device_address) ]] || fabric=hw
    fi
    [[ $fabric =~ ^(hw|soft|vm)$ ]] || die "--fabric is hw, soft or vm, not '$fabric'"
    if [[ $fabric == hw ]]; then
        : "${address:=$(device_address)}"
        [[ -n $address ]] || die "no RDMA device of this machine has an address ('rdma link' shows devices)"
    fi
    say "Setting up"
    [[ $fabric != vm ]] || parts+=(guest)
    "$repo/scripts/setup.sh" "${parts[@]}"
    eval "$("$repo/scripts/setup.sh" env)"
    say "Building"
    step "cargo build --release" cargo build --manifest-path "$repo/Cargo.toml" --locked --release
    case $fabric in
    soft)
        address=127.0.0.1
        step "the software fabric" "$repo/scripts/softrdma.sh" true
        where=(env SOFTRDMA_NO_BUILD=1 "$repo/scripts/softrdma.sh")
        ;;
    vm)
        address=10.9.9.1
        : "${requests:=50}"
        where=("$repo/scripts/guest.sh" --timeout 1800)
        say "Booting a virtual machine with Soft-RoCE (half a minute)"
        ;;
    esac
    if ((replication)); then
        "${where[@]}" "$repo/scripts/demo-replication.sh" "$address" "$line"
        say "Done in $((SECONDS - start)) s"
        return
    fi
    "${where[@]}" "$repo/scripts/demo.sh" --inside --fabric "$fabric" --address "$address" --line "$line" \
        --clients "$clients" --size "$size" --requests "${requests:-500}" --io-threads "$threads"
    say "Done in $((SECONDS - start)) s"
}

# The first IPv4 address of the first RDMA device that is up and has one.
device_address() {
    local netdev
    for netdev in $(rdma link 2>/dev/null | sed -n 's/.* state ACTIVE .*netdev \([^ ]*\).*/\1/p'); do
        ip -4 -brief address show dev "$netdev" | grep -o '[0-9.]*/' | tr -d / | head -n 1
    done | head -n 1
}

# --- inside: server, clients, figures ----------------------------------------

# ask COMMAND… — the answer of the server, over a TCP connection kept open, in
# $reply. Ends the demo when there is none within ten seconds.
ask() {
    local LC_ALL=C kind
    printf '%s\r\n' "$*" >&"$tcp"
    read -r -t 10 -u "$tcp" kind || stuck "the server did not answer $1 over TCP for 10 s"
    kind=${kind%$'\r'}
    reply=${kind:1}
    [[ $kind == '$'* ]] || return 0
    read -r -N $((reply + 2)) -t 10 -u "$tcp" reply || stuck "the server's answer to $1 broke off"
}

stuck() {
    say ''
    tail -n 20 "$work/server.log" >&2
    die "$1"
}

# field SECTION NAME — one number of INFO.
field() {
    ask INFO "$1"
    [[ $reply =~ $2:([0-9]+) ]] || stuck "INFO $1 has no field $2"
    printf '%s\n' "${BASH_REMATCH[1]}"
}

# info NAME — one number of INFO rdma.
info() { field rdma "rdma_$1"; }

# What the server's main thread has used, in hundredths of a second.
main_cpu() {
    local stat
    stat=$(<"/proc/$server/task/$server/stat")
    # Fields 14 and 15, counted after the name, which may hold blanks.
    read -r -a stat <<<"${stat##*) }"
    echo $((stat[11] + stat[12]))
}

micros() { echo "${EPOCHREALTIME/[.,]/}"; }

demonstrate() {
    local try port=$((20000 + RANDOM % 20000))
    [[ -e $module ]] || die "no $module: run scripts/demo.sh without --inside"
    work=$(mktemp -d "${TMPDIR:-/tmp}/valkey-rdma-demo.XXXXXX")
    # The device's address may be reachable from outside, and protected mode, which
    # would refuse that, refuses us there too.
    password=$(od -An -N16 -tx8 /dev/urandom | tr -d ' \n')
    trap 'kill $jobs_of_ours 2>/dev/null || true; wait; rm -rf "$work"' EXIT
    jobs_of_ours=''
    # Unquoted: one address or two.
    # shellcheck disable=SC2046
    "$repo/scripts/chroot.sh" "$line" valkey-server --port "$port" \
        --bind $(printf '%s\n' 127.0.0.1 "$address" | sort -u) --save '' --dir "$work" \
        --logfile "$work/server.log" --io-threads "$threads" --requirepass "$password" \
        --loadmodule "$module" "bind=$address" "port=$((port + 1))" >"$work/server.out" 2>&1 &
    server=$!
    jobs_of_ours=$server
    for ((try = 0; ; try++)); do
        { exec {tcp}<>"/dev/tcp/127.0.0.1/$port"; } 2>/dev/null && break
        if ((try == 300)) || ! kill -0 "$server" 2>/dev/null; then
            cat "$work/server.out" "$work/server.log" >&2 || true
            die "the server did not start"
        fi
        sleep 0.1
    done
    ask AUTH "$password"
    ask INFO server
    [[ $reply =~ valkey_version:([0-9.]+) ]] || die "the server does not say its version"
    say "valkey-server ${BASH_REMATCH[1]} with $(basename "$module"), $threads I/O threads; RDMA at $address:$((port + 1)) ($fabric)"

    local idle_before idle_after
    idle_before=$(idle)
    pings=0 slowest=0
    load rdma set $((port + 1))
    load rdma get $((port + 1))
    figures+=([rdma.pings]=$pings [rdma.slowest]=$((slowest / 1000)))
    idle_after=$(idle)
    pings=0 slowest=0
    load tcp set "$port"
    load tcp get "$port"
    figures+=([tcp.pings]=$pings [tcp.slowest]=$((slowest / 1000)))
    table "$idle_before" "$idle_after"
}

# Main-thread CPU of a server that nobody asks anything, in percent.
idle() {
    local cpu=$(($(main_cpu)))
    sleep 3
    echo $((($(main_cpu) - cpu) / 3))
}

# moved TRANSPORT set|get — bytes of payload that went over it so far.
moved() {
    case $1.$2 in
    rdma.set) info bytes_received ;;
    rdma.get) info bytes_sent ;;
    tcp.set) field stats total_net_input_bytes ;;
    tcp.get) field stats total_net_output_bytes ;;
    esac
}

# load rdma|tcp set|get PORT — one run of the benchmark, watched, into figures.
load() {
    local transport=$1 name=$2 port=$3 run=$1.$2 how=() bench status=0 start cpu bytes time csv
    [[ $transport == tcp ]] || how=(--rdma)
    timeout 900 "$cache/clients/valkey-benchmark" "${how[@]}" -h "$address" -p "$port" -a "$password" \
        -t "$name" -c "$clients" -d "$size" -n "$requests" --csv >"$work/$run.csv" 2>"$work/$run.err" &
    bench=$!
    jobs_of_ours="$server $bench"
    next_line=0
    start=$(micros) cpu=$(main_cpu) bytes=$(moved "$transport" "$name")
    while kill -0 "$bench" 2>/dev/null; do
        ping_once
        # By payload, for a command that ran may still have most of its reply to send.
        progress "$transport" "$name" $((($(moved "$transport" "$name") - bytes) / size)) "$start"
        sleep 0.4
    done
    wait "$bench" || status=$?
    ((!status)) || stuck "valkey-benchmark ended with status $status: $(tail -n 3 "$work/$run.err")"
    time=$(($(micros) - start)) cpu=$(($(main_cpu) - cpu)) bytes=$(($(moved "$transport" "$name") - bytes))
    progress "$transport" "$name" "$requests" "$start" end
    IFS=, read -r -a csv < <(sed -n '2s/"//gp' "$work/$run.csv")
    figures+=([$run.requests]=$requests [$run.payload]=$(per "$bytes" 1000000 1e-6)
        [$run.throughput]=$(per "$bytes" "$time" 1e-6) [$run.rate]=$(per "$requests" "$time" 1)
        [$run.p50]=${csv[4]} [$run.p95]=${csv[5]} [$run.p99]=${csv[6]} [$run.max]=${csv[7]}
        [$run.cpu]=$(per "$cpu" "$time" 1))
}

ping_once() {
    local before
    before=$(micros)
    ask PING
    before=$(($(micros) - before))
    ((++pings, slowest = before > slowest ? before : slowest))
}

# progress TRANSPORT NAME DONE START [end] — redrawn in place on a terminal, else a line
# now and then.
progress() {
    local width=40 done=$(($3 > requests ? requests : $3)) seconds bar
    seconds=$((($(micros) - $4) / 1000000))
    printf -v bar '%*s' $((width * done / requests)) ''
    printf -v bar '  %-4s %s [%-*s] %*d of %d, %d s, slowest PING over TCP %d ms' "${1^^}" "${2^^}" "$width" "${bar// /#}" \
        "${#requests}" "$done" "$requests" "$seconds" $((slowest / 1000))
    if [[ -t 2 ]]; then
        printf '\r%s\e[K%s' "$bar" "${5:+$'\n'}" >&2
    elif [[ ${5:-} || $seconds -ge $((next_line)) ]]; then
        say "$bar"
        next_line=$((seconds + 5))
    fi
}

row() { printf '%-36s %10s %10s %10s %10s\n' "$@"; }

# per NUMBER MICROS SCALE — NUMBER * SCALE for each second, with one decimal.
per() { awk -v n="$1" -v t="$2" -v s="$3" 'BEGIN { printf "%.1f", n * s * 1e6 / t }'; }

# table IDLE_BEFORE IDLE_AFTER
table() {
    local name line
    echo
    row "$clients clients, $size bytes" "RDMA SET" "RDMA GET" "TCP SET" "TCP GET"
    while IFS=: read -r name line; do
        row "$line" "${figures[rdma.set.$name]}" "${figures[rdma.get.$name]}" \
            "${figures[tcp.set.$name]}" "${figures[tcp.get.$name]}"
    done <<'END'
requests:requests
payload:payload, MB
throughput:throughput, MB/s
rate:requests/s
p50:latency p50, ms
p95:latency p95, ms
p99:latency p99, ms
max:latency, longest (to 3,000), ms
cpu:main-thread CPU during, %
END
    row "PING beside it, asked" "" "${figures[rdma.pings]}" "" "${figures[tcp.pings]}"
    row "PING beside it, slowest, ms" "" "${figures[rdma.slowest]}" "" "${figures[tcp.slowest]}"
    echo
    printf '%-36s %10s %10s\n' \
        "Over RDMA" before after \
        "main-thread CPU of the idle server, %" "$1" "$2" \
        "" "I/O threads" "main thread" \
        "short writes" "$(info short_writes_io)" "$(info short_writes_main)" \
        "resumptions" "-" "$(info resumptions)"
    ((threads <= $(nproc))) || printf '\n%s\n' "$threads I/O threads on $(nproc) processors: the threads of \
the server take time from its main thread and from the clients, over RDMA and over TCP."
}

main "$@"
