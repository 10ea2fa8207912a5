#!/usr/bin/env bash
# The compilers of scripts.plan, beside the project's own JAX and of the same version:
#   bash scripts/plan/setup.sh tpu     libtpu, 0.7 GB
#   bash scripts/plan/setup.sh cuda    JAX's CUDA 13 plugin and NVIDIA's libraries, 4 GB
# They lie in .compilers/, which only the plan's own processes read. Delete the folder to remove them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
kind=${1:-}
case $kind in
  tpu) extra=tpu ;;
  cuda) extra=cuda13 ;;
  *) echo "error: bash scripts/plan/setup.sh tpu, or cuda" >&2; exit 2 ;;
esac
PYTHON=${PYTHON:-.venv/bin/python}
[[ -x $PYTHON ]] || PYTHON=python3

# The packages of this JAX's extra, without those that JAX itself brings.
wanted=$("$PYTHON" - "$extra" <<'END'
import importlib.metadata, sys
for text in importlib.metadata.requires("jax"):
    name, _, condition = text.partition(";")
    if f'extra == "{sys.argv[1]}"' in condition and not name.startswith(("jaxlib", "requests")):
        print(name.strip().replace(" ", ""))
END
)
[[ -n $wanted ]] || { echo "error: this JAX names no packages for $extra" >&2; exit 2; }
rm -rf ".compilers/$kind.new"
mkdir -p .compilers
# shellcheck disable=SC2086  # one package a line
"$PYTHON" -m pip install --no-cache-dir --target ".compilers/$kind.new" $wanted
rm -rf ".compilers/$kind"
mv ".compilers/$kind.new" ".compilers/$kind"
echo "installed in .compilers/$kind: $(echo $wanted)"
