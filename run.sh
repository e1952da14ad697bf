#!/usr/bin/env bash
# ./run.sh [DATASET] [LOSS] [MODE] [--flag value ..]   train and evaluate; default: toy contrastive feature
# ./run.sh all DATASET [--seeds N] [--flag value ..]   the twelve cells of a data set, and a table of them
# ./run.sh eval RUN_DIR [--split train] [--checkpoint best] [--embeddings]   every metric of a run
# ./run.sh bench [KERNEL] [--sizes ..] [--json FILE]   time the kernels against what else one could use
# ./run.sh bench speedrun [--json FILE]                a CUB-sized training run, timed and taken apart
# NPROC=4 ./run.sh sop contrastive feature             on four processes, a GPU each: torchrun
# ./run.sh test [--slow]                               run the tests, or the ones that take minutes
# ./run.sh --help                                      every flag
set -euo pipefail
here="$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")"

losses=$(sed -n '/^LOSSES = {/,/^}/s/^    "\([a-z0-9_]*\)":.*/\1/p' "$here/metrix.py" | xargs)
words=("cub cars sop inshop folder toy" "$losses" "baseline input feature embed")
names=("data set" "loss" "mode")

fail() { echo "run.sh: $1" >&2; exit 2; }

# Misspelt words are told at once, before anything is installed.
check() {
    local position=0 word
    for word in "$@"; do
        [[ $word == -* ]] && return
        (( position < ${#words[@]} )) || fail "unexpected word '$word'"
        [[ " ${words[position]} " == *" $word "* ]] ||
            fail "unknown ${names[position]} '$word'; DATASET: ${words[0]}, LOSS: ${words[1]:-every}, MODE: ${words[2]:-every}, or the words all, eval, bench or test first"
        position=$((position + 1))
    done
}
case ${1:-} in
    test | eval | bench) ;;
    all) words=("${words[0]}"); check "${@:2}" ;;
    *) check "$@" ;;
esac

# The active Python if it has what is needed (a CUDA environment, say), else .venv here.
needed="torch, torchvision, numpy, PIL"
[[ ${1:-} == test ]] && needed+=", pytest, scipy"
ready() { "$1" -c "import $needed; torch.nn.utils.get_total_norm" 2>/dev/null; }  # which PyTorch has from 2.6 on
python=python3
if ! ready "$python"; then
    python="$here/.venv/bin/python"
    if ! ready "$python"; then
        command -v python3 >/dev/null || fail "no python3 here; install Python 3.10 or newer"
        echo "The active Python lacks one of: $needed (torch 2.6 or newer). Installing requirements.txt into $here/.venv (several GB, minutes)."
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
if [[ ${1:-} == bench ]]; then
    shift
    module=bench
    [[ ${1:-} == speedrun ]] && { module=speedrun; shift; }
    PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}" exec "$python" -m "kernels.$module" "$@"
fi
if [[ ${NPROC:-1} != 1 ]]; then
    exec "$python" -m torch.distributed.run --standalone --nproc-per-node="$NPROC" "$here/metrix.py" "$@"
fi
exec "$python" "$here/metrix.py" "$@"
