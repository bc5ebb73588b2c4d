# shellcheck shell=bash
# Functions that build for a target in a Debian tree whose cargo can compile the standard library from source.
#
# Debian unstable packages rustc together with the source of its standard library, so `-Zbuild-std` works there for
# targets whose standard library rustup cannot bring. Crates come from this machine's cargo, the tree needs no network.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
# Where things are inside the tree.
BUILD=/build

say() { printf '%s\n' "$*" >&2; }
fail() {
    say "$(basename "$0"): $*"
    exit 2
}

# The words after `-h`: the comment at the head of the script.
usage() { sed -n '2,/^$/s/^# \{0,1\}//p' "$0"; }

# install_or_tell YES PACKAGE...: installs Debian packages when YES is 1, else says how to and ends.
install_or_tell() {
    local yes=$1
    shift
    if [ "$yes" = 1 ]; then
        apt-get install --yes --no-install-recommends "$@"
    else
        fail "this needs: apt-get install $*   (or run again with --install)"
    fi
}

# The Debian mirror that this system uses, or nothing.
system_mirror() {
    # shellcheck disable=SC2016  # the dollar is apt's
    apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 2>/dev/null | grep -m1 '/debian/\?$' || true
}

# debian_tree DIR INSTALL MIRROR PACKAGE...: makes the tree in DIR unless it is there, with PACKAGEs.
debian_tree() {
    local dir=$1 install=$2 mirror=$3
    shift 3
    [ "$(id -u)" = 0 ] || fail "a Debian tree is made and entered by root; run this with sudo"
    if [ ! -x "$dir/usr/bin/cargo" ]; then
        command -v debootstrap >/dev/null || install_or_tell "$install" debootstrap
        say "making a Debian tree in $dir (2 GB, some minutes)"
        local include=rustc,cargo,rust-src,ca-certificates,gcc,libc6-dev
        [ -n "$mirror" ] || mirror=$(system_mirror)
        debootstrap --variant=minbase --include=$include sid "$dir" ${mirror:+"$mirror"} >&2
    fi
    local missing=()
    for package in "$@"; do
        chroot "$dir" dpkg --status "$package" 2>/dev/null | grep -q '^Status:.* installed' || missing+=("$package")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    # A mirror may lag behind the date to which the list of unstable is valid.
    in_tree "$dir" apt-get -o Acquire::Check-Valid-Until=false update -qq >&2
    in_tree "$dir" apt-get install --yes --no-install-recommends "${missing[@]}" >&2
}

# in_tree DIR COMMAND...: runs a command inside the tree, with nothing of this machine's environment but its proxies.
in_tree() {
    local dir=$1
    shift
    env -i HOME=/root LC_ALL=C.UTF-8 DEBIAN_FRONTEND=noninteractive PATH=/usr/sbin:/usr/bin:/sbin:/bin \
        ${http_proxy:+http_proxy="$http_proxy"} ${https_proxy:+https_proxy="$https_proxy"} chroot "$dir" "$@"
}

# bring_source DIR: copies the sources that git knows, as they are now, and the crates that Cargo.lock names.
bring_source() {
    local dir=$1 lock
    rm -rf "$dir$BUILD/source"
    mkdir -p "$dir$BUILD/source" "$dir$BUILD/cargo"
    # Times are kept, so that cargo sees what has not changed.
    (cd "$ROOT" && git ls-files -z --cached --others --exclude-standard |
        while IFS= read -r -d '' file; do [ ! -f "$file" ] || printf '%s\0' "$file"; done |
        tar --null --files-from - -c) | tar -x -C "$dir$BUILD/source"

    lock=$(sha256sum <"$ROOT/Cargo.lock")
    if [ "$(cat "$dir$BUILD/vendor.lock" 2>/dev/null)" != "$lock" ]; then
        say "bringing the crates that Cargo.lock names"
        rm -rf "$dir$BUILD/vendor"
        (cd "$ROOT" && cargo vendor --quiet --locked --versioned-dirs "$dir$BUILD/vendor") >/dev/null
        # Those of the standard library come with its source.
        cp -rn "$dir"/usr/src/rustc-*/library/vendor/. "$dir$BUILD/vendor/"
        cat >"$dir$BUILD/cargo/config.toml" <<END
[source.crates-io]
replace-with = "vendored"
[source.vendored]
directory = "$BUILD/vendor"
[net]
offline = true
END
        echo "$lock" >"$dir$BUILD/vendor.lock"
    fi
}

# cargo_in_tree DIR [NAME=VALUE...] -- ARGUMENT...: runs cargo on the sources in the tree, building the standard library too.
cargo_in_tree() {
    local dir=$1 settings=()
    shift
    while [ "$1" != -- ]; do
        settings+=("$1")
        shift
    done
    shift
    local command=$1
    shift
    in_tree "$dir" env RUSTC_BOOTSTRAP=1 CARGO_HOME=$BUILD/cargo CARGO_TARGET_DIR=$BUILD/target "${settings[@]}" \
        nice -n "${NICE:-10}" sh -c "cd $BUILD/source && exec cargo \"\$@\"" cargo \
        "$command" --locked -Zbuild-std=std,panic_abort "$@"
}

# has_target TARGET: whether rustup's toolchain has, or can fetch, the standard library of a target.
has_target() {
    [ "${NO_RUSTUP:-0}" = 0 ] || return 1
    command -v rustup >/dev/null || return 1
    rustup target list --installed 2>/dev/null | grep -qx "$1" && return 0
    # Where nothing answers, rustup waits for ever.
    local limit=()
    ! command -v timeout >/dev/null || limit=(timeout "${RUSTUP_SECONDS:-120}")
    ${limit[@]+"${limit[@]}"} rustup target add "$1" >/dev/null 2>&1
}
