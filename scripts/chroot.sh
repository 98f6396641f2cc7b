#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# scripts/chroot.sh SERVER COMMAND… — runs COMMAND where the stock server of that name
# (a line, or 8.1-embedded, 9.1.0-lite and the like) is `valkey-server` on the PATH: in the tree of
# its distribution if it needs one, else on this machine as it is.
#
# In a tree, this machine's /dev, /proc, /sys and /tmp, this repository, the
# cache, the build's target folder and the folders in VALKEY_RDMA_SHOW (separated
# by colons) are at their own places; what else is written is forgotten. It needs
# root, leaves no mount behind, keeps the environment, and becomes COMMAND
# without a process in between. It works on the machine and in the guest alike.
set -euo pipefail

# In the guest a process costs a third of a second: hence one mkdir, one mount
# for all, and no helper where the shell will do.
main() {
    [[ ${1:-} == --inside ]] && { shift; inside "$@"; }
    (($# >= 2)) || { sed -n '4,12s/^# \{0,1\}//p' "$0" >&2; exit 2; }
    # shellcheck source=scripts/lib.sh
    . "${BASH_SOURCE[0]%/*}/lib.sh"
    local tree=$cache/servers/$1
    [[ -e $tree ]] || die "no server of line '$1' yet: run scripts/setup.sh server-$1"
    if [[ ! -e $tree/etc/os-release ]]; then
        shift
        export PATH=$tree/usr/bin:$PATH
        exec "$@"
    fi
    need_root "running the $1 server in its own tree"
    shift
    exec unshare --mount --propagation private \
        "$repo/scripts/chroot.sh" --inside "$tree" "$cache" "$repo" "$@"
}

# In a mount namespace of its own, which ends with the command.
inside() {
    local tree=$1 cache=$2 repo=$3 root=/mnt/root folder show folders=() mounts
    shift 3
    IFS=: read -r -a show <<<"${CARGO_TARGET_DIR:-}:${VALKEY_RDMA_SHOW:-}"
    mounts="overlay $root overlay lowerdir=$tree,upperdir=/mnt/upper,workdir=/mnt/work"
    for folder in /dev /proc /sys /tmp "$repo" "$cache" "${show[@]}"; do
        # What lies below /tmp is there with it.
        [[ -n $folder && -e $folder && $folder != /tmp/* ]] || continue
        folders+=("/mnt/upper$folder")
        mounts+=$'\n'"$folder $root$folder none rbind"
    done
    mount -t tmpfs tmpfs /mnt
    mkdir -p /mnt/work "$root" "${folders[@]}"
    printf '%s\n' "$mounts" >/mnt/fstab
    mount --all --fstab /mnt/fstab
    folder=$PWD
    [[ -d $root$folder ]] || folder=/
    export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
    exec chroot "$root" /usr/bin/env --chdir="$folder" "$@"
}

main "$@"
