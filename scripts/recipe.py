"""Read a recipe, check it, bind a run to it, and print what scripts/iterate.sh needs of it.

    python -m scripts.recipe snorkel-mistral-7b v5p-8

A recipe is a TOML file: what a run does, and under [machine.NAME] where and how fast.
scripts/README.md explains each key. All of them are checked before any work, those of the stages'
tables by the stages' own flags and rules.

RUN/settings.json keeps the settings that decide a run's results. The run goes on with these alone.
`iterations` may be raised, and what only decides where or how fast may change.
"""

import dataclasses
import difflib
import json
import math
import os
import re
import shlex
import sys
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import tyro
from etils import epath

from sharding.errors import UserError, at, check_scheme
from stages import dpo, pairs, rank, sample
from stages.evaluate import kl
from stages.files.paths import write_atomically
from stages.files.rows import parse_json
from stages.files.run import check_numbers, run_main

RECIPES = Path(__file__).parent / "recipes"
STAGES = {"sample": sample.Args, "rank": rank.Args, "pairs": pairs.Args, "dpo": dpo.Args}
STAGES |= {"evaluate.sample": sample.Args, "evaluate.kl": kl.Kl}
# Flags that only decide where or how fast: a run may go on with other values.
HOW_FAST = {
    *("mesh", "slots", "cache_memory", "micro_batch_size", "remat", "rows", "device"),
    *("save_every", "keep_states", "eval_every", "shardings", "evaluate.kl.batch_size"),
}
# Flags that the loop sets or cannot use. The seed of stages.pairs is left to the recipe.
BY_LOOP = {
    *("seed", "test_pairs", "test_out", "coordinator", "processes", "process_id"),
    *("overwrite", "slice"),
}


def flags_of(table: str) -> dict[str, Any]:
    """Name → type of the flags that a recipe may set for a stage."""
    return {
        field.name: field.type
        for field in dataclasses.fields(STAGES[table])
        if field.default is not dataclasses.MISSING
        and (field.name not in BY_LOOP or (table, field.name) == ("pairs", "seed"))
    }


UNIONS = (types.UnionType, typing.Union)

# What a recipe may hold: key → type, or a table of such; "*" is any key.
PROMPTS = {"file": str, "dataset": str, "split": str, "first": int, "last": int}
SETTINGS: dict[str, Any] = {
    "model": str,
    "prompts": PROMPTS | {"rows_per_iteration": int},
    "heldout": PROMPTS,
    "ranker": str,
    "iterations": int,
    **{table: flags_of(table) for table in ("sample", "rank", "pairs", "dpo")},
    "evaluate": {"sample": flags_of("evaluate.sample"), "kl": flags_of("evaluate.kl")},
    "export_dtype": Literal["float32", "bfloat16", "float16"],
}
Variable = typing.NewType("Variable", str)  # an environment variable; may begin with a dash
MACHINE = SETTINGS | {"plan": str, "environment": {"*": Variable}, "refuse": {"*": str}}
APART = {"variant": {"*": SETTINGS}, "machine": {"*": MACHINE}, "from_environment": {"*": str}}


@dataclasses.dataclass
class Recipe:
    """What a recipe asks for, with the variant, the machine and the environment applied.

    A stage's table holds its flags, with underscores: dpo["batch_size"] is 64.
    """

    name: str
    model: str  # gguf:FILE, checkpoint:FOLDER, or a model in Hugging Face's form: hub id or folder
    prompts: dict
    heldout: dict
    ranker: str
    iterations: int
    sample: dict
    rank: dict
    pairs: dict
    dpo: dict
    evaluate: dict  # "sample": all flags for the held-out answers; "kl"
    export_dtype: str | None
    machine: dict  # the chosen [machine.NAME], or empty

    def source(self, iteration: int, limit: int = 0) -> tuple[str, str | None, int, int | None]:
        """Where an iteration's prompts come from: (file or dataset, split, first row, the row to
        stop before). Iteration 0: the held-out prompts. limit: at most so many; 0: all."""
        table = self.prompts if iteration else self.heldout
        first, last = table.get("first", 0), table.get("last")
        if rows := table.get("rows_per_iteration"):
            first, last = (iteration - 1) * rows, iteration * rows
        if limit:
            last = min(math.inf if last is None else last, first + limit)
        names = table["file" if "file" in table else "dataset"], table.get("split")
        return (
            *(name and name.replace("{iteration}", str(iteration)) for name in names),
            first,
            last,
        )


