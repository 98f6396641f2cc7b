# SPDX-License-Identifier: BSD-3-Clause
# shellcheck shell=bash
#
# What the scripts have in common, to be sourced: where fetched things are
# kept, how a step is shown with its time, and how Debian packages are had
# without a change to the machine's own apt lists.
set -euo pipefail

# shellcheck disable=SC2034
repo=$(cd "${BASH_SOURCE[0]%/*}/.." && pwd)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/valkey-rdma
PATH=$PATH:/usr/sbin:/sbin # an unprivileged user's may lack them
[[ -d $cache ]] || mkdir -p "$cache"

# Everything a person reads goes to stderr: stdout belongs to the result.
say() { printf '%s\n' "$*" >&2; }
die() { say "error: $*"; exit 1; }

# step TEXT COMMAND… — runs COMMAND with its output kept in a log, which is
# shown only when it fails. COMMAND's own failure handling (set -e) stays in
# force, hence the background job instead of an `if`.
step() {
    local text=$1 log pid status=0 start=$SECONDS
    shift
    log=$(mktemp "${TMPDIR:-/tmp}/valkey-rdma.XXXXXX")
    printf '  %-58s ' "$text" >&2
    ("$@") >"$log" 2>&1 </dev/null &
    pid=$!
    wait "$pid" || status=$?
    if ((status)); then
        say "FAILED after $((SECONDS - start)) s"
        tail -n 40 "$log" >&2
        rm -f "$log"
        exit "$status"
    fi
    rm -f "$log"
    say "$((SECONDS - start)) s"
}

# need_root WHAT — ends with a sentence unless this is root.
need_root() {
    ((EUID == 0)) || die "$1 needs root; run this command as root (or with sudo -E)"
}

# need_packages PACKAGE… — installs those of the machine's own release that
# are missing. This is the only place that changes the machine's package set.
need_packages() {
    local package missing=()
    for package; do
        [[ $(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null) == installed ]] ||
            missing+=("$package")
    done
    ((${#missing[@]})) || return 0
    need_root "installing ${missing[*]}"
    ((${lists_are_new:-0})) || step "apt: lists of this machine's release" apt-get update
    lists_are_new=1
    step "apt: install ${missing[*]}" env DEBIAN_FRONTEND=noninteractive \
        apt-get install -y --no-install-recommends "${missing[@]}"
}

own_suite() {
    local VERSION_CODENAME='' ID=''
    # shellcheck disable=SC1091
    . /etc/os-release
    [[ $ID == debian && -n $VERSION_CODENAME ]] ||
        die "these scripts fetch Debian packages and know Debian only; this machine is '${ID:-unknown}'"
    printf '%s\n' "$VERSION_CODENAME"
}

# The machine's own Debian mirror as deb822 lines (URIs, and what says whom to
# trust), from whichever of apt's two formats it is written in.
own_mirror() {
    local suite files=() file
    suite=$(own_suite)
    for file in /etc/apt/sources.list.d/*.sources /etc/apt/sources.list /etc/apt/sources.list.d/*.list; do
        [[ -e $file ]] && files+=("$file")
    done
    ((${#files[@]})) || die "this machine has no apt sources to take a mirror's address from"
    awk -v suite="$suite" '
        # One stanza or one line describes a mirror; the first one that carries
        # the own release is taken.
        function has(list, word,  i, n, parts) {
            n = split(list, parts, /[ \t\n]+/)
            for (i = 1; i <= n; i++) if (parts[i] == word) return 1
            return 0
        }
        function stanza_end() {
            if (!done && field["uris"] && tolower(field["enabled"]) !~ /no|false/ &&
                has(field["types"], "deb") && has(field["suites"], suite) &&
                has(field["components"], "main")) {
                printf "URIs:%s\n", field["uris"]
                if (field["signed-by"]) printf "Signed-By:%s\n", field["signed-by"]
                if (field["trusted"]) printf "Trusted:%s\n", field["trusted"]
                done = 1
            }
            delete field; key = ""
        }
        FNR == 1 { stanza_end(); deb822 = FILENAME ~ /\.sources$/ }
        /^#/ { next }
        deb822 && /^[ \t]*$/ { stanza_end(); next }
        deb822 && /^[ \t]/ { if (key) field[key] = field[key] "\n" $0; next }
        deb822 {
            key = tolower($0); sub(/:.*/, "", key)
            value = $0; sub(/^[^:]*:/, "", value)
            field[key] = value; next
        }
        $1 == "deb" {
            line = $0; options = ""
            if (match(line, /\[[^]]*\]/)) {
                options = substr(line, RSTART + 1, RLENGTH - 2)
                line = substr(line, 1, RSTART - 1) substr(line, RSTART + RLENGTH)
            }
            split(line, word, /[ \t]+/)
            field["types"] = "deb"; field["uris"] = " " word[2]; field["suites"] = word[3]
            sub(/^[ \t]*deb[ \t]+[^ \t]+[ \t]+[^ \t]+/, "", line); field["components"] = line
            n = split(options, option, /[ \t]+/)
            for (i = 1; i <= n; i++) {
                if (option[i] ~ /^signed-by=/) { sub(/^[^=]*=/, " ", option[i]); gsub(/,/, " ", option[i]); field["signed-by"] = option[i] }
                if (option[i] ~ /^trusted=/) { sub(/^[^=]*=/, " ", option[i]); field["trusted"] = option[i] }
            }
            stanza_end()
        }
        END { stanza_end(); exit !done }
    ' "${files[@]}" || die "no apt source of this machine carries Debian $suite main"
}

