#!/bin/sh
# SPDX-License-Identifier: BSD-3-Clause
# Runs a program on the software RDMA fabric of tests/softrdma, which needs no
# device, no kernel module and no rights. It is for tests and demos only.
#
#   scripts/softrdma.sh COMMAND...   run COMMAND with the fabric on its library path
#   scripts/softrdma.sh --path       build it and print the folder to put on that path
#
# SOFTRDMA_NO_BUILD=1 takes the fabric as it was last built.
set -eu

root=$(cd "$(dirname "$0")/.." && pwd)
target=${CARGO_TARGET_DIR:-$root/target}
dir=$target/softrdma
lib=$dir/libibverbs.so.1

build() {
    (cd "$root" && cargo build --quiet --release --package softrdma --lib) || return 1
    archive=$target/release/libsoftrdma.a
    map=$root/tests/softrdma/softrdma.map
    # shellcheck disable=SC3013 # dash and busybox have -nt
    if [ "$lib" -nt "$archive" ] && [ "$lib" -nt "$map" ] && [ "$lib" -nt "$0" ]; then
        return 0
    fi
    mkdir -p "$dir"
    # Linked aside and moved, so that a running program keeps the file it has.
    cc -shared -o "$lib.$$" -Wl,-soname,libibverbs.so.1 \
        -Wl,--version-script="$map" -Wl,-z,defs -Wl,-z,nodelete -Wl,--gc-sections \
        -Wl,--whole-archive "$archive" -Wl,--no-whole-archive \
        -lgcc_s -lpthread -ldl -lm -lc
    mv "$lib.$$" "$lib"
    # One object under all names: programs that need several get it once.
    for name in librdmacm.so.1 libibverbs.so librdmacm.so libmlx5.so.1 libefa.so.1; do
        ln -sf libibverbs.so.1 "$dir/$name"
    done
}

[ $# -gt 0 ] || {
    sed -n '3,9s/^# \{0,1\}//p' "$0" >&2
    exit 2
}
if [ "${SOFTRDMA_NO_BUILD:-0}" != 1 ] || [ ! -e "$lib" ]; then
    build >&2
fi

if [ "$1" = --path ]; then
    echo "$dir"
    exit 0
fi
LD_LIBRARY_PATH=$dir${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
export LD_LIBRARY_PATH
exec "$@"
