#!/usr/bin/env bash
# Check attention capture on a machine with a GPU, and measure what it costs there; see README.md.
# Not yet run on a GPU.
#   bash recipes/gpu_check/run.sh OUT [--quick] [--runners v1,v2] [--model FOLDER]
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
case ${1:-} in
    "" | -*) exec python "$here/check.py" --help ;;
esac
# Refuses a machine without a GPU before anything is written.
python "$here/check.py" "$1" --only machine
# The doctor's bound is for float32; what it says is kept, and judged by whoever reads it.
pivottrace doctor --json > "$1/doctor.json" || echo "pivottrace doctor found something: $1/doctor.json"
exec python "$here/check.py" "$@"
