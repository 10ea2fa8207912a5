"""The files between the stages, tried with a small stage that copies its prompts in upper case."""

import dataclasses
import gzip
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from stages.files import rows
from stages.files.output import Manifest, Output, an_input, read_lineage, read_manifest
from stages.files.paths import file_sha256
from stages.files.run import run_main, stop_signal


@dataclasses.dataclass
class Args:
    prompts: str
    out: str
    suffix: str = ""
    stop_after: int = -1  # die after this many new rows, as a kill would
    overwrite: bool = False


class Killed(Exception):
    pass


def upper(args: Args) -> None:
    """Rows without a letter are set aside; the others are written last first."""
    read_lineage(args.prompts)
    manifest = Manifest(
        stage="upper",
        arguments={"suffix": args.suffix},
        inputs={"prompts": an_input(args.prompts)},
        identities={"model": "abc"},
    )
    prompts = rows.read(args.prompts, rows.Prompt)
    output = Output.open(args.out, manifest, args.overwrite)
    if output.finished:
        return
    new = 0
    with stop_signal() as check_stop:
        for row in reversed([prompt.fields for prompt in prompts]):
            if output.has(row["prompt_id"]):
                continue
            if new == args.stop_after:
                raise Killed
            check_stop()
            if row["prompt"].upper() == row["prompt"].lower():
                output.set_aside(row, "no letters")
            else:
                output.write(row | {"upper": row["prompt"].upper() + args.suffix})
            new += 1
    output.finish(prompts.ids, prompts.counts, {"measured": 1.5})


