"""stages.sample through its command line: resuming, slices, and the caller's mistakes."""

import json
import os
import signal

import pytest

from scripts import convert
from stages import sample
from stages.files.output import Output, read_manifest
from stages.files.run import run_main
from stages.sample import parse_bytes
from tests import tiny
from tests.stages.chain import refused, run_sample


def test_sampling_that_was_stopped_goes_on_and_ends_with_the_same_answers(
    base, tmp_path, monkeypatch, capsys
):
    write = Output.write

    def stopping(self, row):
        write(self, row)
        if len(self) == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Output, "write", stopping)
    assert run_sample(base, out=tmp_path / "s.jsonl") == 75
    assert not (tmp_path / "s.jsonl").exists()
    monkeypatch.undo()
    assert run_sample(base, out=tmp_path / "s.jsonl") == 0
    assert "going on after" in capsys.readouterr().out
    for a, b in zip(
        tiny.read_jsonl(tmp_path / "s.jsonl"), tiny.read_jsonl(base / "samples.jsonl"), strict=True
    ):
        for x, y in zip(a["responses"], b["responses"], strict=True):
            assert x == y  # log-probs too, bit by bit


def test_a_checkpoint_folder_that_is_incomplete_is_refused(base, tmp_path, capsys):
    refused(capsys, run_sample(base, model="nowhere"), "nowhere", "does not exist")
    broken = tmp_path / "broken"
    tiny.write_checkpoint(broken)
    (broken / "tokenizer_config.json").unlink()
    refused(capsys, run_sample(base, model=broken), "broken", "tokenizer_config.json is missing")
    (broken / "tokenizer_config.json").write_text("{}")
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"rope_scaling": {"type": "yarn"}}))
    refused(capsys, run_sample(base, model=broken), "rope_scaling")


def test_a_prompt_longer_than_the_context_is_set_aside_and_counted(base, tmp_path):
    rows = [*tiny.PROMPTS[:2], {"prompt": "x" * 400}]
    tiny.write_jsonl(tmp_path / "p.jsonl", rows)
    assert run_sample(base, prompts=tmp_path / "p.jsonl", out=tmp_path / "s.jsonl") == 0
    counts = read_manifest(str(tmp_path / "s.jsonl")).counts
    assert counts == {"in": 3, "out": 2, "set aside: prompt longer than 244 tokens": 1}
    (aside,) = tiny.read_jsonl(tmp_path / "s.jsonl.set_aside.jsonl")
    assert aside["reason"] == "prompt longer than 244 tokens"


@pytest.fixture(scope="module")
def sliced(base, tmp_path_factory):
    """A folder with samples of three slices, 0.jsonl to 2.jsonl, and of all prompts, whole.jsonl.
    One prompt is too long, one stands twice."""
    folder = tmp_path_factory.mktemp("sliced")
    rows = [*tiny.PROMPTS[:5], {"prompt": "x" * 400}, tiny.PROMPTS[0], tiny.PROMPTS[6]]
    prompts = tiny.write_jsonl(folder / "p.jsonl", rows)
    assert run_sample(base, prompts=prompts, out=folder / "whole.jsonl") == 0
    for i in (2, 0, 1):
        out = folder / f"{i}.jsonl"
        assert run_sample(base, "--slice", f"{i}/3", prompts=prompts, out=out) == 0
    return folder


def join(*paths) -> int:
    return run_main(convert.main, convert.Command, ["join", *map(str, paths)])