# ------------------------------------------------------------------------------ reading


def read(recipe: str, machine: str = "", environ: Mapping[str, str] = os.environ) -> Recipe:
    """recipe: a name in scripts/recipes/ or a file. machine: one of its [machine.NAME]. environ:
    VARIANT, and the variables that the recipe's [from_environment] names."""
    file = find(recipe)
    where = os.path.relpath(file)
    try:
        raw = tomllib.loads(file.read_text())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not TOML: {error}") from None
    check(where, raw, SETTINGS | APART)
    if environ.get("ZEPHYR"):
        raise UserError("ZEPHYR is now VARIANT: set VARIANT=2024, or nothing for 2023")

    # Layers, each over the ones before: the recipe, its variants, the machine, the environment.
    variants, machines, variables = (raw.pop(key, {}) for key in APART)
    for table in (raw, *variants.values(), *machines.values()):
        for key in ("prompts", "heldout"):
            if isinstance(table.get(key), str):
                table[key] = {"file": table[key]}
    on = pick(where, "machine", machine, machines) if machine else {}
    for name in filter(None, environ.get("VARIANT", "").split(",")):
        raw = merge(raw, pick(where, "variant", name, variants))
        if reason := on.get("refuse", {}).get(name):
            raise UserError(f"{where}, machine {machine}: VARIANT={name} {reason}")
    raw = merge(raw, {key: value for key, value in on.items() if key in SETTINGS})
    for variable, key in variables.items():
        if text := environ.get(variable):
            raw = merge(raw, from_environment(variable, text, key))

    # The result is checked as a whole.
    needed = ("model", "prompts", "heldout", "ranker", "iterations")
    for variable in on.get("environment", {}):
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", variable):
            raise UserError(f"{where}: machine.{machine}.environment.{variable} is no variable")
    if missing := [key for key in needed if key not in raw]:
        raise UserError(f"{where}: {missing[0]} is missing: see scripts/recipes/demo.toml")
    if not 1 <= raw["iterations"] <= 1000:
        raise UserError(
            f"{where}: iterations is {raw['iterations']}: it must be at least 1, at most 1000"
        )
    tables = {name: raw.get(name, {}) for name in ("sample", "rank", "pairs", "dpo", "evaluate")}
    answers = tables["sample"] | tables["evaluate"].get("sample", {})
    tables["evaluate"] = {"kl": {}, **tables["evaluate"], "sample": answers}
    whole = {key: raw[key] for key in needed} | tables
    with at(f"{where}, [rank]"):
        args = rank.Args(raw["ranker"], "", "", **tables["rank"])
        rank.ranker_options(args, rank.is_pairwise(args.ranker))
    made = Recipe(file.stem, **whole, export_dtype=raw.get("export_dtype"), machine=on)
    check_prompts(where, made)
    return made


def find(recipe: str) -> Path:
    if recipe.endswith(".sh") and Path(recipe).is_file():
        raise UserError(f"{recipe}: recipes are TOML: bash scripts/from_shell.sh {recipe}")
    for file in (Path(recipe), RECIPES / f"{recipe}.toml"):
        if file.is_file():
            return file
    names = ", ".join(sorted(p.stem for p in RECIPES.glob("*.toml")))
    hint = f"give a file, or one of {names}"
    if recipe.startswith("mistral-"):  # each machine had a recipe of its own before
        hint = f"give snorkel-mistral-7b {recipe.removeprefix('mistral-')}"
    raise UserError(f"no recipe {recipe}: {hint}")