# suite_sources SUITE — the path of a sources file for SUITE at the machine's
# own mirror.
suite_sources() {
    local file=$cache/apt/$1/debian.sources
    mkdir -p "${file%/*}"
    {
        printf 'Types: deb deb-src\n'
        own_mirror
        printf 'Suites: %s\nComponents: main\n' "$1"
    } >"$file.new.$BASHPID"
    mv "$file.new.$BASHPID" "$file"
    printf '%s\n' "$file"
}

# A mirror may be a copy taken some time ago, whose Release file of a moving
# suite has expired; its signature is still checked.
apt_options=(-o Acquire::Check-Valid-Until=false -o APT::Sandbox::User=root -o Acquire::Languages=none
    -o Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false)

# apt_of SUITE COMMAND… — apt-get over SUITE alone, with lists and state of its
# own. `apt_of SUITE update` comes first.
apt_of() {
    local suite=$1 state=$cache/apt/$1 sources
    shift
    sources=$(suite_sources "$suite")
    mkdir -p "$state/lists/partial" "$state/archives/partial"
    apt-get "${apt_options[@]}" \
        -o Dir::Etc::SourceList="$sources" -o Dir::Etc::SourceParts=/dev/null \
        -o Dir::Etc::Preferences=/dev/null -o Dir::Etc::PreferencesParts=/dev/null \
        -o Dir::State::Lists="$state/lists" -o Dir::Cache="$state" \
        "$@"
}

# copy_proto FOLDER — crates/proto alone, to be changed and built there with the versions of
# Cargo.lock: it compiles in seconds.
copy_proto() {
    mkdir -p "$1"
    cp -r "$repo/crates/proto/." "$1"
    cp "$repo/Cargo.lock" "$1/Cargo.lock"
    printf '\n[workspace]\n' >>"$1/Cargo.toml"
}

# add_sum LOG COUNT — adds the sum that a log ends with to $passed, $failed and $skipped;
# without one, all COUNT failed.
add_sum() {
    local sum p f s
    # -a: a failed test may have shown any bytes, and of a file that is not text grep prints
    # no line.
    sum=$(grep -aE '^[0-9]+ passed, [0-9]+ failed, [0-9]+ skipped$' "$1" | tail -n 1) ||
        sum="0 passed, $2 failed, 0 skipped"
    read -r p _ f _ s _ <<<"$sum"
    ((passed += p, failed += f, skipped += s)) || true
}

# build_all — the module, and all that tests it. The module by itself: built together with
# others it would get their dependencies' features, and another file be tested than is shipped.
build_all() {
    step "cargo: the module" cargo build --locked --release --package valkey-rdma
    step "cargo: the fabric, clients, cells and tools" \
        cargo build --locked --release --workspace --exclude valkey-rdma --examples --bins --lib
}
