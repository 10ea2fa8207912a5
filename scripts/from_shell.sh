#!/usr/bin/env bash
# Refuse a recipe of earlier versions, a shell file, with the TOML that it corresponds to on stdout:
#   bash scripts/from_shell.sh my.sh >my.toml
# Its functions become comments; `model`, `prompts` and `heldout` say what they did. Exit code 2.
set -euo pipefail
file=$(realpath "$1")
cd "$(dirname "$0")/.."

python() { :; }
SEED=0 LIMIT=0 ITERATIONS=3 RANKER= SAMPLE= HELDOUT_SAMPLE= RANK= PAIRS= DPO= KL= EXPORT_DTYPE=
# shellcheck source=/dev/null
source "$file"

body() { declare -f "$1" | sed 's/^/#   /' || true; }
echo "error: $1: recipes are TOML files now, and this one corresponds to" >&2
value() {
  if [[ $1 =~ ^-?[0-9]+(\.[0-9]+)?(e-?[0-9]+)?$ ]]; then echo "$1"; else echo "\"$1\""; fi
}
table() { # NAME FLAG…
  (($# > 1)) || return 0
  printf '\n[%s]\n' "$1"
  shift
  local key values
  while (($#)); do
    key=${1#--} values=
    shift
    if [[ $key == *=* ]]; then set -- "${key#*=}" "$@"; fi
    key=${key%%=*} key=${key//-/_}
    while (($#)) && [[ $1 != --* ]]; do
      values+=", $(value "$1")"
      shift
    done
    case $values in
      '') echo "$key = true" ;;
      ', '*', '*) echo "$key = [${values#, }]" ;;
      *) echo "$key = ${values#, }" ;;
    esac
  done
}

echo "model = \"\" # gguf:FILE, checkpoint:FOLDER, or a hub id or folder; was:"
body start_model
echo "ranker = \"$RANKER\""
echo "iterations = $ITERATIONS"
[[ -z $EXPORT_DTYPE ]] || echo "export_dtype = \"$EXPORT_DTYPE\""
printf '\n[prompts]\nfile = "" # or dataset and split; "{iteration}" is 1, 2, …; was:\n'
body train_prompts
printf '\n[heldout]\nfile = "" # was:\n'
body heldout_prompts
# Splitting the lists of flags is meant.
# shellcheck disable=SC2086
{
  table sample $SAMPLE
  table rank $RANK
  table pairs $PAIRS
  table dpo $DPO
  table evaluate.sample $HELDOUT_SAMPLE
  table evaluate.kl $KL
}
exit 2
