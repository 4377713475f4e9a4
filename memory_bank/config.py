"""What the training scripts of memory bank share: hyper-parameters, network, data, labels and rows from the teacher."""

from dataclasses import dataclass, field
from typing import Literal, Optional

from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from common.config.sections import DataConfig, ModelConfig, OptimConfig, RunConfig
from common.evaluation.inference import Protocol
from memory_bank.released import translate


@dataclass
class Adaptation:
    """What train_domain_adaptation.py has beside, or in place of, the other values.

    Args:
        source_dataset: Kind of the source, whose classes are those of `data`.
        source_root: Its folder, by default the one that `data.root` lies in (GTA5 is looked for there as GTA5 or gta5);
            of the built-in data, which are drawn on first use in another domain, `data.root` with `_b` behind it.
        contrast_weight: Weight of the contrastive loss.
        mix_probability: Of ClassMix among labeled images.
        last_steps: At the end all labels are the target's for so many steps.
    """

    source_dataset: Literal["gta5", "cityscapes", "voc", "shapes"] = "gta5"
    source_root: Optional[str] = None
    contrast_weight: NonNegativeFloat = 0.2
    mix_probability: ClosedUnitInterval = 0.25
    last_steps: NonNegativeInt = 100


@dataclass
class Method:
    """The hyper-parameters of memory bank; the released ones by default.

    Args:
        alpha: First decay of the teacher; it grows to 1 along a cosine.
        bank_size: Rows kept of a class.
        bank_start: Step after which the bank is filled.
        bank_rows_factor: Rows that enter a class at once: 1 on Cityscapes, 7 on VOC.
        bank_threshold: Probability above which a correct pixel may enter the bank.
        bank_ranking: Which rows enter where there are too many: those of the lowest scores, as released, or of the
            highest, as the paper says.
        embedding_dim: Length of a row.
        contrast_start: Step after which the contrastive loss, class weights and ClassMix of unlabeled images begin.
        contrast_weight: Weight of the contrastive loss, for labeled and for unlabeled images.
        confidence_power: Power of their confidence by which pseudo-labels are weighed.
        ramp_steps: Steps after which pseudo-labels have their full weight.
        entropy_weight: Weight of the entropy term.
        entropy_broadcast: The entropy term as released before October 2021, about as many times as large as there are
            unlabeled images in a batch.
        class_balance: Weigh classes by their frequency in labels and pseudo-labels (Cityscapes).
        mix_background: Whether ClassMix pastes class 0 like any other; not on VOC.
        half_size: Images at half their size, in training and evaluation (Cityscapes with DeepLabV2).
        unlabeled_batch_size: Unlabeled images a step, over all processes, each seen in two views; by default half as
            many as labeled ones.
        use_teacher_train: The teacher gives pseudo-labels and the bank's rows; otherwise the student, in evaluation
            mode.
        save_teacher_test: The teacher is evaluated in place of the student.
        patience: Share of the training without a better evaluation after which student and teacher start again from
            the best.
        refresh_batches: Unlabeled batches, at most as many as there are steps, from which batch-norm statistics of the
            best network are taken anew at the end; 0: none.
        adaptation: Section of train_domain_adaptation.py.
    """

    alpha: ClosedUnitInterval = 0.995
    bank_size: PositiveInt = 256
    bank_start: NonNegativeInt = 1000
    bank_rows_factor: PositiveFloat = 1.0
    bank_threshold: ClosedUnitInterval = 0.95
    bank_ranking: Literal["lowest", "highest"] = "lowest"
    embedding_dim: PositiveInt = 256
    contrast_start: NonNegativeInt = 2000
    contrast_weight: NonNegativeFloat = 0.1
    confidence_power: NonNegativeFloat = 6.0
    ramp_steps: PositiveInt = 2000
    entropy_weight: NonNegativeFloat = 0.01
    entropy_broadcast: bool = False
    class_balance: bool = False
    mix_background: bool = True
    half_size: bool = False
    unlabeled_batch_size: Optional[PositiveInt] = None
    use_teacher_train: bool = True
    save_teacher_test: bool = False
    patience: ClosedUnitInterval = 0.2
    refresh_batches: NonNegativeInt = 1000
    adaptation: Adaptation = field(default_factory=Adaptation)

    def unlabeled_batch(self, labeled: int) -> int:
        """Unlabeled images a step beside so many labeled ones."""
        return self.unlabeled_batch_size or max(1, labeled // 2)


@dataclass
class Config:
    data: DataConfig
    model: ModelConfig
    optim: OptimConfig
    method: Method
    run: RunConfig

    from_released = staticmethod(translate)


def protocol_of(config: Config) -> Protocol:
    """Whole images; at half their size where the network was trained so."""
    return Protocol(reduce=2 if config.method.half_size else 1)
