"""Independent jobs, a few at a time, with a bar. Knows no simulation.

Each process draws its own workload; only what a job returns travels.
"""

import multiprocessing
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import TypeVar

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

Key = TypeVar("Key", bound=Hashable)
Result = TypeVar("Result")


def run_jobs(
    jobs: Mapping[Key, Callable[[], Result]], what: str, num_processes: int = 2
) -> dict[Key, Result]:
    """What every job returns, by the same keys in the same order.

    Args:
        jobs: have to be picklable: partials of functions of a module.
        num_processes: 1 stays in this process.

    Raises:
        ValueError: as a job does; the others are given up then.
    """
    if num_processes < 1:
        raise ValueError(f"num_processes={num_processes} must be at least 1")
    found: dict[Key, Result] = {}
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=Console()) as progress:
        task = progress.add_task(what, total=len(jobs))
        if num_processes == 1 or len(jobs) == 1:
            for key, job in jobs.items():
                found[key] = job()
                progress.advance(task)
            return found
        # Not a fork: the command has started JAX, which has threads.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(num_processes, mp_context=context) as pool:
            futures = {pool.submit(job): key for key, job in jobs.items()}
            try:
                for future in as_completed(futures):
                    found[futures[future]] = future.result()
                    progress.advance(task)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    return {key: found[key] for key in jobs}
