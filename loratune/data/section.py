"""The section `data` of a recipe: the rows, how they are read and how long they may be."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from loratune.config.section import Inside, Section, as_tuple
from loratune.data.formats import Auto, Format

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".txt")


class Source(Section):
    """Where rows come from."""

    path: str = Field(min_length=1, description="file, folder, glob, or hub data set")
    subset: Inside | None = Field(None, description="configuration of a hub data set")
    split: Inside = Field("train", description="split of a hub data set")
    revision: Inside | None = Field(None, description="branch, tag or commit of a hub data set")
    max_rows: int | None = Field(None, ge=1, description="read the first rows only")
    weight: float = Field(
        1.0, gt=0, le=1000, description="how often its rows are seen per epoch: 2 is twice, 0.5 every other row"
    )


def _source(value: Any) -> Any:
    if isinstance(value, (str, dict, Source)):
        return {"path": value} if isinstance(value, str) else value
    raise PydanticCustomError("expected", "must be a path, or a mapping with a `path`")


Sources = Annotated[
    tuple[Annotated[Source, BeforeValidator(_source, json_schema_input_type=str | Source)], ...],
    BeforeValidator(as_tuple, json_schema_input_type=str | Source | list[str | Source]),
    Field(min_length=1),
]


class TurnMarks(Section):
    """The text around the assistant's turns, for a chat template that does not mark them."""

    assistant: str = Field(min_length=1, description="text the template writes before each answer")
    end: str = Field(
        min_length=1,
        description="text that ends an answer, such as the next role's marker; it is trained on and ends with a "
        "special token",
    )


class Data(Section):
    """The rows, how they are read and how long they may be."""

    train: Sources = Field(
        description="rows to train on: file, folder, glob, hub data set, or a list of them with weights"
    )
    eval: Sources | None = Field(None, description="held-out rows, as `train`")
    eval_fraction: float | None = Field(
        None, gt=0, lt=1, description="fraction (0-1) of the training rows held out, instead of `eval`"
    )
    format: Format = Field(Auto(), description="format of the rows; auto: detected from the columns, and reported")
    chat_template: str | None = Field(
        None,
        description="template of a base model that has none: a file, or one of chatml, alpaca; saved with the adapter",
    )
    chat_template_kwargs: dict[str, bool | int | float | str] = Field(
        {},
        description="values of variables the chat template asks for, such as enable_thinking: false; written into the "
        "template that is saved with the adapter",
    )
    system: Literal["keep", "fold"] = Field(
        "keep",
        description="where a system text goes; fold: in front of the first user message, for a template without a "
        "system role; written into the template that is saved with the adapter",
    )
    turns: TurnMarks | None = Field(
        None,
        description="markers around the assistant's turns (`assistant` and `end`), where they can't be derived from "
        "the chat template; every row is checked against them",
    )
    max_length: int = Field(2048, ge=2, description="longest row in tokens")
    on_long: Literal["error", "drop", "truncate", "split"] = Field(
        "error",
        description="what happens to a longer row: error, drop, truncate (cut at the end), split (plain text only)",
    )
    packing: Literal["auto", "on", "off"] = Field(
        "auto",
        description="rows of a step concatenated into packs of at most max_length tokens instead of padded; none is "
        "cut or attends to another; auto: where that is exact; never changes what is optimized",
    )
    prefix_sharing: Literal["auto", "on", "off"] = Field(
        "auto",
        description="a prefix that rows of a micro-batch share (a system prompt, a question) is computed once for all "
        "of them, and nothing after the last label token of a row; auto: where rows are packed, without dropout and "
        "neftune, and where it saves 2 % of the tokens; never changes what is optimized",
    )
    on_bad_row: Literal["error", "skip"] = Field(
        "error", description="what happens to a row that can't be read or has no label tokens"
    )
    max_lost: float = Field(
        0.01, ge=0, le=1, description="fraction (0-1) of rows that may be dropped or skipped before that is an error"
    )
    duplicates: Literal["keep", "drop"] = Field(
        "keep", description="what happens to a row that is identical to an earlier one; duplicates are counted"
    )
    overlap: Literal["error", "allow"] = Field(
        "error", description="whether a row may be in both the training and the eval rows"
    )