def run(capsys, prompts: Path, out: Path, *flags: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr)"""
    argv = ["--prompts", str(prompts), "--out", str(out), *flags]
    code = run_main(upper, Args, argv)
    return code, *capsys.readouterr()


def jsonl(path: Path, *rows) -> Path:
    """A file of these lines; a str or bytes is a line as it is."""
    lines = [
        row.encode()
        if isinstance(row, str)
        else row
        if isinstance(row, bytes)
        else json.dumps(row).encode()
        for row in rows
    ]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


ODD = [
    "plain words",
    "half \ud83d a pair",
    "line\u2028separator\u2029and\x85next",
    "emoji 😀 \U0001f1e9\U0001f1ea",
    'quote " backslash \\ nul \x00 \\ud83d',
    "\ufeffa byte order mark",
]


@pytest.fixture
def prompts(tmp_path) -> Path:
    rows = [{"prompt": text, "note": {"kept": [1, None, text]}} for text in ODD]
    return jsonl(
        tmp_path / "prompts.jsonl", *rows, {"prompt": "123"}, "", {"prompt": "plain words"}
    )


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "new" / "out.jsonl"


# ---------------------------------------------------------------------- what is written


def test_every_row_is_written_set_aside_or_merged_and_counted(capsys, prompts, out):
    code, stdout, _ = run(capsys, prompts, out)
    assert code == 0
    assert [row["prompt"] for row in read(out)] == ODD
    assert [row["upper"] for row in read(out)] == [text.upper() for text in ODD]
    assert all(row["note"]["kept"][2] == row["prompt"] for row in read(out))
    aside = read(Path(f"{out}.set_aside.jsonl"))
    assert [(a["row"]["prompt"], a["reason"]) for a in aside] == [("123", "no letters")]
    counts = read_manifest(str(out)).counts
    assert counts == {
        "in": 8,
        "out": 6,
        "merged: the same prompt again": 1,
        "set aside: no letters": 1,
    }
    assert "8 in, 6 out" in stdout and "1 set aside: no letters" in stdout
    assert sorted(p.name for p in out.parent.iterdir()) == [
        "out.jsonl",
        "out.jsonl.manifest.json",
        "out.jsonl.set_aside.jsonl",
    ]


def test_the_manifest_says_what_made_the_file(capsys, prompts, out):
    run(capsys, prompts, out, "--suffix", "!")
    manifest = json.loads(Path(f"{out}.manifest.json").read_text())
    assert manifest["stage"] == "upper"
    assert manifest["arguments"] == {"suffix": "!"}
    assert manifest["inputs"] == {
        "prompts": {"path": str(prompts), "sha256": file_sha256(str(prompts))}
    }
    assert manifest["identities"] == {"model": "abc"}
    files = {"sha256": out, "set_aside_sha256": f"{out}.set_aside.jsonl"}
    hashes = {name: file_sha256(str(path)) for name, path in files.items()}
    assert manifest["results"] == {"measured": 1.5} | hashes


# ---------------------------------------------------------------------- going on


@pytest.mark.parametrize("kill_after", range(8))
@pytest.mark.parametrize("cut", [0, 1, 20])
def test_a_killed_stage_goes_on_to_the_same_bytes(capsys, prompts, out, tmp_path, kill_after, cut):
    run(capsys, prompts, tmp_path / "whole.jsonl")
    with pytest.raises(Killed) if kill_after < 7 else pytest.MonkeyPatch.context():
        run(capsys, prompts, out, "--stop-after", str(kill_after))
    partial = Path(f"{out}.partial")
    if partial.exists() and cut:
        size = max(0, partial.stat().st_size - cut)
        os.truncate(partial, size)
    code, stdout, _ = run(capsys, prompts, out)
    assert code == 0
    assert ("going on after" in stdout) == (kill_after > bool(cut) and kill_after < 7)
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    aside = [Path(f"{path}.set_aside.jsonl") for path in (out, tmp_path / "whole.jsonl")]
    assert aside[0].read_bytes() == aside[1].read_bytes()
    manifests = [read_manifest(str(path)) for path in (out, tmp_path / "whole.jsonl")]
    manifests[0].seconds = manifests[1].seconds
    assert manifests[0] == manifests[1]
    assert not partial.exists()


@pytest.mark.parametrize("garbage", [b"\x00\x00\n", b"{}\n", b"[1]\n", b'{"row": {}}\n', b"\xff\n"])
def test_a_damaged_partial_file_is_mended(capsys, prompts, out, garbage):
    with pytest.raises(Killed):
        run(capsys, prompts, out, "--stop-after", "3")
    with open(f"{out}.partial", "ab") as file:
        file.write(garbage)
    assert run(capsys, prompts, out)[0] == 0
    assert [row["prompt"] for row in read(out)] == ODD


def test_a_partial_file_of_unknown_origin_is_not_used(capsys, prompts, out):
    with pytest.raises(Killed):
        run(capsys, prompts, out, "--stop-after", "3", "--suffix", "?")
    os.remove(f"{out}.partial.manifest.json")
    code, stdout, _ = run(capsys, prompts, out)
    assert code == 0 and "going on" not in stdout
    assert not any(row["upper"].endswith("?") for row in read(out))


def test_a_stage_killed_while_finishing_finishes(capsys, prompts, out, monkeypatch):
    def dies(*_):
        raise Killed

    for name in ("publish", "file_sha256"):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            if name == "file_sha256":  # not the input's, but the finished output's
                patch.setattr(Output, "finish", dies)
            else:
                patch.setattr("stages.files.output." + name, dies)
            run(capsys, prompts, out)
        assert not out.exists()
    assert run(capsys, prompts, out)[0] == 0
    assert len(read(out)) == 6


def test_a_finished_output_is_left_alone(capsys, prompts, out):
    run(capsys, prompts, out)
    before = out.stat().st_mtime_ns
    code, stdout, _ = run(capsys, prompts, out)
    assert code == 0 and f"{out} is finished already: 8 in, 6 out" in stdout
    assert out.stat().st_mtime_ns == before


def test_an_edited_output_is_kept_and_said(capsys, prompts, out):
    run(capsys, prompts, out)
    out.write_bytes(out.read_bytes().replace(b"PLAIN", b"EDITED"))
    code, stdout, _ = run(capsys, prompts, out)
    assert code == 0 and "changed since its manifest was written" in stdout
    assert b"EDITED" in out.read_bytes()
    code, stdout, _ = run(capsys, out, out.with_name("next.jsonl"))
    assert code == 0 and "your own edit" in stdout


@pytest.mark.parametrize("finished", [True, False])
def test_other_arguments_or_inputs_are_refused_until_overwrite(capsys, prompts, out, finished):
    if finished:
        run(capsys, prompts, out)
    else:
        with pytest.raises(Killed):
            run(capsys, prompts, out, "--stop-after", "2")
    code, _, stderr = run(capsys, prompts, out, "--suffix", "?")
    assert code == 2 and 'arguments.suffix "" there, "?" here' in stderr
    with prompts.open("a") as file:
        file.write('{"prompt": "one more"}\n')
    code, _, stderr = run(capsys, prompts, out)
    assert code == 2 and "the input's content differs" in stderr and "--overwrite" in stderr
    code, _, _ = run(capsys, prompts, out, "--suffix", "?", "--overwrite")
    assert code == 0
    assert [row["upper"] for row in read(out)] == [f"{t.upper()}?" for t in [*ODD, "one more"]]


def test_a_run_that_wrote_nothing_is_in_nobodys_way(capsys, prompts, out):
    with pytest.raises(Killed):
        run(capsys, prompts, out, "--stop-after", "0")
    assert Path(f"{out}.partial.manifest.json").exists()
    code, _, _ = run(capsys, prompts, out, "--suffix", "?")
    assert code == 0 and read(out)[0]["upper"].endswith("?")
    assert read_manifest(str(out)).arguments == {"suffix": "?"}


def test_the_inputs_name_does_not_matter(capsys, prompts, out):
    run(capsys, prompts, out)
    moved = prompts.rename(prompts.with_name("moved.jsonl"))
    code, stdout, _ = run(capsys, moved, out)
    assert code == 0 and "finished already" in stdout


def test_two_processes_cannot_write_one_file(capsys, prompts, out):
    manifest = Manifest("upper", {"suffix": ""}, {}, {})
    holder = Output.open(str(out), manifest)
    code, _, stderr = run(capsys, prompts, out)
    assert code == 2 and "another process" in stderr
    holder._file.close()


def test_the_stale_set_aside_file_of_an_older_run_goes(capsys, prompts, out):
    run(capsys, prompts, out)
    os.remove(out)
    run(capsys, jsonl(prompts, {"prompt": "letters"}), out)
    assert not Path(f"{out}.set_aside.jsonl").exists()


# ---------------------------------------------------------------------- signals


STAGE = """
import os, signal, sys, time
import tests.stages.test_output as t
from stages.files.output import Output
from stages.files.run import run_main
append = Output._append
def slow(self, entry):
    append(self, entry)
    print("row", flush=True)
    time.sleep(float(os.environ["PAUSE"]))
