#!/usr/bin/env bash
# Tries kiln on this machine's GPU, measures it beside transformers + Accelerate, and prints one table. Needs what
# ci/build-cuda.sh made, a CUDA 13.0 driver, and Python with torch, transformers and accelerate: see README.md here.
#
# usage: benches/gpu/run.sh [--binaries FOLDER] [--only STAGE,…] [--quick]
#        benches/gpu/run.sh --rehearse            without a GPU: training and a tiny comparison, on the CPU
#        benches/gpu/run.sh --report FILE.jsonl…  one table of what several calls with --only wrote
#
# Stages: tests train nccl base-128 base-512 large-384 real-lengths. --quick is one round, without compiled contestants.
# Results go to $OUT, else benches/results/ (without a GPU or with --quick nowhere). Exits with 0 where everything
# passed, 1 where something failed, 2 for wrong arguments, 3 where nothing failed but something was skipped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

python=${KILN_PYTHON:-python3}
here=benches/gpu
binaries=target/gpu
stages="tests train nccl base-128 base-512 large-384 real-lengths"
# Seconds of each: 25 minutes in all.
declare -A limits=([tests]=200 [train]=150 [nccl]=90 [base-128]=240 [base-512]=240 [large-384]=320 [real-lengths]=260
    [tiny]=600)
only=$stages quick='' device=cuda suffix=''
few=(--rounds 1 --variants "eager, autocast;eager, bf16 weights") turns=()

fail() {
    echo "gpu: $*" >&2
    exit 2
}
while [ $# -gt 0 ]; do
    case $1 in
        --binaries) binaries=${2:?"--binaries: needs the folder that ci/build-cuda.sh made"} && shift ;;
        --only) only=${2:?"--only: needs stages, of $stages"} && only=${only//,/ } suffix=-${only// /-} && shift ;;
        --quick) quick=--quick turns=("${few[@]}") ;;
        --rehearse) device=cpu only="train tiny" turns=("${few[@]}") ;;
        --report) shift && exec "$python" $here/report.py "$@" ;;
        -h | --help) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0" && exit ;;
        *) fail "no option is called $1: see --help" ;;
    esac
    shift
done
for stage in $only; do
    [ -n "${limits[$stage]:-}" ] || fail "no stage is called $stage: there are $stages"
done
[ -x "$binaries/kiln" ] || fail "$binaries/kiln is not there: make it by ci/build-cuda.sh $binaries, here or elsewhere"

# torch's wheels bring CUDA's libraries and NCCL, which kiln's programs find by this path. What it names already is first.
libraries=$("$python" -c 'import glob, importlib.util
found = importlib.util.find_spec("nvidia")
folders = found.submodule_search_locations if found else []
print(":".join(path for folder in folders for path in sorted(glob.glob(folder + "/*/lib"))))')
export LD_LIBRARY_PATH=${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$libraries
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false RUST_BACKTRACE=0 PYTHONUNBUFFERED=1

gpu=$(nvidia-smi -L 2> /dev/null | grep '^GPU 0' || true)
[ -z "${OUT:-}" ] || mkdir -p "$OUT"
lines=$(mktemp "${OUT:-${TMPDIR:-/tmp}}/gpu-XXXXXX.jsonl") # it stays where this is killed
"$python" $here/report.py --start "$binaries/kiln" "$lines"
worst=0
for stage in $only; do
    started=$SECONDS status=0
    if [ $device = cuda ] && [ -z "$gpu" ]; then
        echo "$stage: skipped: no CUDA device" >&2
        status=3
    else
        case $stage in
            tests | train | nccl) command=(checks.py "$stage" --binaries "$binaries" --device $device $quick) ;;
            *) command=(compare.py "$stage" --kiln "$binaries/kiln" "${turns[@]}") ;;
        esac
        echo "gpu: $stage, at most ${limits[$stage]} s" >&2
        timeout --kill-after=10 "${limits[$stage]}" "$python" $here/"${command[@]}" --lines "$lines" || status=$?
    fi
    case $status in
        0) result=passed ;;
        3) result=skipped && worst=$((worst ? worst : 3)) ;;
        124 | 137) result="failed: not done in ${limits[$stage]} s" worst=1 ;;
        *) result=failed worst=1 ;;
    esac
    printf '{"stage": "%s", "result": "%s", "seconds": %d, "limit": %d}\n' \
        "$stage" "$result" $((SECONDS - started)) "${limits[$stage]}" >> "$lines"
done

output=${OUT:-}
[ -n "$output" ] || [ -z "$gpu" ] || [ -n "$quick" ] || [ $device = cpu ] || output=benches/results
"$python" $here/report.py "$lines" --suffix "$suffix" ${output:+--output "$output"}
rm "$lines"
exit $worst
