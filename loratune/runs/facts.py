"""Content of run.json, in three parts: known at the start, with rows and model loaded, and at the end."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Start:
    """Known before anything is loaded.

    Attributes:
        recipe_sha256: of the recipe.
        seed: of the recipe.
        device: name of the GPU, or `CPU` with its threads.
        processes: number of them.
        versions: of loratune, Python and the packages that a result depends on, by name.
        started: time, UTC.
        trust_remote_code: whether code of the base may run.
    """

    recipe_sha256: str
    seed: int
    device: str
    processes: int
    versions: dict[str, str]
    started: str
    trust_remote_code: bool


@dataclass(frozen=True)
class Setup:
    """Known with rows and model loaded, before the first step.

    Attributes:
        base: hub id or folder of the base model.
        data: counts of the rows to `train` on and held out for `eval` (None without).
        batching: how rows are packed or padded.
        steps: number of optimizer steps.
        adapter_bytes_predicted: of the adapter's (or model's) tensors on disk.
        dtype: precision of the weights.
        quantization: of the base's linear layers: none, nf4, fp4, int8 or another name.
        fingerprints: sha256 (hex) of data, eval, base and tokenizer, and of a `reference` that the recipe names.
        sources: path, bytes and time of each local data file.
        turn_ends: tokens that end a trained turn, with their ids.
        chat: whether turns of a conversation were trained.
        memory: in bytes, from `training.memory_use.measure`.
        activations: the memory plan.
        compiled: whether torch's compiler was used.
        kernels: names of our own kernels that were used on a GPU.
    """

    base: str
    data: dict[str, Any]
    batching: dict[str, Any]
    steps: int
    adapter_bytes_predicted: int
    dtype: str
    quantization: str
    fingerprints: dict[str, str | None]
    sources: list[dict[str, Any]]
    turn_ends: dict[str, int]
    chat: bool
    memory: dict[str, int]
    activations: dict[str, int | None]
    compiled: bool
    kernels: list[str]


@dataclass
class End:
    """Known at the end.

    Attributes:
        step: the last one done.
        saved_step: the one whose weights were saved.
        train_loss: of the last step, in nats per label token.
        best_eval_loss: loss of the best evaluation; None without.
        best_evaluation: its step, the `metric` it is the best by, and loss and figures with unit and direction; None
            without.
        seconds: spent in steps.
        tokens_per_second: in steps.
        adapter_bytes: of the tensors on disk; None before they are written.
    """

    step: int
    saved_step: int
    train_loss: float
    best_eval_loss: float | None
    seconds: float
    tokens_per_second: float
    best_evaluation: dict[str, Any] | None = None
    adapter_bytes: int | None = None


@dataclass
class Facts:
    """Content of run.json, without its `status`.

    Attributes:
        start: known before anything is loaded.
        drift: changes that were allowed at a resume; None for a run that was not resumed.
        base_differs: how the base differs from the one the run began with, where that was allowed.
        setup: known with rows and model loaded.
        end: known at the end.
    """

    start: Start
    drift: list[str] | None = None
    base_differs: list[str] | None = None
    setup: Setup | None = None
    end: End | None = None

    @property
    def prepared(self) -> Setup:
        """What is known once the run is set up."""
        assert self.setup is not None
        return self.setup

    def as_json(self) -> dict[str, Any]:
        """Return the content of run.json."""
        told = asdict(self.start)
        told |= {name: value for name in ("drift", "base_differs") if (value := getattr(self, name)) is not None}
        told |= asdict(self.setup) if self.setup else {}
        return told | (asdict(self.end) if self.end else {})
