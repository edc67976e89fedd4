"""The section `transfer` of a recipe: a teacher, what it leaves, and the students that read it."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fullrank.embeddings import EmbeddingOptimizer
from fullrank.models import RankerSpec
from fullrank.training.config import TrainerConfig
from fullrank.training.recipe import Recipe, explain
from fullrank.training.stream_config import StreamConfig
from fullrank.transfer.external import ExternalDistillation


class Part(BaseModel):
    """Base of the parts: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class TeacherConfig(Part):
    """The foundation model.

    Attributes:
        model, training, embedding: as in a recipe of its own.
        warm_up: windows that it learns before it is asked.
        refresh: windows from one version to the next; null keeps the first for good.
        staleness: for each number Δ a log of labels: those of a window are of a version that has not learnt from the
            Δ - 1 windows before.
        delay: seconds from an event to its label and embedding.
    """

    model: RankerSpec
    training: TrainerConfig = TrainerConfig()
    embedding: EmbeddingOptimizer = EmbeddingOptimizer()
    warm_up: int = Field(default=1, ge=1)
    refresh: int | None = Field(default=1, ge=1)
    staleness: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(1,), min_length=1)
    delay: int = Field(default=3600, ge=0)


class EmbeddingsConfig(Part):
    """What is logged of the teacher's layers.

    Attributes:
        layers: names of modules; the first hidden layer's activation is a good choice.
        dim, prefix_dims, bits: of the codec.
        days: that a history reaches back; null for all time.
        fixed: embed all events with the first version, so that histories are of one space; else with each version's
            own codec, and a history mixes them.
    """

    layers: tuple[str, ...] = Field(min_length=1)
    dim: int = Field(default=32, ge=1)
    prefix_dims: tuple[int, ...] = (8, 16)
    bits: Literal[4, 32] = 4
    days: int | None = Field(default=30, ge=1)
    fixed: bool = True


class StudentHistory(Part):
    """How a student reads the embeddings.

    Attributes:
        pooling: see `HistoryConfig`.
        length: most events.
        prefix: numbers of a code to read; null for all.
    """

    pooling: Literal["sum", "mean", "target_attention"] = "sum"
    length: int = Field(default=50, ge=1)
    prefix: int | None = Field(default=None, ge=1)


class StudentConfig(Part):
    """A served model; what is not given is that of `student`.

    Attributes:
        model, training, embedding: as in a recipe of its own.
        without: features of the log that it does not have, beside the `private` ones.
        distillation: of the teacher's labels; null for none.
        staleness: of these labels; default the first of the teacher's.
        history: of the teacher's embeddings; null for none.
    """

    model: RankerSpec | None = None
    training: TrainerConfig | None = None
    embedding: EmbeddingOptimizer | None = None
    without: tuple[str, ...] = ()
    distillation: ExternalDistillation | None = None
    staleness: int | None = None
    history: StudentHistory | None = None


class GainRoles(Part):
    """Which students tell what a history is worth: on the features x, and the raw history h, or the embeddings s, or
    both beside them."""

    x: str
    xh: str
    xs: str
    xhs: str


class TransferConfig(Part):
    """A teacher and its students on a log, window by window.

    Attributes:
        private: features that the teacher has and no student.
        window: seconds of a window.
        teacher: the foundation model.
        embeddings: what is logged of its layers; null for labels alone.
        student: what students have in common.
        students: by name. They predict each window, then learn from it, from the first that the teacher has labelled.
        baseline: the student that the others are compared with; default the first.
        gain: see `GainRoles`.
        measure_from: windows from the first that is labelled to the first that counts in the report.
    """

    private: tuple[str, ...] = ()
    window: int = Field(default=86_400, ge=1)
    teacher: TeacherConfig
    embeddings: EmbeddingsConfig | None = None
    student: StudentConfig = StudentConfig()
    students: dict[str, StudentConfig] = Field(min_length=1)
    baseline: str | None = None
    gain: GainRoles | None = None
    measure_from: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        for name, student in self.students.items():
            if student.model is None and self.student.model is None:
                raise ValueError(f"students.{name} has no model, and neither has student")
            if student.history is not None and self.embeddings is None:
                raise ValueError(f"students.{name} has a history, and there is no section embeddings")
            if student.staleness not in (None, *self.teacher.staleness):
                raise ValueError(f"students.{name}.staleness is {student.staleness}, which teacher.staleness has not")
            if not name or name.startswith(".") or "/" in name:
                raise ValueError(f'students: "{name}" is no name of a directory')
        asked = [] if self.gain is None else list(self.gain.model_dump().values())
        for name in [*asked, *([] if self.baseline is None else [self.baseline])]:
            if name not in self.students:
                raise ValueError(f'there is no student "{name}"; the students are {", ".join(self.students)}')
        return self

    @property
    def reference(self) -> str:
        """The baseline's name."""
        return self.baseline or next(iter(self.students))

    def recipe_of_teacher(self, recipe: Recipe) -> Recipe:
        """The stream in which the teacher learns."""
        teacher = self.teacher
        return self._recipe(recipe, teacher.model, teacher.training, teacher.embedding)

    def recipe_of(self, name: str, recipe: Recipe) -> Recipe:
        """The stream in which a student learns."""
        own, shared = self.students[name], self.student
        model = own.model or shared.model
        assert model is not None
        history = None
        if own.history is not None and self.embeddings is not None:
            history = {**own.history.model_dump(), "dim": self.embeddings.dim, "bits": self.embeddings.bits}
        fields: dict[str, Any] = {
            "name": "student",
            "backbone": model,
            "without": (*self.private, *shared.without, *own.without),
            "distillation": None if own.distillation is None else own.distillation.model_dump(),
            "history": history,
        }
        training = own.training or shared.training or TrainerConfig()
        embedding = own.embedding or shared.embedding or EmbeddingOptimizer()
        return self._recipe(recipe, RankerSpec.of(fields), training, embedding)

    def _recipe(
        self, recipe: Recipe, model: RankerSpec, training: TrainerConfig, embedding: EmbeddingOptimizer
    ) -> Recipe:
        shared = {name: getattr(recipe, name) for name in ("imports", "data", "threads")}
        stream = StreamConfig(window=self.window, rollback=None)
        return Recipe(**shared, model=model, training=training, embedding=embedding, stream=stream)


def read_transfer(recipe: Recipe, source: str) -> TransferConfig:
    """The section of a recipe.

    Raises:
        ValueError: if it has none, or one line per wrong field.
    """
    if recipe.transfer is None:
        raise ValueError(f"{source}: expected a section transfer")
    try:
        return TransferConfig.model_validate(recipe.transfer)
    except ValidationError as error:
        raise ValueError(
            explain(error, f"{source}: transfer", TransferConfig, recipe.transfer, separator=".")
        ) from None