def pick(where: str, kind: str, name: str, tables: dict) -> dict:
    if name not in tables:
        raise UserError(f"{where} has no {kind} {name}: it has {', '.join(tables) or 'none'}")
    return tables[name]


def merge(base: dict, over: dict) -> dict:
    """`base` with the keys of `over` in it, table by table."""
    tables = {k: merge(base.get(k, {}), x) for k, x in over.items() if isinstance(x, dict)}
    return base | over | tables


def from_environment(variable: str, text: str, key: str) -> dict:
    """A recipe's table with the value of an environment variable at the dotted `key`."""
    *path, last = key.split(".")
    known = SETTINGS
    for part in path:
        known = known[part] if isinstance(known.get(part), dict) else {}
    if isinstance(known.get(last, {}), dict):
        raise UserError(f"from_environment.{variable} is {key!r}: no such key")
    value: Any = text
    if not conforms(text, known[last]) and re.fullmatch(r"-?\d+", text):
        value = int(text)
    check(f"{variable}={text}", {last: value}, known, ".".join([*path, ""]))
    for part in (last, *reversed(path)):
        value = {part: value}
    return value


# ----------------------------------------------------------------------------- checking


def check(where: str, table: dict, known: dict, path: str = "") -> None:
    """Refuse keys that are not `known`, and values of another type."""
    for key, value in table.items():
        kind = known.get(key, known.get("*"))
        if kind is None:
            near = difflib.get_close_matches(key, known, n=3) or sorted(known)
            raise UserError(f"{where}: unknown key {path}{key}: known are {', '.join(near)}")
        if isinstance(kind, dict) and isinstance(value, dict):
            check(where, value, kind, f"{path}{key}.")
        elif key in ("prompts", "heldout") and isinstance(value, str):
            pass  # short for a table with `file` alone
        elif not conforms(value, kind):
            shown = json.dumps(value, default=str)
            raise UserError(f"{where}: {path}{key} is {shown}: it must be {described(kind)}")


def conforms(value: Any, kind: Any) -> bool:
    """Whether a value of a TOML file is of the type of a flag."""
    origin, options = typing.get_origin(kind), typing.get_args(kind)
    if origin in UNIONS:
        return any(conforms(value, option) for option in options)
    if origin is Literal:
        return value in options
    if origin is tuple:
        items = value if isinstance(value, list) else ()
        of = options[:1] * len(items) if options[-1] is ... else options
        return isinstance(value, list) and len(items) == len(of) and all(map(conforms, items, of))
    if type(value) is float and not math.isfinite(value):  # NaN never equals the settings kept
        return False
    # A shell drops a zero byte, and a stage would take -x for a flag.
    if kind is Variable:
        return type(value) is str and "\0" not in value
    if type(value) is str and re.search(r"\0|^-+\w|^--?$", value):
        return False
    return type(value) in ((int, float) if kind is float else (kind,))


def described(kind: Any) -> str:
    origin, options = typing.get_origin(kind), typing.get_args(kind)
    if origin in UNIONS:
        return " or ".join(described(option) for option in options if option is not type(None))
    if origin is Literal:
        return f"one of {', '.join(options)}"
    words = {
        int: "a whole number",
        float: "a number",
        str: "a text, no flag",
        Variable: "a text",
        bool: "true or false",
    }
    if origin is tuple:
        number = "" if options[-1] is ... else f"{len(options)} times "
        return f"a list of {number}{words[options[0]]}"
    return "a table" if isinstance(kind, dict) else words[kind]


def with_flags(args: Any, table: dict) -> Any:
    """A stage's Args with the flags of a recipe's table."""
    lists = {name: tuple(x) for name, x in table.items() if isinstance(x, list)}
    return dataclasses.replace(args, **table | lists)


