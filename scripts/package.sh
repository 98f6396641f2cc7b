#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# scripts/package.sh — builds the module and, around it, the Debian package
# target/debian/valkey-rdma_VERSION_amd64.deb, whose path it prints.
#
# The package runs on this machine's release and later ones.
# shellcheck source=scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

modules=usr/lib/valkey/modules
units=usr/lib/systemd/system
acceptance=usr/lib/valkey-rdma
doc=usr/share/doc/valkey-rdma

main() {
    local target=${CARGO_TARGET_DIR:-$repo/target} version deb
    ((!$#)) || { sed -n '4,7s/^# \{0,1\}//p' "$0" >&2; exit 2; }
    cd "$repo"
    "$repo/scripts/setup.sh" build
    build_environment=$("$repo/scripts/setup.sh" env)
    eval "$build_environment"
    step "cargo: the module" cargo build --locked --release --package valkey-rdma
    step "cargo: the client of the acceptance run" \
        cargo build --locked --release --package client --example acceptance
    version=$(cargo pkgid --package valkey-rdma)
    version=${version##*[#@]}
    deb=$target/debian/valkey-rdma_${version}_amd64.deb
    step "package: ${deb##*/}" assemble "$target/release/libvalkey_rdma.so" "$version" "$deb"
    printf '%s\n' "$deb"
}

# assemble MODULE VERSION DEB
assemble() {
    local module=$1 version=$2 deb=$3 root libc
    root=$(mktemp -d "${TMPDIR:-/tmp}/valkey-rdma-deb.XXXXXX")
    umask 022
    chmod 755 "$root"
    # The same sources give the same file.
    SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct || stat -c %Y Cargo.toml)}
    export SOURCE_DATE_EPOCH

    # Executable: 8.0 refuses a module that is not.
    install -D -m 755 "$module" "$root/$modules/libvalkey_rdma.so"
    strip --strip-unneeded "$root/$modules/libvalkey_rdma.so"
    install -D -m 755 -t "$root/$acceptance" scripts/accept.sh "${module%/*}/examples/acceptance"
    install -m 644 scripts/lib.sh "$root/$acceptance/"
    strip --strip-unneeded "$root/$acceptance/acceptance"
    for unit in valkey-server valkey-server@; do
        install -D -m 644 packaging/valkey-server.conf "$root/$units/$unit.service.d/valkey-rdma.conf"
    done
    documents "$root" "$version"

    # What the module asks of the C library is what it was built with.
    libc=$(objdump -T "$module" | grep -o 'GLIBC_[0-9.]*' | sort -Vu | tail -n 1)
    mkdir "$root/DEBIAN"
    sed -e "s/@VERSION@/$version/" -e "s/@LIBC@/${libc#GLIBC_}/" \
        -e "s/@SIZE@/$(du -sk --apparent-size "$root" | cut -f1)/" \
        packaging/control.in >"$root/DEBIAN/control"
    install -m 755 packaging/{postinst,prerm,postrm} "$root/DEBIAN/"
    (cd "$root" && find usr -type f -exec md5sum {} + | LC_ALL=C sort -k 2 >DEBIAN/md5sums)

    mkdir -p "${deb%/*}"
    dpkg-deb --root-owner-group -Zxz --build "$root" "$deb"
    rm -r "$root"
}

documents() {
    local root=$1 version=$2 argument
    # shellcheck disable=SC2016 # the backquotes are Markdown's
    sed -n '/^### Settings/,/^Settings of the server/s/^| `\([a-z-]*\)` .*/\1/p' README.md |
        while read -r argument; do
            grep -q "^\.BI $argument=" packaging/valkey-rdma.7 ||
                die "packaging/valkey-rdma.7 lacks the argument '$argument' of the README's table"
        done
    install -d "$root/usr/share/man/man7" "$root/$doc/docs" "$root/$doc/examples"
    sed "s/@VERSION@/$version/" packaging/valkey-rdma.7 | gzip -9n >"$root/usr/share/man/man7/valkey-rdma.7.gz"
    install -m 644 README.md SECURITY.md "$root/$doc/"
    install -m 644 docs/*.md "$root/$doc/docs/"
    install -m 644 packaging/loadmodule.conf "$root/$doc/examples/"
    printf '%s (%s) unstable; urgency=medium\n\n  * See CHANGELOG.md.gz.\n\n -- %s  %s\n' \
        valkey-rdma "$version" "$(sed -n 's/^Maintainer: //p' packaging/control.in)" \
        "$(date -uRd "@$SOURCE_DATE_EPOCH")" | gzip -9n >"$root/$doc/changelog.gz"
    gzip -9nc CHANGELOG.md >"$root/$doc/CHANGELOG.md.gz"
    {
        cat packaging/copyright
        sed -n '/^Redistribution/,$ { s/^$/./; s/^/ /; p }' LICENSE
        crates_in valkey-rdma "$modules/libvalkey_rdma.so"
        crates_in client "$acceptance/acceptance"
    } >"$root/$doc/copyright"
}

# crates_in PACKAGE FILE — whose work is in a file. What is part of a build on the way to it is not.
crates_in() {
    printf '\nFiles: %s\nComment: contains, besides, the crates\n' "$2"
    cargo tree --locked --package "$1" --edges normal,no-proc-macro --prefix none --format '{p}: {l}' |
        sed -e "/^valkey-rdma/d" -e "/^$1 /d" -e 's/ (\*)$//' -e 's/^/ /' | LC_ALL=C sort -u
}

main "$@"
