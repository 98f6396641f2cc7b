#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# scripts/guest.sh [OPTION…] COMMAND… — runs COMMAND as root in a virtual machine
# that has a Soft-RoCE device, on a machine that has no RDMA device itself.
#
#   --rw DIR        a folder that the guest may write to (repeatable)
#   --ro DIR        a folder to show although the guest's /tmp hides it (repeatable)
#   --kernel NAME   new: the one of scripts/setup.sh guest-new instead of Debian's own
#   --memory SIZE   4G unless given
#   --cpus N        2 unless given
#   --timeout SEC   1800 unless given; the guest is ended then, with status 124
#   --console       shows the kernel's messages too, on stderr
#
# Where the command failed, or the kernel complained, the kernel's messages are kept
# and the last line on stderr names their file. A guest that took too long has its
# registers and stacks there.
#
# The guest sees this machine's files at their own places, read-only, with /tmp
# and /run of its own, in which this repository, its cache and target folder and
# the folder that this script was called from still show. COMMAND runs in that
# folder, with this environment, no limit on locked memory, and its output as it
# comes; its exit status is handed back. The device, rxe0, is reachable at
# 10.9.9.1, 10.9.9.2 and fd09::1.
# shellcheck source=scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

# Inside: what turns a bare kernel into a machine with an RDMA device.
inside() {
    local job=$1
    # Of a task that makes no progress the kernel tells, each time, and goes on: where the
    # whole machine is emulated and shared, it may only have been slow.
    echo 60 >/proc/sys/kernel/hung_task_timeout_secs
    echo -1 >/proc/sys/kernel/hung_task_warnings
    echo 1 >/proc/sys/kernel/hung_task_all_cpu_backtrace
    echo 1 >/proc/sys/kernel/softlockup_all_cpu_backtrace
    # A machine without a kernel of its own may have no /lib/modules to link to:
    # the kernel, too, loads its modules on demand from the cache.
    echo "$job/modprobe" >/proc/sys/kernel/modprobe
    # The plain checksum comes first, or Soft-RoCE takes the one for carry-less
    # multiplication, which is slow to emulate.
    # A newer kernel has it built in.
    "$job/modprobe" -q crc32_generic || true
    "$job/modprobe" -a dummy overlay rdma_rxe rdma_ucm ib_uverbs
    own_tmp "$job"
    ip link set lo up
    # Large packets: Soft-RoCE then takes its largest MTU, 4096, and emulation has
    # a quarter of the work.
    ip link add d0 mtu 9000 type dummy
    ip addr add 10.9.9.1/24 dev d0
    ip addr add 10.9.9.2/24 dev d0
    # Nobody else can have the address, and bind fails until a check is over.
    ip addr add fd09::1/64 dev d0 nodad
    ip link set d0 up
    rdma link add rxe0 type rxe netdev d0
    ulimit -l unlimited
    ulimit -n "$(ulimit -Hn)"
    cd "$(cat "$job/folder")"
    mapfile -d '' -t command <"$job/command"
    exec "${command[@]}"
}