def check_values(recipe: Recipe) -> None:
    """Have the stages refuse values that make no sense, before the first stage works for hours.
    Takes two seconds, since the stages load JAX for it."""
    for name, check_flags, args, table in (
        ("sample", sample.checked, sample.Args("C", "P", "S"), recipe.sample),
        ("evaluate.sample", sample.checked, sample.Args("C", "P", "S"), recipe.evaluate["sample"]),
        ("pairs", pairs.check_flags, pairs.Args("K", "D"), recipe.pairs),
        ("dpo", dpo.checked, dpo.Args("C", "D", "C2"), recipe.dpo),
        ("evaluate.kl", kl.check_flags, kl.Kl("C", "S", "K"), recipe.evaluate["kl"]),
    ):
        with at(f"recipe {recipe.name}, [{name}]"):
            check_numbers(with_flags(args, table))
            check_flags(with_flags(args, table))


def check_prompts(where: str, recipe: Recipe) -> None:
    """Refuse a table that names no source of prompts, two of them, or a file that is missing."""
    if "split" in recipe.heldout and "dataset" in recipe.prompts:
        recipe.heldout.setdefault("dataset", recipe.prompts["dataset"])
    for name, iterations in (("prompts", range(1, recipe.iterations + 1)), ("heldout", [0])):
        table = getattr(recipe, name)
        if ("file" in table) == ("dataset" in table):
            raise UserError(f"{where}: {name} needs one of file and dataset")
        if "file" in table and "split" in table:
            raise UserError(f"{where}: {name}.split is for a dataset, and {name} has a file")
        if "rows_per_iteration" in table and table.keys() & {"first", "last"}:
            raise UserError(f"{where}: {name} has rows_per_iteration, or first and last, not both")
        first = table.get("first", 0)
        last = table.get("rows_per_iteration", table.get("last", math.inf))
        if not 0 <= first < last:
            shown = ", ".join(f"{k} = {x}" for k, x in table.items() if isinstance(x, int))
            raise UserError(f"{where}: {name} takes no rows ({shown})")
        for file in (recipe.source(i)[0] for i in iterations if "file" in table):
            check_scheme(file, f"{where}: {name}.file")
            if not epath.Path(file).is_file():
                raise UserError(f"{where}: {name}.file: {file} does not exist")
            if not file.endswith(".jsonl"):
                raise UserError(f"{where}: {name}.file: {file}: give a prompts.jsonl")


# ------------------------------------------------------------------- settings of a run


def settings_of(recipe: Recipe, seed: int, limit: int) -> dict[str, Any]:
    """What decides a run's results: dotted key → value."""

    def flat(table: dict, path: str = "") -> dict[str, Any]:
        rows: dict[str, Any] = {}
        for key, value in table.items():
            if isinstance(value, dict):
                rows |= flat(value, f"{path}{key}.")
            elif not HOW_FAST & {key, f"{path}{key}"}:
                rows[f"{path}{key}"] = value
        return rows

    told = {k: x for k, x in vars(recipe).items() if k not in ("name", "iterations", "machine")}
    return {"SEED": seed, "LIMIT": limit} | flat(told)


def bind(run: Path, settings: dict[str, Any], write: bool) -> None:
    """Refuse to go on with a run that has other settings. write: keep a new run's settings."""
    file = run / "settings.json"
    if file.exists():
        try:
            before = dict(parse_json(file.read_bytes()))
        except (ValueError, TypeError):
            raise UserError(f"{file} is damaged: restore it, or choose another NAME") from None
        for key in before | settings:
            old, new = (table.get(key, default_of(key)) for table in (before, settings))
            # A dtype that was auto may be named: a stage that began with another one refuses it.
            if old != new and not (key.endswith(".dtype") and old == "auto"):
                raise UserError(
                    f"{run} was begun with other settings ({key} was {json.dumps(old)}, now it is "
                    f"{json.dumps(new)}): choose another NAME, or remove {run}"
                )
    elif (run / "settings").exists():
        raise UserError(
            f"{run} was begun by an earlier version, whose settings cannot be compared: choose "
            "another NAME, or finish it with that version"
        )
    elif write:
        write_atomically(str(file), json.dumps(settings, indent=1, ensure_ascii=False) + "\n")


