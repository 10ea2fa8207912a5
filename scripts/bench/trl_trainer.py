"""TRL's DPOTrainer on token ids as they are: what the tests and the benchmarks compare with."""

import queue
import time

import datasets
import torch
import transformers
from trl import DPOConfig, DPOTrainer


class Plain(DPOTrainer):
    """Takes rows of prompt_ids, chosen_ids and rejected_ids, in their order. It keeps the losses
    unrounded, and how long it computed the reference's log-probs of each batch beforehand."""

    def _prepare_dataset(self, dataset, *_, **__):
        self.losses, self.computed = [], []
        return dataset

    def _precompute_ref_logps(self, *args):
        dataset = super()._precompute_ref_logps(*args)
        self.reference_seconds, self.computed = self.computed, []
        return dataset

    def compute_ref_log_probs(self, *args):
        begun = time.perf_counter()
        logps = super().compute_ref_log_probs(*args)
        self.computed.append(time.perf_counter() - begun)
        return logps

    def _get_train_sampler(self, *_):
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        self.losses.append((loss[0] if isinstance(loss, tuple) else loss).item())
        return loss

    def metrics(self) -> list[dict]:
        """Of each step."""
        logged = [row for row in self.state.log_history if "rewards/chosen" in row]
        return [row | {"loss": loss} for row, loss in zip(logged, self.losses, strict=True)]


def make(
    folder: str, rows: list[dict], pairs: int, dtype: str = "float32", callbacks=None, **settings
) -> Plain:
    """A trainer of a model in Hugging Face's format, on CPU, of so many pairs per step.

    dtype: bfloat16 is TRL's default, autocast over float32 parameters. settings: DPOConfig's.
    """
    defaults = dict(
        output_dir=f"{folder}-trl",
        per_device_train_batch_size=pairs,
        max_steps=len(rows) // pairs,
        max_length=None,
        optim="adamw_torch",
        report_to="none",
        beta=0.1,
        gradient_checkpointing=False,
        bf16=dtype == "bfloat16",
        use_cpu=True,
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return Plain(
        model=transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        args=DPOConfig(**defaults | settings),
        processing_class=tokenizer,
        callbacks=callbacks,
        train_dataset=datasets.Dataset.from_list(rows),
    )


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
        self.seconds = time.perf_counter() - self.begun

    def on_log(self, *_, **__):  # the step's metrics are known then
        self.took.put(self.seconds)
