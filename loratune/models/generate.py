"""Generate answers: in batches for an evaluation, or streamed for a chat."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from itertools import groupby
from typing import Any

import torch

from loratune.models import end_tokens


def positions(net: Any) -> int | None:
    """Return the maximum number of positions of a model, or None where its configuration gives none."""
    config = net.config.get_text_config().to_dict()
    found = config.get("max_position_embeddings") or config.get("n_positions")
    return int(found) if found else None


def room(net: Any) -> int | None:
    """Return how many positions are left for a row where virtual tokens stand before it, or None; see `positions`."""
    limit = positions(net)
    return None if limit is None else max(0, limit - virtual_tokens(net))


def virtual_tokens(net: Any) -> int:
    """Return how many virtual tokens a model puts before each row."""
    from peft import PeftModel

    if not isinstance(net, PeftModel) or not net.active_peft_config.is_prompt_learning:
        return 0
    return int(net.active_peft_config.num_virtual_tokens)


def has_learned_positions(net: Any) -> bool:
    """Return whether a model has a table of position embeddings, which it can't run beyond."""
    limit, words = positions(net), net.get_input_embeddings()
    net = net.get_base_model() if virtual_tokens(net) else net  # their vectors lie in a table, too
    # some tables have a few rows before the first position
    return limit is not None and any(
        isinstance(module, torch.nn.Embedding) and module is not words and 0 <= module.num_embeddings - limit <= 4
        for module in net.modules()
    )


def answers(
    net: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int, batch_size: int,
    temperature: float = 0.0, progress: Callable[[int], None] = lambda count: None, ends: Collection[int] = (),
) -> list[str]:  # fmt: skip
    """Generate an answer to each prompt.

    Args:
        net: the model.
        tokenizer: its tokenizer.
        prompts: token ids, with special tokens and generation prompt; none empty, each shorter than `room`. One that
            leaves fewer than `max_new_tokens` positions is answered alone, with as many tokens as are left.
        max_new_tokens: longest answer in tokens.
        batch_size: prompts at once, padded on the left; sorted by length.
        temperature: tokens are drawn from softmax(logits / temperature), with no other change; 0 is greedy.
        progress: called with the number of answers so far.
        ends: end tokens in addition to the eos of model and tokenizer; see `end_tokens.py`.

    Returns:
        The answers in the order of the prompts, without special tokens.
    """
    limit = room(net)
    most = [max_new_tokens if limit is None else min(max_new_tokens, limit - len(prompt)) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    whole = [i for i in order if most[i] == max_new_tokens]
    batches = [[i] for i in order if most[i] < max_new_tokens]
    # behind virtual tokens PEFT gives the model no positions, so that padding would move a prompt away from them
    before = virtual_tokens(net)
    alike = groupby(whole, key=lambda i: len(prompts[i]) if before else 0)
    for some in [list(group) for _, group in alike]:
        batches += [some[start : start + batch_size] for start in range(0, len(some), batch_size)]
    out = [""] * len(prompts)
    done = 0
    for chosen in batches:
        longest = len(prompts[chosen[0]])
        input_ids = torch.full((len(chosen), longest), int(tokenizer.pad_token_id or 0))  # (rows, tokens)
        mask = torch.zeros_like(input_ids)
        for row, index in enumerate(chosen):
            input_ids[row, longest - len(prompts[index]) :] = torch.tensor(prompts[index])
            mask[row, longest - len(prompts[index]) :] = 1
        written = _generate(net, tokenizer, input_ids, mask, most[chosen[0]], temperature, ends)
        for row, index in enumerate(chosen):
            out[index] = tokenizer.decode(written[row, longest:], skip_special_tokens=True).strip()
        done += len(chosen)
        progress(done)
    return out


def stream(
    net: Any, tokenizer: Any, prompt: Sequence[int], max_new_tokens: int, temperature: float,
    write: Callable[[str], None], ends: Collection[int] = (),
) -> None:  # fmt: skip
    """Generate one answer to token ids, passing each piece of text to `write` as soon as it is generated.

    Raises:
        KeyboardInterrupt: at Ctrl-C; what was generated until then is written.
    """
    from transformers import TextStreamer

    class Writer(TextStreamer):  # type: ignore[misc]
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            write(text)

    input_ids = torch.tensor([list(prompt)])
    streamer = Writer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    try:
        _generate(net, tokenizer, input_ids, torch.ones_like(input_ids), max_new_tokens, temperature, ends, streamer)
    except KeyboardInterrupt:
        streamer.end()  # it holds back the last word until it is complete
        raise


# what transformers would otherwise take from the model's generation_config.json, or set itself (a top_k of 50)
_PLAIN = {
    "top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0,
    "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "num_beams": 1,
}  # fmt: skip
_GREEDY = ("repetition_penalty", "no_repeat_ngram_size", "num_beams")  # of these, what changes the likeliest token


@torch.no_grad()
def _generate(
    net: Any, tokenizer: Any, input_ids: torch.Tensor, mask: torch.Tensor, max_new_tokens: int, temperature: float,
    ends: Collection[int], streamer: Any = None,
) -> torch.Tensor:  # fmt: skip
    from transformers import GenerationConfig

    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    plain = _PLAIN if temperature > 0 else {name: _PLAIN[name] for name in _GREEDY}
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted({*end_tokens.of_model(net, tokenizer), *ends}),
        pad_token_id=tokenizer.pad_token_id or 0,
        use_cache=True,
        **plain,
        **sampling,
    )
    written: torch.Tensor = net.generate(
        input_ids=input_ids.to(net.device),
        attention_mask=mask.to(net.device),
        generation_config=config,
        streamer=streamer,
    )
    return written