def default_of(key: str) -> Any:
    """The stage's default for a setting that the recipe leaves out; None for other keys."""
    table, _, name = key.rpartition(".")
    value = getattr(STAGES.get(table), name, None)
    return list(value) if isinstance(value, tuple) else value


# ------------------------------------------------------------------------ for the shell


@dataclasses.dataclass
class Args:
    recipe: tyro.conf.Positional[str] = "demo"
    """A name in scripts/recipes/, or a file."""
    machine: tyro.conf.Positional[str] = ""
    """One of the recipe's [machine.NAME]. Default: the stages choose for the devices they see."""


def main(args: Args) -> None:
    seed, limit = whole_number("SEED", "0"), whole_number("LIMIT", "0")
    several = bool(os.environ.get("COORDINATOR"))
    process_id = several and (whole_number("PROCESSES"), whole_number("PROCESS_ID"))[1]
    recipe = read(args.recipe, args.machine)
    parts = [recipe.name, os.environ.get("VARIANT", ""), f"seed{seed}" if seed else ""]
    name = os.environ.get("NAME") or "-".join(filter(None, parts))
    run = Path(os.environ.get("RUNS") or "runs") / name
    if (run / f"iteration_{recipe.iterations + 1}").exists() and not (run / "finished").exists():
        raise UserError(
            f"{run} is beyond iteration {recipe.iterations}: iterations may be raised, not lowered"
        )
    check_values(recipe)
    bind(run, settings_of(recipe, seed, limit), write=not process_id)

    words = {"NAME": name, "run": run, "SEED": seed, "ITERATIONS": recipe.iterations}
    words |= {"MODEL": recipe.model, "RANKER": recipe.ranker}
    for variable, value in words.items():
        print(f"{variable}={shlex.quote(str(value))}")
    tables = {name.upper(): getattr(recipe, name) for name in ("sample", "rank", "pairs", "dpo")}
    tables |= {"HELDOUT_SAMPLE": recipe.evaluate["sample"], "KL": recipe.evaluate["kl"]}
    tables["EXPORT"] = {"dtype": recipe.export_dtype}
    for variable, table in tables.items():
        print(f"{variable}=({shlex.join(flags(table))})")
    for iteration in range(recipe.iterations + 1):  # 0: the held-out prompts
        source, *rows = recipe.source(iteration, limit)
        words = [source, *flags(dict(zip(("split", "first", "last"), rows)))]
        print(f"PROMPTS_{iteration}=({shlex.join(words)})")
    for variable, value in recipe.machine.get("environment", {}).items():
        if variable == "XLA_FLAGS":  # a list, whose last value of a flag counts
            value = f"{value} {os.environ.get(variable, '')}".strip()
        elif variable in os.environ or variable.replace("XLA_", "XLA_PYTHON_") in os.environ:
            continue  # XLA_PYTHON_CLIENT_… is an earlier name; JAX refuses both at once
        print(f"export {variable}={shlex.quote(value)}")


def whole_number(variable: str, default: str = "") -> int:
    text = os.environ.get(variable) or default
    if not text.isdecimal():
        raise UserError(f"{variable}={text} is no whole number")
    return int(text)


def flags(table: dict) -> list[str]:
    """A table as words of a command line."""
    words = []
    for key, value in table.items():
        name = key.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            values = value if isinstance(value, list) else [value]
            words += [f"--{name}", *map(str, values)]
    return words


if __name__ == "__main__":
    sys.exit(run_main(main, Args))
