#!/usr/bin/env bash
# ./run.sh [DATASET] [LOSS] [MODE] [--flag value ..]   train and evaluate; default: toy contrastive feature
# ./run.sh all DATASET [--seeds N] [--flag value ..]   every loss and mode of a data set, then a table of them
# ./run.sh eval RUN_DIR [--checkpoint best]            every metric of a run's checkpoint
# ./run.sh bench [KERNEL] [--sizes ..] [--json FILE]   time the kernels against the alternatives
# ./run.sh test [--slow]                               the fast tests; with --slow, the slow ones instead
# ./run.sh --help                                      what each flag means
# MODES="baseline embed" ./run.sh all cub              only these modes; LOSSES selects losses likewise
# NPROC=4 ./run.sh sop contrastive feature             four processes, one GPU each
# PYTHON=/path/to/python ./run.sh                      use this Python
set -euo pipefail  # macOS has bash 3.2: an empty array counts as unset there
unset CDPATH
here=$(cd "$(dirname "$0")" && cd "$(dirname "$(readlink "$(basename "$0")")")" && pwd)  # follows a symbolic link
fail() { echo "run.sh: $*" >&2; exit 2; }

if [[ ${1:-} == all ]]; then  # check the words before anything starts
    losses="contrastive multisimilarity proxyanchor" modes="baseline input feature embed"
    for word in ${LOSSES:-}; do [[ " $losses " == *" $word "* ]] || fail "LOSSES: $word is none of: $losses"; done
    for word in ${MODES:-}; do [[ " $modes " == *" $word "* ]] || fail "MODES: $word is none of: $modes"; done
    words=() seeds=1 suffix=""
    for word in "${@:2}"; do
        if [[ $seeds == next ]]; then seeds=$word; continue; fi
        case $word in
            --seeds) seeds=next ;;
            --seeds=*) seeds=${word#*=} ;;
            --out | --out=* | --seed | --seed=* | --resume) fail "all sets ${word%%=*} itself; leave it out" ;;
            --validation) suffix=-validation words+=("$word") ;;
            *) words+=("$word") ;;
        esac
    done
    dataset=${words[0]:--}
    [[ $dataset != -* ]] || fail "all needs a data set: ./run.sh all DATASET [--seeds N] [--flag value ..]"
    [[ $seeds =~ ^[1-9][0-9]?[0-9]?$ ]] || fail "--seeds needs a number from 1 to 999"
fi

needed="torch torchvision numpy PIL"
if [[ ${1:-} == test ]]; then needed+=" pytest scipy"; fi
find='import sys
if sys.version_info < (3, 10):
    sys.stderr.write("run.sh: Python %d.%d is too old: 3.10 or newer is needed\n" % sys.version_info[:2]); sys.exit(2)
from importlib.metadata import distributions
from importlib.util import find_spec
missing = [name for name in sys.argv[1:] if not find_spec(name)]
for name, major, minor in ("torch", 2, 11), ("pillow", 10, 1):
    found = next(iter(distributions(name=name)), None)
    if found and tuple(map(int, found.version.split(".")[:2])) < (major, minor):
        missing += ["%s %d.%d or newer" % (name, major, minor)]
print(", ".join(missing)); sys.exit(3 if missing else 0)'
python=${PYTHON:-python3} venv=$here/.venv/bin/python code=0
command -v "$python" > /dev/null || fail "$python: no such Python; set PYTHON=/path/to/python"
missing=$("$python" -c "$find" $needed) || code=$?
[[ $code == 0 || $code == 3 ]] || exit "$code"  # Python has said why
if [[ $code == 3 ]] && ! "$venv" -c "$find" $needed > /dev/null 2>&1; then
    echo "Missing packages: $missing. Installing requirements.txt into $here/.venv (a few GB, a few minutes)."
    "$python" -m venv "$here/.venv"
    "$venv" -m pip install --disable-pip-version-check -r "$here/requirements.txt"
fi
[[ $code == 0 ]] || python=$venv

case ${1:-} in
    test)
        cd "$here"
        if [[ ${2:-} == --slow ]]; then exec "$python" -m pytest -q -m slow tests "${@:3}"; fi
        exec "$python" -m pytest -q -m "not slow" tests "${@:2}" ;;
    bench) exec "$python" "$here/tests/bench.py" "${@:2}" ;;
esac
launch=("$python")
if [[ ${NPROC:-1} != 1 ]]; then launch+=(-m torch.distributed.run --standalone --nproc-per-node="$NPROC"); fi
if [[ ${1:-} != all ]]; then exec "${launch[@]}" "$here/metrix.py" "$@"; fi

runs=()
for ((seed = 0; seed < seeds; seed++)); do
    for loss in ${LOSSES:-$losses}; do
        for mode in ${MODES:-$modes}; do
            run=runs/$dataset-$loss-$mode$suffix-seed$seed
            "${launch[@]}" "$here/metrix.py" "$dataset" $loss $mode --seed $seed --out "$run" "${words[@]:1}"
            runs+=("$run")
        done
    done
done
exec "$python" "$here/results/table.py" "${runs[@]}"
