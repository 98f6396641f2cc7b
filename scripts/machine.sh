#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# scripts/machine.sh [OPTION…] RELEASE FOLDER COMMAND… — boots Debian RELEASE (12, 13
# or forky) in a virtual machine of its own, with systemd as its init, and runs
# COMMAND there as root in FOLDER of this machine, which shows at /mnt, writable.
#
#   --memory SIZE   2G unless given
#   --cpus N        2 unless given
#   --timeout SEC   900 unless given; the machine is ended then, with status 124
#   --console       shows the kernel's and systemd's messages when it ends, on stderr
#
# COMMAND's output comes as it is written, its exit status is handed back. The
# machine has no network. What it writes to its disk is forgotten.
# shellcheck source=scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

main() {
    local memory=2G cpus=2 limit=900 console=0 name image folder release job status=0 pid
    while (($#)); do
        case $1 in
        --memory) memory=$2; shift 2 ;;
        --cpus) cpus=$2; shift 2 ;;
        --timeout) limit=$2; shift 2 ;;
        --console) console=1; shift ;;
        --*) die "unknown option $1" ;;
        *) break ;;
        esac
    done
    (($# >= 3)) || { sed -n '4,14s/^# \{0,1\}//p' "$0" >&2; exit 2; }
    name=$1 image=$cache/machines/$1.ext4 folder=$(realpath "$2")
    shift 2
    [[ -e $image ]] || die "no disk of Debian $name yet: run scripts/setup.sh machine-$name"
    [[ -e $cache/kernel/release ]] || die "no kernel yet: run scripts/setup.sh guest"
    release=$(cat "$cache/kernel/release")

    job=$(mktemp -d "${TMPDIR:-/tmp}/valkey-rdma-machine.XXXXXX")
    mkdir "$job/share" "$job/init"
    touch "$job/share/output"
    initramfs "$release" "$job/init" >"$job/initramfs"
    {
        echo "cd /mnt"
        printf '%q ' "$@"
    } >"$job/share/command"

    # Plain emulation, as in guest.sh, of a plain processor: what newer ones have is
    # slow to emulate, and has drivers that take their time to load, as have the
    # devices that nobody needs here. The disk is never written back, so that nothing
    # has to wait for it.
    timeout --kill-after=5 "$limit" qemu-system-x86_64 \
        -accel tcg -cpu qemu64,-svm,+rdrand -smp "$cpus" -m "$memory" -nodefaults -no-user-config \
        -display none -no-reboot -serial "file:$job/console" -device virtio-rng-pci \
        -kernel "$cache/kernel/boot/vmlinuz-$release" -initrd "$job/initramfs" \
        -append "console=ttyS0 panic=-1 mitigations=off modprobe.blacklist=ata_piix,floppy,i2c_piix4,pcspkr,psmouse,drm" \
        -drive "file=$image,format=raw,if=virtio,snapshot=on,cache=unsafe" \
        -virtfs "local,path=$cache/kernel/lib/modules,mount_tag=modules,security_model=none,readonly=on" \
        -virtfs "local,path=$job/share,mount_tag=job,security_model=none" \
        -virtfs "local,path=$folder,mount_tag=folder,security_model=none" \
        </dev/null >&2 &
    pid=$!
    trap 'kill "$pid" 2>/dev/null || true' TERM INT HUP
    tail --silent --sleep-interval=0.2 --lines=+1 --follow --pid="$pid" "$job/share/output"
    wait "$pid" || status=$?
    # A machine that went down by itself says how COMMAND ended; one that does not, broke.
    ((status)) || status=$(cat "$job/share/status" 2>/dev/null || echo 125)
    ((!console && status != 125)) || cat "$job/console" >&2
    rm -r "$job"
    return "$status"
}

# initramfs RELEASE FOLDER — an archive, on stdout, with what it takes to find the
# disk and to tell systemd of one more unit.
initramfs() {
    local release=$1 folder=$2 module modules
    mapfile -t modules < <(modprobe -d "$cache/kernel" -S "$release" --show-depends -a \
        virtio_pci virtio_blk virtio_rng ext4 9pnet_virtio 9p | sed -n 's/^insmod //p' | awk '!seen[$1]++ { print $1 }')
    mkdir -p "$folder"/{bin,modules,dev,proc,sys,run,root}
    cp "$(command -v busybox)" "$folder/bin/busybox"
    for module in "${modules[@]}"; do
        cp "$module" "$folder/modules/"
        echo "insmod /modules/${module##*/}"
    done >"$folder/load"
    cat >"$folder/init" <<'END'
#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t devtmpfs dev /dev
mount -t tmpfs -o mode=755 run /run
. /load
mount -t ext4 /dev/vda /root
share() { mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000 "$@"; }
mkdir -p /root/usr/lib/modules /run/job
share -o ro,cache=loose modules /root/usr/lib/modules
share folder /root/mnt
share job /run/job
units=/run/systemd/system
mkdir -p $units/multi-user.target.wants
cat >$units/job.service <<'UNIT'
[Service]
Type=exec
Environment=HOME=/root
ExecStart=/bin/bash -c 'bash /run/job/command >/run/job/output 2>&1 </dev/null; echo $? >/run/job/status'
ExecStopPost=systemctl poweroff --force --force
UNIT
ln -s ../job.service $units/multi-user.target.wants/
mount -o move /run /root/run
exec switch_root /root /sbin/init
END
    chmod +x "$folder/init"
    (cd "$folder" && find . | busybox cpio -o -H newc 2>/dev/null)
}

main "$@"
