"""The dpo stage against TRL's DPOTrainer: the same weights, the same tokenised real pairs, fp32."""

import json

import numpy as np
import pytest
import torch
import transformers

from model import checkpoint
from model.batches import epoch_order
from model.tokenizer import ChatTokenizer
from scripts import convert
from stages import dpo
from stages.files.examples import read_pairs
from stages.files.run import run_main
from tests import tiny

STEPS, WARM_UP, PAIRS_A_STEP = 20, 2, 4
# Weights large enough for log-probs that differ from token to token.
SIZE = dict(
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    initializer_range=0.08,
    model_type="mistral",
    max_position_embeddings=1024,
    tie_word_embeddings=False,
)


@pytest.fixture(scope="module")
def start(tmp_path_factory, data):
    """(folder, rows): a small random Mistral, and real pairs for STEPS steps."""
    folder = tmp_path_factory.mktemp("trl")
    tiny.write_checkpoint(folder / "model", **SIZE)
    lines = (data / "preferences" / "ultrafeedback_1000.jsonl").read_text().splitlines()
    rows = []
    for i, line in enumerate(lines):
        row = json.loads(line)
        prompt, chosen, rejected = (row[k] for k in ("prompt", "chosen", "rejected"))
        if chosen != rejected and chosen.strip() and rejected.strip():
            user = {"role": "user", "content": prompt}
            sides = {
                side: [user, {"role": "assistant", "content": row[side]}]
                for side in ("chosen", "rejected")
            }
            rows.append({"prompt_id": str(i), "prompt": prompt} | sides)
    # The shortest: this tokenizer makes a token of nearly every letter.
    rows.sort(key=lambda row: sum(len(row[k][-1]["content"]) for k in ("chosen", "rejected")))
    rows = rows[: STEPS * PAIRS_A_STEP]
    assert len(rows) == STEPS * PAIRS_A_STEP
    convert.main(convert.ToHf(str(folder / "model"), str(folder / "hf"), dtype="float32"))
    return folder, rows


def ours(folder, pairs, out, *more):
    argv = ["--checkpoint", f"{folder}/model", "--pairs", pairs]
    argv += [
        "--out",
        str(out),
        "--learning-rate",
        "1e-4",
        "--batch-size",
        str(PAIRS_A_STEP),
        "--micro-batch-size",
        "4",
        "--mesh",
        "1",
        "1",
        "-1",
        *more,
    ]
    assert run_main(dpo.main, dpo.Args, argv) == 0
    return [r for r in tiny.read_jsonl(f"{out}.log/metrics.jsonl") if "loss" in r]


def theirs(folder, examples, **changes):
    """(TRL's rows of metrics, the model it trained)."""
    from scripts.bench import trl_trainer

    order = epoch_order(0, 0, len(examples))
    rows = [
        {f"{name}_ids": getattr(e, name).tolist() for name in ("prompt", "chosen", "rejected")}
        for e in (examples[i] for i in order)
    ]
    settings = {"learning_rate": 1e-4, "warmup_steps": WARM_UP} | changes
    trainer = trl_trainer.make(f"{folder}/hf", rows, PAIRS_A_STEP, **settings)
    trainer.train()
    return trainer.metrics(), trainer.model


def flat(model) -> np.ndarray:
    return np.concatenate([p.detach().numpy().ravel() for p in model.parameters()])


@pytest.mark.parametrize(
    "steps,flags,changes",
    [
        pytest.param(5, (), {}, id="sigmoid, a few"),
        pytest.param(STEPS, (), {}, id="sigmoid", marks=pytest.mark.heavy),
        pytest.param(
            STEPS,
            ("--loss", "ipo", "--beta", "0.5"),
            {"loss_type": ["ipo"], "beta": 0.5},
            id="ipo",
            marks=pytest.mark.heavy,
        ),
        pytest.param(
            STEPS,
            ("--loss", "robust", "--label-smoothing", "0.1"),
            {"loss_type": ["robust"], "label_smoothing": 0.1},
            id="robust",
            marks=pytest.mark.heavy,
        ),
    ],
)
def test_steps_are_trls_steps(start, tmp_path, steps, flags, changes):
    folder, rows = start
    pairs = tiny.write_jsonl(tmp_path / "pairs.jsonl", rows[: steps * PAIRS_A_STEP])
    tokenizer = ChatTokenizer.from_folder(str(folder / "model"), (2,))
    examples, _ = read_pairs(pairs, tokenizer, tiny.VOCABULARY, 1024, 512, [])
    found = ours(folder, pairs, tmp_path / "out", "--warmup-ratio", str(WARM_UP / steps), *flags)
    expected, model = theirs(folder, examples, **changes)
    assert len(found) == len(expected) == steps
    tolerances = {"loss": 1e-5, "logps/chosen": 1e-3, "logps/rejected": 1e-3}
    tolerances |= {f"rewards/{n}": 1e-4 for n in ("chosen", "rejected", "margins", "accuracies")}
    furthest = dict.fromkeys(tolerances, 0.0)
    for a, b in zip(found, expected):
        for name, tolerance in tolerances.items():
            if name == "rewards/accuracies" and a["step"] <= WARM_UP:
                continue  # warm-up begins at 0: margins are rounding, and so are their signs
            furthest[name] = max(furthest[name], abs(a[name] - b[name]))
            scale = max(1.0, abs(b[name])) if name == "loss" and "ipo" in flags else 1.0
            assert abs(a[name] - b[name]) < tolerance * scale, (name, a["step"])
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
        assert a["learning_rate"] == pytest.approx(b["learning_rate"], rel=1e-5, abs=1e-12)

    hf = str(tmp_path / "hf")
    convert.main(convert.ToHf(str(tmp_path / "out"), hf, dtype="float32"))
    begin, ours_end = (
        flat(transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32))
        for path in (folder / "hf", hf)
    )
    update = flat(model) - begin
    apart = np.linalg.norm(ours_end - flat(model)) / np.linalg.norm(update)
    said = ", ".join(f"{name} {value:.1e}" for name, value in furthest.items())
    print(f"{changes.get('loss_type', ['sigmoid'])[0]}: furthest {said}; update {apart:.1e}")
    assert apart < 1e-3
    assert np.ptp([row["loss"] for row in found]) > 1e-3  # it moved
    assert checkpoint.identity(str(tmp_path / "out")) != checkpoint.identity(f"{folder}/model")
