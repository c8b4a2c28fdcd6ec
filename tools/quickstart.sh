#!/usr/bin/env bash
# The main job on the embedded dataset: set-up, three detectors, a table and a picture. Run it again after an
# interruption: what is done is not done again.
set -euo pipefail
cd "$(dirname "$0")/.."
python="$(bash tools/setup_env.sh)"
exec "$python" tools/quickstart.py "$@"