def test_slices_that_are_joined_are_the_file_of_one_run(sliced, tmp_path, capsys):
    out, parts = tmp_path / "s.jsonl", [sliced / f"{i}.jsonl" for i in range(3)]
    assert [len(tiny.read_jsonl(part)) for part in parts] == [3, 2, 1]
    assert read_manifest(str(parts[0])).arguments["slice"] == "0/3"
    assert join(out, *parts[::-1]) == 0
    for end in ("", ".set_aside.jsonl"):
        joined, whole = (tiny.read_jsonl(f"{p}{end}") for p in (out, sliced / "whole.jsonl"))
        for one, other in zip(joined, whole, strict=True):
            for a, b in zip(one.pop("responses", []), other.pop("responses", []), strict=True):
                assert a.pop("logprob") == pytest.approx(b.pop("logprob"), abs=1e-4)
                assert a == b
            assert one == other
    ours, theirs = read_manifest(str(out)), read_manifest(str(sliced / "whole.jsonl"))
    assert ours.key() == theirs.key() and ours.inputs == theirs.inputs
    assert ours.counts == theirs.counts and (ours.counts["in"], ours.counts["out"]) == (8, 6)
    assert ours.results.keys() == theirs.results.keys()
    assert ours.results["last_sitting"]["tokens"] == theirs.results["last_sitting"]["tokens"]
    assert not list(tmp_path.glob("*partial*"))
    capsys.readouterr()
    assert join(out, *parts) == 0
    assert "finished already" in capsys.readouterr().out


@pytest.mark.parametrize(
    "parts,word",
    [
        (("0", "1"), "all 3 slices"),
        (("0", "1", "1"), "twice"),
        (("0", "1", "gone"), "gone.jsonl"),
        (("0", "1", "whole"), "no slice"),
        (("0", "1", "half"), "not finished"),
        (("0", "1", "edited"), "changed"),
        (("0", "1", "other"), "seed 1"),
        (("0", "1", "4th"), "slice 2/4"),
        (("0", "1", "9th"), "9th.jsonl.manifest.json was edited"),
        (("0", "1", "nth"), "nth.jsonl.manifest.json was edited"),
        ((), "PART"),
    ],
)
def test_what_makes_no_whole_is_not_joined(base, sliced, tmp_path, capsys, parts, word):
    def change(name, **manifest):
        file = sliced / "2.jsonl.manifest.json"
        (tmp_path / f"{name}.jsonl").write_bytes((sliced / "2.jsonl").read_bytes())
        content = json.loads(file.read_text())
        content["arguments"] |= manifest
        (tmp_path / f"{name}.jsonl.manifest.json").write_text(json.dumps(content))
        return tmp_path / f"{name}.jsonl"

    with change("edited").open("a") as file:
        file.write("{}\n")
    change("other", seed=1), change("4th", slice="2/4")
    change("9th", slice="9/3"), change("nth", slice="x/3")
    change("half").rename(tmp_path / "half.jsonl.partial")
    folders = [
        tmp_path if (tmp_path / f"{p}.jsonl.manifest.json").exists() else sliced for p in parts
    ]
    paths = [folder / f"{part}.jsonl" for folder, part in zip(folders, parts)]
    refused(capsys, join(tmp_path / "s.jsonl", *paths), word)
    assert not (tmp_path / "s.jsonl").exists()
    taken = tmp_path / "taken.jsonl"
    taken.write_text("mine")
    refused(capsys, join(taken, *(sliced / f"{i}.jsonl" for i in range(3))), "taken.jsonl")
    assert taken.read_text() == "mine"


