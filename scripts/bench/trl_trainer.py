"""TRL's DPOTrainer on token ids as they are: what the tests and the benchmark compare with."""

import torch
from trl import DPOTrainer


class Plain(DPOTrainer):
    """Takes rows of prompt_ids, chosen_ids and rejected_ids, in their order."""

    def _prepare_dataset(self, dataset, *_, **__):
        return dataset

    def _get_train_sampler(self, *_):
        return torch.utils.data.SequentialSampler(self.train_dataset)
