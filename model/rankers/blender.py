"""PairRM by llm-blender's own PyTorch code, on the host: what pairrm.py is measured against.

llm-blender 0.0.2 does not import on transformers 5, which dropped two names that it uses, and there
its tokenizer has lost the model's normaliser; all three are put back here. It runs as it is
otherwise: it pads the answers of a batch to one length, cuts them
by the longest prompt of the batch, and fails on a text that holds one of its own markers.
"""

import contextlib
import functools
import warnings
from collections.abc import Callable
from pathlib import Path

from model.rankers.pairrm import open_folder, open_tokenizer
from sharding.errors import UserError


def import_blender():
    """The package llm_blender, importable."""
    import transformers
    import transformers.utils.hub

    if not hasattr(transformers.utils.hub, "TRANSFORMERS_CACHE"):
        from huggingface_hub.constants import HF_HUB_CACHE

        transformers.utils.hub.TRANSFORMERS_CACHE = HF_HUB_CACHE
    base = transformers.PreTrainedTokenizerBase
    if not hasattr(base, "batch_encode_plus"):
        base.batch_encode_plus = lambda self, texts, **options: self(texts, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import llm_blender
    return llm_blender


class BlenderRanker:
    """The backend llm-blender: the same questions as PairRM's, in the same interface."""

    def __init__(self, folder: str):
        """folder: as the hub holds PairRM (its config.json names the encoder), or its hub id."""
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
        with _one_line("llm-blender fails on this text; --backend jax does not"):
            return self.blender.ranker_collator(
                [{"source": source, "candidates": list(candidates)}]
            )

    def enough(self, comparisons: list) -> bool:
        """Whether there is anything to do: nothing is gained by waiting for more."""
        return bool(comparisons)

    def logits(
        self, comparisons: list, done: Callable[[int], None] = lambda n: None
    ) -> list[float]:
        """As PairRM.logits, of (what `encode` gave, i, j). Singly, so that none is padded."""
        import torch

        found = []
        for encoded, i, j in comparisons:
            ids, masks = encoded["candidate_ids"][0], encoded["candidate_attention_mask"][0]
            with (
                torch.no_grad(),
                _one_line("llm-blender fails on this text; --backend jax does not"),
            ):
                logits = self.blender.ranker._forward(
                    encoded["source_ids"],
                    encoded["source_attention_mask"],
                    ids[i : i + 1],
                    masks[i : i + 1],
                    ids[j : j + 1],
                    masks[j : j + 1],
                )["logits"]
            found.append(logits.item())
            done(1)
        return found


@contextlib.contextmanager
def _one_line(what: str):
    """Turn whatever it raises into a UserError of one line."""
    try:
        yield
    except Exception as error:
        line = next((s.strip() for s in str(error).splitlines() if s.strip()), repr(error))
        raise UserError(f"{what} ({line})") from None
