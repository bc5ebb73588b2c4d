# shellcheck shell=bash
# Functions by which one machine's report is made: what it has, whether it answers right, how fast.
#
# As old as macOS's bash, 3.2. A script of a platform sources this, may redefine `versions`, then calls `make_report PLATFORM PROVIDER "$@"`.

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ROOT=$(cd "$HERE/../.." && pwd)

say() { printf '%s\n' "$*" >&2; }
fail() {
    say "$(basename "$0"): $*"
    exit 2
}

# value NAME VALUE...: the value of an option, or the end.
value() {
    [ $# -gt 1 ] || fail "$1 needs a value; see --help"
    printf '%s' "$2"
}

common_usage() {
    cat <<END

Options of every report:
  --program FILE     llava-phi; otherwise the one on the search path, else it is built
  --model DIR        the package; models/tiny/package otherwise
  --questions FILE   image TAB question, a line each; scripts/report/questions.tsv otherwise
  --root DIR         what the images' paths are relative to; the repository otherwise
  --out DIR          where the report is written; llava-phi-report-PLATFORM-DATE otherwise
  --provider NAME    ask for another provider: with cpu, a rehearsal on a machine without the device
  --options WORDS    further options of every run, as for --provider-library or --provider-option
END
}

# make_report PLATFORM PROVIDER OPTION...
make_report() {
    platform=$1 provider=$2
    shift 2
    program='' model=$ROOT/models/tiny/package questions=$HERE/questions.tsv images=$ROOT out='' options=''
    while [ $# -gt 0 ]; do
        case $1 in
        -h | --help)
            sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
            common_usage
            exit 0
            ;;
        --program) program=$(value "$@") ;;
        --model) model=$(value "$@") ;;
        --questions) questions=$(value "$@") ;;
        --root) images=$(value "$@") ;;
        --out) out=$(value "$@") ;;
        --provider) provider=$(value "$@") ;;
        --options) options=$(value "$@") ;;
        *) fail "there is no option $1; see --help" ;;
        esac
        shift 2
    done
    [ -f "$model/manifest.json" ] || fail "$model holds no manifest.json; give the directory of a package"
    command -v python3 >/dev/null || fail "this needs python3"
    out=${out:-llava-phi-report-$platform-$(date -u +%Y-%m-%d-%H%M)}
    mkdir -p "$out/logs"
    out=$(cd "$out" && pwd)
    : >"$out/logs/steps.tsv"

    prepare
    run_steps
    python3 "$HERE/assemble.py" "$out" --platform "$platform" --provider "$provider" --manifest "$model/manifest.json"
}

# Finds or builds the program. A platform whose device is another machine redefines it; `device_model` and
# `device_root` are then the paths there.
prepare() {
    device_model=$model device_root=$images
    if [ -z "$program" ]; then
        program=$(command -v llava-phi || true)
    fi
    if [ -z "$program" ]; then
        say "building llava-phi"
        (cd "$ROOT" && cargo build --release --locked)
        program=$ROOT/target/release/llava-phi
    fi
    [ -x "$program" ] || fail "$program is not a program"
}

# What tells this machine from another; each platform adds its own.
versions() { uname -a; }

# Steps of a platform before the first answer.
before_answers() { :; }

# step NAME COMMAND...: runs one step; its output, errors, exit code and seconds go into the report. Never ends the
# report: that a step fails is a result.
step() {
    local name=$1 code=0 begin
    shift
    begin=$(date +%s)
    say "$name: $*"
    "$@" >"$out/logs/$name.out" 2>"$out/logs/$name.err" </dev/null || code=$?
    printf '%s\t%s\t%s\t%s\n' "$name" "$code" "$(($(date +%s) - begin))" "$*" >>"$out/logs/steps.tsv"
    [ $code = 0 ] || say "$name: exit code $code: $(tail -n 1 "$out/logs/$name.err" | cut -c 1-300)"
}

# compare NAME WORDS...: the answers of `ask` with these words against the golden variant's on the processor.
compare() {
    local name=$1
    shift
    step "parity-$name" python3 "$HERE/parity.py" --questions "$questions" --root "$device_root" \
        --reference "$ask --variant portable-f32 --provider cpu" --candidate "$ask $options $*" \
        --output "$out/logs/parity-$name.json"
}

run_steps() {
    local ask one variant whole
    one=$(grep -m1 -v '^[[:space:]]*$' "$questions") || fail "$questions holds no question"
    ask="'$program' ask --model '$device_model'"
    local image=${one%%$'\t'*} question=${one#*$'\t'}
    local asked=(ask --json --model "$device_model")
    # Options are words for a shell, as a person writes them.
    local extra=() word
    while IFS= read -r word; do
        [ -z "$word" ] || extra+=("$word")
    done < <(python3 -c 'import shlex, sys; print("\n".join(shlex.split(sys.argv[1])))' "$options")

    step versions versions
    step program "$program" --version
    step runtime "$program" runtime status --json
    step inspect "$program" inspect "$device_model" --verify
    before_answers
    step doctor "$program" doctor --json --model "$device_model" ${extra[@]+"${extra[@]}"}
    # As a user would have it, then without falling back.
    step ask-auto "$program" "${asked[@]}" ${extra[@]+"${extra[@]}"} -- "$device_root/$image" "$question"
    step ask-only "$program" "${asked[@]}" --provider "only:$provider" ${extra[@]+"${extra[@]}"} -- "$device_root/$image" "$question"
    compare only --provider "only:$provider"
    while IFS=$'\t' read -r variant whole; do
        if [ "$whole" = whole ]; then
            compare "$variant" --variant "$variant" --provider "only:$provider"
        fi
    done < <(python3 "$HERE/assemble.py" --variants "$provider" --manifest "$model/manifest.json")
    compare vision --provider "vision=$provider,decoder=cpu"
    step tune "$program" tune --json --model "$device_model" ${extra[@]+"${extra[@]}"}
}