Output._append = slow
sys.exit(run_main(t.upper, t.Args, sys.argv[1:]))
"""


def start(prompts: Path, out: Path, pause: float) -> subprocess.Popen:
    command = [sys.executable, "-c", STAGE, "--prompts", str(prompts), "--out", str(out)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"PAUSE": str(pause)},
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_stopped_stage_exits_75_and_goes_on(capsys, prompts, out, tmp_path, number):
    process = start(prompts, out, pause=0.3)
    while "row" not in process.stdout.readline():
        assert process.poll() is None, process.stderr.read()
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 75
        assert f"stopped by {number.name}, the work is saved" in stderr
        assert "run the same command again" in stderr and "Traceback" not in stderr
    code, stdout, _ = run(capsys, prompts, out)
    assert code == 0 and "going on after" in stdout
    run(capsys, prompts, tmp_path / "whole.jsonl")
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_a_stage_at_once_with_75(capsys, prompts, out, first, second):
    process = start(prompts, out, pause=60)  # in a call that no handler in Python interrupts
    while "row" not in process.stdout.readline():
        assert process.poll() is None, process.stderr.read()
    process.send_signal(first)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.5)
    process.send_signal(second)
    _, stderr = process.communicate(timeout=3)
    assert process.returncode == 75 and "stopped at once, what was saved is kept" in stderr
    code, stdout, _ = run(capsys, prompts, out)
    assert code == 0 and "going on after 1 rows" in stdout


def test_rows_are_on_the_disk_before_a_stop_says_that_they_are_saved(
    capsys, prompts, out, monkeypatch
):
    write, synced = Output.write, []

    def stopping(self, row):
        write(self, row)
        if len(self) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    def sync():
        synced.append((len(read(Path(f"{out}.partial"))), capsys.readouterr().err))

    monkeypatch.setattr(Output, "write", stopping)
    monkeypatch.setattr(os, "sync", sync)
    code, _, stderr = run(capsys, prompts, out)
    assert code == 75 and "the work is saved" in stderr
    assert synced == [(2, "")]


# ---------------------------------------------------------------------- the caller's mistakes


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: a list, not an object"),
        ("null", "line 2: a NoneType, not an object"),
        (b'{"prompt": "\xe9"}', "line 2: not UTF-8 (byte 13)"),
        ('{"prompt": "x"}'.encode("utf-16"), "line 2: not UTF-8"),
        ('{"prompt": "x", "score": NaN}', "NaN is no JSON number"),
        ('{"prompt": "x", "score": 1e999}', "holds what JSON cannot"),
        ('{"prompt": "x", "score": ' + "9" * 5000 + "}", "line 2: not JSON"),
        ("[" * 100_000, "line 2: not JSON"),
        (f'{{"prompt": "x", "y": {"[" * 101}{"]" * 101}}}', "line 2: not JSON (nested too deep)"),
        (f'{{"prompt": "x", "y": {"[" * 985}{"]" * 985}}}', "line 2: not JSON (nested too deep)"),
        ('{"y": ' * 3000 + "1" + "}" * 3000, "line 2: not JSON (nested too deep)"),
        ('{"prompt": "x", "prompt": "y"}', "line 2: not JSON (field 'prompt' stands twice"),
        ('{"prompt": "x", "y": {"a": 1, "a": 1}}', "field 'a' stands twice"),
        ('{"prompt": "x", "score": -1e400}', "line 2: not JSON (-1e400: -inf is no finite number"),
        ({"text": "x"}, "line 2: field 'prompt' is missing: add it as str"),
        ({"prompt": 3}, "line 2: field 'prompt' is int, not str"),
        ({"prompt": None}, "line 2: field 'prompt' is NoneType, not str"),
        ({"prompt": "x", "prompt_id": 7}, "line 2: field 'prompt_id' is int, not str"),
        ({"prompt": "x", "prompt_id": True}, "line 2: field 'prompt_id' is bool, not str"),
        ({"prompt": " \n"}, "line 2: the prompt is empty"),
        ({"prompt": "y", "prompt_id": "one"}, "prompt_id 'one' stood above with another prompt"),
        ({"messages": []}, "line 2: messages must end with a user turn"),
        ({"messages": "hi"}, "field 'messages' is str, not list"),
        ({"messages": ["hi"]}, "messages[0]: not an object"),
        ({"messages": [{"role": "user"}]}, "messages[0]: field 'content' is missing"),
        ({"messages": [{"role": "tool", "content": ""}]}, "role 'tool' is not system, user"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "must end with a user turn"),
    ],
)
def test_a_malformed_line_is_named(capsys, tmp_path, out, line, message):
    prompts = jsonl(tmp_path / "prompts.jsonl", {"prompt": "x", "prompt_id": "one"}, line)
    code, _, stderr = run(capsys, prompts, out)
    assert code == 2
    assert message in stderr
    assert stderr.startswith("error: ") and stderr.count("\n") == 1 and len(stderr) < 400
    assert not out.exists()


def test_unusable_paths_are_named(capsys, prompts, tmp_path):
    out = tmp_path / "out.jsonl"
    (tmp_path / "folder").mkdir()
    (tmp_path / "foreign.jsonl").write_text("mine\n")
    for source, target, message in [
        (tmp_path / "absent.jsonl", out, "does not exist"),
        (tmp_path / "folder", out, "is a folder"),
        (prompts, tmp_path / "folder", "is a folder"),
        (prompts, tmp_path / "foreign.jsonl", "has no manifest: move it, or pass --overwrite"),
        (prompts, prompts, "is the input"),
        (prompts, prompts / "under" / "a-file.jsonl", "prompts.jsonl"),
        (prompts, Path("/proc/cannot/be/written.jsonl"), "/proc/cannot"),
    ]:
        for flags in ([],) if "foreign" in target.name else ([], ["--overwrite"]):
            code, _, stderr = run(capsys, source, target, *flags)
            assert code == 2 and message in stderr and stderr.count("\n") == 1, stderr
    assert prompts.exists() and (tmp_path / "foreign.jsonl").read_text() == "mine\n"


def test_a_broken_manifest_is_named(capsys, prompts, out):
    whole = {"stage": "x", "arguments": {}, "identities": {}}
    no_inputs = (json.dumps(whole | {"inputs": x}) for x in ([], None, 1, {"a": {}}, ["a"]))
    for content in ("{", "[]", '{"stage": "x"}', "\xff", "[" * 100_000, "\0", "", *no_inputs):
        Path(f"{prompts}.manifest.json").write_text(content, encoding="latin-1")
        code, _, stderr = run(capsys, prompts, out)
        assert code == 2 and "not a manifest" in stderr


@pytest.mark.parametrize(
    "bug",
    [ZeroDivisionError(), FileExistsError(17, "File exists"), PermissionError(13, "a socket's")],
)
def test_a_bug_is_no_callers_mistake(bug):
    def main(args):
        raise bug

    with pytest.raises(type(bug)):
        run_main(main, Args, ["--prompts", "x", "--out", "y"])


# ---------------------------------------------------------------------- reading


def test_a_huge_line_is_one_row(capsys, tmp_path, out):
    prompts = jsonl(tmp_path / "p.jsonl", {"prompt": "x" * 5_000_000}, {"prompt": "y"})
    assert run(capsys, prompts, out)[0] == 0
    assert [len(row["upper"]) for row in read(out)] == [5_000_000, 1]


# ---------------------------------------------------------------------- files that are not ours


def same_file(path: Path, how: str) -> str:
    """Another path of the same file."""
    if how == "dotted":
        return str(path.parent / "." / "x" / ".." / path.name).replace("x/../", "./")
    link = path.with_name(f"{how}-{path.name}")
    link.symlink_to(path) if how == "symbolic" else link.hardlink_to(path)
    return str(link)


@pytest.mark.parametrize("how", ["dotted", "symbolic", "hard"])
def test_the_input_is_never_written_over_whatever_it_is_called(capsys, prompts, how):
    before = prompts.read_bytes()
    code, _, stderr = run(capsys, prompts, same_file(prompts, how), "--overwrite")
    assert code == 2 and "is the input" in stderr
    assert prompts.read_bytes() == before


@pytest.mark.parametrize(
    "end",
    [
        ".manifest.json",
        ".set_aside.jsonl",
        ".partial",
        ".partial.manifest.json",
        ".partial.sorted",
        ".partial.set_aside",
    ],
)
def test_an_input_with_the_name_of_a_file_beside_the_output_is_kept(capsys, prompts, out, end):
    out.parent.mkdir()
    source = prompts.rename(f"{out}{end}")
    before = source.read_bytes()
    code, _, stderr = run(capsys, source, out)
    assert code == 2 and "is the input" in stderr
    assert source.read_bytes() == before


def test_a_file_of_the_partial_files_name_that_is_not_ours_is_kept(capsys, prompts, out):
    out.parent.mkdir()
    mine = Path(f"{out}.partial")
    mine.write_text("half a novel")
    code, _, stderr = run(capsys, prompts, out, "--overwrite")
    assert code == 2 and "not of this project" in stderr
    assert mine.read_text() == "half a novel"


def test_overwriting_keeps_the_old_file_until_the_new_one_is_whole_and_goes_on(
    capsys, prompts, out
):
    run(capsys, prompts, out)
    before = out.read_bytes()
    again = ("--suffix", "?", "--overwrite")
    for stop_after in ("2", "1"):
        with pytest.raises(Killed):
            run(capsys, prompts, out, *again, "--stop-after", stop_after)
        assert out.read_bytes() == before
    code, stdout, _ = run(capsys, prompts, out, *again)
    assert code == 0 and "going on after 3 rows" in stdout
    assert all(row["upper"].endswith("?") for row in read(out))


def test_a_kill_between_the_new_manifest_and_the_new_file_does_not_pass_for_the_old_one(
    capsys, prompts, out, monkeypatch
):
    run(capsys, prompts, out)

    def dies(local, path):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("stages.files.output.publish", dies)
        run(capsys, prompts, out, "--suffix", "?", "--overwrite")
    code, _, _ = run(capsys, prompts, out, "--suffix", "?")
    assert code == 0 and all(row["upper"].endswith("?") for row in read(out))


def test_what_another_process_writes_is_not_overwritten(capsys, prompts, out):
    run(capsys, prompts, out)
    before = out.read_bytes()
    holder = Output.open(str(out), Manifest("upper", {"suffix": "!"}, {}, {}), overwrite=True)
    code, _, stderr = run(capsys, prompts, out, "--overwrite")
    assert code == 2 and "another process" in stderr and out.read_bytes() == before
    holder._file.close()


# ---------------------------------------------------------------------- inputs that cannot be read


def test_what_cannot_be_read_twice_or_is_compressed_is_refused_by_name(capsys, prompts, tmp_path):
    out = tmp_path / "o.jsonl"
    pipe, packed = tmp_path / "pipe", tmp_path / "p.jsonl.gz"
    os.mkfifo(pipe)
    packed.write_bytes(gzip.compress(prompts.read_bytes()))
    for source, word in ((pipe, "a pipe"), (packed, "gzip"), (Path("/dev/null"), "a device")):
        code, _, stderr = run(capsys, source, out)
        assert code == 2 and word in stderr and stderr.count("\n") == 1
    for target in ("s3://b/x.jsonl", "file:///x.jsonl", "https://h/x"):
        code, _, stderr = run(capsys, prompts, target)
        scheme = target.partition("://")[0]
        assert code == 2 and f"{scheme}:// is not supported" in stderr
        code, _, stderr = run(capsys, target, out)
        assert code == 2 and f"{scheme}:// is not supported" in stderr
    assert not list(tmp_path.glob("o.jsonl*"))


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
def test_a_pipe_or_a_device_is_no_output_and_stays(capsys, prompts, tmp_path, overwrite):
    os.mkfifo(tmp_path / "pipe")
    for target in (tmp_path / "pipe", Path("/dev/null")):
        before = target.stat()
        code, _, stderr = run(capsys, prompts, target, *overwrite)
        assert code == 2 and "is no regular file" in stderr and stderr.count("\n") == 1
        assert target.stat().st_ino == before.st_ino and target.stat().st_mode == before.st_mode


@pytest.mark.parametrize("out", ["new/", "a/b/", "{0}/"])
def test_an_output_that_ends_with_a_slash_is_refused_before_the_work(
    capsys, prompts, tmp_path, out
):
    code, _, stderr = run(capsys, prompts, str(tmp_path / "x") + "/" + out.format("y"))
    assert code == 2 and "is a folder: give the path of the file to write" in stderr
    assert not (tmp_path / "x").exists()


def test_a_full_or_forbidding_disk_is_one_line(capsys, prompts, tmp_path):
    for target in (f"/proc/{'x' * 300}.jsonl", str(tmp_path / ("y" * 300)), "/dev/full/x.jsonl"):
        code, _, stderr = run(capsys, prompts, target)
        assert code == 2 and stderr.startswith("error: ") and stderr.count("\n") == 1, stderr


def test_a_manifest_of_an_earlier_version_is_the_same_run(capsys, prompts, out):
    run(capsys, prompts, out)
    file = Path(f"{out}.manifest.json")
    manifest = json.loads(file.read_text())
    manifest["inputs"] = {e["path"]: e["sha256"] for e in manifest["inputs"].values()}
    file.write_text(json.dumps(manifest))
    code, stdout, _ = run(capsys, prompts, out)
    assert code == 0 and "finished already" in stdout
    code, _, stderr = run(capsys, prompts, out, "--suffix", "?")
    assert code == 2 and "arguments.suffix" in stderr and "input" not in stderr


def test_inputs_that_swap_their_roles_are_another_run(tmp_path):
    a, b = (jsonl(tmp_path / f"{x}.jsonl", {"prompt": x}) for x in "ab")
    one = Manifest("x", {}, {"train": an_input(str(a)), "test": an_input(str(b))}, {})
    other = Manifest("x", {}, {"train": an_input(str(b)), "test": an_input(str(a))}, {})
    assert one.key() != other.key()


def test_overwriting_a_file_of_this_very_run_leaves_it_and_an_edited_one_is_made_again(
    capsys, prompts, out
):
    run(capsys, prompts, out)
    before = out.read_bytes()
    code, stdout, _ = run(capsys, prompts, out, "--overwrite")
    assert code == 0 and "finished already" in stdout
    out.write_bytes(before.replace(b"PLAIN", b"EDITED"))
    assert run(capsys, prompts, out, "--overwrite")[0] == 0
    assert out.read_bytes() == before
