"""Hugging Face folders: what transformers writes is read, what is written transformers loads."""

import dataclasses
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import safetensors.torch
import tokenizers
import torch
import transformers
from huggingface_hub.errors import GatedRepoError

from model import checkpoint, checkpoint_writing, decoder, disk, hf
from model.checkpoint_writing import fingerprint
from scripts import convert
from sharding.errors import UserError
from stages.files.run import run_main

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def write_model(
    folder: Path, dtype="bfloat16", kind="mistral", max_shard_size="5GB", **changes
) -> str:
    """A random model as transformers saves it, tokenizer and chat template included."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **SIZES | changes)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"word{i}": i for i in range(3, 61)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return str(folder)


def tensors_of(folder) -> dict[str, torch.Tensor]:
    found = {}
    for file in Path(folder).glob("*.safetensors"):
        found |= safetensors.torch.load_file(file)
    return found


def rewrite(folder: str, change):
    """Apply `change(tensors)` to a folder's model.safetensors."""
    tensors = tensors_of(folder)
    change(tensors)
    safetensors.torch.save_file(tensors, f"{folder}/model.safetensors", {"format": "pt"})


@pytest.fixture
def source(tmp_path) -> str:
    return write_model(tmp_path / "source")


@pytest.fixture
def model(tmp_path, source) -> str:
    """A checkpoint made from `source`."""
    convert.main(convert.FromHf(source, str(tmp_path / "checkpoint")))
    return str(tmp_path / "checkpoint")


@pytest.mark.parametrize(
    "kind, changes",
    [
        ("mistral", {"head_dim": 12, "sliding_window": 8}),
        ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    ],
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_model_read_and_written_is_the_same_bit_for_bit(tmp_path, dtype, kind, changes):
    source = write_model(tmp_path / "source", dtype, kind, **changes)
    convert.main(convert.FromHf(source, str(tmp_path / "C")))
    convert.main(convert.ToHf(str(tmp_path / "C"), str(tmp_path / "D")))
    before, after = tensors_of(source), tensors_of(tmp_path / "D")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype == getattr(torch, dtype)
        assert torch.equal(after[name].view(torch.uint8), tensor.view(torch.uint8)), name


def test_the_parameters_read_have_the_model_s_tree_and_values(source):
    config, params = hf.read_hf(source)
    shapes = jax.tree.map(lambda x: (x.shape, np.dtype(x.dtype)), decoder.abstract(config))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == shapes
    theirs = tensors_of(source)["model.layers.1.self_attn.k_proj.weight"].float().numpy()
    # [k·h, d] there, [d, k, h] here: one element followed by hand
    assert params["layers"]["k"][1, 5, 1, 3] == theirs[1 * 8 + 3, 5]


def test_transformers_loads_what_is_written_without_a_missing_or_unexpected_key(tmp_path, model):
    dst = str(tmp_path / "D")
    convert.main(convert.ToHf(model, dst, max_shard_gb=2e-5))  # about 20 kB a file
    assert len(list(Path(dst).glob("model-*-of-*.safetensors"))) == 3
    index = json.loads((Path(dst) / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors_of(dst).values())
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(dst, output_loading_info=True)
    assert {name: list(problems) for name, problems in info.items() if problems} == {}
    assert theirs.dtype == torch.bfloat16
    original = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "source")
    for (name, a), (_, b) in zip(theirs.state_dict().items(), original.state_dict().items()):
        assert torch.equal(a, b), name
    assert theirs.generation_config.eos_token_id == 2
    tokenizer = transformers.AutoTokenizer.from_pretrained(dst)
    assert tokenizer("word5 word60").input_ids == [5, 60]
    assert tokenizer.chat_template == TEMPLATE
    assert not Path(f"{dst}.tmp").exists()


def test_sharded_folders_are_read(tmp_path, source):
    sharded = write_model(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list(Path(sharded).glob("*.safetensors"))) == 3
    (config, params), (other_config, other_params) = hf.read_hf(source), hf.read_hf(sharded)
    assert config == other_config
    assert fingerprint(params) == fingerprint(other_params)


def test_the_dtype_is_that_of_the_tensors_not_of_the_config(tmp_path, source):
    config = json.loads((Path(source) / "config.json").read_text()) | {"dtype": "float16"}
    (Path(source) / "config.json").write_text(json.dumps(config))
    assert hf.read_hf(source)[0].torch_dtype == "bfloat16"

    def one_in_fp32(tensors):
        tensors["model.norm.weight"] = tensors["model.norm.weight"].float()

    rewrite(source, one_in_fp32)
    assert hf.read_hf(source)[0].torch_dtype == "float32"


def test_harmless_extra_tensors_are_accepted(tmp_path):
    source = write_model(tmp_path / "source", tie_word_embeddings=True)
    expected = hf.read_hf(source)[1]

    def add(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4, dtype=torch.float64)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    rewrite(source, add)
    assert fingerprint(hf.read_hf(source)[1]) == fingerprint(expected)


def test_a_tied_head_that_differs_from_the_embedding_is_refused(tmp_path):
    source = write_model(tmp_path / "source", tie_word_embeddings=True)
    rewrite(source, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    with pytest.raises(hf.UserError, match=r"lm_head.weight differs.*set tie_word_embeddings"):
        hf.read_hf(source)


def cut_off(folder):
    file = Path(folder) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def cut_in_header(folder):
    file = Path(folder) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:300])


