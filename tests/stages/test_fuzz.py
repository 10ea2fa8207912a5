"""Damaged files between the stages: each is read as it is or refused in one line; nothing is lost,
changed or waited for in silence. FUZZ_CASES says how many (tests/fuzzing.py)."""

import json
import math
import tempfile
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.tokenizer import ChatTokenizer
from scripts import convert
from sharding.errors import UserError
from stages import pairs, rank
from stages.evaluate import compare, kl, overlap, score
from stages.files import benchmarks, formats, rows
from stages.files.examples import read_pairs
from stages.files.output import read_manifest
from tests import tiny
from tests.fuzzing import cases, changed, damaged
from tests.stages.test_rows import talk

REWARD = "def reward(p, rs, finish_reasons): return [float(len(r)) for r in rs]\n"
RESPONSES = [
    {
        "text": "one",
        "token_ids": [5, 6],
        "end_token_id": 2,
        "logprob": -1.5,
        "finish_reason": "stop",
    },
    {"text": "a second", "token_ids": [7], "logprob": -3, "finish_reason": "length"},
    {"text": "", "token_ids": [], "end_token_id": None, "finish_reason": None},
]
PROMPTS = [
    {"prompt": "Why? é 😀", "prompt_id": "x", "topic": {"a": [1, None, 2.5]}},
    {"messages": talk("hi", "hello", "Why?", system="s")},
    {"prompt": "How?", "dataset": "d"},
]
SAMPLES = [row | {"prompt_token_ids": [3, 4], "responses": RESPONSES} for row in PROMPTS]
MATRIX = [[0, 1.5, None], [-1.0, 0, 2], [None, 3, 0]]
RANKED = [row | {"scores": [1, 2.5, -1], "comparisons": MATRIX} for row in SAMPLES]
PAIRS = [
    {
        "prompt_id": f"p{i}",
        "prompt": "hi",
        "chosen": talk("hi", "a"),
        "rejected": talk("hi", f"b{i}"),
        "all_generated_responses": ["a", f"b{i}"],
        "all_rm_scores": [2.0, 1],
        "chosen_index": 0,
        "rejected_index": 1,
        "comparisons": [[0, 1.5], [-1, 0]],
        "prompt_token_ids": [3, 4],
        "chosen_token_ids": [5, 6],
        "chosen_finish_reason": "stop",
        "chosen_end_token_id": 2,
    }
    for i in range(3)
]
KEYS = ("prompt_id", "prompt", "messages", "responses", "scores", "chosen", "rejected", "turns")
LISTS = {
    "model outputs": [
        {"instruction": "Why?", "output": "So.", "generator": "m", "dataset": "d"},
        {"instruction": "Add.", "input": "1 2", "output": "3", "finish_reason": "length"},
        {"instruction": "How?", "output": "Thus."},
    ],
    "alpaca": [{"instruction": "Why?", "dataset": "d"}, {"instruction": "How?", "input": "x"}],
}
LINES = {
    "mt bench": [
        {"question_id": 81, "category": "writing", "turns": ["First?", "Second?"]},
        {"question_id": "82", "turns": ["Only?"]},
        {"turns": ["Without an id?"]},
    ],
    "prompts": PROMPTS,
    "samples": SAMPLES,
}
ANNOTATIONS = [
    {
        "instruction": f"i{i}",
        "output_1": "aa" * (i % 5),
        "generator_1": "r",
        "output_2": "b" * i,
        "generator_2": "m",
        "preference": 1 + (i % 7) / 7,
    }
    for i in range(24)
]


@contextmanager
def folder():
    with tempfile.TemporaryDirectory() as path:
        (Path(path) / "reward.py").write_text(REWARD)
        yield Path(path)


@contextmanager
def written(data):
    """(a file of this content, one to write beside it)."""
    with folder() as place:
        (place / "in.jsonl").write_bytes(data)
        yield place / "in.jsonl", place / "out.jsonl"


def ends(command, *args) -> bool:
    """Whether it does its work; else it refuses in one line, and every other exception is a bug."""
    try:
        command(*args)
    except UserError as error:
        line = str(error)
        assert len(line.splitlines()) == 1 and 10 < len(line) < 2500, line
        return False
    return True


