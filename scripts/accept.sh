#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# scripts/accept.sh ROLE ADDRESS [OPTION…] — the acceptance run: shows within fifteen
# minutes, on two hosts with RDMA devices, whether this module works there, and leaves
# one folder that tells others. On the first host, then on the second:
#
#   server ADDRESS   starts a server; ADDRESS is this host's own, of its RDMA device.
#                    Prints the command for the other host, and ends when that one did
#   client ADDRESS   runs the checks against the server at the same ADDRESS
#   both ADDRESS     both on one host, for Soft-RoCE and for a first try
#
#   --quick          two minutes instead of fifteen
#   --seconds S      length of each run of load: 15 unless given, with --quick 3
#   --clients N      the most at a time: 1000 unless given, with --quick 100
#   --port P         16379 unless given, for TCP and RDMA; the next one is rping's
#   --out FOLDER     where to put what is kept; a new folder in /tmp unless given
#   --line L         server: a server that scripts/setup.sh fetched, such as 9.1, instead
#                    of the one on the PATH (VALKEY_SERVER names another)
#   --module FILE    server: the module, unless it was built here or installed
#   --reset COMMAND  server: resets the device, last; clients have to be served again
#   --password P     client: as the server's side printed it
#
# Lines begin with PASS, FAIL, LOOK (a figure, with what is expected and by what
# source) or SKIP. The last line sums up: N passed, N failed, N skipped.
# shellcheck source=scripts/lib.sh
. "${BASH_SOURCE[0]%/*}/lib.sh"

role='' address='' quick=0 seconds='' clients='' port=16379 out='' line='' module='' reset=''
passed=0 failed=0 skipped=0 children=() work=''
declare -A inputs=() holders=()

main() {
    role=${1:-} address=${2:-}
    [[ $role =~ ^(server|client|both)$ && -n $address ]] || usage
    shift 2
    while (($#)); do
        case $1 in
        --quick) quick=1; shift; continue ;;
        --seconds | --clients | --port | --out | --line | --module | --reset) ;;
        --password) export ACCEPT_PASSWORD=${2:?}; shift 2; continue ;;
        *) usage ;;
        esac
        printf -v "${1#--}" %s "${2:?$1 needs a value}"
        shift 2
    done
    : "${seconds:=$((quick ? 3 : 15))}" "${clients:=$((quick ? 100 : 1000))}"
    : "${out:=${TMPDIR:-/tmp}/valkey-rdma-accept-$(uname -n | tr -cd 'A-Za-z0-9.-')-$role-$(date -u +%Y%m%dT%H%M%S)}"
    mkdir -p "$out"
    out=$(realpath "$out")
    work=$(mktemp -d "${TMPDIR:-/tmp}/valkey-rdma-accept.XXXXXX")
    trap clean EXIT
    trap 'say "Kept in $out"; exit 130' INT TERM HUP
    find_program
    raise_limits
    "run_$role"
}

usage() { sed -n '4,25s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2; exit 2; }

clean() {
    local pid
    for pid in "${children[@]}"; do kill "$pid" 2>/dev/null || true; done
    wait
    rm -rf "$work"
}

# --- what both sides have ------------------------------------------------------

# The program that speaks RDMA and TCP: built here, or beside this script in the package.
find_program() {
    local file
    for file in "${CARGO_TARGET_DIR:-$repo/target}/release/examples/acceptance" "${BASH_SOURCE[0]%/*}/acceptance"; do
        [[ ! -x $file ]] || { program=$file; return; }
    done
    die "no program 'acceptance' yet. With cargo: scripts/setup.sh build; eval \"\$(scripts/setup.sh env)\"; \
cargo build --release --locked --package valkey-rdma --package client --lib --examples"
}

raise_limits() {
    ulimit -n "$(ulimit -Hn)" 2>/dev/null || true
    ulimit -l unlimited 2>/dev/null ||
        say "locked memory is limited to $(ulimit -l) KiB, which may be too little for a thousand connections; root has no limit"
}

server_name() { [[ $address == *:* ]] && echo "[$address]:$port" || echo "$address:$port"; }
tcp() { timeout 90 "$program" tcp "$(server_name)" "$@"; }
over_rdma() { timeout 900 "$program" "$1" "$(server_name)" "${@:2}"; }
field() { tcp INFO rdma | tr -d '\r' | sed -n "s/^rdma_$1://p"; }

# within SECONDS COMMAND… — tries until it is true.
within() {
    local end=$((SECONDS + $1))
    shift
    until "$@" >/dev/null 2>&1; do
        ((SECONDS < end)) || return 1
        sleep 0.2
    done
}

# verdict PASS|FAIL|LOOK|SKIP TEXT
verdict() {
    printf '%s %s\n' "$1" "$2" | tee -a "$out/report"
    case $1 in
    PASS) ((++passed)) ;;
    FAIL) ((++failed)) ;;
    SKIP) ((++skipped)) ;;
    esac
}

