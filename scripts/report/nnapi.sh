#!/usr/bin/env bash
# Makes a report of llava-phi on an Android device by the NNAPI provider, to be signed and sent back.
#
#   scripts/report/nnapi.sh --library FILE [--serial ID] [OPTION...]
#
# Runs on a computer that the device is connected to. Needs adb with the device in debugging mode, and Rust with the
# Android NDK (ANDROID_NDK_HOME), or the cross-built program in --program. Everything is put into
# /data/local/tmp/llava-phi on the device and stays there, so that a second report is quick.
#
#   --library FILE     ONNX Runtime for the device: libonnxruntime.so for arm64-v8a, or the .aar that holds it
#   --serial ID        which device, when several are connected; as `adb devices` lists them
#
# With `--provider xnnpack` or `--provider webgpu` the same is done for those, where the library has them.

set -euo pipefail
# shellcheck source=scripts/report/common.sh
source "$(dirname "$0")/common.sh"

DEVICE=/data/local/tmp/llava-phi
library='' words=()
while [ $# -gt 0 ]; do
    case $1 in
    --library) library=${2:?--library needs a file} && shift ;;
    --serial) export ANDROID_SERIAL=${2:?--serial needs a device} && shift ;;
    *) words+=("$1") ;;
    esac
    shift
done

versions() {
    adb version
    for property in ro.product.manufacturer ro.product.model ro.soc.model ro.board.platform ro.build.version.release \
        ro.build.version.sdk ro.build.fingerprint; do
        printf '%s: %s\n' "$property" "$(adb shell getprop $property </dev/null)"
    done
    adb shell 'head -3 /proc/meminfo; cat /sys/devices/system/cpu/present; grep -m1 Features /proc/cpuinfo; true' </dev/null
}

prepare() {
    command -v adb >/dev/null || fail "this needs adb, of Android's platform tools"
    [ "$(adb get-state 2>/dev/null)" = device ] || fail "adb sees no device; connect one and allow debugging, or give --serial"
    [ -f "$library" ] || fail "give --library FILE: libonnxruntime.so for arm64-v8a, or the .aar that holds it"
    case $library in
    *.aar)
        unzip -o -q "$library" jni/arm64-v8a/libonnxruntime.so -d "$out"
        library=$out/jni/arm64-v8a/libonnxruntime.so
        ;;
    esac
    [ -n "$program" ] || build
    for file in "$program" "$library"; do
        python3 -c 'import hashlib, sys; print(hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest(), sys.argv[1])' "$file"
    done >"$out/logs/pushed.sha256"

    adb shell "mkdir -p $DEVICE/package"
    adb push --sync "$program" "$DEVICE/llava-phi"
    adb push --sync "$library" "$DEVICE/libonnxruntime.so"
    adb push --sync "$model/." "$DEVICE/package/"
    cut -f 1 "$questions" | sort -u | while IFS= read -r image; do
        [ -z "$image" ] || {
            adb shell "mkdir -p '$DEVICE/$(dirname "$image")'" </dev/null
            adb push --sync "$images/$image" "$DEVICE/$image" </dev/null
        }
    done
    adb shell "chmod 755 $DEVICE/llava-phi"

    # Everything after this asks this program, which asks the device.
    program=$out/llava-phi-on-device
    cat >"$program" <<END
#!/usr/bin/env bash
# Made by scripts/report/nnapi.sh: llava-phi on the device.
exec adb shell "cd $DEVICE && HOME=$DEVICE XDG_CACHE_HOME=$DEVICE/cache LD_LIBRARY_PATH=$DEVICE ORT_DYLIB_PATH=$DEVICE/libonnxruntime.so \\
    ./llava-phi\$(printf ' %q' "\$@")" </dev/null
END
    chmod +x "$program"
    device_model=$DEVICE/package device_root=$DEVICE
}

# Cross-builds the program with the NDK's linker.
build() {
    [ -d "${ANDROID_NDK_HOME:-}" ] || fail "set ANDROID_NDK_HOME, or give the cross-built program in --program"
    local linker
    linker=$(find "$ANDROID_NDK_HOME/toolchains/llvm/prebuilt" -name aarch64-linux-android24-clang | head -n 1)
    [ -n "$linker" ] || fail "$ANDROID_NDK_HOME has no aarch64-linux-android24-clang; is it an NDK?"
    (cd "$ROOT" && CARGO_TARGET_AARCH64_LINUX_ANDROID_LINKER=$linker \
        cargo build --release --locked --target aarch64-linux-android)
    program=$ROOT/target/aarch64-linux-android/release/llava-phi
}

make_report android nnapi ${words[@]+"${words[@]}"}