def in_tensors(change):
    return lambda folder: rewrite(folder, change)


def as_config(text):
    return lambda folder: (Path(folder) / "config.json").write_text(text)


def with_value(name, value):
    def change(tensors):
        tensors[name].view(-1)[-1] = value

    return change


def without(name):
    return lambda folder: (Path(folder) / name).unlink()


Q1 = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    "damage, message",
    [
        (cut_off, r"model\.safetensors \(\d+ bytes\): it is damaged or cut off; download it again"),
        (cut_in_header, r"model\.safetensors \(300 bytes\): it is damaged or cut off"),
        (in_tensors(lambda t: t.pop(Q1)), f"tensor {Q1} is missing: download"),
        (
            in_tensors(lambda t: t.update({Q1.replace("weight", "bias"): torch.zeros(32)})),
            r"tensor .*q_proj\.bias has no place in this architecture",
        ),
        (
            in_tensors(lambda t: t.update({Q1: torch.zeros(32, 31)})),
            rf"tensor {Q1} is \[32, 31\], config.json makes it \[32, 32\]",
        ),
        (
            in_tensors(lambda t: t.update({Q1: torch.zeros(32, 32, dtype=torch.int8)})),
            rf"tensor {Q1} is I8; F32, F16, BF16 are built: take the unquantized",
        ),
        (as_config("{"), r"config\.json is not JSON .*download it again"),
        (as_config("[]"), r"config\.json holds no JSON object"),
        (without("config.json"), r"config\.json is missing"),
        (without("tokenizer_config.json"), r"tokenizer_config\.json is missing"),
        (without("model.safetensors"), r"neither model\.safetensors nor .*index\.json"),
        (
            in_tensors(lambda t: t.pop("lm_head.weight")),
            r"tensor lm_head\.weight is missing, .*set tie_word_embeddings to true",
        ),
        (
            in_tensors(lambda t: t.pop("model.norm.weight")),
            r"tensor model\.norm\.weight is missing",
        ),
        *(
            (in_tensors(with_value(name, value)), rf"safetensors: tensor {name} holds NaN or inf")
            for name in (Q1, "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
            for value in (math.nan, math.inf, -math.inf)
        ),
    ],
)
def test_a_damaged_folder_is_refused_by_name(tmp_path, source, damage, message):
    damage(source)
    with pytest.raises(UserError, match=message):
        convert.main(convert.FromHf(source, str(tmp_path / "C")))
    assert not (tmp_path / "C").exists()


