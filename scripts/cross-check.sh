#!/usr/bin/env bash
# Checks that the library and the program compile for every platform that llava-phi is for.
#
#   scripts/cross-check.sh [--tree DIR] [--mirror URL] [--install] [--no-rustup] [--ios-symbols] [TARGET...]
#
# For each target `cargo check` is run on what is built for it: library and program with ONNX Runtime loaded at run
# time (not on iOS), and the library with ONNX Runtime linked in. No linker, SDK or device is needed.
#
#   --tree DIR      for targets that `rustup target add` cannot bring, make and use a Debian tree in DIR (as root;
#                   2 GB, and as much again for what is built). Without it they are reported as not checked.
#   --mirror URL    the Debian mirror that the tree is made from; this system's otherwise
#   --no-rustup     check in the Debian tree even what rustup can bring
#   --install       install debootstrap through apt if it is missing; without it, it is only asked for
#   --ios-symbols   also build the static library for iOS and compare what it expects of ONNX Runtime with what the
#                   framework defines: the one in ORT_IOS_XCFWK_PATH, else the symbols known of release 1.29
#
# Ends with a table; fails when a target fails or could not be checked. Logs: target/cross-check/.

set -euo pipefail
# shellcheck source=scripts/cross/debian.sh
source "$(dirname "$0")/cross/debian.sh"

tree='' mirror='' install=0 ios_symbols=0 targets=()
while [ $# -gt 0 ]; do
    case $1 in
    --tree) tree=${2:?--tree needs a directory} && shift ;;
    --mirror) mirror=${2:?--mirror needs a URL} && shift ;;
    --install) install=1 ;;
    --no-rustup) export NO_RUSTUP=1 ;;
    --ios-symbols) ios_symbols=1 ;;
    -h | --help) usage && exit 0 ;;
    -*) fail "there is no option $1; see --help" ;;
    *) targets+=("$1") ;;
    esac
    shift
done
[ ${#targets[@]} -gt 0 ] || targets=(
    aarch64-linux-android aarch64-apple-ios aarch64-apple-darwin x86_64-pc-windows-msvc aarch64-unknown-linux-gnu
)
# What an iOS framework of ONNX Runtime defines, as read from release 1.29.
FRAMEWORK_SYMBOLS='_OrtGetApiBase
_OrtSessionOptionsAppendExecutionProvider_CPU
_OrtSessionOptionsAppendExecutionProvider_CoreML'

logs=$ROOT/target/cross-check
mkdir -p "$logs"
rows=() failed=0

# run_cargo HOW ARGUMENT...: cargo with rustup's toolchain, or in the Debian tree.
run_cargo() {
    local how=$1
    shift
    if [ "$how" = rustup ]; then
        (cd "$ROOT" && nice -n "${NICE:-10}" cargo "$1" --locked "${@:2}")
    else
        cargo_in_tree "$tree" -- "$@"
    fi
}

# row TARGET WHAT HOW RESULT SECONDS
row() {
    local line
    line=$(printf '%-26s %-38s %-7s %-7s %s' "$@")
    rows+=("$line")
    say "$line"
    [ "$4" = ok ] || failed=1
}

# check TARGET HOW WHAT ARGUMENT...
check() {
    local target=$1 how=$2 what=$3 result=ok begin=$SECONDS log
    shift 3
    log="$logs/$target-$(echo "$what" | tr -c 'a-z\n' -).log"
    run_cargo "$how" check --target "$target" "$@" >"$log" 2>&1 || result=FAILED
    [ "$result" = ok ] || tail -n 40 "$log" >&2
    row "$target" "$what" "$how" "$result" "$((SECONDS - begin)) s"
}

# The undefined symbols of ONNX Runtime in the static library for iOS must be ones that the framework defines.
check_ios_symbols() {
    local how=$1 target=aarch64-apple-ios begin=$SECONDS result=ok nm=llvm-nm library wanted defined framework
    if ! run_cargo "$how" rustc --target $target --lib --crate-type staticlib --no-default-features \
        --config "profile.dev.package.'*'.opt-level=0" >"$logs/ios-symbols.log" 2>&1; then
        tail -n 40 "$logs/ios-symbols.log" >&2
        row $target "static library" "$how" FAILED "$((SECONDS - begin)) s"
        return
    fi
    library=$ROOT/target/$target/debug/libllava_phi.a
    [ "$how" = rustup ] || library=$tree$BUILD/target/$target/debug/libllava_phi.a
    # An older llvm-nm passes over members that it cannot read, and says so by its exit code.
    wanted=$("$nm" --undefined-only "$library" 2>/dev/null | grep -o '_Ort[A-Za-z0-9_]*' | sort -u) || true
    defined=$FRAMEWORK_SYMBOLS
    framework=${ORT_IOS_XCFWK_PATH:-}/ios-arm64/onnxruntime.framework/onnxruntime
    [ ! -f "$framework" ] || defined=$("$nm" --defined-only "$framework" | grep -o '_Ort[A-Za-z0-9_]*' | sort -u) || true
    [ -n "$wanted" ] || result=FAILED
    for symbol in $wanted; do
        say "the static library expects $symbol"
        grep -qx "$symbol" <<<"$defined" || { say "the framework does not define it" && result=FAILED; }
    done
    row $target "static library, symbols" "$how" "$result" "$((SECONDS - begin)) s"
}

ready=0
for target in "${targets[@]}"; do
    how=rustup
    if ! has_target "$target"; then
        how=debian
        if [ -z "$tree" ]; then
            row "$target" "rustup cannot bring it; give --tree DIR" - missing 0
            continue
        fi
        if [ $ready = 0 ]; then
            debian_tree "$tree" "$install" "$mirror"
            bring_source "$tree"
            ready=1
        fi
    fi
    if [[ $target == *-ios* ]]; then
        check "$target" $how "library, linked" --no-default-features --lib
        check "$target" $how "program, linked" --no-default-features --features cli
        if [ $ios_symbols = 1 ]; then
            command -v llvm-nm >/dev/null || install_or_tell "$install" llvm
            check_ios_symbols $how
        fi
    else
        check "$target" $how "library and program, loaded"
        check "$target" $how "library, linked" --no-default-features --lib
    fi
done

echo
printf '%-26s %-38s %-7s %-7s %s\n' target what with result time
printf '%s\n' "${rows[@]}"
exit $failed