# check TEXT COMMAND… — PASS or FAIL, with the last line of what COMMAND says. COMMAND runs in
# this shell, and may begin what others end.
check() {
    local text=$1 said status=0
    shift
    "$@" >"$work/said" 2>&1 || status=$?
    said=$(tail -n 1 "$work/said")
    if ((!status)); then
        verdict PASS "$text${said:+: $said}"
    else
        verdict FAIL "$text: ${said:-status $status}"
    fi
}

# figure TEXT VALUE UNIT MOST SOURCE — whether it is as expected is for people to judge.
figure() {
    local is='as expected'
    (($2 <= $4)) || is='MORE THAN EXPECTED'
    verdict LOOK "$1: $2 $3, $is (up to $4 $3: $5)"
}

sum() {
    say "Kept in $out"
    printf '%d passed, %d failed, %d skipped\n' "$passed" "$failed" "$skipped" | tee -a "$out/report"
    ((!failed && passed))
}

# inventory FOLDER — what this host is; what the other side can't see.
inventory() {
    local device attribute value
    {
        date -u +%FT%TZ
        uname -nsrm
        sed -n 's/^PRETTY_NAME=//p' /etc/os-release
        sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | uniq -c
        sed -n '/^MemTotal/p' /proc/meminfo
        echo "locked memory: $(ulimit -l) KiB, descriptors: $(ulimit -n)"
        echo "revision: $(git -C "$repo" describe --always --dirty 2>/dev/null || echo 'not from a clone')"
        echo '--- libraries'
        ldd "$program" | sed -n 's/.*=> \(.*\(rdmacm\|ibverbs\).*\) .*/\1/p' | xargs -r realpath
        ls /usr/lib/*/libibverbs /usr/lib64/libibverbs
        echo '--- kernel modules'
        grep -E '^(rdma|ib_|iw_|mlx|bnxt|irdma|erdma|mana|ionic|qed|siw|hns)' /proc/modules | cut -d' ' -f1-3
        for device in /sys/class/infiniband/*; do
            [[ -e $device ]] || continue
            echo "--- device ${device##*/}"
            echo "driver: $(basename "$(realpath "$device/device/driver")" 2>/dev/null)"
            for attribute in node_type fw_ver hca_type board_id hw_rev device/vendor device/device device/numa_node; do
                value=$(cat "$device/$attribute" 2>/dev/null) || continue
                echo "$attribute: $value"
            done
            echo "GID types: $(cat "$device"/ports/1/gid_attrs/types/* 2>/dev/null | sort | uniq -c | tr '\n' ' ')"
            roce_defaults "${device##*/}"
        done
        echo '--- rdma link, rdma system, rdma resource'
        rdma link
        rdma system
        rdma resource
        echo '--- ibv_devinfo -v'
        ibv_devinfo -v
    } >"$1/inventory" 2>&1 || true
}

# The RoCE version and class that the connection manager takes. The folder makes the kernel
# show them; it goes again if it was not there.
roce_defaults() {
    local folder=/sys/kernel/config/rdma_cm/$1 made=0
    [[ -d $folder ]] || { mkdir "$folder" 2>/dev/null && made=1; } || return 0
    echo "RoCE: $(cat "$folder"/ports/1/default_roce_mode), TOS $(cat "$folder"/ports/1/default_roce_tos)"
    ((!made)) || rmdir "$folder"
}

