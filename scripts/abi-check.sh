#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# scripts/abi-check.sh [--write] DIR… — compares the headers of valkey releases,
# each unpacked in a DIR, with the tables in tests/abi that the module's own
# layouts are tested against. Says what differs, and ends with 1 if anything does.
#
#   --write     makes the table of a release's line instead
#   --fetched   stands for the sources that `scripts/setup.sh sources` fetched
#
# A table is one fact a line, separated by tabs; what follows the number is for
# the reader:
#   size STRUCT BYTES          offset STRUCT.FIELD BYTES TYPE
#   const NAME VALUE           function NAME TYPE
# shellcheck source=scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

# By the tag they are declared under; what a line does not have is left out.
structs=(ConnectionType connection connListener serverRdmaContextConfig)
functions=(connTypeRegister connectionTypeTcp connectionByType listenerByType acceptCommonHandler changeListener)
constants='CONN_(STATE|FLAG|POSTPONE)_[A-Z_]+|CONN_TYPE_RDMA|CONN_ADDR_STR_LEN|CONFIG_BINDADDR_MAX'

# table DIR — the facts of a release, from its own headers by its own compiler.
table() {
    local dir=$1 name include=()
    for name in "$dir"/src "$dir"/deps/*/ "$dir"/deps/*/src "$dir"/deps/*/include; do
        include+=(-I "$name")
    done
    printf '#include "server.h"\n' >"$work/all.c"
    gcc -std=gnu11 -E -P "${include[@]}" "$work/all.c" >"$work/all.i"
    {
        printf '#include "server.h"\n#include <stddef.h>\n'
        # shellcheck disable=SC2016
        printf '%s\n' '#define SIZE(s) printf("size\t" #s "\t%zu\n", sizeof(s));' \
            '#define OFFSET(s, f, d) printf("offset\t" #s "." #f "\t%zu\t%s\n", offsetof(s, f), d);' \
            '#define CONST(c) printf(_Generic((c), char *: "const\t%s\t\"%s\"\n", default: "const\t%s\t%d\n"), #c, (c));' \
            'int main(void) {'
        for name in "${structs[@]}"; do members "$name" "$work/all.i"; done
        printf 'SIZE(ClientFlags)\n'
        { grep -ohwE "$constants" "$dir/src/connection.h" "$dir/src/server.h" || true; } |
            sort -u | sed 's/.*/CONST(&)/'
        for name in "${functions[@]}"; do
            printf 'puts("function\\t%s\\t%s");\n' "$name" "$(prototype "$name" "$work/all.i")"
        done
        printf '}\n'
    } >"$work/probe.c"
    gcc -std=gnu11 -w "${include[@]}" -o "$work/probe" "$work/probe.c"
    "$work/probe"
}

# type_of: a declaration without its names, in one spelling, so that a change of
# names alone does not count.
awk_type_of='
    function type_of(declaration, name,  at, list, n, parts, i, type) {
        gsub(/[ \t]+/, " ", declaration); sub(/^ /, "", declaration); sub(/ ?;.*/, "", declaration)
        gsub(/struct connection /, "connection ", declaration)
        if (!match(declaration, "\\(\\*" name "\\)|[^ *]*" name " ?\\(")) {
            at = index(declaration, "["); list = at ? substr(declaration, at) : ""
            if (at) declaration = substr(declaration, 1, at - 1)
            sub(" ?" name "$", "", declaration); return declaration list
        }
        type = substr(declaration, 1, RSTART - 1); sub(/ $/, "", type)
        at = index(substr(declaration, RSTART + 1), name) + RSTART + length(name)
        list = substr(declaration, at); sub(/^[ )]*\(/, "", list); sub(/\)$/, "", list)
        n = split(list, parts, /, */); list = ""
        for (i = 1; i <= n; i++) {
            if (parts[i] ~ /[a-zA-Z_0-9][ *]+[a-zA-Z_0-9]+$/ && parts[i] !~ /^(const )?[a-z]+$/) sub(/ *[a-zA-Z_0-9]+$/, "", parts[i])
            list = list (i > 1 ? ", " : "") parts[i]
        }
        return type "(" list ")"
    }'

# members STRUCT PREPROCESSED — probe lines for a struct and all its members, in
# order, so that a member that was added shows as well as one that moved.
members() {
    awk -v struct="$1" "$awk_type_of"'
        !inside && $0 ~ "struct " struct " *{" { inside = 1; print "SIZE(" struct ")"; next }
        inside && /^ *}/ { exit }
        inside {
            text = text " " $0
            if (text !~ /; *$/) next
            if (match(text, /\(\*[a-zA-Z_0-9]+\)/)) name = substr(text, RSTART + 2, RLENGTH - 3)
            else { name = text; sub(/ *(\[.*)?; *$/, "", name); sub(/.*[ *]/, "", name) }
            printf "OFFSET(%s, %s, \"%s\")\n", struct, name, type_of(text, name)
            text = ""
        }' "$2"
}

prototype() {
    awk -v name="$1" "$awk_type_of"'
        text == "" && $0 !~ "^[a-zA-Z].*[ *]" name "\\(" { next }
        { text = text " " $0 }
        /;/ { print type_of(text, name); exit }' "$2"
}

release_of() { sed -n 's/^#define VALKEY_VERSION "\(.*\)"$/\1/p' "$1/src/version.h"; }

main() {
    local write=0 dirs=() dir release line file differ=0
    while (($#)); do
        case $1 in
        --write) write=1 ;;
        --fetched) dirs+=("$cache/src/8.1" "$cache/src/9.1") ;;
        *) dirs+=("$1") ;;
        esac
        shift
    done
    ((${#dirs[@]})) || { sed -n '4,14s/^# \{0,1\}//p' "$0" >&2; exit 2; }
    for dir in "${dirs[@]}"; do
        [[ -e $dir/src/version.h ]] || die "$dir is not the source of a valkey release"
        release=$(release_of "$dir")
        line=${release%.*}
        file=$repo/tests/abi/$line.txt
        table "$dir" >"$work/table"
        if ((write)); then
            mkdir -p "${file%/*}"
            { printf '# valkey %s, x86-64, by scripts/abi-check.sh --write\n' "$release"; cat "$work/table"; } >"$file"
            echo "valkey $release: written to tests/abi/$line.txt"
        elif [[ ! -e $file ]]; then
            echo "valkey $release: line $line has no table in tests/abi, so the module refuses it"
            differ=1
        elif diff --label "tests/abi/$line.txt" --label "valkey $release" -u \
            <(grep -v '^#' "$file") "$work/table"; then
            echo "valkey $release: as tests/abi/$line.txt has it"
        else
            differ=1
        fi
    done
    return "$differ"
}

work=$(mktemp -d)
trap 'rm -r "$work"' EXIT
main "$@"