def as_pytorch(folder: str) -> None:
    """Make a folder's safetensors files PyTorch's."""
    for file in Path(folder).glob("*.safetensors"):
        bin_file = file.with_name(file.name.replace("model", "pytorch_model", 1))
        torch.save(safetensors.torch.load_file(file), bin_file.with_suffix(".bin"))
        file.unlink()
    for file in Path(folder).glob("*.index.json"):
        index = json.loads(file.read_text())
        index["weight_map"] = {
            name: file.replace("model", "pytorch_model", 1).replace(".safetensors", ".bin")
            for name, file in index["weight_map"].items()
        }
        (Path(folder) / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        file.unlink()


@pytest.mark.parametrize("size", ["5GB", "20KB"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_pytorch_files_give_the_same_model(tmp_path, dtype, size):
    source = write_model(tmp_path / "source", dtype, max_shard_size=size)
    config, params = hf.read_hf(source)
    as_pytorch(source)
    assert len(list(Path(source).glob("pytorch_model*.bin"))) == (1 if size == "5GB" else 3)
    read_config, read_params = hf.read_hf(source)
    assert (read_config, fingerprint(read_params)) == (config, fingerprint(params))
    convert.main(convert.FromHf(source, str(tmp_path / "C")))
    assert checkpoint.identity(str(tmp_path / "C")) == fingerprint(params)


def test_code_in_a_folder_is_not_run_and_keys_left_out_are_named_once(tmp_path, source, capsys):
    code = f"open({str(tmp_path / 'run')!r}, 'w')\n"
    for file in ("modeling_mine.py", "configuration_mine.py", "tokenization_mine.py"):
        (Path(source) / file).write_text(code)
    for file, names in (
        ("config.json", ["AutoConfig", "AutoModelForCausalLM"]),
        ("tokenizer_config.json", ["AutoTokenizer"]),
    ):
        path = Path(source) / file
        auto_map = {name: "modeling_mine.Mine" for name in names}
        path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": auto_map}))
    assert command("from-hf", source, str(tmp_path / "C")) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "left out" in line]
    assert len(lines) == 1 and "does not know auto_map" in lines[0]
    checkpoint.load_config(str(tmp_path / "C"))
    assert command("to-hf", str(tmp_path / "C"), str(tmp_path / "D")) == 0
    assert "left out" not in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    assert not any((tmp_path / "C").glob("*.py")) and not any((tmp_path / "D").glob("*.py"))


LINKED = ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def link_out(file, outside):
    """Make `file` a link to a file in the folder `outside`: itself, or one that is new."""
    target = outside / file.name
    if file.exists():
        file.rename(target)
    else:
        target.write_text("secret")
    file.symlink_to(target)


@pytest.mark.parametrize("name", [*LINKED, "README.md", "merges.txt", "model.safetensors"])
def test_from_hf_follows_no_link_out_of_the_folder(tmp_path, source, name):
    link_out(Path(source) / name, tmp_path)
    with pytest.raises(UserError, match=rf"{name} is a link to .*, out of its folder"):
        convert.main(convert.FromHf(source, str(tmp_path / "C")))
    assert not (tmp_path / "C").exists()


@pytest.mark.parametrize("name", [*LINKED, "special_tokens_map.json", "merges.txt"])
def test_to_hf_copies_no_link_s_target_from_outside(tmp_path, model, name):
    link_out(Path(model) / name, tmp_path)
    with pytest.raises(UserError, match=rf"{name} is a link to .*, out of its folder"):
        convert.main(convert.ToHf(model, str(tmp_path / "D")))
    assert not (tmp_path / "D").exists()


def test_a_missing_shard_is_named(tmp_path):
    source = Path(write_model(tmp_path / "source", max_shard_size="20KB"))
    gone = sorted(source.glob("model-*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(hf.UserError, match=rf"{gone.name} is missing, and the index names it"):
        hf.read_hf(str(source))


def test_an_architecture_that_is_not_built_is_refused_with_its_file(tmp_path, source):
    path = Path(source) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "gemma"}))
    with pytest.raises(UserError, match=r"config\.json: model_type 'gemma'"):
        hf.read_config(source)


def test_weights_too_large_for_fp16_are_refused(tmp_path, source):
    rewrite(source, lambda t: t["model.norm.weight"].fill_(1e6))
    convert.main(convert.FromHf(source, str(tmp_path / "C")))
    with pytest.raises(UserError, match=r"model\.norm\.weight does not fit into float16"):
        convert.main(convert.ToHf(str(tmp_path / "C"), str(tmp_path / "D"), dtype="float16"))
    assert not (tmp_path / "D").exists()


# ---------------------------------------------------------------------- what rounding takes away


def train_by_hand(model: str, folder: Path) -> tuple[str, int, int]:
    """A checkpoint with three updates below a bf16 step and two above; (folder, lost, changed)."""
    config, params = checkpoint.load(model)
    params = jax.tree.map(np.array, params)
    params["final_norm"][:3] += 1e-4  # 1 + 1e-4 rounds to 1
    params["final_norm"][3] = 1.25
    params["layers"]["q"][2, 0, 0, 0] = 3.0
    checkpoint_writing.save(str(folder), config, params, model, {"stage": "by hand"})
    return str(folder), 3, 5


def test_the_weights_whose_update_the_rounding_takes_away_are_counted(tmp_path, model, capsys):
    trained, lost, changed = train_by_hand(model, tmp_path / "trained")
    assert hf.rounded_away(trained, model, "bfloat16") == (lost, changed)
    assert hf.rounded_away(trained, model, "float32") == (0, changed)
    assert hf.rounded_away(model, model, "bfloat16") == (0, 0)
    convert.main(convert.ToHf(trained, str(tmp_path / "D"), base=model))
    line = "bfloat16 rounds away the whole update of 3 of 5 changed weights (60.0%)"
    assert line in capsys.readouterr().out


def test_without_a_base_the_inexact_weights_are_counted(tmp_path, model, capsys):
    trained, _, _ = train_by_hand(model, tmp_path / "trained")
    count = checkpoint.read_manifest(model)["parameters"]
    assert hf.inexact(trained, "bfloat16") == (3, count)
    convert.main(convert.ToHf(trained, str(tmp_path / "D")))
    warning = f"warning: bfloat16 rounds 3 of {count:,} weights"
    assert warning in capsys.readouterr().out
    for unwarned in (
        convert.ToHf(trained, str(tmp_path / "E"), dtype="float32"),
        convert.ToHf(model, str(tmp_path / "F")),
    ):
        convert.main(unwarned)
        assert "rounds" not in capsys.readouterr().out


def test_a_base_of_another_shape_is_refused(tmp_path, model):
    other = write_model(tmp_path / "other source", num_hidden_layers=2)
    convert.main(convert.FromHf(other, str(tmp_path / "other")))
    with pytest.raises(UserError, match="is another architecture"):
        convert.main(convert.ToHf(model, str(tmp_path / "D"), base=str(tmp_path / "other")))


# ---------------------------------------------------------------------- the command line


def command(*argv: str) -> int:
    return run_main(convert.main, convert.Command, list(argv))


def test_the_same_conversion_again_is_finished_and_another_is_refused(tmp_path, source, capsys):
    folder, dst = str(tmp_path / "C"), str(tmp_path / "D")
    for args in (convert.FromHf(source, folder), convert.ToHf(folder, dst)):
        convert.main(args)
        first = capsys.readouterr().out
        convert.main(args)
        again = capsys.readouterr().out
        assert "parameters" in first and "is finished already" in again
        assert checkpoint.identity(folder) in first and checkpoint.identity(folder) in again
    with pytest.raises(UserError, match="exists and is something else"):
        convert.main(convert.ToHf(folder, dst, dtype="float32"))
    rewrite(source, lambda t: t["model.norm.weight"].fill_(2))
    with pytest.raises(UserError, match="exists, made of something else"):
        convert.main(convert.FromHf(source, folder))


@pytest.mark.parametrize("which", ["from-hf", "to-hf"])
def test_an_interrupted_conversion_is_made_anew(tmp_path, source, model, which, monkeypatch):
    out = tmp_path / "out"
    args = {"from-hf": convert.FromHf(source, str(out)), "to-hf": convert.ToHf(model, str(out))}

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint_writing, "finish_folder", killed)
        with pytest.raises(KeyboardInterrupt):
            convert.main(args[which])
    leftover = tmp_path / f"out{disk.MARK}"
    assert leftover.exists() and not out.exists()
    convert.main(args[which])
    assert not leftover.exists()
    assert (out / "config.json").exists()


