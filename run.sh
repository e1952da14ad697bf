#!/usr/bin/env bash
# ./run.sh [DATASET] [LOSS] [MODE] [--flag value ..]   train and evaluate; default: toy contrastive feature
# ./run.sh test [--slow]                               run the tests, or the ones that take minutes
# ./run.sh --help                                      every flag
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

words=("toy folder" "contrastive multisimilarity proxyanchor" "baseline input feature embed")
names=("data set" "loss" "mode")

fail() { echo "run.sh: $1" >&2; exit 2; }

# Misspelt words are told at once, before anything is installed.
if [[ ${1:-} != test ]]; then
    position=0
    for word in "$@"; do
        [[ $word == -* ]] && break
        (( position < 3 )) || fail "unexpected word '$word' after DATASET LOSS MODE"
        [[ " ${words[position]} " == *" $word "* ]] ||
            fail "unknown ${names[position]} '$word'; DATASET: ${words[0]}, LOSS: ${words[1]}, MODE: ${words[2]}, or the word test alone"
        position=$((position + 1))
    done
fi

# The active Python if it has what is needed (a CUDA environment, say), else .venv here.
needed="torch, torchvision, numpy, PIL"
[[ ${1:-} == test ]] && needed+=", pytest"
ready() { "$1" -c "import $needed" 2>/dev/null; }
python=python3
if ! ready "$python"; then
    python="$here/.venv/bin/python"
    if ! ready "$python"; then
        command -v python3 >/dev/null || fail "no python3 here; install Python 3.10 or newer"
        echo "The active Python lacks one of: $needed. Installing requirements.txt into $here/.venv (several GB, minutes)."
        python3 -m venv "$here/.venv" || fail "python3 cannot make $here/.venv; install its venv module"
        "$python" -m pip install --disable-pip-version-check -r "$here/requirements.txt"
    fi
fi

if [[ ${1:-} == test ]]; then
    shift
    marked="not slow"
    [[ ${1:-} == --slow ]] && { marked="slow"; shift; }
    cd "$here"
    exec "$python" -m pytest -q -m "$marked" tests "$@"
fi
exec "$python" "$here/metrix.py" "$@"
