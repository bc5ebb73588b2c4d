#!/usr/bin/env bash
# Checks that an emulated Arm program answers with the same tokens as this machine's own.
#
#   scripts/arm64.sh [--tree DIR] [--mirror URL] [--install] [--native FILE] [--model DIR] [--variant NAME]...
#
# Builds llava-phi for aarch64-unknown-linux-gnu, lets it fetch the Arm build of ONNX Runtime through pip, runs it under
# qemu and compares `ask --json` of both, for every variant of the package and every question of
# scripts/report/questions.tsv.
#
# Needs Linux, cargo, python3 with pip, qemu-aarch64, a linker and a C library for Arm; on Debian or Ubuntu
# `apt-get install qemu-user gcc-aarch64-linux-gnu libc6-dev-arm64-cross libstdc++6-arm64-cross`.
#
# qemu 7.2, as in Debian 12, crashes in ONNX Runtime 1.32; 11.1 runs it.
#
#   --tree DIR      take qemu from a Debian unstable tree in DIR, and build there when rustup cannot bring the target (as
#                   root; see cross-check.sh)
#   --mirror URL    the Debian mirror that the tree is made from; this system's otherwise
#   --install       install what is missing through apt; without it, it is only asked for
#   --native FILE   this machine's llava-phi; it is built otherwise
#   --model DIR     the package; models/tiny/package otherwise
#   --variant NAME  only this variant, may be given again

set -euo pipefail
# shellcheck source=scripts/cross/debian.sh
source "$(dirname "$0")/cross/debian.sh"

tree='' mirror='' install=0 native='' model=$ROOT/models/tiny/package variants=()
while [ $# -gt 0 ]; do
    case $1 in
    --tree) tree=${2:?--tree needs a directory} && shift ;;
    --mirror) mirror=${2:?--mirror needs a URL} && shift ;;
    --install) install=1 ;;
    --no-rustup) export NO_RUSTUP=1 ;;
    --native) native=${2:?--native needs a file} && shift ;;
    --model) model=${2:?--model needs a directory} && shift ;;
    --variant) variants+=("${2:?--variant needs a name}") && shift ;;
    -h | --help) usage && exit 0 ;;
    *) fail "there is no option $1; see --help" ;;
    esac
    shift
done
[ -f "$model/manifest.json" ] || fail "$model holds no manifest.json; give the directory of a package"
target=aarch64-unknown-linux-gnu
cross=(gcc-aarch64-linux-gnu libc6-dev-arm64-cross libstdc++6-arm64-cross)

if [ -n "$tree" ]; then
    debian_tree "$tree" "$install" "$mirror" qemu-user
    # It is statically linked there.
    qemu=$tree/usr/bin/qemu-aarch64
else
    command -v qemu-aarch64 >/dev/null || install_or_tell "$install" qemu-user
    qemu='qemu-aarch64'
fi
sysroot=/usr/aarch64-linux-gnu
if has_target $target; then
    if ! command -v aarch64-linux-gnu-gcc >/dev/null || [ ! -e $sysroot/lib/libstdc++.so.6 ]; then
        install_or_tell "$install" "${cross[@]}"
    fi
    (cd "$ROOT" && CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc \
        nice -n "${NICE:-10}" cargo build --locked --target $target)
    program=$ROOT/target/$target/debug/llava-phi
else
    [ -n "$tree" ] || fail "rustup cannot bring $target; give --tree DIR to build in a Debian tree"
    debian_tree "$tree" "$install" "$mirror" "${cross[@]}"
    bring_source "$tree"
    cargo_in_tree "$tree" CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc -- build --target $target
    program=$tree$BUILD/target/$target/debug/llava-phi
    sysroot=$tree/usr/aarch64-linux-gnu
fi
if [ -z "$native" ]; then
    (cd "$ROOT" && nice -n "${NICE:-10}" cargo build --locked)
    native=$ROOT/target/debug/llava-phi
fi

# The Arm program fetches its own library, checked against the hash that it knows.
work=$ROOT/target/arm64
mkdir -p "$work"
cat >"$work/llava-phi" <<END
#!/bin/sh
# Made by scripts/arm64.sh: the Arm program, emulated. cpuinfo's complaints are not its own.
XDG_CACHE_HOME='$work/cache' VIRTUAL_ENV='' ORT_DYLIB_PATH='' exec '$qemu' -L '$sysroot' '$program' "\$@"
END
chmod +x "$work/llava-phi"
"$work/llava-phi" runtime install >&2 || fail "the emulated program ended with code $?; another qemu may run it, see --tree"

if [ ${#variants[@]} = 0 ]; then
    mapfile -t variants < <(python3 -c 'import json, sys; print("\n".join(json.load(sys.stdin)["variants"]))' <"$model/manifest.json")
fi
# On a machine with an accelerator the processor must be asked for; older programs know no other.
on_cpu=
if "$native" ask --help | grep -q -- '--provider '; then on_cpu='--provider cpu'; fi
code=0
for variant in "${variants[@]}"; do
    say "variant $variant: this machine's $("$native" --version | tail -1), emulated $("$work/llava-phi" --version 2>/dev/null | tail -1)"
    options="ask --model '$model' --variant $variant $on_cpu"
    python3 "$ROOT/scripts/report/parity.py" --reference "'$native' $options" --candidate "'$work/llava-phi' $options" \
        --root "$ROOT" --output "$work/$variant.json" || code=1
done
exit $code
