#!/usr/bin/env bash
# ./run.sh [DATASET] [LOSS] [MODE] [--flag value ..]   train and evaluate; default: toy contrastive feature
# ./run.sh all DATASET [--seeds N] [--flag value ..]   the twelve cells of a data set, and a table of them
# ./run.sh eval RUN_DIR [--checkpoint best]            every metric of a run's checkpoint
# ./run.sh bench [KERNEL] [--sizes ..] [--json FILE]   time the kernels against the alternatives
# ./run.sh test [--slow]                               the tests, or those that take minutes
# MODES="baseline embed" ./run.sh all cub              these modes only; LOSSES chooses losses likewise
# NPROC=4 ./run.sh sop contrastive feature             four processes, one GPU each (torchrun)
# PYTHON=/path/to/python ./run.sh                      another Python than the active one
set -euo pipefail
here="$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")"

needed="torch, torchvision, numpy, PIL"
[[ ${1:-} == test ]] && needed+=", pytest, scipy"
python=${PYTHON:-python3}
if ! "$python" -c "import $needed" 2>/dev/null; then
    python="$here/.venv/bin/python"
    if ! "$python" -c "import $needed" 2>/dev/null; then
        echo "The active Python lacks one of: $needed. Installing requirements.txt into $here/.venv: GBs, minutes."
        "${PYTHON:-python3}" -m venv "$here/.venv"
        "$python" -m pip install --disable-pip-version-check -r "$here/requirements.txt"
    fi
fi

case ${1:-} in
    test)
        marked="not slow"
        if [[ ${2:-} == --slow ]]; then marked="slow"; shift; fi
        cd "$here"
        exec "$python" -m pytest -q -m "$marked" tests "${@:2}" ;;
    bench)
        PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}" exec "$python" -m kernels.bench "${@:2}" ;;
    all)
        dataset=${2:?"all needs a data set"} seeds=1 flags=() runs=()
        for ((n = 3; n <= $#; n++)); do
            if [[ ${!n} == --seeds ]]; then n=$((n + 1)); seeds=${!n}; else flags+=("${!n}"); fi
        done
        for ((seed = 0; seed < seeds; seed++)); do
            for loss in ${LOSSES:-contrastive multisimilarity proxyanchor}; do
                for mode in ${MODES:-baseline input feature embed}; do
                    runs+=("runs/$dataset-$loss-$mode-seed$seed")
                    PYTHON=$python "$here/run.sh" "$dataset" $loss $mode --seed $seed --out "${runs[-1]}" "${flags[@]}"
                done
            done
        done
        exec "$python" "$here/eval.py" "${runs[@]}" ;;
esac
if [[ ${NPROC:-1} != 1 ]]; then
    exec "$python" -m torch.distributed.run --standalone --nproc-per-node="$NPROC" "$here/metrix.py" "$@"
fi
exec "$python" "$here/metrix.py" "$@"
