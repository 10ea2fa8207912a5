"""What the tests of several stages begin with."""

import os
import signal

import pytest

from stages import pairs
from stages.files.run import run_main
from stages.files.work import Work
from tests import tiny
from tests.stages.chain import run_dpo, run_rank, run_sample

REWARD = """
def reward(prompt, responses):
    return [len(set(r)) / 10 for r in responses]
"""


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A folder with a checkpoint, prompts and a reward, and all stages' files but the training."""
    folder = tmp_path_factory.mktemp("base")
    tiny.write_checkpoint(folder / "model")
    tiny.write_checkpoint(folder / "other", seed=1)
    tiny.write_jsonl(folder / "prompts.jsonl", tiny.PROMPTS)
    (folder / "reward.py").write_text(REWARD)
    assert run_sample(folder) == 0
    assert run_rank(folder) == 0
    argv = ["--ranked", str(folder / "ranked.jsonl"), "--out", str(folder / "pairs.jsonl")]
    assert run_main(pairs.main, pairs.Args, [*argv, "--test-count", "2"]) == 0
    return folder


@pytest.fixture
def stopped(base, tmp_path, monkeypatch, capsys):
    """A training, in tmp_path/out, that a signal stopped after the second of its four steps."""
    log = Work.log

    def stopping(self, step, values):
        log(self, step, values)
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Work, "log", stopping)
        assert run_dpo(base, tmp_path / "out") == 75
    capsys.readouterr()
    return tmp_path / "out"
