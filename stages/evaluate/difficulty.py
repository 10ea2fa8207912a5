"""What AlpacaEval 2.0's length-controlled win rate knows beforehand of its 805 instructions.

Two files of the hub's data set tatsu-lab/alpaca_eval: instruction_difficulty.csv (an index and a
value a row; a JSON file {"instruction_difficulty": […]} will do too) and df_gamed.csv.
"""

import csv
import json

import numpy as np
from etils import epath

from sharding.errors import UserError
from stages.evaluate.winrates import Gamed


def read(path: str, instructions: int) -> np.ndarray:
    """The difficulties, in the order of the instructions, of which there must be as many."""
    try:
        text = epath.Path(path).read_text()
        if path.endswith(".json"):
            values = json.loads(text)["instruction_difficulty"]
        else:
            values = [row[1] for row in csv.reader(text.splitlines()[1:])]
        found = np.array([float(value) for value in values])
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise UserError(f"--difficulty {path}: no list of difficulties ({error!r})") from None
    if len(found) != instructions:
        raise UserError(
            f"--difficulty {path} knows {len(found)} instructions, and {instructions} are "
            "compared: leave it out unless these are AlpacaEval's, all of them, in its order"
        )
    return found


def read_gamed(path: str) -> Gamed:
    """df_gamed.csv: columns preference (0 to 1), std_delta_len, instruction_difficulty."""
    try:
        rows = list(csv.DictReader(epath.Path(path).read_text().splitlines()))
        names = ("preference", "std_delta_len", "instruction_difficulty")
        columns = [np.array([float(row[name]) for row in rows]) for name in names]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--gamed {path}: not AlpacaEval's df_gamed.csv ({error!r})") from None
    return Gamed(*columns)
