#!/usr/bin/env bash
# Make or refresh the virtual environment: scripts/setup.sh EXTRAS, for example `setup.sh dev`.
# Finds a Python of at least 3.11 (PYTHON overrides) and hands over to setup_env.py.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

is_new_enough() {
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

# Plain python3 comes first: on GPU hosts it is the one that has torch.
if [ -n "${PYTHON:-}" ]; then
  candidates=("$PYTHON")
else
  candidates=(python3 python3.12 python3.11 python3.13 python3.14 python)
fi
for candidate in "${candidates[@]}"; do
  if is_new_enough "$candidate"; then
    exec "$candidate" "$here/setup_env.py" --venv "${VENV:-.venv}" "$@"
  fi
done
echo "setup: no Python of at least 3.11 among: ${candidates[*]}." \
  "Install one, or name it: make test PYTHON=/path/to/python3.12" >&2
exit 2