@st.composite
def jsonl(draw, content: list[dict]) -> bytes:
    """The rows as lines, some of them changed, the bytes damaged, or both."""
    lines = []
    for row in content:
        row = draw(changed(row, KEYS)) if draw(st.integers(0, 2)) else row
        text = json.dumps(row, ensure_ascii=draw(st.booleans()))
        lines.append(text.encode("utf-8", draw(st.sampled_from(["surrogatepass", "replace"]))))
    for _ in range(draw(st.integers(0, 1))):
        lines.insert(draw(st.integers(0, 3)), draw(st.sampled_from([b"", b" \r", b"{}", lines[0]])))
    data = draw(st.sampled_from([b"\n", b"\r\n"])).join(lines) + draw(st.sampled_from([b"\n", b""]))
    return draw(damaged(data)) if draw(st.integers(0, 3)) == 0 else data


@st.composite
def json_list(draw, content: list[dict]) -> bytes:
    value = draw(changed(content, KEYS)) if draw(st.integers(0, 3)) else content
    data = json.dumps(value, ensure_ascii=draw(st.booleans())).encode("utf-8", "replace")
    return draw(damaged(data)) if draw(st.integers(0, 3)) == 0 else data


def lines_of(data: bytes) -> list[dict]:
    texts = [line.decode() for line in data.removeprefix(b"\xef\xbb\xbf").split(b"\n")]
    return [json.loads(text) for text in texts if text.strip()]


def check_read(path: Path, kind: type[rows.Prompt]) -> bool:
    """Reads a file of rows: each line is a row, with the fields of the line."""
    read = []
    if not ends(lambda: read.append(rows.read(str(path), kind))):
        return False
    file, written = read[0], lines_of(path.read_bytes())
    assert file.counts["in"] == len(written) == len(file) + file.counts[rows.MERGED]
    kept = [row.fields for row in file]
    for fields in kept:
        assert rows.decode_line(rows.json_line(fields), "again") == fields
        mine = [row for row in written if row | {"prompt_id": fields["prompt_id"]} == fields]
        assert mine
    return True


def check_written(path: Path, out: Path, carried: set[str]) -> None:
    """Each row in is a row out, set aside, or merged; and `carried` fields are as they were."""
    counts = read_manifest(str(out)).counts
    aside = Path(f"{out}.set_aside.jsonl")
    left_out = [entry["row"] for entry in lines_of(aside.read_bytes())] if aside.exists() else []
    made, given = lines_of(out.read_bytes()), lines_of(path.read_bytes())
    merged = sum(n for name, n in counts.items() if name.startswith("merged"))
    assert len(made) + len(left_out) + merged == len(given) == counts["in"]
    for row in (*made, *left_out):
        same = [
            g for g in given if all(row.get(name) == g.get(name) for name in carried & g.keys())
        ]
        assert same, row


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    tiny.write_tokenizer(path)
    return ChatTokenizer.from_folder(str(path), (2,))


# ------------------------------------------------------------------------------- JSONL rows


@cases(40)
@given(data=jsonl(PROMPTS))
def test_fuzz_prompts(tokenizer, data):
    with written(data) as (path, out):
        if check_read(path, rows.Prompt):
            for row in rows.read(str(path), rows.Prompt):
                ends(tokenizer.prompt_ids, row.messages)
            if ends(convert.main, convert.Prompts(str(path), str(out))):
                check_written(path, out, {"prompt", "messages", "topic", "dataset"})


@cases(40)
@given(data=jsonl(SAMPLES))
def test_fuzz_samples(tokenizer, data):
    with written(data) as (path, out):
        if check_read(path, rows.Sample):
            for row in rows.read(str(path), rows.Sample):
                ends(kl._tokens_of, row, tokenizer, tiny.config())
        if ends(rank.main, rank.Args(f"{path.parent}/reward.py:reward", str(path), str(out))):
            check_written(path, out, {"prompt", "messages", "topic", "responses"})
            assert check_read(out, rows.Ranked)


@cases(40)
@given(data=jsonl(RANKED), penalty=st.sampled_from([0.0, 0.5]))
def test_fuzz_ranked(data, penalty):
    with written(data) as (path, out):
        check_read(path, rows.Ranked)
        if ends(pairs.main, pairs.Args(str(path), str(out), length_penalty=penalty)):
            check_written(path, out, {"topic", "comparisons", "prompt_token_ids"})
            assert not out.read_bytes() or check_read(out, rows.Pair)


