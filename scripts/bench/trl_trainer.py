"""TRL's DPOTrainer on token ids as they are: what the tests and the benchmark compare with."""

import queue
import time

import torch
import transformers
from trl import DPOTrainer


class Plain(DPOTrainer):
    """Takes rows of prompt_ids, chosen_ids and rejected_ids, in their order."""

    def _prepare_dataset(self, dataset, *_, **__):
        return dataset

    def _get_train_sampler(self, *_):
        return torch.utils.data.SequentialSampler(self.train_dataset)


class StepByStep(transformers.TrainerCallback):
    """Holds a training that runs in another thread before each step until `step` is called."""

    def __init__(self):
        self.go, self.took = queue.Queue(), queue.Queue()

    def step(self) -> float:
        """Let it do one step: seconds."""
        self.go.put(None)
        return self.took.get()

    def on_step_begin(self, *_, **__):
        self.go.get()
        self.begun = time.perf_counter()

    def on_step_end(self, *_, **__):
        self.took.put(time.perf_counter() - self.begun)