# Counters of the devices, as DEVICE/PORT/NAME=VALUE. In the guest a process takes a third of a
# second, hence none for each.
counters() {
    local file value
    for file in /sys/class/infiniband/*/ports/*/{counters,hw_counters}/*; do
        read -r value <"$file" || continue
        echo "${file#/sys/class/infiniband/}=$value"
    done >"$1" 2>/dev/null || true
}

last_messages() { dmesg 2>/dev/null | tail -n 300 >"$1/dmesg" || true; }

# --- server --------------------------------------------------------------------

run_server() {
    local word=''
    : "${ACCEPT_PASSWORD:=$(od -An -N12 -tx8 /dev/urandom | tr -d ' \n')}"
    export ACCEPT_PASSWORD
    inventory "$out"
    counters "$out/counters.before"
    start_server
    start_rping
    check "the server listens" within 60 listens
    ((!failed)) || { tail -n 20 "$out/log" "$out/output" >&2 || true; gather; sum; return; }
    verdict LOOK "server $(tcp INFO server | tr -d '\r' | sed -n 's/^valkey_version://p'), module $(field version), line $(field line)"
    say "On the other host:"
    say "  ${BASH_SOURCE[0]} client $address --port $port$( ((!quick)) || echo ' --quick') --password $ACCEPT_PASSWORD"
    while [[ $word != bye ]]; do
        if ! kill -0 "$server" 2>/dev/null; then
            verdict FAIL "the server is gone: $out/log"
            break
        fi
        word=$(tcp BLPOP accept:ask 1 2>/dev/null | tail -n 1 | tr -d ' ') || sleep 1
        [[ $word == '(null)' || -z $word || $word == bye ]] || tcp RPUSH accept:answer "$(answer "$word")" >/dev/null || true
    done
    [[ $word != bye ]] || check "the server ends in order" ends
    [[ -e $out/INFO-rdma ]] || gather
    sum
}

start_server() {
    local server_command=()
    for file in "$module" "${CARGO_TARGET_DIR:-$repo/target}/release/libvalkey_rdma.so" /usr/lib/valkey/modules/libvalkey_rdma.so; do
        [[ ! -e $file ]] || { module=$(realpath "$file"); break; }
    done
    [[ -e $module ]] || die "no libvalkey_rdma.so: name it with --module, or build or install it"
    if [[ -n $line ]]; then
        server_command=(env VALKEY_RDMA_SHOW="$out" "$repo/scripts/chroot.sh" "$line" valkey-server)
    else
        server_command=("${VALKEY_SERVER:-valkey-server}")
        [[ -n $(type -P "${server_command[0]}") ]] ||
            die "no valkey-server on the PATH: install one, or take --line 8.0 after scripts/setup.sh server-8.0"
    fi
    mkdir "$work/data"
    # By stdin, so that the password is in no list of processes and in no file that is kept.
    "${server_command[@]}" - >"$out/output" 2>&1 <<END &
bind $address
port $port
requirepass $ACCEPT_PASSWORD
enable-debug-command yes
save ""
dir $work/data
loglevel verbose
logfile $out/log
maxclients 5000
loadmodule $module bind=$address port=$port keepalive-interval=1000
END
    server=$!
    children+=("$server")
}

listens() {
    kill -0 "$server" && tcp PING && tcp INFO server | grep '^listener.*rdma' >/dev/null
}

start_rping() {
    rping=no
    [[ -n $(type -P rping) ]] || return 0
    rping -s -a "$address" -p $((port + 1)) -P >/dev/null 2>&1 &
    children+=("$!")
    rping=yes
}

# answer WORD — what the client's side wants to know of this host, as one line.
answer() {
    case $1 in
    rping) echo "$rping" ;;
    pinned) sed -n 's/^VmPin:[^0-9]*\([0-9]*\).*/\1/p' "/proc/$server/status" ;;
    processor) processor ;;
    reset)
        [[ -n $reset ]] || { echo none; return; }
        bash -c "$reset" >"$out/reset" 2>&1 && echo ok || echo "failed: $(tail -n 1 "$out/reset")"
        ;;
    folder)
        gather
        # The log goes on meanwhile.
        { tar --warning=no-file-changed -C "$out" -cz . || (($? == 1)); } | tcp -x SET accept:folder
        ;;
    *) echo "this side does not know '$1'" ;;
    esac
}