@pytest.mark.parametrize("which", ["from-hf", "to-hf"])
def test_no_folder_or_file_of_the_user_s_own_is_replaced(tmp_path, source, model, which):
    out = tmp_path / "out"
    args = {"from-hf": convert.FromHf(source, str(out)), "to-hf": convert.ToHf(model, str(out))}
    for own in ("out.tmp", "out.unfinished"):
        (tmp_path / own).mkdir()
        (tmp_path / own / "notes.txt").write_text("mine")
    convert.main(args[which])
    for own in ("out.tmp", "out.unfinished"):
        assert (tmp_path / own / "notes.txt").read_text() == "mine"


def test_a_hub_id_is_found_in_the_local_cache(tmp_path, source, monkeypatch, capsys):
    """The hub's own layout, offline: snapshots/COMMIT/* are links into blobs/."""
    commit, root = "a" * 40, tmp_path / "hub" / "models--some-org--tiny-model"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(commit)
    (root / "snapshots" / commit).mkdir(parents=True)
    (root / "blobs").mkdir()
    for i, file in enumerate(Path(source).iterdir()):
        shutil.copy(file, root / "blobs" / str(i))
        (root / "snapshots" / commit / file.name).symlink_to(f"../../blobs/{i}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert command("from-hf", "some-org/tiny-model", str(tmp_path / "C")) == 0
    _, params = hf.read_hf(source)
    assert checkpoint.identity(str(tmp_path / "C")) == fingerprint(params)
    assert checkpoint.read_manifest(str(tmp_path / "C"))["origin"]["arguments"]["commit"] == commit

    capsys.readouterr()
    assert command("from-hf", "some-org/absent", str(tmp_path / "X")) == 2
    error = capsys.readouterr().err
    assert error.startswith(
        "error: some-org/absent is no folder here, and the hub does not give it"
    )


@pytest.mark.parametrize("status", [401, 403])
def test_of_a_gated_model_is_said_what_to_do(tmp_path, monkeypatch, capsys, status):
    response = SimpleNamespace(status_code=status, headers={}, request=None)

    def gated(*_, **__):
        raise GatedRepoError(f"{status} Client Error.", response=response)

    monkeypatch.setattr("huggingface_hub.snapshot_download", gated)
    assert command("from-hf", "some-org/gated", str(tmp_path / "C")) == 2
    error = capsys.readouterr().err
    assert "accept the terms at https://huggingface.co/some-org/gated and set HF_TOKEN" in error


def test_a_name_that_is_neither_folder_nor_hub_id_is_refused(tmp_path):
    with pytest.raises(UserError, match="neither a folder nor a hub id"):
        convert.main(convert.FromHf("/no/such/folder", str(tmp_path / "C")))
    for scheme in ("https", "file", "s3", "hf"):
        with pytest.raises(UserError, match=f"{scheme}:// is not supported"):
            convert.main(convert.FromHf(f"{scheme}://a/b", str(tmp_path / "C")))


@pytest.mark.parametrize("name", ["from-hf", "from-gguf", "to-hf", "from-parquet"])
def test_help_explains_every_subcommand(name, capsys):
    with pytest.raises(SystemExit) as stop:
        command(name, "--help")
    shown = capsys.readouterr().out
    assert stop.value.code == 0
    assert "usage:" in shown and {"to-hf": "--base", "from-hf": "hub id"}.get(name, name) in shown


def test_every_slot_is_in_the_table_once_and_the_tree_is_covered(source):
    config = dataclasses.replace(hf.read_config(source), num_hidden_layers=2)
    found = hf.slots(config)
    assert len(found) == 3 + 2 * 9
    assert len(set((slot.path, slot.layer) for slot in found.values())) == len(found)
    shapes = jax.tree.map(lambda x: x.shape, hf.empty_params(config))
    assert shapes == jax.tree.map(lambda x: x.shape, decoder.abstract(config))
