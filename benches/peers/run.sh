#!/usr/bin/env bash
# Runs kiln beside what its users have today, in turns, and writes the ratios: see README.md here.
#
# usage: benches/peers/run.sh [OPTION…]      --help lists them; --prepare fetches and makes what is read, and ends
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

export KILN_CACHE=${KILN_CACHE:-$HOME/.cache/kiln}
python=${KILN_PYTHON:-$(ci/python-env.sh)}
case " $* " in *" --help "* | *" -h "*) exec "$python" benches/peers/run.py --help ;; esac
experiments/fetch.sh all-MiniLM-L6-v2 bbc >&2
[ -f "$KILN_CACHE/data/bbc-split/test.csv" ] || "$python" benches/peers/bbc_split.py >&2
"$python" benches/peers/prepare.py
[ "${1:-}" = --prepare ] || exec "$python" benches/peers/run.py "$@"