# The processor's time that the server takes within two seconds, all threads, in percent.
processor() {
    local before after
    read -r -a before < <(sed 's/.*) //' "/proc/$server/stat")
    sleep 2
    read -r -a after < <(sed 's/.*) //' "/proc/$server/stat")
    echo $(((after[11] + after[12] - before[11] - before[12]) * 100 / ($(getconf CLK_TCK) * 2)))
}

# What the server says of itself, and the kernel of the devices.
gather() {
    local command
    for command in 'INFO everything' 'INFO rdma' RDMA.STATS RDMA.CLIENTS RDMA.DOCTOR 'MODULE LIST' 'CLIENT LIST'; do
        # shellcheck disable=SC2086 # two words
        tcp $command >"$out/${command// /-}" 2>&1 || true
    done
    counters "$out/counters.after"
    last_messages "$out"
}

ends() {
    tcp SHUTDOWN NOSAVE >/dev/null 2>&1 || true
    within 30 gone_process || return 1
    wait "$server" || { echo "status $?"; return 1; }
}

# Ended, and no zombie counts.
gone_process() { [[ ! -e /proc/$server || $(sed 's/.*) //' "/proc/$server/stat") == Z* ]]; }

# --- client --------------------------------------------------------------------

run_client() {
    the_checks
    sum
}

run_both() {
    local other
    ACCEPT_PASSWORD=$(od -An -N12 -tx8 /dev/urandom | tr -d ' \n')
    export ACCEPT_PASSWORD
    "${BASH_SOURCE[0]}" server "$address" --port "$port" --out "$work/server" ${line:+--line "$line"} \
        ${module:+--module "$module"} ${reset:+--reset "$reset"} >"$work/server.out" 2>&1 &
    other=$!
    children+=("$other")
    within 300 grep -q 'On the other host' "$work/server.out" ||
        { cat "$work/server.out" >&2; die "the server's side did not start"; }
    the_checks
    check "the server's side" wait "$other"
    sed 's/^/server: /' "$work/server.out" >&2
    sum
}

# stage TEXT — for people who wait.
stage() { say "$(printf '[%3d s] %s' "$SECONDS" "$1")"; }

# on_server WORD — asks the other host's side.
on_server() {
    tcp DEL accept:answer >/dev/null && tcp RPUSH accept:ask "$1" >/dev/null &&
        tcp BLPOP accept:answer 60 | tail -n 1 | sed 's/^ *//'
}

# hold NAME STEP… — a step that waits for a line, in the background; true once it is ready.
hold() {
    local name=$1 fd
    shift
    mkfifo "$work/$name.in"
    "$program" "$1" "$(server_name)" "${@:2}" <"$work/$name.in" >"$work/$name.out" 2>&1 &
    holders[$name]=$!
    children+=("$!")
    exec {fd}>"$work/$name.in"
    inputs[$name]=$fd
    within 600 grep -q ready "$work/$name.out"
}

# release NAME — lets it go on, and says how it ended.
release() {
    local fd=${inputs[$1]} status=0
    echo >&"$fd"
    exec {fd}>&-
    wait "${holders[$1]}" || status=$?
    tail -n 1 "$work/$1.out" | grep -v '^ready$' || true
    return "$status"
}

the_checks() {
    mkdir -p "$out/client"
    # Of one host the server's side has it already.
    [[ $role == both ]] || inventory "$out/client"
    counters "$out/client/counters.before"
    tcp PING >/dev/null || die "no server at $(server_name) over TCP, or another password: see what the server's side printed"
    first_contact
    if ((!failed)); then
        idle_begins
        lengths
        bursts
        load
        idle_ends
        storm
        crowd
        the_sum
        endings
        at_rest
        doctor
        device_reset
    else
        say "Without a first contact nothing else can be shown"
    fi
    keep
}

