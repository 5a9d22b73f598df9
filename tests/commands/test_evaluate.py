from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraModel, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import loratune
from loratune import recipe
from loratune.commands import evaluate as evaluation
from loratune.commands.evaluate import evaluate
from loratune.console import Terminal
from loratune.data import row_files
from loratune.data.encode import Encoder
from loratune.data.formats import Chat
from loratune.errors import DataError, LoratuneError, ModelError, Place, SetupError, UsageError
from loratune.models import base_model, generate
from loratune.models.policy import Policy
from loratune.models.section import Model
from loratune.objectives import metrics
from loratune.system import regex_match
from loratune.training import memory_use
from tests import tiny


@pytest.fixture(autouse=True)
def _float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute in float32 on every machine, so that numbers can be compared."""
    monkeypatch.setattr(base_model, "computes_in_bf16", lambda where: False)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """Return a run of two large steps with six held-out rows."""
    folder = tmp_path_factory.mktemp("evaluated")
    optimizer = {"type": "adamw", "lr": 0.3}
    path = tiny.write_recipe(folder, base, rows=16, data={"eval": "eval.jsonl"}, optimizer=optimizer)
    done = loratune.train(loratune.load_recipe(path))
    assert done.steps == 2
    return done.folder


def nets(run: Path, base: Path) -> dict[str, Any]:
    """Load base and adapter apart from loratune."""
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    under = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return {"base": plain, "adapter": PeftModel.from_pretrained(under, run).eval()}


def held_out(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.parent / "eval.jsonl").read_text().splitlines()]


def by_hand(net: Any, raws: list[dict[str, Any]]) -> tuple[float, float]:
    """Return loss per trained token and token accuracy."""
    encoder = Encoder(tiny.tokenizer())
    nats = right = count = 0.0
    for raw in raws:
        row = encoder.encode(Chat().read(raw), Place("x"))
        ids = torch.from_numpy(row.ids).long()
        with torch.no_grad():
            logp = net(input_ids=ids[None]).logits[0].double().log_softmax(-1)
        for position in range(1, len(ids)):
            if row.trained[position]:
                nats -= float(logp[position - 1, ids[position]])
                right += int(logp[position - 1].argmax()) == int(ids[position])
                count += 1
    return nats / count, right / count


def test_loss_and_accuracy_equal_an_own_computation(run: Path, base: Path) -> None:
    result = evaluate(run, generate=False)
    assert (result.rows, result.generated, result.predictions) == (6, 0, None)
    assert list(result.scores) == ["base", "adapter"]
    for system, net in nets(run, base).items():
        loss, accuracy = by_hand(net, held_out(run))
        scores = result.scores[system]
        assert list(scores) == ["loss", "perplexity", "token accuracy"]
        assert scores["loss"].value == pytest.approx(loss, rel=1e-5)
        assert scores["token accuracy"].value == pytest.approx(accuracy)
        assert scores["perplexity"].value == pytest.approx(math.exp(loss), rel=1e-4)
        for score in scores.values():
            assert score.low < score.value < score.high or score.value in (score.low, score.high)
        assert scores["perplexity"].low == pytest.approx(math.exp(scores["loss"].low))
    assert result.scores["base"]["loss"].value != pytest.approx(result.scores["adapter"]["loss"].value, rel=1e-2)
    facts = json.loads((run / "run.json").read_text())  # the run measured the same when it ended
    assert result.scores["adapter"]["loss"].value == pytest.approx(facts["best_eval_loss"], rel=1e-4)


def test_the_base_column_is_the_base_alone(run: Path, base: Path) -> None:
    data = str(run.parent / "eval.jsonl")
    beside = evaluate(run, max_new_tokens=8)
    alone = evaluate(base, data=data, max_new_tokens=8, out=run.parent / "alone.jsonl")
    assert list(alone.scores) == ["model"]
    for metric, score in beside.scores["base"].items():
        assert score.__dict__ == pytest.approx(alone.scores["model"][metric].__dict__, rel=1e-6)
    assert "loss" in beside.scores["base"]


def one_by_one(net: Any, tokens: Any, prompts: list[list[int]], longest: int) -> list[str]:
    out = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        written = net.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=longest,
            do_sample=False,
            eos_token_id=tokens.eos_token_id,
            pad_token_id=tokens.eos_token_id,
        )
        out.append(tokens.decode(written[0, len(prompt) :], skip_special_tokens=True).strip())
    return out


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_answers_are_those_without_padding(run: Path, base: Path, tmp_path: Path, batch_size: int) -> None:
    out = tmp_path / "predictions.jsonl"
    result = evaluate(run, max_new_tokens=12, batch_size=batch_size, out=out)
    assert (result.generated, result.predictions) == (6, out)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    tokens = AutoTokenizer.from_pretrained(base)
    raws = held_out(run)
    prompts = [
        tokens(tokens.apply_chat_template(raw["messages"][:-1], tokenize=False, add_generation_prompt=True)).input_ids
        for raw in raws
    ]
    assert len({len(prompt) for prompt in prompts}) > 3  # else nothing is padded
    assert [line["prompt"] for line in lines] == [tokens.decode(prompt) for prompt in prompts]
    assert [line["reference"] for line in lines] == [raw["messages"][-1]["content"] for raw in raws]
    assert [Path(line["place"]).name for line in lines] == [f"eval.jsonl:{i}" for i in range(1, 7)]
    for system, net in nets(run, base).items():
        wanted = one_by_one(net, tokens, prompts, 12)
        assert [line[system] for line in lines] == wanted
        f1 = [metrics.token_f1(answer, line["reference"]) for answer, line in zip(wanted, lines, strict=True)]
        assert [line[f"{system} scores"]["token F1"] for line in lines] == f1
        assert result.scores[system]["token F1"].value == pytest.approx(sum(f1) / 6)
    assert any(line["base"] != line["adapter"] for line in lines)


def test_generate_answers_in_the_order_of_the_prompts(base: Path) -> None:
    net = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    tokens = AutoTokenizer.from_pretrained(base)
    prompts = [tokens(text).input_ids for text in ("a", "the blue cat", "dog runs", "x y z one two three", "b")]
    told: list[int] = []
    got = generate.answers(net, tokens, prompts, 9, batch_size=2, progress=told.append)
    assert got == one_by_one(net, tokens, prompts, 9)
    assert told == [2, 4, 5]
    torch.manual_seed(0)
    warm = generate.answers(net, tokens, prompts, 9, batch_size=2, temperature=1.5)
    assert warm != got
    torch.manual_seed(0)
    assert generate.answers(net, tokens, prompts, 9, batch_size=2, temperature=1.5) == warm


def test_limit(run: Path, base: Path) -> None:
    result = evaluate(run, limit=2, generate=False)
    assert result.rows == 2
    loss, _ = by_hand(nets(run, base)["adapter"], held_out(run)[:2])
    assert result.scores["adapter"]["loss"].value == pytest.approx(loss, rel=1e-5)
    assert evaluate(run, limit=99, generate=False).rows == 6


def test_json_table_and_default_predictions(run: Path) -> None:
    result = evaluate(run, max_new_tokens=4, regex=r"\w+", choices=["cat", "dog"])
    found = json.loads(json.dumps(result.as_json()))
    assert set(found) == {
        "name",
        "rows",
        "generated",
        "scores",
        "predictions",
        "base_differs",
        "trust_remote_code",
        "examples",
        "objective",
        "unit",
        "classes",
        "confusion",
    }
    assert (found["objective"], found["unit"]) == ("", "nats per label token")
    names = ["loss", "perplexity", "token accuracy", "exact match", "contains", "token F1", "regex", "choice"]
    for system in ("base", "adapter"):
        assert list(found["scores"][system]) == names
        assert all(set(score) == {"value", "low", "high"} for score in found["scores"][system].values())
    assert Path(found["predictions"]) == run / "predictions.jsonl"
    assert len((run / "predictions.jsonl").read_text().splitlines()) == 6
    table = evaluation.show(result).splitlines()
    assert table[0] == f"{run}: 6 rows, 6 answered (mean, 95 % bootstrap interval)"
    assert table[2].split() == ["base", "adapter", "intervals"]
    assert [line.split("  ")[0] for line in table[4:12]] == names
    assert table[-1] == f"predictions: {run / 'predictions.jsonl'}"
    first = json.loads((run / "predictions.jsonl").read_text().splitlines()[0])
    assert found["examples"][0] == {name: first[name] for name in ("reference", "base", "adapter")}
    at = table.index("answer 1 of 6")
    assert [line.split()[0] for line in table[at + 1 : at + 4]] == ["reference", "base", "adapter"]
    assert table[at + 1] == f"  reference  {first['reference']}"
    assert "answer 3 of 6" in table
    assert "answer 4 of 6" not in table
    score = result.scores["base"]["loss"]
    assert f"{score.value:.3f} [{score.low:.3f}, {score.high:.3f}]" in table[4]


def test_apart_or_overlap() -> None:
    low, high = evaluation.Score(1, 0.5, 1.5), evaluation.Score(2, 1.6, 2.5)
    for other, word in ((high, "apart"), (evaluation.Score(1.4, 1.4, 2), "overlap")):
        shown = evaluation.show(
            evaluation.Evaluation("x", 1, 0, {"base": {"loss": low}, "adapter": {"loss": other}}, None)
        )
        assert shown.splitlines()[-1].endswith(word)


def test_another_format_and_file(run: Path, tmp_path: Path) -> None:
    path = tiny.write_jsonl(tmp_path / "qa.jsonl", [{"prompt": "a", "completion": " b"}] * 3)
    result = evaluate(run, data=str(path), format="completion", generate=False)
    assert result.rows == 3
    assert result.scores["base"]["loss"].low == result.scores["base"]["loss"].high


def test_a_base_of_ones_own(run: Path, tmp_path: Path) -> None:
    other = tiny.save(tmp_path / "other", seed=5)
    mine, others = (
        evaluate(run, generate=False),
        evaluate(run, base=str(other), generate=False, allow_base_mismatch=True),
    )
    assert mine.scores["base"]["loss"].value != others.scores["base"]["loss"].value


def failing(error: type[LoratuneError], *arguments: Any, **options: Any) -> str:
    with pytest.raises(error) as caught:
        evaluate(*arguments, **options)
    return str(caught.value)


def test_errors(run: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = str(tiny.write_jsonl(tmp_path / "rows.jsonl", [{"text": "x"}]))
    assert failing(UsageError, base) == "no rows to evaluate on\n  name them with --data"
    assert failing(DataError, run, data="none.jsonl") == "no data at `none.jsonl`"
    assert failing(DataError, run, data=rows, format="chat") == (
        f"{rows}:1: `messages` is missing; the row's columns: `text`"
    )
    (tmp_path / "x.bin").touch()
    assert "x.bin: unknown kind of file" in failing(DataError, run, data=str(tmp_path / "x.bin"))
    assert failing(UsageError, run, data=rows, format="chats") == (
        "unknown format `chats`; known: `auto`, `chat`, `instruction`, `completion`, `text`, `preference`, `kto`, `labelled`, `pattern`\n  did you mean `chat`?"
    )
    assert failing(UsageError, run, regex="(").startswith("--regex `(` is not a regular expression: ")
    (tmp_path / "empty").mkdir()
    assert failing(ModelError, tmp_path / "empty").startswith(
        f"{tmp_path}/empty: no adapter_config.json and no config.json"
    )
    assert failing(ModelError, "./nowhere") == "./nowhere: no such folder"


def test_a_run_without_held_out_rows(base: Path, tmp_path: Path) -> None:
    done = loratune.train(recipe.load(tiny.write_recipe(tmp_path, base, rows=8)))
    assert failing(UsageError, done.folder) == "the run has no held-out rows\n  name some with --data"


@pytest.fixture(scope="module")
def biased(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run that trained the bias vectors of its base, too."""
    folder = tmp_path_factory.mktemp("biased")
    tiny.save(folder / "base", attention_bias=True, mlp_bias=True)
    data, optimizer = {"eval": "eval.jsonl"}, {"type": "adamw", "lr": 0.1}
    path = tiny.write_recipe(folder, folder / "base", rows=16, data=data, optimizer=optimizer, method={"bias": "all"})
    return loratune.train(loratune.load_recipe(path)).folder