# A writable /tmp, in which the folders asked for keep showing.
own_tmp() {
    local folder new=/run/tmp.new
    mkdir -p "$new"
    mount -t tmpfs tmpfs "$new"
    chmod 1777 "$new"
    while read -r folder; do
        [[ $folder == /tmp/* ]] || continue
        mkdir -p "$new/${folder#/tmp/}"
        mount --bind "$folder" "$new/${folder#/tmp/}"
    done <"$1/folders"
    mount --move "$new" /tmp
}

main() {
    # What the guest's own /tmp would hide of what every command here needs.
    local folders=("$repo" "$cache" "$PWD" "${CARGO_TARGET_DIR:-$repo}")
    local rw=() memory=4G cpus=2 limit=1800 console=0 release job status=0 out err
    local pid watch watched=0 messages shown kernel=$cache/kernel
    while (($#)); do
        case $1 in
        --inside) inside "$2" ;;
        --rw) rw+=(--rwdir "$(realpath "$2")"); folders+=("$(realpath "$2")"); shift 2 ;;
        --ro) folders+=("$(realpath "$2")"); shift 2 ;;
        --kernel) kernel=$cache/kernel-$2; shift 2 ;;
        --memory) memory=$2; shift 2 ;;
        --cpus) cpus=$2; shift 2 ;;
        --timeout) limit=$2; shift 2 ;;
        --console) console=1; shift ;;
        --*) die "unknown option $1" ;;
        *) break ;;
        esac
    done
    (($#)) || { sed -n '4,24s/^# \{0,1\}//p' "$0" >&2; exit 2; }
    [[ -e $kernel/release && -e $cache/virtme-ng ]] ||
        die "no kernel yet: run scripts/setup.sh guest${kernel#"$cache/kernel"}"
    release=$(cat "$kernel/release")

    # The kernel's command line is too short for a long command: it names a
    # folder instead.
    job=$(mktemp -d "$cache/guest.XXXXXX")
    printf '%s\0' "$@" >"$job/command"
    pwd >"$job/folder"
    printf '%s\n' "${folders[@]}" >"$job/folders"
    {
        export -p
        printf 'exec bash %q --inside %q\n' "$repo/scripts/guest.sh" "$job"
    } >"$job/start"
    printf '#!/bin/sh\nexec /sbin/modprobe -d %q "$@"\n' "$kernel" >"$job/modprobe"
    chmod +x "$job/modprobe"

    # qemu opens its outputs anew and cuts them off at 0, which must not happen
    # to a file that this script's output goes to: it is given pipes.
    exec 3> >(exec cat) && out=$!
    exec 4> >(exec cat >&2) && err=$!

    messages=$job/messages
    : >"$messages"
    mkfifo "$job/monitor.in" "$job/monitor.out"

    # Plain emulation: where /dev/kvm exists without hardware behind it, boots
    # under it hang. timeout passes signals on to all that virtme-run starts, so
    # this pid ends this guest and no other. Where the processor has erms, memory
    # is copied by "rep movsb", which is emulated byte by byte. The clock is the
    # processor's counter, which the kernel would not trust by itself: an emulated
    # timer's is a system call and an exit for each of the server's many readings.
    # The emulation was seen to leave a halted processor asleep with an interrupt pending:
    # the clock ticks periodically on each of them, which wakes it.
    # An NMI ends the kernel with the stacks of all tasks, which is for the very end.
    PYTHONPATH=$cache/virtme-ng timeout --kill-after=5 $((limit + 120)) \
        python3 "$cache/virtme-ng/bin/virtme-run" \
        --kimg "$kernel/boot/vmlinuz-$release" --mods auto --disable-kvm --force-9p \
        --cpus "$cpus" --memory "$memory" "${rw[@]}" \
        --kopt tsc=reliable --kopt clocksource=tsc --kopt nohz=off --kopt highres=off \
        --kopt ignore_loglevel --kopt nokaslr \
        --kopt unknown_nmi_panic --kopt panic_print=0x41 \
        --qemu-opt=-cpu --qemu-opt=max,-erms,-fsrm \
        --qemu-opt=-set --qemu-opt="chardev.console.path=$messages" \
        --qemu-opt=-chardev --qemu-opt="pipe,id=monitor,path=$job/monitor" \
        --qemu-opt=-mon --qemu-opt=chardev=monitor \
        --script-sh "exec bash $job/start" \
        </dev/null >&3 2>&4 3>&- 4>&- &
    pid=$!
    exec 3>&- 4>&-
    timeout "$limit" tail --pid="$pid" -s 0.2 -f /dev/null &
    watch=$!
    trap 'kill "$pid" "$watch" 2>/dev/null || true' TERM INT HUP
    if ((console)); then
        tail --pid="$pid" -n +1 -f "$messages" >&2 &
        shown=$!
    fi
    wait "$watch" || watched=$?
    ((watched != 124)) || last_look "$job" "$pid"
    wait "$pid" || status=$?
    ((watched != 124)) || status=124
    # Signalled together with us, these have a status that says nothing.
    wait "$out" "$err" "${shown:-$err}" || true
    keep "$job" "$status"
    return "$status"
}

# The guest took too long. Its registers come first, which need nothing of it.
last_look() {
    local job=$1 pid=$2 command
    say "the guest took too long"
    {
        for command in 'info registers -a' nmi; do
            # shellcheck disable=SC2016 # expanded by the shell that is bounded in time
            timeout 10 bash -c 'echo "$1" >"$2"' - "$command" "$job/monitor.in" || true
        done
        timeout 5 cat "$job/monitor.out" | grep -aE '^(CPU#|R[A-Z0-9]+ *=|CR0)' || true
    } >"$job/registers"
    # The kernel takes its time for the stacks, on an emulated serial line, and ends then.
    timeout 60 tail --pid="$pid" -s 0.2 -f /dev/null || kill "$pid" 2>/dev/null || true
    {
        echo "--- registers, when the time was over"
        cat "$job/registers"
    } >>"$job/messages"
}

# What the kernel says of itself when something is wrong with it.
complaints='soft lockup|hard LOCKUP|blocked for more than|self-detected stall|detected stalls|BUG: |Oops|WARNING: CPU|general protection|Kernel panic'

# keep JOB STATUS — what the kernel said, if anything went wrong; the rest of the job goes.
keep() {
    local job=$1 status=$2 kept=$cache/guest-messages/${1##*.}
    if ((status)) || grep -qaE "$complaints" "$job/messages"; then
        mkdir -p "${kept%/*}"
        mv "$job/messages" "$kept"
        grep -aE "$complaints" "$kept" | head -n 20 >&2 || true
        say "the guest's kernel: $kept"
    fi
    rm -r "$job"
}

main "$@"