first_contact() {
    local cli
    stage "first contact"
    if [[ -n $(type -P rping) && $(on_server rping) == yes ]]; then
        check "the fabric without us, rping of $((quick ? 20 : 200)) rounds" \
            rounds $((quick ? 20 : 200))
    else
        verdict SKIP "rping is not on both hosts (rdmacm-utils)"
    fi
    check "PING over RDMA" over_rdma rdma PING
    check "INFO rdma names the device" device_named
    check "CLIENT LIST has a client that came by RDMA" listed
    check "RDMA.CLIENTS has it as well" in_rdma_clients
    if cli=$(tool valkey-cli); then
        check "valkey-cli --rdma" timeout 30 "$cli" --rdma -h "$address" -p "$port" ping
    else
        verdict SKIP "no valkey-cli with --rdma (scripts/setup.sh clients builds one)"
    fi
}

rounds() { timeout 60 rping -c -a "$address" -p $((port + 1)) -C "$1" >/dev/null; }

# tool NAME — the path of one with RDMA. It takes the password from the environment.
tool() {
    local file
    export VALKEYCLI_AUTH=$ACCEPT_PASSWORD REDISCLI_AUTH=$ACCEPT_PASSWORD
    for file in "$cache/clients/$1" "$(type -P "$1")"; do
        [[ ! -x $file ]] || ! "$file" --help 2>&1 | grep -e --rdma >/dev/null || { echo "$file"; return; }
    done
    return 1
}

device_named() { over_rdma rdma INFO rdma | tr -d '\r' | grep '^rdma_device0:'; }
# Not grep -q, which ends at the first hit: the program would fail to write the rest.
listed() { over_rdma rdma CLIENT LIST | grep cmd=client >/dev/null; }
in_rdma_clients() { over_rdma rdma RDMA.CLIENTS | grep established >/dev/null; }

lengths() {
    stage "lengths at the limits of inline data and of windows"
    check "SET and GET" over_rdma lengths $((quick ? 5000000 : 33554432))
}

bursts() {
    local count
    stage "more requests in flight than receives"
    for count in 65 300 900; do
        ((!quick || count != 300)) || continue
        check "receiver not ready" over_rdma burst "$count"
    done
}

# An idle client, beside all that comes until idle_ends.
idle_begins() {
    check "a client that is idle from now on" hold quiet idle accept-quiet
}

# Connections that the server closes are probed as well, so it is alone for a while.
idle_ends() {
    local probes
    stage "keepalive probes"
    check "no other client is left" within 60 only_one
    probes=$(field keepalive_probes)
    sleep 5
    probes=$(($(field keepalive_probes) - probes))
    check "RDMA WRITEs of 0 bytes to the idle client, within 5 s: $probes" [ "$probes" -ge 2 ]
    check "it lives" release quiet
}

only_one() {
    [[ $(field connections_established) == 1 && $(field connections_lingering) == 0 && $(field connections_ending) == 0 ]]
}

load() {
    local shape bytes number pipeline bench runs=() by_rdma text
    stage "load, $seconds s for each kind of request, over RDMA and over TCP"
    runs=('1 3 1' '50 3 1' '50 64 1' '50 4096 16' '20 1048576 1' "$clients 64 1")
    for shape in "${runs[@]}"; do
        read -r number bytes pipeline <<<"$shape"
        text="$number clients, $bytes bytes, pipeline $pipeline"
        check "RDMA, $text" timeout 900 "$program" load rdma "$(server_name)" "$number" "$bytes" "$pipeline" "$seconds"
        by_rdma=$(tail -n 1 "$out/report")
        by_tcp "$by_rdma" timeout 900 "$program" load tcp "$(server_name)" "$number" "$bytes" "$pipeline" "$seconds"
    done
    if bench=$(tool valkey-benchmark); then
        # As many as take some ten seconds at the rate of the load before.
        check "valkey-benchmark --rdma" benchmark "$bench" \
            "$(awk '{ print ($(NF - 3) + 0 > 200 ? $(NF - 3) * 10 : 2000) }' <<<"$by_rdma")"
    else
        verdict SKIP "no valkey-benchmark with --rdma (scripts/setup.sh clients builds one)"
    fi
}

