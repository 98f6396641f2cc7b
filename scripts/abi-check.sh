#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# scripts/abi-check.sh [--write] DIR… — compares the headers of valkey releases,
# each unpacked in a DIR, with the tables in tests/abi that the module's own
# layouts are tested against; tests/abi/releases.tsv says which table a release
# has. Says what differs, and ends with 1 if anything does.
#
#   --write     makes tests/abi/RELEASE.txt instead: the release has a layout of its own
#   --fetched   stands for the sources that `scripts/setup.sh sources` fetched
#
# scripts/abi-check.sh --compare DIR [OLD-DIR] — says in words what a release that is
# not known yet changes for the module, against the last known release before it, or
# against the source in OLD-DIR; then also what its I/O threads do with connections.
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

# known_before RELEASE — the release of tests/abi/releases.tsv that is nearest, from below if
# there is one, and its layout.
known_before() {
    grep -v '^#' "$repo/tests/abi/releases.tsv" | sort -V |
        awk -F '\t' -v new="$1" '
            function number(release,  parts) { split(release, parts, "."); return (parts[1] * 1000 + parts[2]) * 1000 + parts[3] }
            NR == 1 || number($1) <= number(new) { found = $1 " " $2 }
            END { print found }'
}

# in_words OLD NEW — what differs between two tables.
in_words() {
    awk -F '\t' '
        function struct_of(name) { sub(/\..*/, "", name); return name }
        function field_of(name) { sub(/.*\./, "", name); return name }
        /^#/ { next }
        { key = $1 " " $2 }
        FNR == NR { old[key] = $3; type[key] = $4; next }
        { seen[key] = 1 }
        $1 == "size" && (key in old) && old[key] != $3 { printf "%s has %d bytes instead of %d.\n", $2, $3, old[key] }
        $1 == "size" && !(key in old) { printf "%s is new: %d bytes.\n", $2, $3 }
        $1 == "offset" && !(key in old) { printf "%s has a new member %s, %s, at %d.\n", struct_of($2), field_of($2), $4, $3 }
        $1 == "offset" && (key in old) && old[key] != $3 { printf "%s of %s has moved from %d to %d.\n", field_of($2), struct_of($2), old[key], $3 }
        $1 == "offset" && (key in old) && type[key] != $4 { printf "%s of %s is %s instead of %s.\n", field_of($2), struct_of($2), $4, type[key] }
        $1 == "const" && !(key in old) { printf "The constant %s is new: %s.\n", $2, $3 }
        $1 == "const" && (key in old) && old[key] != $3 { printf "The constant %s is %s instead of %s.\n", $2, $3, old[key] }
        $1 == "function" && (key in old) && old[key] != $3 { printf "The function %s is %s instead of %s.\n", $2, $3, old[key] }
        $1 == "function" && $3 == "" { printf "The function %s is gone.\n", $2 }
        END {
            for (key in old) if (!(key in seen)) {
                split(key, part, " ")
                if (part[1] == "offset") printf "%s of %s is gone.\n", field_of(part[2]), struct_of(part[2])
                else printf "%s is gone.\n", part[2]
            }
        }' "$1" "$2" | sort
}

# on_io_threads DIR — what the functions for I/O threads call of a connection.
on_io_threads() {
    awk '
        FNR == 1 { name = "" }
        /^[a-zA-Z].*\(.*\{ *$/ { name = $0; sub(/\(.*/, "", name); sub(/.*[ *]/, "", name) }
        /^}/ { name = "" }
        name == "" || (FILENAME !~ /io_threads\.c$/ && name !~ /[iI][oO]Thread|IOJob/) { next }
        {
            text = $0
            while (match(text, /conn[A-Z][A-Za-z]*\(/)) {
                call = substr(text, RSTART, RLENGTH - 1)
                if (call != name) print name " calls " call
                text = substr(text, RSTART + RLENGTH)
            }
        }' "$1/src/io_threads.c" "$1/src/networking.c" | sort -u
}

# compare DIR [OLD-DIR] — a release that is not known yet, in words.
compare() {
    local dir=$1 old=${2:-} release known layout
    release=$(release_of "$dir")
    if [[ -n $old ]]; then
        known=$(release_of "$old")
        table "$old" >"$work/old"
    else
        read -r known layout < <(known_before "$release")
        cp "$repo/tests/abi/$layout.txt" "$work/old"
    fi
    table "$dir" >"$work/table"
    in_words "$work/old" "$work/table" >"$work/words"
    echo "valkey $release against $known:"
    if [[ -s $work/words ]]; then
        sed 's/^/  /' "$work/words"
    else
        echo "  Sizes, members, constants and functions are the same."
    fi
    if [[ -n $old ]]; then
        on_io_threads "$old" >"$work/before"
        on_io_threads "$dir" >"$work/after"
        echo "On I/O threads:"
        if cmp -s "$work/before" "$work/after"; then
            echo "  The same functions call the same of a connection."
        else
            comm -13 "$work/before" "$work/after" | sed 's/^/  New: /'
            comm -23 "$work/before" "$work/after" | sed 's/^/  Gone: /'
        fi
    fi
    echo "docs/abi.md, \"Adding a release\", says what follows from that."
}

main() {
    local write=0 dirs=() dir release known layout file differ=0
    if [[ ${1:-} == --compare ]]; then
        (($# == 2 || $# == 3)) || die "--compare takes a folder, or two"
        compare "${@:2}"
        return
    fi
    while (($#)); do
        case $1 in
        --write) write=1 ;;
        --fetched) dirs+=("$cache/src/8.1" "$cache/src/9.1") ;;
        *) dirs+=("$1") ;;
        esac
        shift
    done
    ((${#dirs[@]})) || { sed -n '4,19s/^# \{0,1\}//p' "$0" >&2; exit 2; }
    for dir in "${dirs[@]}"; do
        [[ -e $dir/src/version.h ]] || die "$dir is not the source of a valkey release"
        release=$(release_of "$dir")
        table "$dir" >"$work/table"
        if ((write)); then
            { printf '# valkey %s, x86-64, by scripts/abi-check.sh --write\n' "$release"; cat "$work/table"; } >"$repo/tests/abi/$release.txt"
            echo "valkey $release: written to tests/abi/$release.txt"
            continue
        fi
        read -r known layout < <(known_before "$release")
        file=$repo/tests/abi/$layout.txt
        if [[ ${known%.*} != "${release%.*}" ]]; then
            echo "valkey $release: its line is not supported, so the module refuses it; --compare says what it changes"
            differ=1
        elif diff --label "tests/abi/$layout.txt" --label "valkey $release" -u \
            <(grep -v '^#' "$file") "$work/table"; then
            echo "valkey $release: as tests/abi/$layout.txt has it"
        else
            differ=1
        fi
    done
    return "$differ"
}

work=$(mktemp -d)
trap 'rm -r "$work"' EXIT
main "$@"
