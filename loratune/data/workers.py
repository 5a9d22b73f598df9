"""Prepare blocks of rows in parallel: small data in threads, large data in as many processes as there are cores.

Tokenizing releases Python's global interpreter lock, so threads help and start at once; the rest holds the lock.
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

SMALL = 8 << 20  # bytes of data files that threads read before processes would have started
AHEAD = 2  # blocks in flight per worker, so that none waits for the next


def number(size: int) -> int:
    """Return the best number of processes for `size` bytes of data files; 1: threads of this one."""
    return limits.cores() if size > SMALL else 1


def prepared(
    blocks: Iterable[Block], data: Data, encoder: Encoder, processes: int
) -> Iterator[tuple[Block, list[Prepared]]]:
    """Yield each block with its prepared rows, in order.

    Args:
        blocks: of a source.
        data: how rows are read and fitted to `max_length`.
        encoder: of the base model's tokenizer.
        processes: number of them; below 2 threads of this one are used.

    Raises:
        SetupError: when a worker dies, most likely because memory ran out.
    """
    if processes > 1:
        yield from _by_processes(blocks, data, encoder, processes)
        return
    threads = ThreadPoolExecutor(limits.cores() + 1)  # one more: it renders while the others tokenize
    one_by_one = _one_by_one(lambda block: prepare(block, data, encoder))
    try:
        yield from _windowed(blocks, lambda block: threads.submit(one_by_one, block), limits.cores() + 2)
    finally:
        threads.shutdown(cancel_futures=True)


def _one_by_one(work: Callable[[Block], list[Prepared]]) -> Callable[[Block], list[Prepared]]:
    """Return a function that does the same, but handles large blocks one at a time, as each takes much memory."""
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
            worker.kill()  # before the threads end, which wait for them
        threads.shutdown(cancel_futures=True)
        for worker in workers:
            worker.close()


def _windowed(
    blocks: Iterable[Block], submit: Callable[[Block], Future[list[Prepared]]], width: int
) -> Iterator[tuple[Block, list[Prepared]]]:
    """Yield results in order, with at most `width` in flight, so that memory is bounded."""
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
            "out of memory? close other programs, or split very long rows",
        )

    def kill(self) -> None:
        self._process.kill()

    def close(self) -> None:
        for pipe in (self._requests, self._answers):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        self._process.wait()


def _serve() -> None:
    """Prepare blocks from stdin and write results to stdout until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process decides
    answers = child_process.answers()
    requests = sys.stdin.buffer
    data, tokenizer = pickle.load(requests)
    encoder = Encoder(tokenizer, own=True)
    gc.freeze()  # existing objects stay
    gc.set_threshold(100_000)  # rows create no reference cycles
    while True:
        try:
            block = pickle.load(requests)
        except EOFError:
            return
        pickle.dump(prepare(block, data, encoder), answers, protocol=5)
        answers.flush()


if __name__ == "__main__":
    _serve()
