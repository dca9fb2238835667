"""The order of a training's records: the same for any number of processes, whether or not they divide the records."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import Dataset, Sampler, get_worker_info

from mllm_keeplora.data.schema import Record
from mllm_keeplora.models.family import Batch, Family
from mllm_keeplora.system import watch

IDLE = -1


class TrainingRecords(Dataset):
    """Gives records by index, and at `IDLE` one that trains nothing."""

    def __init__(self, records: Sequence[Record]):
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Record:
        return self.records[0].untrained() if index == IDLE else self.records[index]


@dataclass(frozen=True)
class Collator:
    """Makes training batches of records, in this process or in a data loader's workers.

    Workers outlive the signals that end a run: a whole process group may be told, and the steps up to the checkpoint
    still need their batches.
    """

    family: Family
    max_length: int | None = None  # most tokens of a record

    def __call__(self, records: Sequence[Record]) -> Batch:
        if get_worker_info() is not None:
            watch.ignore_endings()
        return self.family.training_batch(records, self.max_length)


class FilledSampler(Sampler):
    """Orders a dataset at random, and ends with idle records up to a multiple of what the processes take.

    Otherwise a data loader gives some records twice to fill the last step of an epoch, and what is learnt depends on
    the number of processes.

    Args:
        dataset: what is sampled.
        seed: of the order, as the data loader of a single process takes it.
        multiple: records that all processes together take at once.
        epoch: gives the epoch that begins; a data loader that skips batches of a resumed one tells no sampler.
    """

    def __init__(self, dataset: TrainingRecords, seed: int, multiple: int, epoch: Callable[[], int]):
        self.order = SeedableRandomSampler(dataset, data_seed=seed)
        self.idle = -len(dataset) % multiple
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.order) + self.idle

    def __iter__(self) -> Iterator[int]:
        self.order.set_epoch(self.epoch())
        yield from self.order
        yield from [IDLE] * self.idle