def test_the_base_of_an_adapter_with_biases_has_its_own(biased: Path) -> None:
    beside = evaluate(biased, generate=False)
    alone = evaluate(biased.parent / "base", data=str(biased.parent / "eval.jsonl"), generate=False)
    assert beside.scores["base"]["loss"].value == pytest.approx(alone.scores["model"]["loss"].value, rel=1e-6)
    facts = json.loads((biased / "run.json").read_text())
    assert beside.scores["adapter"]["loss"].value == pytest.approx(facts["best_eval_loss"], rel=1e-4)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory")], ids=type)  # fmt: skip
def test_memory_that_runs_out_is_told(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(Policy, "per_target", fail)
    monkeypatch.setattr(generate, "stream", fail)
    monkeypatch.setattr(LoraModel, "merge_and_unload", fail)
    for use, hint in (
        (lambda: evaluate(run), "--batch-size 1"),
        (lambda: loratune.chat(run, "hello"), "--max-new-tokens"),
        (lambda: loratune.merge(run, tmp_path / "merged"), "4 bytes a weight"),
    ):
        with pytest.raises(SetupError, match="out of memory on cpu") as caught:
            use()
        assert hint in str(caught.value)
        assert caught.value.exit_code == 3


def test_another_runtime_error_is_none_of_memory(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("a mistake")

    monkeypatch.setattr(Policy, "per_target", fail)
    with pytest.raises(RuntimeError, match="a mistake"):
        evaluate(run)


def test_tokens_scored_at_once_go_by_the_free_memory(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = base_model.load(Model(base=str(base), dtype="float32"), where=torch.device("cpu"))
    for free, plain, tokens in ((None, True, 4096), (1 << 34, True, 4096), (1 << 24, True, 1024), (1 << 10, True, 128)):
        monkeypatch.setattr(memory_use, "free_memory", lambda where, left=free: left)
        assert memory_use.scoring_tokens(loaded, 200, 4096, plain) == tokens


def test_a_pattern_that_takes_too_long_on_answers_loses_nothing_else(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second system's answers are too much for it: the first one's measure goes, too, as nothing stands beside it."""
    asked: list[int] = []
    found = regex_match.found

    def tired(pattern: str, texts: list[str]) -> list[str | None]:
        asked.append(len(texts))
        return found(pattern, texts, 1e-6 if len(asked) == 3 else regex_match.PATIENCE)

    monkeypatch.setattr(regex_match, "found", tired)
    monkeypatch.setattr(regex_match, "check", lambda pattern: None)
    result = evaluate(run, max_new_tokens=4, regex=r"\w+", out=tmp_path / "out.jsonl", on_event=Terminal())
    assert len(asked) == 3
    assert list(result.scores) == ["base", "adapter"]
    for scores in result.scores.values():
        assert "regex" not in scores
        assert "exact match" in scores
    assert (tmp_path / "out.jsonl").exists()
    assert r"--regex `\w+` takes more than 1e-06 s" in capsys.readouterr().err


def test_rows_by_a_pattern_and_names_that_stand_for_nothing(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name in a folder that is there is none of the hub, which is not asked for it."""
    (tmp_path / "rows").mkdir()
    monkeypatch.chdir(tmp_path)
    for number in (1, 2):
        tiny.write_jsonl(tmp_path / "rows" / f"eval-{number}.jsonl", tiny.chats(2, seed=number))
    assert evaluate(base, data="rows/eval-*.jsonl", generate=False).rows == 4
    assert evaluate(base, data="rows/eval-[1].jsonl", generate=False).rows == 2
    monkeypatch.setattr(row_files, "hub", lambda *_: pytest.fail("asked the hub"))
    for name in ("rows/x", "rows/eval-3.jsonl", "./x"):
        with pytest.raises(DataError, match=f"no data at `{name}`"):
            evaluate(base, data=name, generate=False)
