#!/usr/bin/env bash
# Refuse a recipe of earlier versions, a shell file, with the TOML that it corresponds to on stdout:
#   bash scripts/from_shell.sh my.sh >my.toml
# Its functions become comments; `model`, `prompts` and `heldout` say what they did. Exit code 2.
set -euo pipefail
file=$(realpath "$1")
cd "$(dirname "$0")/.."

python() { :; }
SEED=0 LIMIT=0 ITERATIONS=3 RANKER= SAMPLE= HELDOUT_SAMPLE= RANK= PAIRS= DPO= KL= EXPORT_DTYPE=
set +u # a recipe may use variables that the loop used to set
# shellcheck source=/dev/null
source "$file" >&2
set -uf # flags with * are no file patterns

body() { declare -f "$1" | sed 's/^/#   /' || true; }
echo "error: $1: recipes are TOML files now, and this one corresponds to" >&2
quoted() {
  local text=${1//\\/\\\\}
  text=${text//\"/\\\"} text=${text//$'\t'/\\t}
  echo "\"${text//$'\n'/\\n}\""
}
value() { # KEY WORD: as TOML writes it
  local number=${2/#-./-0.}
  number=${number/#./0.}
  number=${number/%[.]/}
  if [[ $1 != stop_strings && $2 == *[0-9]* &&
    $number =~ ^-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?$ ]]; then
    echo "$number"
  else
    quoted "$2"
  fi
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
      values+=", $(value "$key" "$1")"
      shift
    done
    case $values:$key in
      :no_*) echo "${key#no_} = false" ;;
      :*) echo "$key = true" ;;
      *:stop_strings | *', '*', '*) echo "$key = [${values#, }]" ;;
      *) echo "$key = ${values#, }" ;;
    esac
  done
}

echo "model = \"\" # gguf:FILE, checkpoint:FOLDER, or a hub id or folder; was:"
body start_model
echo "ranker = $(quoted "$RANKER")"
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
