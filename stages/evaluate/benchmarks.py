"""Instructions of a benchmark, or of any file of prompts, as prompt rows.

- "alpaca_eval": AlpacaEval's 805, from the hub's data set tatsu-lab/alpaca_eval (its JSON file: its
  loading script no longer works with `datasets`), or a folder that holds that file
- a JSON list in AlpacaEval's form (instruction, dataset; answers in it are not read)
- MT-Bench's question.jsonl (turns): the first turns alone, since a second one asks about an answer
- prompts.jsonl, or any JSONL whose rows have prompt, messages or instruction
"""

from collections import Counter

from etils import epath

from sharding.errors import UserError
from stages.evaluate.answers import conversation_key, is_json_list, read_json_list
from stages.files.paths import text_sha256
from stages.files.rows import Row, field, messages_of, prompt_key, read_rows

HUB, HUB_FILE = "tatsu-lab/alpaca_eval", "alpaca_eval.json"


def local_file(benchmark: str) -> str:
    """The file that `benchmark` names, downloaded where it is on the hub."""
    if benchmark == "alpaca_eval":
        from huggingface_hub import hf_hub_download

        try:
            return hf_hub_download(HUB, HUB_FILE, repo_type="dataset")
        except Exception as error:  # of many kinds: no network, gated, no space
            line = next((s.strip() for s in str(error).splitlines() if s.strip()), repr(error))
            raise UserError(
                f"the hub does not give {HUB}'s {HUB_FILE} ({line}): download it elsewhere, and "
                "give its path"
            ) from None
    if epath.Path(benchmark).is_dir():
        return str(epath.Path(benchmark) / HUB_FILE)
    return benchmark


def read_instructions(path: str, counts: Counter) -> list[Row]:
    """Rows of {prompt or messages, prompt_id, dataset}, each instruction once, and their counts."""
    rows, seen, ids = [], {}, set()
    for where, row in read_json_list(path) if is_json_list(path) else read_rows(path):
        counts["in"] += 1
        found = _prompt(row, where, counts)
        key = conversation_key(messages_of(found, where))
        if not key.strip():
            raise UserError(f"{where}: the instruction is empty: write one, or remove it")
        if key in seen:
            raise UserError(f"{where}: this instruction stood above ({seen[key]}): remove one")
        seen[key] = where
        found.setdefault("prompt_id", text_sha256(prompt_key(found, where)))
        if field(found, "prompt_id", str, where) in ids:
            raise UserError(f"{where}: prompt_id {found['prompt_id']!r} stood above: change one")
        ids.add(found["prompt_id"])
        rows.append(found)
    if not rows:
        raise UserError(f"{path} holds no instructions")
    counts["out"] = len(rows)
    return rows


def _prompt(row: Row, where: str, counts: Counter) -> Row:
    kept = {name: row[name] for name in ("prompt_id", "dataset") if row.get(name) is not None}
    if "messages" in row:
        return kept | {"messages": messages_of(row, where)}
    if "turns" in row:
        turns = field(row, "turns", list, where)
        if not turns or not isinstance(turns[0], str):
            raise UserError(f"{where}: field 'turns' must be a list of texts")
        counts["second turns not asked"] += len(turns) > 1
        return {
            "dataset": row.get("category"),
            "prompt_id": f"question {row.get('question_id')}",
            "prompt": turns[0],
        }
    name = "instruction" if "instruction" in row and "prompt" not in row else "prompt"
    return kept | {"prompt": field(row, name, str, where)}
