"""Blocks of rows prepared side by side: small data in threads, large data in as many processes as there are cores.

Tokenizing holds no lock of Python's, so that threads help and start at once; the rest of the work waits for that lock.
A worker is `python -m loratune.data.workers` with a pipe in and a pipe out.
"""

from __future__ import annotations

import contextlib
import gc
import pickle
import queue
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from loratune.data.encode import Encoder
from loratune.data.prepare import Prepared, prepare
from loratune.data.row_files import Block
from loratune.data.section import Data
from loratune.errors import SetupError
from loratune.system import child_process, limits

SMALL = 8 << 20  # bytes of data files that are read before processes would have started
AHEAD = 2  # blocks per worker on their way, so that none waits for the next


def number(size: int) -> int:
    """Return how many processes prepare so many bytes of data files best; 1: threads of this one."""
    return limits.cores() if size > SMALL else 1


def prepared(
    blocks: Iterable[Block], data: Data, encoder: Encoder, processes: int
) -> Iterator[tuple[Block, list[Prepared]]]:
    """Yield each block with what became of its rows, in order.

    Args:
        blocks: of a source.
        data: how rows are read and fitted.
        encoder: of the base model's tokenizer.
        processes: how many; below 2 threads of this one do it.

    Raises:
        SetupError: when a worker dies, for want of memory most likely.
    """
    if processes > 1:
        yield from _by_processes(blocks, data, encoder, processes)
        return
    threads = ThreadPoolExecutor(limits.cores() + 1)  # one more: while the others tokenize it renders
    one_by_one = _one_by_one(lambda block: prepare(block, data, encoder))
    try:
        yield from _windowed(blocks, lambda block: threads.submit(one_by_one, block), limits.cores() + 2)
    finally:
        threads.shutdown(cancel_futures=True)


def _one_by_one(work: Callable[[Block], list[Prepared]]) -> Callable[[Block], list[Prepared]]:
    """Return a function that does the same, but large blocks one after the other, as each takes much memory."""
    lock = threading.Lock()

    def done(block: Block) -> list[Prepared]:
        with lock if block.large else contextlib.nullcontext():
            return work(block)

    return done


def _by_processes(
    blocks: Iterable[Block], data: Data, encoder: Encoder, number: int
) -> Iterator[tuple[Block, list[Prepared]]]:
    workers = [_Worker(data, encoder) for _ in range(number)]
    threads = ThreadPoolExecutor(number)  # a thread waits for each worker
    free: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
    for worker in workers:
        free.put(worker)

    @_one_by_one
    def ask(block: Block) -> list[Prepared]:
        worker = free.get()
        try:
            return worker.ask(block)
        finally:
            free.put(worker)

    try:
        yield from _windowed(blocks, lambda block: threads.submit(ask, block), AHEAD * number)
    finally:
        for worker in workers:
            worker.kill()  # before the threads, which wait for them
        threads.shutdown(cancel_futures=True)
        for worker in workers:
            worker.close()


def _windowed(
    blocks: Iterable[Block], submit: Callable[[Block], Future[list[Prepared]]], width: int
) -> Iterator[tuple[Block, list[Prepared]]]:
    """Yield results in order, at most `width` on their way: memory does not depend on how many there are."""
    waiting: deque[tuple[Block, Future[list[Prepared]]]] = deque()
    for block in blocks:
        waiting.append((block, submit(block)))
        if len(waiting) == width:
            first, future = waiting.popleft()
            yield first, future.result()
    for first, future in waiting:
        yield first, future.result()


class _Worker:
    def __init__(self, data: Data, encoder: Encoder):
        self._process = subprocess.Popen(
            child_process.command("loratune.data.workers"), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env=child_process.environment(TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1"),
        )  # fmt: skip
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests, self._answers = self._process.stdin, self._process.stdout
        self._send((data, encoder.tokenizer))

    def _send(self, what: object) -> None:
        try:
            pickle.dump(what, self._requests, protocol=5)
            self._requests.flush()
        except BrokenPipeError:
            raise self._died() from None

    def ask(self, block: Block) -> list[Prepared]:
        self._send(block)
        try:
            answer: list[Prepared] = pickle.load(self._answers)
        except (EOFError, pickle.UnpicklingError):
            raise self._died() from None
        return answer

    def _died(self) -> SetupError:
        ended = self._process.wait()
        return SetupError(
            f"a process that reads rows ended early ({'signal' if ended < 0 else 'exit code'} {abs(ended)})",
            "was memory short? close other programs, or split very long rows",
        )

    def kill(self) -> None:
        self._process.kill()

    def close(self) -> None:
        for pipe in (self._requests, self._answers):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        self._process.wait()


def _serve() -> None:
    """Answer blocks from stdin on stdout until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one that asks decides
    answers = child_process.answers()
    requests = sys.stdin.buffer
    data, tokenizer = pickle.load(requests)
    encoder = Encoder(tokenizer, own=True)
    gc.freeze()  # what is there stays
    gc.set_threshold(100_000)  # rows leave nothing behind that only a collection would find
    while True:
        try:
            block = pickle.load(requests)
        except EOFError:
            return
        pickle.dump(prepare(block, data, encoder), answers, protocol=5)
        answers.flush()


if __name__ == "__main__":
    _serve()
