"""Bases that compare pictures with texts: CLIP, SigLIP and all that `AutoModelForZeroShotImageClassification` loads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

from mllm_keeplora.data.classes import ClassList
from mllm_keeplora.data.media.images import images_of
from mllm_keeplora.data.schema import Record
from mllm_keeplora.errors import UserError
from mllm_keeplora.models.dual import losses
from mllm_keeplora.models.dual.answers import answer_of, likeliest, picture_features, text_features
from mllm_keeplora.models.dual.parts import name_parts, projector_names, sees_pictures, summary_of, vocabulary_of
from mllm_keeplora.models.dual.pictures import refuse_other_size
from mllm_keeplora.models.dual.sizes import patches, sizes_of
from mllm_keeplora.models.dual.texts import ClassTexts
from mllm_keeplora.models.family import OF_LOSSES, Answer, Batch
from mllm_keeplora.models.reading import said

if TYPE_CHECKING:
    from torch import Tensor

WHITE = (255, 255, 255)
NO_FROZEN_PARTS = (
    "branches are weighed by what frozen parts of a base see, but of a dual encoder both towers learn; take a strategy "
    "that sums its branches"
)


@dataclass
class DualFamily:
    """`models.family.Family` of such a base: a batch has pictures, and the texts of their classes once.

    Attributes:
        processor: prepares pictures.
        texts: makes tokens of the classes' texts.
        patches: rows that a picture takes in its tower.
    """

    processor: Any
    texts: ClassTexts
    patches: int
    _lists: list[ClassList] = field(default_factory=list)  # that questions name by their place here
    _read: dict[int, Tensor] | None = None  # features of their texts, while one set is asked
    _ensemble: bool = False

    auto: ClassVar[str] = "AutoModelForZeroShotImageClassification"
    name_parts = staticmethod(name_parts)
    summary = staticmethod(summary_of)
    vocabulary = staticmethod(vocabulary_of)
    sees_pictures = staticmethod(sees_pictures)
    projector_names = staticmethod(projector_names)
    passing = staticmethod(losses.passing)
    supervised = staticmethod(losses.supervised_logits)
    losses = staticmethod(losses.class_losses)
    sizes = staticmethod(sizes_of)

    @classmethod
    def of(
        cls, processor: Any, config: Any, style: str = "", generation: Any = None, video: str = "auto"
    ) -> DualFamily:
        """Make the family of a base from its processor and its config; the other arguments have no meaning.

        Raises:
            UserError: the tokenizer makes no tokens, or the processor pictures that do not fit the image tower.
        """
        refuse_other_size(processor, config)
        return cls(processor, ClassTexts.of(processor.tokenizer, config), patches(config))

    def training_batch(self, records: Sequence[Record], max_length: int | None = None) -> Batch:
        import torch

        lists = [_classes_of(record) for record in records]
        texts = dict.fromkeys(own[0] for each in dict.fromkeys(lists) for own in each.texts)
        places = {text: place for place, text in enumerate(texts)}
        labels = [
            places[each.texts[_place_of(record, each)][0]] if record.turns[-1].trained else losses.IGNORED
            for record, each in zip(records, lists, strict=True)
        ]
        batch = {**self._pixels(records), **self.texts.tokens(list(texts)), "labels": torch.tensor(labels)}
        if len(set(lists)) > 1:
            batch["allowed"] = torch.zeros(len(records), len(texts), dtype=torch.bool)
            for row, each in zip(batch["allowed"], lists, strict=True):
                row[[places[own[0]] for own in each.texts]] = True
        return batch

    def question_batch(self, records: Sequence[Record], suffixes: Sequence[str] | None = None) -> Batch:
        import torch

        lists = [_classes_of(record) for record in records]
        self._lists += [each for each in dict.fromkeys(lists) if each not in self._lists]
        return {**self._pixels(records), "lists": torch.tensor([self._lists.index(each) for each in lists])}

    def joined(self, first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> Batch:
        return losses.joined(first, second, self.texts.pad)

    def padded(self, batch: Mapping[str, Tensor]) -> Batch:
        return {**batch, **self.texts.padded(batch)}

    def example(self) -> Batch:
        import torch
        from PIL import Image

        pictures = self._prepared([Image.new("RGB", (8, 8))])
        return {**pictures, **self.texts.tokens(["a", "b"]), "labels": torch.tensor([0])}

    def length(self, record: Record) -> int:
        return 0

    def extent(self, record: Record) -> tuple[int, int]:
        return self.patches, 1

    def token_kinds(self, model: Any, batch: Mapping[str, Tensor], pictures: bool = False) -> dict[str, Tensor]:
        if pictures:
            mask = batch.get("pixel_attention_mask")
            return {"image": batch["labels"].new_ones(len(batch["labels"]), 1) > 0 if mask is None else mask > 0}
        return {"instruction": batch.get("attention_mask", batch["input_ids"].new_ones(batch["input_ids"].shape)) > 0}

    @contextmanager
    def asking(self, ensemble: bool) -> Iterator[None]:
        self._read, self._ensemble = {}, ensemble
        try:
            yield
        finally:
            self._read, self._ensemble = None, False

    def answers(
        self, model: Any, batch: Mapping[str, Tensor], limit: int, keep_rows: Callable[[Tensor], None]
    ) -> list[Answer]:
        return list(map(answer_of, self._likeliest(model, batch, 2)))

    def ranked(self, model: Any, record: Record, count: int) -> list[tuple[str, float]]:
        """Give the likeliest classes of a record's picture with their probabilities, the likeliest first."""
        import torch

        device = next(model.parameters()).device
        batch = {name: values.to(device) for name, values in self.question_batch([record]).items()}
        with torch.inference_mode():
            [found] = self._likeliest(model, batch, count)
        return [(name, probability) for name, probability, _ in found]

    def _likeliest(self, model: Any, batch: Mapping[str, Tensor], count: int) -> Iterator[list]:
        features = {} if self._read is None else self._read
        for place in dict.fromkeys(batch["lists"].tolist()):
            if place not in features:
                features[place] = text_features(model, self.texts, self._lists[place], self._ensemble)
        return likeliest(model, batch, self._lists, features, count)

    def picture_features(self, model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        others = ("input_ids", "attention_mask", *OF_LOSSES)
        return picture_features(model, {name: values for name, values in batch.items() if name not in others})

    def question_features(self, model: Any, batch: Mapping[str, Tensor], pictures: bool = True) -> NoReturn:
        raise UserError(NO_FROZEN_PARTS)

    def question_states(self, model: Any, batch: Mapping[str, Tensor], pictures: bool = True) -> NoReturn:
        raise UserError(NO_FROZEN_PARTS)

    def feature_sizes(self, model: Any, pictures: bool = True) -> tuple[int, int]:
        return 0, 0

    def rows_by_question(self, model: Any, batch: Mapping[str, Tensor], rows: int) -> Tensor:
        return batch["labels"].new_ones(rows)  # each of a picture or a text

    def _pixels(self, records: Sequence[Record]) -> Batch:
        """Prepare one picture of each record."""
        pictures = [images_of(record, WHITE) for record in records]
        for record, own in zip(records, pictures, strict=True):
            if len(own) != 1:
                raise UserError(f"{record.origin}: a dual encoder is shown one picture, got {len(own)}")
        return self._prepared([own[0] for own in pictures])

    def _prepared(self, pictures: list[Any]) -> Batch:
        try:
            return dict(self.processor.image_processor(pictures, return_tensors="pt"))
        except MemoryError:
            raise
        except Exception as error:  # of whatever kind a processor raises
            raise UserError(f"the base's processor cannot prepare pictures: {said(error)}") from error


def _classes_of(record: Record) -> ClassList:
    """Give the list that a record's answer is one of."""
    if record.classes is None:
        raise UserError(
            f"{record.origin}: a dual encoder cannot be asked {record.question[:80]!r}; it names one of a list of "
            "classes (`classes` of a domain)"
        )
    return record.classes


def _place_of(record: Record, classes: ClassList) -> int:
    label = record.turns[-1].text
    if label not in classes.places:
        raise UserError(f"{record.origin}: label {label!r} is none of its {len(classes.names)} classes")
    return classes.places[label]
