#!/usr/bin/env bash
# Makes, or finds ready, the Python that kiln's tests and peers compare against, and prints the
# path of its interpreter on stdout (all else goes to stderr). kiln itself needs no Python.
#
# It lies in ${KILN_CACHE:-~/.cache/kiln}/python. The stamp in it is written last and holds the
# hash of what was asked for: an interrupted install, or another list, is made anew.
# KILN_BASE_PYTHON names the interpreter to start from (default python3).
# With the argument `trackers`: the one that the trackers' tests need, in python-trackers beside it. It
# sees all packages of the first and has requirements-trackers.txt on top.
set -euo pipefail
exec 3>&1 1>&2

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cache=${KILN_CACHE:-$HOME/.cache/kiln}
venv=$cache/python
base=${KILN_BASE_PYTHON:-python3}
say() { echo "python-env: $*"; }

# Debian's own package, and only where the machine lacks it and lets us.
apt_install() {
    say "installing $* with apt-get"
    local sudo=
    [ "$(id -u)" = 0 ] || sudo='sudo -n'
    { $sudo apt-get update -qq && DEBIAN_FRONTEND=noninteractive $sudo apt-get install -y -qq --no-install-recommends "$@" > /dev/null; } ||
        { say "could not install $*: install it by hand and run this again"; exit 1; }
}

command -v "$base" > /dev/null || apt_install python3 python3-venv
"$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    { say "$("$base" --version) is too old: the pinned packages need 3.11; set KILN_BASE_PYTHON to a newer one"; exit 1; }

want=$("$base" --version; cat "$here/requirements.txt" "$here/torch_without_cuda.sh")
want=$(sha256sum <<< "$want" | cut -d' ' -f1)
stamp=$venv/kiln-stamp
mkdir -p "$cache"
exec 9> "$cache/python.lock"
flock 9 # a second caller waits for the first and then finds it done
if [ "$(cat "$stamp" 2> /dev/null)" != "$want" ] || ! "$venv/bin/python" -c '' 2> /dev/null; then
    say "making $venv (about 0.7 GB to download, once)"
    rm -f "$stamp" && rm -rf "$venv"
    "$base" -m venv "$venv" > /dev/null || { rm -rf "$venv"; apt_install python3-venv; "$base" -m venv "$venv"; }
    # Compiling every module takes longer than all else; those that are used are compiled below.
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile --no-deps -r "$here/requirements.txt"
    bash "$here/torch_without_cuda.sh" "$venv"
    env -u PYTHONDONTWRITEBYTECODE "$venv/bin/python" - <<'PYTHON'
import datasets, onnx, onnxruntime, sklearn.metrics, torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertForSequenceClassification, BertTokenizer
torch.ones(2) @ torch.ones(2)
PYTHON
    echo "$want" > "$stamp"
    say "ready: $(du -sh "$venv" | cut -f1) in ${SECONDS} s"
fi
if [ "${1-}" = trackers ]; then
    below=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    venv=$cache/python-trackers stamp=$cache/python-trackers/kiln-stamp
    want=$(cat <(echo "$want") "$here/requirements-trackers.txt" | sha256sum | cut -d' ' -f1)
    if [ "$(cat "$stamp" 2> /dev/null)" != "$want" ] || ! "$venv/bin/python" -c '' 2> /dev/null; then
        say "making $venv (about 0.1 GB to download, once)"
        rm -rf "$venv"
        "$base" -m venv "$venv"
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile --no-deps -r "$here/requirements-trackers.txt"
        echo "$below" > "$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/kiln-python.pth"
        # The server's modules are compiled here, not in a test that waits for it.
        env -u PYTHONDONTWRITEBYTECODE "$venv/bin/python" -c 'import mlflow.server.fastapi_app, tensorboard, wandb' > /dev/null
        echo "$want" > "$stamp"
        say "ready: $(du -sh "$venv" | cut -f1) in ${SECONDS} s"
    fi
fi
echo "$venv/bin/python" >&3
