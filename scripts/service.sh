#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# scripts/service.sh [RELEASE…] [--each-line] — the package in use: a virtual machine
# with Debian RELEASE (12, 13, forky; 13 unless given), systemd, and Debian's
# valkey-server runs the commands of docs/install.md, from the package's
# installation to its removal, and serves RDMA clients in between.
#
#   --each-line   also starts the service without each line of the package's
#                 drop-in, which it then must not do, or not serve
#
# The last line sums up: N passed, N failed, N skipped. Needs root.
# shellcheck source=scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

dropin=valkey-server.service.d/valkey-rdma.conf
slow=/run/systemd/system/modprobe@rdma_ucm.service.d/slow.conf
passed=0 failed=0 pages=0

main() {
    local releases=() each=() release job
    [[ ${1:-} != --inside ]] || { shift; inside "$@"; }
    for release; do
        case $release in
        --each-line) each=(--each-line) ;;
        12 | 13 | forky) releases+=("$release") ;;
        *) sed -n '4,13s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
        esac
    done
    ((${#releases[@]})) || releases=(13)
    "$repo/scripts/setup.sh" clients guest "${releases[@]/#/machine-}"

    job=$(mktemp -d "${TMPDIR:-/tmp}/valkey-rdma-service.XXXXXX")
    mkdir "$job/docs"
    cp -r "$repo/scripts" "$cache/clients" "$job/"
    cp "$repo/docs/install.md" "$job/docs/"
    cd "$repo"
    block build '' | bash -e | tail -n 1 | xargs -I{} cp {} "$job/"
    for release in "${releases[@]}"; do
        say "Debian $release, as a service"
        machine "$release" "$job" "${each[@]}"
    done
    rm -r "$job"
    printf '%d passed, %d failed, 0 skipped\n' "$passed" "$failed"
    ((!failed && passed))
}

# A machine that does not get to its sum counts as one failure.
machine() {
    local release=$1 job=$2 sum
    shift 2
    "$repo/scripts/machine.sh" --timeout 1200 "$release" "$job" scripts/service.sh --inside "$@" |
        tee "$job/output" >&2 || true
    sum=$(grep -aE '^[0-9]+ passed, [0-9]+ failed$' "$job/output") || sum='0 passed, 1 failed'
    read -r p _ f _ <<<"$sum"
    ((passed += p, failed += f)) || true
}

# block KIND TEXT — the page's commands of KIND (build: where the repository is;
# server: where the server is), the block that contains TEXT or all of them.
block() {
    awk -v kind="$1" -v text="$2" '
        $0 == "```sh " kind { inside = 1; block = ""; next }
        $0 == "```" && inside { inside = 0; if (index(block, text)) printf "%s", block; next }
        inside { block = block $0 "\n" }
    ' docs/install.md
}

# --- in the machine ----------------------------------------------------------

inside() {
    export DEBIAN_FRONTEND=noninteractive PATH=$PWD/clients:$PATH
    # The page's address, on the page's interface.
    ip link set lo up
    ip link add eth0 type dummy
    ip addr add 192.0.2.10/24 dev eth0
    ip link set eth0 up

    page "install the package and valkey-server" 'apt-get install'
    check "without a device nothing changes" systemctl restart valkey-server
    page "make a device" 'rdma link add'
    page "switch RDMA on, restart the service" 'loadmodule'
    page "serve clients, read INFO rdma" 'valkey-benchmark'
    check "MODULE LIST and INFO rdma say who serves" shows_itself
    check "RDMA.CLIENTS tells of a client that does not read" tells_who_hangs
    page "a further server, RDMA on port 6380" 'valkey-server@second'
    systemctl stop valkey-server@second
    if [[ ${1:-} == --each-line ]]; then
        check "starts as after a boot, and serves" starts_and_serves
        while read -r line <&3; do
            check "needs $line" needs "$line"
        done 3< <(grep '^[A-Z][A-Za-z]*=' "/usr/lib/systemd/system/$dropin")
        check "starts as after a boot, and serves, again" starts_and_serves
    fi
    check "CONFIG REWRITE, restart, serve on another port" rewrite
    page "remove the package: the server starts without" 'apt-get remove'
    check "nothing of the package is left in use" is_gone
    check "the further server starts without, too" second_starts
    check "no command of the page was left out" eval "(($(grep -c '^```sh server' docs/install.md) == pages))"
    finish
}

finish() {
    printf '%d passed, %d failed\n' "$passed" "$failed"
    exit $((failed > 0))
}

# check TEXT COMMAND… — one step; what comes after a failed one would say nothing.
check() {
    local text=$1 start=$SECONDS status=0
    shift
    printf '  %-58s ' "$text"
    (set -ex; "$@") >/tmp/log 2>&1 </dev/null &
    wait "$!" || status=$?
    if ((status)); then
        printf 'FAILED after %d s\n' "$((SECONDS - start))"
        tail -n 30 /tmp/log
        systemctl status --no-pager --lines=10 valkey-server || true
        tail -n 20 /var/log/valkey/valkey-server.log || true
        ((++failed))
        finish
    fi
    printf '%d s\n' "$((SECONDS - start))"
    ((++passed))
}

page() {
    ((++pages))
    check "$1" commands "$2"
}

commands() {
    local commands
    commands=$(block server "$1")
    [[ -n $commands ]]
    timeout 600 bash -ex <<<"$commands"
}

# serves [PORT] — each of $clients, or 20, is served.
serves() {
    local count=${clients:-20}
    timeout "${patience:-60}" valkey-benchmark --rdma -h 192.0.2.10 -p "${1:-6379}" \
        -c "$count" -n $((5 * count)) -t set -q
}

shows_itself() {
    local version try
    version=$(dpkg-query -W -f '${Version}' valkey-rdma)
    valkey-cli info rdma | tr -d '\r' >/tmp/info
    cat /tmp/info
    grep -x "rdma_version:$version" /tmp/info
    grep '^rdma_device.*rxe0' /tmp/info
    (($(sed -n 's/^rdma_connections_accepted://p' /tmp/info) >= 20))
    valkey-cli module list | grep -x rdma
    [[ $(/usr/lib/valkey-rdma/acceptance rdma 192.0.2.10:6379 PING) == PONG ]]
    # Once those before are gone, one client, which has what an idle one has.
    for ((try = 0; ; try++)); do
        valkey-cli --rdma -h 192.0.2.10 info rdma | tr -d '\r' >/tmp/info
        ! grep -x rdma_registered_bytes:32768 /tmp/info || break
        ((try < 10))
        sleep 1
    done
}

# The commands of docs/troubleshooting.md, for a client that asks for more than it reads.
tells_who_hangs() {
    local try id
    # shellcheck disable=SC2216 # who never reads is what is wanted
    valkey-cli --rdma -h 192.0.2.10 monitor | sleep 25 &
    for ((try = 0; ; try++)); do
        valkey-benchmark -t set -d 10000 -n 400 -q
        valkey-cli -3 rdma.clients >/tmp/hangs
        ! grep -q "client's window" /tmp/hangs || break
        ((try < 10))
    done
    cat /tmp/hangs
    id=$(sed -n 's/^id //p' /tmp/hangs)
    valkey-cli client list | grep "^id=$id .* cmd=monitor "
    valkey-cli info rdma | tr -d '\r' | grep -x rdma_connections_window_full:1
    valkey-cli client kill id "$id"
    wait
}

# As after a boot: nobody has asked for the connection manager's kernel module yet.
starts_and_serves() {
    systemctl stop valkey-server modprobe@rdma_ucm
    systemctl daemon-reload
    systemctl reset-failed
    modprobe -r rdma_ucm
    local before
    before=$(wc -l </var/log/valkey/valkey-server.log)
    systemctl start valkey-server
    # More than systemd's own limit on locked memory, 8 MiB, admits.
    local clients=300
    # Nor is anything closed to it that it only misses when a device is reset.
    serves && ! tail -n "+$((before + 1))" /var/log/valkey/valkey-server.log | grep RestrictAddressFamilies
}

# needs LINE — passes when the service does not serve without that line.
needs() {
    local status=0 patience=20
    mkdir -p "/etc/systemd/system/${dropin%/*}" "${slow%/*}"
    grep -vxF "$1" "/usr/lib/systemd/system/$dropin" >"/etc/systemd/system/$dropin"
    # An order shows when it takes long.
    [[ $1 != After=* ]] || printf '[Service]\nExecStartPre=sleep 120\n' >"$slow"
    (starts_and_serves) || status=$?
    rm -rf "/etc/systemd/system/${dropin%/*}" "${slow%/*}"
    systemctl daemon-reload
    ((status))
}

rewrite() {
    local port=rdma-port
    [[ $(valkey-cli config get rdma.port) != *rdma.port* ]] || port=rdma.port
    [[ $(valkey-cli config set $port 6381) == OK ]]
    [[ $(valkey-cli config rewrite) == OK ]]
    systemctl restart valkey-server
    serves 6381
}

is_gone() {
    [[ ! -e /usr/lib/valkey/modules ]]
    [[ $(systemctl cat valkey-server valkey-server@second) != *infiniband* ]]
    [[ $(valkey-cli module list) != *rdma* ]]
    [[ $(valkey-cli ping) == PONG ]]
}

second_starts() {
    systemctl start valkey-server@second
    [[ $(valkey-cli -p 6380 ping) == PONG ]]
}

main "$@"