@pytest.mark.parametrize(
    "old,new",
    [
        ("xxx", "yyy"),
        ("244 tokens", "12 tokens"),
        ('{"row"', '{"line"'),
        ("}\n", "}\n\n"),
        ("prompt_id", "prompt-id"),
        ('"reason"', '"why"'),
    ],
)
def test_rows_set_aside_that_were_edited_are_not_joined(sliced, tmp_path, capsys, old, new):
    for file in sliced.glob("?.jsonl*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (aside,) = tmp_path.glob("*.set_aside.jsonl")
    aside.write_text(aside.read_text().replace(old, new))
    code = join(tmp_path / "s.jsonl", *(tmp_path / f"{i}.jsonl" for i in range(3)))
    refused(capsys, code, aside.name, "has changed since it was written")
    assert not (tmp_path / "s.jsonl").exists()


def test_the_cache_memory_decides_the_slots(base, tmp_path, capsys):
    # A slot: 2 layers × keys and values × 2 heads × 8 × positions × 4 bytes.
    positions = 12 + max(
        len(r["prompt_token_ids"]) for r in tiny.read_jsonl(base / "samples.jsonl")
    )
    positions = -(-positions // 16) * 16  # as the engine rounds them
    # Two heads are not cut over four devices: each device holds both.
    memory = 4 * 5 * 2 * 2 * 2 * 8 * positions * 4 + 100
    argv = ["--checkpoint", str(base / "model"), "--prompts", str(base / "prompts.jsonl")]
    argv += ["--n", "3", "--max-new-tokens", "12", "--mesh", "1", "1", "-1", "--out"]
    more = [f"{tmp_path}/s.jsonl", "--cache-memory", f"{memory}"]
    assert run_main(sample.main, sample.Args, argv + more) == 0
    last = read_manifest(str(tmp_path / "s.jsonl")).results["last_sitting"]
    assert last["slots"] == 5
    argv += [f"{tmp_path}/t.jsonl", "--cache-memory", "1000"]
    code = run_main(sample.main, sample.Args, argv)
    refused(capsys, code, "raise --cache-memory")


def test_slots_must_fit_in_the_memory_at_the_longest_prompt_that_the_flag_allows(
    base, tmp_path, monkeypatch, capsys
):
    lengths = sorted(len(r["prompt_token_ids"]) for r in tiny.read_jsonl(base / "samples.jsonl"))
    limit, flags = lengths[3], ("--mesh", "1", "1", "-1")
    positions = -(-(limit + 12) // 16) * 16
    free = 4 * 4 * 2 * 2 * 2 * 8 * positions * 4  # four slots, on each of four devices
    monkeypatch.setattr("sharding.chips.free_memory", lambda mesh: free)
    refused(capsys, run_sample(base, *flags, out=tmp_path / "s.jsonl"), "are free: lower --slots")
    flags += "--max-prompt-length", f"{limit}"
    assert run_sample(base, *flags, out=tmp_path / "t.jsonl") == 0
    manifest = read_manifest(str(tmp_path / "t.jsonl"))
    aside = f"set aside: prompt longer than {limit} tokens"
    assert manifest.counts == {"in": 7, "out": 4, aside: 3}
    assert manifest.arguments["max_prompt_length"] == limit


def test_a_file_of_the_checkpoint_is_never_written_over(base, capsys):
    before = (base / "model" / "manifest.json").read_bytes()
    code = run_sample(base, "--overwrite", out="model/manifest.json")
    refused(capsys, code, "a part of the input", "--checkpoint")
    assert (base / "model" / "manifest.json").read_bytes() == before


def test_a_checkpoint_of_another_scheme_is_refused_by_name(base, tmp_path, capsys):
    for model in ("s3://bucket/model", "file:///model"):
        argv = ["--checkpoint", model, "--prompts", str(base / "prompts.jsonl")]
        code = run_main(sample.main, sample.Args, [*argv, "--out", str(tmp_path / "s.jsonl")])
        refused(capsys, code, model, "is not supported")


@pytest.mark.parametrize("text,size", [("8GiB", 8 << 30), ("1.5 MB", 1_500_000), ("77", 77)])
def test_sizes_are_read_with_their_units(text, size):
    assert parse_bytes(text, "--cache-memory") == size


@pytest.mark.parametrize(
    "flags,word",
    [
        (["--n", "0"], "n is 0"),
        (["--top-p", "2"], "top_p"),
        (["--max-new-tokens", "999"], "room"),
        (["--slots", "0"], "slots"),
        (["--mesh", "3", "1", "1"], "mesh"),
        (["--cache-memory", "1GiB"], "both set the number of slots"),
        (["--slice", "3/3"], "--slice"),
        (["--slice", "1"], "--slice"),
        (["--min-p", "1"], "min_p"),
    ],
)
def test_sampling_settings_that_make_no_sense_are_refused(base, tmp_path, capsys, flags, word):
    refused(capsys, run_sample(base, *flags, out=tmp_path / "s.jsonl"), word)
