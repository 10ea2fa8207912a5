"""The loop's stages, killed at drawn calls, end with the same result; `python -m scripts.torture`
breaks the whole loop in all other ways too."""

import random
from collections import Counter

import pytest

from scripts import torture
from tests import tiny

# The loop without what takes longest: the held-out answers, their comparisons and the report.
STAGES = """
set -eu
run=$RUNS/torture it=$RUNS/torture/iteration_1
python() { "$PYTHON" "$@"; }
mkdir -p "$it"
[ -d "$run/start" ] || python -m scripts.convert from-hf "$INPUTS/model" "$run/start"
python -m stages.sample --checkpoint "$run/start" --prompts "$INPUTS/prompts.jsonl" \\
  --out "$it/samples.jsonl" --n 2 --max-new-tokens 8 --temperature 1 --dtype float32
python -m stages.rank --ranker "$INPUTS/reward.py:reward" --samples "$it/samples.jsonl" \\
  --out "$it/ranked.jsonl"
python -m stages.pairs --ranked "$it/ranked.jsonl" --out "$it/pairs.jsonl"
python -m stages.dpo --checkpoint "$run/start" --pairs "$it/pairs.jsonl" --out "$it/checkpoint" \\
  --learning-rate 1e-3 --batch-size 8 --micro-batch-size 8 --save-every 1 --dtype float32
[ -d "$run/final-hf" ] || python -m scripts.convert to-hf "$it/checkpoint" "$run/final-hf"
"""


@pytest.fixture(scope="module")
def loop(tmp_path_factory):
    folder = tmp_path_factory.mktemp("torture")
    torture.write_inputs(folder / "inputs")
    (folder / "stages.sh").write_text(STAGES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XLA_FLAGS", tiny.xla_flags(1))
        loop = torture.Loop(folder / "loop", folder / "inputs")
    loop.command = ["bash", str(folder / "stages.sh")]
    loop.environment |= {"INPUTS": str(folder / "inputs")}
    yield loop
    loop.close()


def test_killed_ten_times_the_stages_end_with_the_same_bits(loop, tmp_path):
    codes, *_ = loop.attempt(torture.Fault())
    assert codes == [0], loop.said()
    calls = [call for call in loop.log.read_text().splitlines() if not call.startswith("the shell")]
    whole = loop.run.rename(loop.folder / "whole")
    rng, faults = random.Random(0), []
    for fault in torture.draw(rng, calls, "kill", 6, Counter()):
        if fault.seconds is None:
            # Near its beginning, then at the drawn call; the longest stages once only.
            if not any(name in fault.stage for name in ("stages.dpo", "from-hf")):
                faults.append(torture.Fault("kill", rng.randint(1, 4), 0, fault.stage))
            faults.append(fault)
    rows = torture.break_a_run(loop, faults, whole, tmp_path)
    assert [row["wrong"] for row in rows] == [[]] * len(rows), rows
    assert len(rows) == len(faults) == 10
    assert len({row["call"][0] for row in rows}) == 6  # every stage


def test_a_difference_is_seen(loop, tmp_path):
    """In the tool itself: what would be a loss must not pass."""
    whole = loop.folder / "whole"
    for name in ("iteration_1/pairs.jsonl", "final-hf/model.safetensors", "start/config.json"):
        content = torture.contents(whole)
        assert name in content
        ours = (whole / name).read_bytes()
        (whole / name).write_bytes(ours.replace(b"0", b"1", 1))
        assert torture.contents(whole)[name] != content[name]
        (whole / name).write_bytes(ours)
    assert torture.differences(whole, whole) == []