# by_tcp LINE COMMAND… — the same over TCP, as what RDMA is compared with.
by_tcp() {
    local said
    said=$("${@:2}" 2>&1) || true
    verdict LOOK "$(awk -v rdma="$1" -v tcp="$said" 'BEGIN {
        if (split(tcp, t, " ") < 4 || !match(rdma, /[0-9]+ SET\/s [0-9]+ GET\/s/)) { print "TCP: " tcp; exit }
        split(substr(rdma, RSTART), r, " ")
        printf "TCP, the same: %s; RDMA has %.2f and %.2f of that (expected on a device: more than 1)\n", \
            tcp, r[1] / t[1], r[3] / t[3]
    }')"
}

# benchmark PROGRAM REQUESTS
benchmark() {
    local said status=0
    timeout 120 "$1" --rdma -h "$address" -p "$port" -a "$ACCEPT_PASSWORD" -t set,get -q -c 50 \
        -n $((quick ? 2000 : $2)) -d 64 >"$work/benchmark" 2>&1 || status=$?
    said=$(tr '\r' '\n' <"$work/benchmark" | grep -E 'requests per second' | tr '\n' ' ')
    if ((status)) || [[ $(grep -o 'requests per second' <<<"$said" | wc -l) != 2 ]]; then
        echo "status $status (124: not done in 120 s); it said: $(tr '\r' '\n' <"$work/benchmark" | tail -n 1)"
        return 1
    fi
    echo "$said"
}

storm() {
    local rounds=$((quick ? 4 : 20)) count=$((clients / 2)) took
    stage "connections that come and go"
    if took=$(over_rdma storm "$rounds" "$count" 2>&1); then
        verdict PASS "$((rounds * count)) connections, $count at a time"
        figure "made, asked and closed" "$took" µs 2000 "a guess: eight or nine commands of the device each way"
    else
        verdict FAIL "connections that come and go: $took"
    fi
}

# Many idle clients: what they pin, and a fork beside them.
crowd() {
    local count=$clients pinned forked alone
    stage "$count idle clients, and a fork beside them"
    alone=$(fork_time)
    pinned=$(on_server pinned)
    check "$count clients at a time" hold many crowd "$count"
    pinned=$(($(on_server pinned) - pinned))
    if ((pinned > 0)); then
        figure "pinned memory for each" $((pinned / count)) KiB 64 "32 of ours, 10 to 32 of the device's queues by its driver's source"
    else
        verdict LOOK "the kernel counts no pinned memory for this device (VmPin)"
    fi
    check "a fork beside them ends well" fork_time
    forked=$(field_of stats latest_fork_usec)
    figure "that fork, more than one without them" $((forked > alone ? forked - alone : 0)) µs 20000 \
        "a guess; registered memory is kept out of the child"
    check "all of them after that" release many
}

field_of() { tcp INFO "$1" | tr -d '\r' | sed -n "s/^$2://p"; }
saved() { [[ $(field_of persistence rdb_bgsave_in_progress) == 0 ]]; }

# Microseconds.
fork_time() {
    tcp BGSAVE >/dev/null && within 60 saved &&
        [[ $(field_of persistence rdb_last_bgsave_status) == ok ]] && field_of stats latest_fork_usec
}

# All went well so far, so nothing may have been counted that tells of trouble.
the_sum() {
    local name value
    stage "counters"
    tcp INFO rdma | tr -d '\r' >"$work/info"
    for name in errors_receiver_not_ready errors_transport errors_remote_access errors_remote errors_local \
        ended_by_violation refused_memory refused_descriptors refused_device posts_failed poll_failures \
        devices_lost devices_unfit queues_lost watchdog_nudges; do
        value=$(sed -n "s/^rdma_$name://p" "$work/info")
        if [[ $value == 0 ]]; then verdict PASS "rdma_$name is 0"; else verdict FAIL "rdma_$name is ${value:-not there}"; fi
    done
    verdict LOOK "$(grep -E '^rdma_registered_peak_bytes|^rdma_completions_per_poll_peak' "$work/info" | tr '\n' ' ')"
}

is_listed() { tcp CLIENT LIST | grep "name=$1 " >/dev/null; }
not_listed() { ! is_listed "$1"; }

