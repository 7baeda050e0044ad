#!/usr/bin/env bash
# Trains on two "machines" that share a disk but no network but a cable: two network namespaces, two
# ranks in each. Then cuts the cable in mid-training, and looks for every rank to end and say why.
#
# usage: ci/netns.sh [KILN]      needs root; KILN is the binary, target/release/kiln unless told
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
kiln=$(realpath "${1:-target/release/kiln}")

if ! ip netns add kiln-a 2> /dev/null; then
    echo "skipped: no right to make network namespaces (root has it)" >&2
    exit 0
fi
scratch=$(mktemp -d)
cleanup() {
    ip netns pids kiln-a 2> /dev/null | xargs -r kill -9 2> /dev/null || true
    ip netns pids kiln-b 2> /dev/null | xargs -r kill -9 2> /dev/null || true
    ip netns del kiln-a 2> /dev/null || true
    ip netns del kiln-b 2> /dev/null || true
    rm -rf "$scratch"
}
trap cleanup EXIT
ip netns add kiln-b
ip link add kiln-cable-a netns kiln-a type veth peer name kiln-cable-b netns kiln-b
for side in a b; do
    ip -n "kiln-$side" link set lo up
    ip -n "kiln-$side" link set "kiln-cable-$side" up
done
ip -n kiln-a address add 10.123.0.1/24 dev kiln-cable-a
ip -n kiln-b address add 10.123.0.2/24 dev kiln-cable-b

fail() { echo "netns: $*" >&2; tail -n 5 "$scratch"/*.err >&2; exit 1; }
settings=(--offline --stop-after train --threads 1 --set train.deterministic=true --set train.eval_steps=10)
node() { # node SIDE RANK ROOT OPTION…
    local side=$1 rank=$2 root=$3
    shift 3
    ip netns exec "kiln-$side" "$kiln" train "${settings[@]}" --root "$root" --nproc-per-node 2 \
        --nnodes 2 --node-rank "$rank" --master-addr 10.123.0.1 "$@" > "$root-$side.out" 2> "$root-$side.err"
}
weights() { sha256sum < "$1/quickstart/runs/1/small-bert/model/model.safetensors"; }

"$kiln" train "${settings[@]}" --root "$scratch/alone" --set train.max_steps=20 > /dev/null 2>&1
node a 0 "$scratch/two" --set train.max_steps=20 & first=$!
node b 1 "$scratch/two" --set train.max_steps=20 || fail "the second machine failed"
wait "$first" || fail "the first machine failed"
[ "$(weights "$scratch/two")" = "$(weights "$scratch/alone")" ] || fail "two machines made other weights than one"
echo "netns: 2 machines × 2 ranks made the weights of one process, to the bit"

node a 0 "$scratch/cut" --set train.max_steps=100000 & first=$!
node b 1 "$scratch/cut" --set train.max_steps=100000 & second=$!
until grep -q step=10 "$scratch/cut-a.out" 2> /dev/null; do
    kill -0 "$first" 2> /dev/null || fail "the training ended before its first evaluation"
    sleep 0.1
done
ip -n kiln-a link set kiln-cable-a down
cut=$(date +%s%N)
wait "$first" && fail "rank 0 did not notice that the cable was cut"
wait "$second" && fail "the second machine did not notice that the cable was cut"
took=$((($(date +%s%N) - cut) / 1000000))
grep -h "is lost" "$scratch"/cut-*.err || fail "nobody says who was lost"
[ "$took" -lt 15000 ] || fail "all ended only $took ms after the cable was cut"
[ -z "$(ip netns pids kiln-a)$(ip netns pids kiln-b)" ] || fail "a rank was left behind"
echo "netns: all 4 ranks and their 2 agents ended within $took ms of the cut, and none was left"
