"""PairRM by llm-blender's own PyTorch code, on the host: the reference for pairrm.py.

llm-blender 0.0.2 does not import with transformers 5, which dropped two names that it uses, and its
tokenizer loses the model's normaliser there; all three are put back here. The rest runs as it is:
llm-blender pads the answers of a batch to one length, cuts them by the longest prompt of the batch,
and fails on a text that holds one of its own markers.
"""

import contextlib
import functools
import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path

import transformers
import transformers.utils.hub
from huggingface_hub.constants import HF_HUB_CACHE

from model.rankers.pairrm import open_folder, open_tokenizer
from sharding.errors import UserError, first_line

TEXT_FAILS = "llm-blender fails on this text; --backend jax does not"


def import_blender():
    """The package llm_blender, made to import with transformers 5."""
    if not hasattr(transformers.utils.hub, "TRANSFORMERS_CACHE"):
        transformers.utils.hub.TRANSFORMERS_CACHE = HF_HUB_CACHE
    base = transformers.PreTrainedTokenizerBase
    if not hasattr(base, "batch_encode_plus"):
        base.batch_encode_plus = lambda self, texts, **options: self(texts, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import llm_blender  # here: only after the names above are put back
    return llm_blender


class BlenderRanker:
    """The backend llm-blender, with the interface of pairrm.PairRM."""

    on_mesh = False

    def __init__(self, folder: str):
        """folder: as the hub holds PairRM (its config.json names the encoder), or its hub id."""
        for package in ("torch", "llm_blender"):
            if importlib.util.find_spec(package) is None:
                raise UserError(
                    f"--backend llm-blender needs the package {package}, which is not installed: "
                    "run bash scripts/setup.sh --torch, or use --backend jax"
                )
        self._files = open_folder(folder)
        self.identity = self._files.identity

    @functools.cached_property
    def blender(self):
        """llm_blender.Blender with the ranker loaded."""
        blender = import_blender().Blender()
        with _one_line("llm-blender cannot load the ranker"):
            blender.loadranker(str(Path(self._files.weights).parent), device="cpu")
        tokenizer = blender.ranker_collator.tokenizer
        tokenizer.backend_tokenizer.normalizer = open_tokenizer(self._files.tokenizer).normalizer
        return blender

    def encode(self, source: str, candidates: list[str]) -> dict:
        """The prompt and its answers as a batch of one, tokenised and padded by llm-blender."""
        with _one_line(TEXT_FAILS):
            return self.blender.ranker_collator(
                [{"source": source, "candidates": list(candidates)}]
            )

    def enough(self, comparisons: list) -> bool:
        """Whether there is anything to compute: larger batches are no faster here."""
        return bool(comparisons)

    def logits(
        self, comparisons: list, done: Callable[[int], None] = lambda n: None
    ) -> list[float]:
        """As PairRM.logits; a comparison is (what `encode` gave, i, j). Each is computed alone, so
        that no text is padded."""
        import torch  # here: takes seconds to load

        all_logits = []
        for encoded, i, j in comparisons:
            ids, masks = encoded["candidate_ids"][0], encoded["candidate_attention_mask"][0]
            with torch.no_grad(), _one_line(TEXT_FAILS):
                logits = self.blender.ranker._forward(
                    encoded["source_ids"],
                    encoded["source_attention_mask"],
                    ids[i : i + 1],
                    masks[i : i + 1],
                    ids[j : j + 1],
                    masks[j : j + 1],
                )["logits"]
            all_logits.append(logits.item())
            done(1)
        return all_logits


@contextlib.contextmanager
def _one_line(what: str):
    """Turn any error into a UserError of one line."""
    try:
        yield
    except Exception as error:
        raise UserError(f"{what} ({first_line(error)})") from None