endings() {
    local start
    stage "clients that are killed, and that fall silent"
    hold killed idle accept-killed
    check "a client with a name is listed" is_listed accept-killed
    kill -KILL "${holders[killed]}"
    check "it was killed, and is gone within 3 s" within 3 not_listed accept-killed
    hold silent vanish accept-silent
    start=$SECONDS
    check "one that fell silent is gone within 60 s" within 60 not_listed accept-silent
    figure "that took" $((SECONDS - start)) s 30 \
        "a probe after 1 to 2 s, then 8 tries of the ACK time-out, 1.1 or 2.1 s by most kernels; 12 s at most by keepalive-probes"
    release silent >/dev/null || true
}

at_rest() {
    local percent
    stage "the server without clients"
    check "no connection is left" within 20 nobody
    check "no registered memory is left" within 20 nothing_registered
    percent=$(on_server processor)
    check "the idle server takes $percent % of a processor, less than 10" [ "$percent" -lt 10 ]
    check "and serves" over_rdma rdma PING
}

nobody() { [[ $(field connections_established) == 0 && $(field connections_ending) == 0 ]]; }
nothing_registered() { [[ $(field registered_bytes) == 0 ]]; }

# What fails and has something in its place is a figure.
doctor() {
    local said failures
    stage "the device, checked by the server itself"
    if ! said=$(tcp RDMA.DOCTOR 2>&1); then
        verdict SKIP "RDMA.DOCTOR: $said"
        return
    fi
    failures=$(grep -B 1 'failed: ' <<<"$said" | sed '/^--$/d; s/^ *//' | paste -d ' ' - -) || true
    if grep -vE '^(probe|receiver-not-ready) |^$' <<<"$failures" >"$work/unmet"; then
        verdict FAIL "RDMA.DOCTOR: $(tr '\n' ' ' <"$work/unmet")"
    elif [[ -n $failures ]]; then
        verdict LOOK "RDMA.DOCTOR: ${failures//$'\n'/, } (the module does without, docs/troubleshooting.md)"
    else
        verdict PASS "RDMA.DOCTOR finds nothing that fails"
    fi
    verdict LOOK "it $(grep -A 1 ' resembles$' <<<"$said" | tr -s ' \n' ' ')"
}

device_reset() {
    local said percent
    stage "a device that is reset"
    hold beside idle accept-beside
    said=$(on_server reset)
    if [[ $said == none ]]; then
        verdict SKIP "no reset of the device: the server's side has no --reset"
        release beside >/dev/null
        return
    fi
    check "the reset: $said" [ "$said" = ok ]
    check "clients are served again within 30 s" within 30 over_rdma rdma PING
    release beside >/dev/null || true
    percent=$(on_server processor)
    check "the server takes $percent % of a processor after it, less than 10" [ "$percent" -lt 10 ]
}

# Both hosts' figures into the one folder.
keep() {
    stage "what is kept"
    mkdir -p "$out/server"
    check "the server's part of the folder" fetch_folder
    counters "$out/client/counters.after"
    differences server
    differences client
    last_messages "$out/client"
    tar -C "${out%/*}" -czf "$out.tar.gz" "${out##*/}"
    say "To send: $out.tar.gz (host names, addresses, devices, the kernel's messages; no keys and no values of yours)"
    tcp RPUSH accept:ask bye >/dev/null || true
}

fetch_folder() {
    [[ $(on_server folder) == OK ]] && tcp GET accept:folder >"$work/folder" &&
        tar -C "$out/server" -xzf "$work/folder"
}

# Counters of that side's devices that tell of trouble, and changed.
differences() {
    local old=$out/$1/counters.before new=$out/$1/counters.after change
    [[ -s $old && -s $new ]] || return 0
    diff "$old" "$new" | sed -n 's/^> //p' |
        grep -iE 'rnr|out_of_buffer|retry|timeout|local_ack|out_of_sequence|packet_seq_err|implied_nak|duplicate|retrans|cnp|error|discard' >"$work/changed" || true
    while read -r change; do
        verdict LOOK "counter of the $1's device: $change, before $(sed -n "s|^${change%=*}=||p" "$old")"
    done <"$work/changed"
}

main "$@"
