"""Which texts count as the same words, whatever their script."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from stages.evaluate import overlap
from tests import tiny
from tests.stages.test_evaluate import error_line, run

ROOT = Path(__file__).parents[2]


def reports(tmp_path, train: list[str], benchmark: list[str], *flags) -> dict:
    files = [tmp_path / "train.jsonl", tmp_path / "benchmark.jsonl"]
    for file, texts in zip(files, (train, benchmark)):
        file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    out = tmp_path / "o.json"
    argv = ("--train", files[0], "--benchmarks", files[1], "--out", out, "--overwrite", *flags)
    assert run("overlap", *argv) == 0
    (report,) = json.loads(out.read_text())["reports"]
    return report


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("दिन", "दान"),  # vowel signs: Mc
        ("দিন", "দান"),
        ("தமிழ்", "தமழ்"),  # Mn
        ("กิน", "กัน"),
        ("ខ្មែរ", "ខមែរ"),
        ("كِتاب", "كُتاب"),
        ("か", "が"),
        ("resume", "résumé"),
        ("C++", "C#"),
        ("C++", "C"),
        ("F#", "F"),
        ("A+", "A"),
        ("What is 7 + 3?", "What is 7 - 3?"),
        ("What is 7 * 3?", "What is 7 / 3?"),
        ("What is 7*3?", "What is 7-3?"),
        ("What is -5 + 2?", "What is 5 + 2?"),
        ("x < y", "x > y"),
        ("x^2", "x2"),
        ("50%", "50"),
        ("$100", "€100"),
        ("???", "!!!"),
        ("???", "?"),
        (":)", ":("),
        ("...", "—"),
        ("😀", "😂"),
        ("🇩🇪", "🇫🇷"),
        ("👍🏻", "👍🏿"),
        ("今天天气", "明天天气"),
        ("東京", "京東"),
        ("\U0001fadc", "\U0001fae9"),  # newer than this Python, perhaps
        ("\ud83d", "\ud83e"),
        ("What is 2³?", "What is 23?"),
        ("2⁵", "25"),
        ("x²", "x2"),
        ("10⁻³", "10³"),
        ("1½", "11/2"),
        ("log₂8", "log28"),
        ("Solve x-3=0", "Solve x/3=0"),
        ("2x-y=0", "2x y=0"),
        ("(a+b)-c", "(a+b) c"),
        ("1e-5", "1e5"),
        ("x*3", "x/3"),
        ("Simplify x*y", "Simplify x/y"),
        ("f(x)*g(y)*h", "f(x) g(y) h"),
        ("x**2 + y**2", "x 2 + y 2"),
        ("5 km/h", "5 km h"),
        ("Explain A*", "Explain A"),
        ("5!", "5"),
        ("n!", "n"),
        ("a != b", "a = b"),
        ("a && b", "a b"),
        ("R&D", "R D"),
        (
            "🏴\U000e0067\U000e0062\U000e0065\U000e007f",
            "🏴\U000e0067\U000e0062\U000e0073\U000e007f",
        ),
        ("1:2", "1.2"),
        ("1.2", "1 2"),
        ("@x", "x"),
        ("§ 5", "5"),
    ],
)
def test_other_prompts_are_not_word_for_word_the_same(tmp_path, one, other):
    assert overlap.ngrams(one, 8).isdisjoint(overlap.ngrams(other, 8))
    within = [overlap.ngrams(f"Tell me all of {text} now", 3) for text in (one, other)]
    # Punctuation counts where there is nothing else.
    assert (within[0] == within[1]) == (one in ("???", ":)", "..."))
    report = reports(tmp_path, [one], [other])
    assert (report["identical"], report["touched"]) == (0, 0)
    assert reports(tmp_path, [other, one], [one])["identical"] == 1


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Ｗhat's UP, there?", "what s up there"),
        ("ÉTÉ", "e\u0301te\u0301"),
        ("Straße", "STRASSE"),
        ("GPT-4 and COVID-19", "gpt 4 and covid 19"),
        ("**Hello**, `world`!", "hello world"),
        ("snake_case", "snake case"),
        ("ｶﾞｷﾞ", "ガギ"),
        ("你好，世界！", "你好 世界"),
        ("１２３", "123"),
        ("soft\u00adhyphen\u200b", "softhyphen"),
        ("I ❤️ it", "i ❤ it"),
        ("7 × 3", "7 * 3"),
        ("ΣΊΣΥΦΟΣ", "σίσυφος"),
        (" ??? ", "???"),
        ("J\u030c", "\u01f0"),
        ("x²", "x^2"),
        ("½ of it", "1/2 of it"),
        ("7 – 3", "7 − 3"),
        ("e-mail and/or T-shirt", "e mail and or t shirt"),
        ("he / she", "he/she"),
        ("Tell me *all* of **it all**, ***now***!", "tell me all of it all now"),
        ("* one\n* two\n\n***\n", "one two"),
        ("请**重点**说明", "请重点说明"),
        ("Hi! So: a 3-day trip (really)!", "hi so a 3 day trip really"),
        ("好!", "好"),
        ("H₂O", "H2O"),
    ],
)
def test_case_width_and_punctuation_do_not_count(tmp_path, one, other):
    assert overlap.ngrams(one, 8) == overlap.ngrams(other, 8)
    assert reports(tmp_path, [one], [other])["identical"] == 1


@pytest.mark.parametrize(
    "text",
    [
        "请介绍一下北京的历史和文化",
        "日本の首都はどこですか教えてください",
        "ประเทศไทยมีเมืองหลวงชื่ออะไร",
        "តើរាជធានីនៃប្រទេសកម្ពុជាឈ្មោះអ្វី",
        "မြန်မာနိုင်ငံ၏မြို့တော်",
        "ນະຄອນຫຼວງຂອງປະເທດລາວແມ່ນຫຍັງ",
        "대한민국의 수도는 어디이고 인구는 몇 명이며 역사는 어떻게 되나요",
        "भारत की राजधानी क्या है और वहाँ कितने लोग रहते हैं",
        "What is the capital of France and how many people live there",
    ],
)
def test_a_prompt_repeated_within_a_longer_one_is_counted_in_every_script(tmp_path, text):
    report = reports(tmp_path, [f"Hi! {text}。谢谢", "Other"], [text])
    assert (report["identical"], report["contaminated"], report["mean_share"]) == (0, 1, 1.0)
    assert reports(tmp_path, [text, "Other"], [text])["identical"] == 1
    assert reports(tmp_path, [text[: len(text) // 2]], [text])["identical"] == 0


def test_a_short_prompt_is_met_by_the_same_whole_prompt_alone(tmp_path):
    assert reports(tmp_path, ["你好世界，你好"], ["你好"])["touched"] == 0
    assert reports(tmp_path, ["C++ is a language"], ["C++"])["touched"] == 0
    assert reports(tmp_path, ["你好！"], ["你好"])["identical"] == 1


def test_the_nearest_prompt_does_not_depend_on_the_seed_of_hashes(tmp_path):
    words = "a b c d e f g h i j k l m n o p".split()
    texts = [" ".join(words[i : i + 9]) for i in range(8)]
    tiny.write_jsonl(tmp_path / "t.jsonl", [{"prompt": text} for text in reversed(texts)])
    tiny.write_jsonl(tmp_path / "b.jsonl", [{"prompt": " ".join(words)}])
    contents = set()
    for seed in "123":
        argv = "-m stages.evaluate overlap --train t.jsonl --benchmarks b.jsonl --overwrite --out"
        command = [sys.executable, *argv.split(), f"o{seed}.json"]
        environ = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
        subprocess.run(command, cwd=tmp_path, env=environ, check=True, capture_output=True)
        contents.add((tmp_path / f"o{seed}.json").read_text())
    assert len(contents) == 1


def test_a_result_by_other_rules_is_not_taken_for_this_one(tmp_path, capsys, monkeypatch):
    reports(tmp_path, ["one"], ["two"])
    monkeypatch.setattr(overlap, "NORMALISATION", "as before")
    files = ("--train", tmp_path / "train.jsonl", "--benchmarks", tmp_path / "benchmark.jsonl")
    assert run("overlap", *files, "--out", tmp_path / "o.json") == 2
    assert "arguments.normalisation" in error_line(capsys)
