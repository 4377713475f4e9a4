"""Configuration of memory bank: hyper-parameters and evaluation protocol."""

from dataclasses import dataclass, field
from typing import Literal, Optional

from common.config.lengths import Decay, Steps
from common.config.sections import BaseConfig
from common.config.types import (
    BatchSize,
    ClosedUnitInterval,
    NonNegativeFloat,
    NonNegativeInt,
    Size,
    number,
    whole_number,
)
from common.evaluation.inference import Protocol

BankSize = whole_number(1, 2**16)
BankFactor = number(2**-10, 2**10)


@dataclass
class Adaptation:
    """Options of train_domain_adaptation.py, some of which replace values of the section above.

    Args:
        source_dataset: Layout of the source dataset, as in `data.dataset`; it has the classes of `data`.
        source_root: Folder of the source dataset; by default it is looked for beside `data.root` (GTA5 as GTA5 or
            gta5). The built-in data are drawn in another domain on first use, by default in the folder `data.root` with
            the suffix `_b`.
        contrast_weight: Weight of the contrastive loss.
        mix_probability: Probability of ClassMix among labeled images.
        last_steps: Number of last steps in which all labels are the target's.
    """

    source_dataset: Literal["gta5", "cityscapes", "voc", "shapes"] = "gta5"
    source_root: Optional[str] = None
    contrast_weight: NonNegativeFloat = 0.2
    mix_probability: ClosedUnitInterval = 0.25
    last_steps: Steps = 100


@dataclass
class Method:
    """Hyper-parameters of memory bank; the defaults are the released values.

    Args:
        alpha: First EMA decay of the teacher; it rises to 1 along a cosine.
        bank_size: Embeddings that the bank keeps per class.
        bank_start: Step after which the bank is filled.
        bank_rows_factor: Embeddings that enter the bank per class and step, relative to the released number for
            Cityscapes; 1 on Cityscapes, 7 on VOC.
        bank_threshold: Probability above which a correctly classified pixel may enter the bank.
        bank_ranking: Selection among too many candidates for the bank: those with the lowest scores, as released, or
            the highest, as in the paper.
        embedding_dim: Dimensions of an embedding.
        contrast_start: Step after which the contrastive loss, class weights and ClassMix of unlabeled images start.
        contrast_weight: Weight of the contrastive loss, for labeled and for unlabeled images.
        confidence_power: Exponent of the confidence that weights a pseudo-label.
        ramp_steps: Steps after which pseudo-labels have their full weight.
        entropy_weight: Weight of the entropy term.
        entropy_broadcast: Compute the entropy term as released before October 2021; it is then larger by about the
            number of unlabeled images in a batch.
        class_balance: Weight classes by their frequency in labels and pseudo-labels (Cityscapes).
        mix_background: Let ClassMix paste class 0 like any other class; false on VOC.
        half_size: Train and evaluate at half the image size (Cityscapes with DeepLabV2).
        unlabeled_batch_size: Unlabeled images per step, over all processes, each seen in two views; by default half the
            number of labeled images.
        use_teacher_train: Use the teacher for pseudo-labels and for the embeddings of the bank; otherwise the student
            in evaluation mode.
        save_teacher_test: Evaluate the teacher instead of the student.
        patience: Share of the training without a better evaluation after which student and teacher restart from the
            best checkpoint.
        refresh_batches: Largest number of unlabeled batches from which the batch-norm statistics of the best network
            are recomputed at the end of the run (never more than the run has steps); 0 disables it.
        labels_only: Train on labeled images only: the same network, augmentation and schedule without unlabeled images,
            bank and contrastive loss; in domain adaptation on the labels of the target.
        adaptation: Section of train_domain_adaptation.py.
    """

    alpha: Decay = 0.995
    bank_size: BankSize = 256
    bank_start: Steps = 1000
    bank_rows_factor: BankFactor = 1.0
    bank_threshold: ClosedUnitInterval = 0.95
    bank_ranking: Literal["lowest", "highest"] = "lowest"
    embedding_dim: Size = 256
    contrast_start: Steps = 2000
    contrast_weight: NonNegativeFloat = 0.1
    confidence_power: NonNegativeFloat = 6.0
    ramp_steps: Steps = 2000
    entropy_weight: NonNegativeFloat = 0.01
    entropy_broadcast: bool = False
    class_balance: bool = False
    mix_background: bool = True
    half_size: bool = False
    unlabeled_batch_size: Optional[BatchSize] = None
    use_teacher_train: bool = True
    save_teacher_test: bool = False
    patience: ClosedUnitInterval = 0.2
    refresh_batches: NonNegativeInt = 1000
    labels_only: bool = False
    adaptation: Adaptation = field(default_factory=Adaptation)

    def unlabeled_batch(self, labeled: int) -> int:
        """Return the number of unlabeled images per step for a number of labeled ones."""
        return self.unlabeled_batch_size or max(1, labeled // 2)


@dataclass
class Config(BaseConfig):
    method: Method


def protocol_of(config: Config) -> Protocol:
    """Return the evaluation protocol: whole images, at half their size if the network was trained that way."""
    return Protocol(reduce=2 if config.method.half_size else 1)
