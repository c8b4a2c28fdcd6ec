#!/usr/bin/env bash
# Set up the environment if needed (tools/setup_env.sh), then run every check: ruff, mypy, pytest.
# All of them run; the last line names those that failed. Arguments go to pytest:
#   bash tools/run_tests.sh tests/layers -k conv
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python="$(bash tools/setup_env.sh)"
failed=()

# A full disk fails hundreds of tests, each with an error of its own: say it once, before them.
temporary="${TMPDIR:-/tmp}"
room="$(df -Pk "$temporary" | awk 'NR == 2 { print int($4 / 1024 / 1024) }')"
if [ "$room" -lt 4 ]; then
    echo "run_tests: warning: $room GB are free in $temporary, and the tests take up to 3 there; set TMPDIR to a folder with more" >&2
fi

# check NAME COMMAND...
check() {
    local name="$1" start="$SECONDS" verdict=passed
    shift
    echo "== $name"
    if ! "$@"; then
        verdict=FAILED
        failed+=("$name")
    fi
    echo "== $name: $verdict in $((SECONDS - start)) s"
}

check "ruff check" "$python" -m ruff check .
check "ruff format" "$python" -m ruff format --check .
check "mypy" "$python" -m mypy aqdet tools
# One process a core, one thread each: torch's own threads would only compete with the workers.
OMP_NUM_THREADS=1 check "pytest" \
    "$python" -m pytest -q --durations=10 -n 2 --dist loadfile "$@"

if [ "${#failed[@]}" -gt 0 ]; then
    printf 'run_tests: FAILED in %d s:' "$SECONDS"
    printf ' [%s]' "${failed[@]}"
    echo
    exit 1
fi
echo "run_tests: all passed in $SECONDS s"