@cases(40)
@given(data=jsonl(PAIRS))
def test_fuzz_pairs(tokenizer, data):
    with written(data) as (path, _):
        check_read(path, rows.Pair)
        made, aside = [], []

        def read():
            made.append(read_pairs(str(path), tokenizer, tiny.VOCABULARY, 64, 32, aside))

        if ends(read):
            examples, file = made[0]
            assert len(examples) + len(aside) == len(file)
            for example in examples:
                assert example.win_probability is None or 0 <= example.win_probability <= 1
        if ends(formats.write_split, str(path), str(path.parent / "hub"), "train"):
            (parquet,) = (path.parent / "hub/data").glob("*.parquet")
            assert pq.read_metadata(parquet).num_rows == len(lines_of(data))


# ------------------------------------------------------------- benchmark files, annotations


@cases(60)
@given(
    data=st.one_of(
        *(json_list(content) for content in LISTS.values()),
        *(jsonl(content) for content in LINES.values()),
    )
)
def test_fuzz_benchmarks(data):
    with folder() as place:
        path, good = place / "in.json", place / "good.json"
        path.write_bytes(data)
        good.write_text(json.dumps(LISTS["model outputs"]))
        asked, counts = [], Counter()
        if ends(lambda: asked.extend(benchmarks.read_instructions(str(path), counts))):
            assert counts["in"] == len(asked) == counts["out"]
            assert len({row["prompt_id"] for row in asked}) == len(asked)
            for row, (at, source) in zip(asked, benchmarks.rows_of(str(path))):
                if not {"messages", "turns"} <= source.keys() and "prompt" in row:
                    assert row["prompt"] in benchmarks.asked_texts(source, at)
        args = overlap.Overlap((str(good),), str(place / "overlap.json"), (str(path),))
        if ends(overlap.main, args):
            (report,) = json.loads((place / "overlap.json").read_text())["reports"]
            assert 0 <= report["mean_share"] <= 1 and report["prompts"] >= report["touched"]
        ranker, out = f"{place}/reward.py:reward", str(place / "compare.json")
        args = compare.Compare(str(path), str(good), ranker, out, common_only=True)
        if ends(compare.main, args):
            content = json.loads(Path(out).read_text())
            assert content["wins"] + content["ties"] + content["losses"] == len(
                content["per_instruction"]
            )


@cases(40)
@given(data=json_list(ANNOTATIONS))
def test_fuzz_annotations(data):
    with folder() as place:
        path, out = place / "in.json", place / "out.json"
        path.write_bytes(data)
        if ends(score.main, score.Score(str(path), str(out))):
            content, given_rows = json.loads(out.read_text()), json.loads(data)
            preferences = [row.get("preference") for row in given_rows]
            judged = [1.5 if p == 0 else p for p in preferences if p is not None and p == p]
            assert content["n_total"] == len(judged)
            wanted = 100 * (sum(judged) / len(judged) - 1)
            assert math.isclose(content["win_rate"], wanted, abs_tol=1e-9)


# ------------------------------------------------------------------------ preference datasets

PUBLISHED = [{name: row[name] for name in formats.KINDS} for row in PAIRS]


@st.composite
def shards(draw) -> list[tuple[str, bytes]]:
    """The files of a dataset: Parquet where Arrow holds the rows, or JSONL."""
    files = []
    for n in range(draw(st.integers(1, 2))):
        data = draw(jsonl(PUBLISHED))
        if draw(st.booleans()):
            try:
                table = pa.Table.from_pylist(lines_of(data))
                sink = pa.BufferOutputStream()
                pq.write_table(table, sink)
                data = sink.getvalue().to_pybytes()
                data = draw(damaged(data)) if draw(st.integers(0, 4)) == 0 else data
                files.append((f"train-{n:05d}-of-00002.parquet", data))
                continue
            except (pa.ArrowException, ValueError, TypeError, AttributeError, OverflowError):
                pass
        files.append((f"train-{n:05d}-of-00002.jsonl", data))
    return files


@cases(15)
@given(files=shards())
def test_fuzz_preference_datasets(files):
    with folder() as place:
        (place / "set/data").mkdir(parents=True)
        for name, data in files:
            (place / "set/data" / name).write_bytes(data)
        out, prompts = place / "out.jsonl", place / "prompts.jsonl"
        if ends(convert.main, convert.FromParquet(str(place / "set"), str(out))):
            counts = read_manifest(str(out)).counts
            lines = lines_of(out.read_bytes())
            assert counts["out"] == len(lines)
            assert not lines or check_read(out, rows.Pair)  # the next stage takes them all
            assert all(row.unusable is None for row in rows.read(str(out), rows.Pair))
        if ends(convert.main, convert.Prompts(str(place / "set"), str(prompts))):
            assert not prompts.read_bytes() or check_read(prompts, rows.Prompt)
