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
doctor=0
pivottrace doctor --json > "$1/doctor.json" || doctor=1
python "$here/check.py" "$@"
if [ "$doctor" = 1 ]; then
    echo "pivottrace doctor found something: $1/doctor.json" >&2
    exit 1
fi
