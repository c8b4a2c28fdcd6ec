#!/usr/bin/env bash
# Prepare the Python environment of aqdet; progress goes to stderr, and the one line on stdout is
# the interpreter to use:  python="$(bash tools/setup_env.sh)"
#
# Makes .venv with Python 3.11 or newer, installs the releases pinned in constraints.txt,
# Detectron2 where `import detectron2` fails, and aqdet in editable mode with its `train`, `export` and `dev` extras.
# Returns at once when nothing changed since the last time; an interrupted set-up is resumed.
#
#   AQDET_VENV=DIR             the virtual environment's folder (relative to the checkout; default: .venv); one that
#                              exists keeps its Python, so `python3.13 -m venv .venv` before this chooses 3.13
#   AQDET_USE_CURRENT_ENV=1    use the active environment (conda, venv, ...), which must have
#                              Detectron2 already: only what aqdet lacks is added, nothing is
#                              pinned, upgraded or removed
#   AQDET_TORCH_INDEX=URL      PyTorch from this package index instead of PyPI:
#                              https://download.pytorch.org/whl/cpu saves 4 GB of CUDA where there is no GPU;
#                              or from a folder with a wheel of torch and one of torchvision, which need not be of the
#                              pinned releases, but of one build
#   AQDET_DETECTRON2=main      another version of Detectron2: main, a commit, a source folder, an archive or a
#                              repository (tools/install_detectron2.py says how); default: 0.6
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf 'setup [%4d s] %s\n' "$SECONDS" "$*" >&2; }
die() { say "error: $*"; exit 1; }

heartbeat=
stop_heartbeat() {
    if [ -n "$heartbeat" ]; then kill "$heartbeat" 2>/dev/null || true; fi
    heartbeat=
}
trap stop_heartbeat EXIT
trap 'exit 130' INT TERM

# step TEXT COMMAND...: run the command with its output on stderr and a line every 20 s.
step() {
    local text="$1" status=0
    shift
    say "$text"
    (
        nap=
        trap 'kill $nap 2>/dev/null; exit' TERM
        while kill -0 $$ 2>/dev/null; do
            sleep 20 & nap=$!
            wait "$nap"
            say "  still at it: $text"
        done
    ) >/dev/null &
    heartbeat=$!
    "$@" >&2 || status=$?
    stop_heartbeat
    [ "$status" -eq 0 ] || die "$text: failed (the message is above); fix it and run this again"
}

find_python() {
    local candidate
    for candidate in python3.11 python3.12 python3.13 python3 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    die "Python 3.11 or newer is needed: none of python3.11 to python3.13, python3, python on PATH is one"
}

if [ "${AQDET_USE_CURRENT_ENV:-0}" = 1 ]; then
    python="$(command -v python || command -v python3 || true)"
    [ -n "$python" ] || die "AQDET_USE_CURRENT_ENV=1, but there is no python on PATH"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        die "AQDET_USE_CURRENT_ENV=1, but $python is older than Python 3.11"
    if ! reason="$("$python" -P -W ignore -c 'import detectron2.modeling' 2>&1)"; then
        # The last line of the traceback: not installed, or why what is installed does not work.
        die "AQDET_USE_CURRENT_ENV=1, but $python cannot import detectron2: ${reason##*$'\n'}"
    fi
    step "adding aqdet to the environment of $python" \
        "$python" -m pip install --quiet --no-build-isolation --editable '.[train,export,dev]'
    say "done"
    echo "$python"
    exit
fi

venv="${AQDET_VENV:-.venv}"
python="$venv/bin/python"
stamp="$venv/.aqdet-setup"
constraints=constraints.txt
torch_source="${AQDET_TORCH_INDEX:-}"
if [ -d "$torch_source" ]; then
    # torchvision's ops are compiled for one build of PyTorch: those on PyPI do not load beside one without CUDA.
    if ! compgen -G "$torch_source/torchvision-*.whl" >/dev/null; then
        die "AQDET_TORCH_INDEX=$torch_source is a folder without a wheel of torchvision: add the one built for its torch"
    fi
    constraints="$venv/constraints.txt"
    torch_source+=" $(cd "$torch_source" && echo torch*.whl)"
fi

fingerprint() {
    "$python" - "$PWD" "$torch_source" "${AQDET_DETECTRON2:-}" \
        constraints.txt setup.py pyproject.toml tools/install_detectron2.py tools/detectron2_changes.py <<'PY'
import hashlib
import pathlib
import sys

parts = [*(word.encode() for word in sys.argv[1:4]), *(pathlib.Path(name).read_bytes() for name in sys.argv[4:])]
print(hashlib.sha256(b"\0".join(hashlib.sha256(part).digest() for part in parts)).hexdigest())
PY
}

absolute_python() { "$python" -c 'import sys; print(sys.executable)'; }

if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$(fingerprint 2>/dev/null)" ]; then
    say "$venv is up to date"
    absolute_python
    exit
fi
rm -f "$stamp"

if ! "$python" -m pip --version >/dev/null 2>&1; then
    base="$(find_python)"
    step "making $venv with $base" "$base" -m venv "$venv"
fi
fingerprint="$(fingerprint)"
pip=("$python" -m pip install --quiet --constraint "$constraints")
if [ -n "${AQDET_TORCH_INDEX:-}" ]; then
    from=(--index-url "$AQDET_TORCH_INDEX")
    if [ -d "$AQDET_TORCH_INDEX" ]; then
        from=(--no-index --find-links "$AQDET_TORCH_INDEX")
        # The folder decides which release: the pins of PyTorch, and of the CUDA that belongs to them, do not hold.
        grep -Ev '^(torch|torchvision|triton|cuda-[a-z]+|nvidia-[a-z0-9-]+)==' constraints.txt >"$constraints"
    fi
    # Further indices and folders of pip's configuration would be asked too, and could win: the environment replaces
    # them. What PyTorch needs besides is on PyPI, and comes with the next step.
    step "installing PyTorch from $AQDET_TORCH_INDEX" \
        env PIP_EXTRA_INDEX_URL="$AQDET_TORCH_INDEX" PIP_FIND_LINKS="$venv" \
        "${pip[@]}" --upgrade --no-deps "${from[@]}" torch torchvision
    if [ -d "$AQDET_TORCH_INDEX" ]; then
        # No later step replaces them by what PyPI has.
        "$python" -c 'from importlib.metadata import version as of
print(*(f"{name}=={of(name)}" for name in ("torch", "torchvision")), sep="\n")' >>"$constraints"
    fi
fi
step "installing PyTorch (several GB the first time)" "${pip[@]}" setuptools wheel torch torchvision
step "installing Detectron2 where missing" \
    "$python" tools/install_detectron2.py --constraint "$constraints"
step "installing aqdet and its other dependencies" \
    "${pip[@]}" --no-build-isolation --editable '.[train,export,dev]'
step "checking the imports" "$python" -P -c 'import torchvision, detectron2.modeling, aqdet.modeling'
echo "$fingerprint" >"$stamp.new"
mv "$stamp.new" "$stamp"
say "done: $venv"
absolute_python
