#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# scripts/build-on.sh [RELEASE…] — scripts/setup.sh build and cargo build --release in
# a bare tree of Debian RELEASE (12, 13, forky; all of them unless given), with this
# machine's Rust toolchain and that release's compiler, headers and libraries.
#
# The last line sums up: N passed, N failed, N skipped. Needs root.
# shellcheck source=scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

main() {
    local releases=("$@") release passed=0 failed=0 sysroot status
    [[ ${1:-} != --inside ]] || { shift; inside "$@"; }
    ((${#releases[@]})) || releases=(12 13 forky)
    for release in "${releases[@]}"; do
        [[ $release =~ ^(12|13|forky)$ ]] || { sed -n '4,8s/^# \{0,1\}//p' "$0" >&2; exit 2; }
    done
    "$repo/scripts/setup.sh" "${releases[@]/#/tree-}"
    cd "$repo"
    sysroot=$(rustc --print sysroot)
    step "cargo: fetch the crates" cargo fetch --locked
    for release in "${releases[@]}"; do
        status=0
        (step "Debian $release: set-up and cargo build --release" \
            unshare --mount --propagation private \
            "$repo/scripts/build-on.sh" --inside "$cache/trees/$release" "$sysroot" "${CARGO_HOME:-$HOME/.cargo}") || status=$?
        ((status ? ++failed : ++passed))
    done
    printf '%d passed, %d failed, 0 skipped\n' "$passed" "$failed"
    ((!failed && passed))
}

# In a mount namespace of its own, which ends with the build. The tree keeps what
# setup.sh adds to it; this repository is only read.
inside() {
    local tree=$1 sysroot=$2 crates=$3 folder certificates=/etc/ssl/certs/ca-certificates.crt
    for folder in /dev /proc /sys "$repo" "$sysroot" "$crates"; do
        mkdir -p "$tree$folder"
        mount --rbind "$folder" "$tree$folder"
    done
    mount -o remount,bind,ro "$tree$repo"
    # Whatever this machine needs to reach PyPI.
    cp /etc/resolv.conf "$tree/etc/resolv.conf"
    cp "$certificates" "$tree$certificates"
    [[ ! -e /etc/pip.conf ]] || cp /etc/pip.conf "$tree/etc/pip.conf"
    unset XDG_CACHE_HOME RUSTUP_TOOLCHAIN
    # shellcheck disable=SC2016 # expanded inside
    exec chroot "$tree" /usr/bin/env --chdir="$repo" HOME=/root CARGO_HOME="$crates" \
        CARGO_TARGET_DIR=/root/target CARGO_NET_OFFLINE=true TMPDIR=/tmp \
        PATH="$sysroot/bin:/usr/sbin:/usr/bin:/sbin:/bin" bash -euc '
            scripts/setup.sh build
            eval "$(scripts/setup.sh env)"
            cargo build --release --locked
            objdump -T /root/target/release/libvalkey_rdma.so | grep ValkeyModule_OnLoad'
}

main "$@"
