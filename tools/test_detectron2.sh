#!/usr/bin/env bash
# Run the tests of all modules that stand on Detectron2 on two of its versions, in one environment, and print both
# counts: the one that is installed, and AQDET_DETECTRON2 (default: main), put for these tests alone into a folder.
# Arguments go to pytest, and name the tests to run instead.
#
#   bash tools/test_detectron2.sh
#   AQDET_DETECTRON2=../detectron2 bash tools/test_detectron2.sh tests/modeling
#
# The environment is set up where it is not (tools/setup_env.sh), unless PYTHON names an interpreter. Without a network
# main cannot be fetched: that is said in one line, and nothing runs (status 3); a source folder, an archive or a
# repository on this machine works (tools/install_detectron2.py). Status 1: a test failed on either version.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

source="${AQDET_DETECTRON2:-main}"
unset AQDET_DETECTRON2
python="${PYTHON:-$(bash tools/setup_env.sh)}" || exit 1
target="$PWD/.venv-detectron2"
"$python" tools/install_detectron2.py --source "$source" --target "$target" || exit 3
if [ "$#" = 0 ]; then
    set -- tests/test_config.py tests/test_registration.py tests/checkpoint tests/engine tests/evaluation tests/layers \
        tests/modeling tests/quantization
fi
status=0
rows=()

test_on() {  # PYTHONPATH ARGUMENTS...: the tests with Detectron2 from there, or the installed one
    local path="$1" start="$SECONDS" version count log
    shift
    export PYTHONPATH="$path"
    version="$("$python" -W ignore -c 'import detectron2; print(detectron2.__version__)')"
    log="$(mktemp)"
    echo "== Detectron2 $version"
    OMP_NUM_THREADS=1 "$python" -m pytest -q -n 2 --dist loadfile "$@" 2>&1 | tee "$log" || status=1
    count="$(tail -n 1 "$log" | sed 's/^=* *//; s/ in [0-9.]*s.*//')"
    rows+=("Detectron2 $version: $count in $((SECONDS - start)) s")
    rm "$log"
}

test_on "$PWD" "$@"
test_on "$target:$PWD" "$@"
printf '%s\n' "${rows[@]}"
exit "$status"
