"""Cluster: pieces of work as jobs of Slurm, through submitit; what was stopped goes on, what failed is reported."""

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ssat_probe.workers import Progress, Work, refuse_failed

POLL_S = 5.0
"Seconds between two looks at the jobs; submitit asks Slurm less often than it is asked."


@dataclass(frozen=True)
class Submitted:
    """A piece of work as a job; one that is preempted or out of time is queued again and goes on from its files."""

    piece: Work
    threads: int

    def __call__(self) -> bool:
        """Do the piece, on the machine where the job runs."""
        if self.threads:
            torch.set_num_threads(self.threads)
        return self.piece(lambda done, total, text: None)

    def checkpoint(self) -> Any:
        """What submitit queues when Slurm takes the machine away: the same again."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)


def as_jobs(
    pieces: Sequence[Work],
    names: Sequence[str],
    folder: Path,
    cluster: str,
    *,
    jobs: int,
    threads: int,
    options: Mapping[str, Any],
    progress: Progress,
) -> bool:
    """Do all pieces as jobs, and wait for them; a job that was killed is sent once more, when the others have ended.

    Args:
        pieces: What to do; they must find their files on every machine.
        names: Of the pieces, for messages.
        folder: For the logs of the jobs, on a disk that all machines share.
        cluster: ``slurm``, or ``local`` for submitit's processes on this machine.
        jobs: Most jobs at once; 0 means as many as Slurm allows, and 1 on this machine.
        threads: Of each job; 0 means what torch finds.
        options: Of submitit's executor, such as ``timeout_min``, ``gpus_per_node`` or ``slurm_partition``.
        progress: Told how many are done.

    Returns:
        Whether any of them did anything.

    Raises:
        ValueError: If submitit is not installed, or Slurm does not take the jobs.
    """
    if not pieces:
        return False
    try:
        import submitit
    except ImportError as error:
        raise ValueError(
            f"cluster {cluster} needs submitit, got an environment without {error.name or 'it'}; pip install "
            "'ssat-probe[slurm]'."
        ) from error
    wanted = {"name": "ssat-probe"} | ({"cpus_per_task": threads} if threads else {})
    if jobs and cluster == "slurm":
        wanted["slurm_array_parallelism"] = jobs
    executor = _executor(folder, cluster, wanted, options)
    at_once = len(pieces) if cluster == "slurm" else jobs or 1
    results: list[bool] = []
    failed: dict[str, str] = {}
    left = list(range(len(pieces)))
    for is_last in (False, True):
        killed: list[int] = []
        for begin in range(0, len(left), at_once):
            numbers = left[begin : begin + at_once]
            try:
                with executor.batch():
                    group = [executor.submit(Submitted(pieces[number], threads)) for number in numbers]
            except RuntimeError as error:
                raise ValueError(
                    f"cluster {cluster} must take the jobs, got from it: {_sentence_of(error)}; change "
                    "--cluster-options."
                ) from error
            _wait(group, len(pieces) - len(left) + begin, len(pieces), progress)
            for number, job in zip(numbers, group, strict=True):
                reason = job.exception()
                if reason is None:
                    results.append(bool(job.result()))
                elif isinstance(reason, submitit.core.utils.UncompletedJobError) and not is_last:
                    killed.append(number)
                else:
                    failed[names[number]] = f"job {job.job_id}: {_sentence_of(reason)}"
        left = killed
    refuse_failed(failed, len(pieces), f"See the logs in {folder}. ")
    return any(results)


def _executor(folder: Path, cluster: str, wanted: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
    """Of submitit, with ours and the user's options."""
    import submitit

    try:
        executor = submitit.AutoExecutor(folder=str(folder), cluster=cluster)
    except RuntimeError as error:  # srun is not there
        raise ValueError(
            f"cluster {cluster} must be there, got from submitit: {str(error).rstrip('?.')}; run this where jobs are "
            "sent from, or leave --cluster out."
        ) from error
    try:
        executor.update_parameters(**wanted, **options)
    except (AssertionError, NameError, TypeError, ValueError) as error:  # it asserts the types
        raise ValueError(
            f"cluster_options must be those of submitit's executor, got {dict(options)!r}: {error}"
        ) from error
    return executor


def _sentence_of(reason: Exception) -> str:
    """The line of submitit's report that says why: the state of a job without result, else the end of its traceback."""
    report = str(reason).strip()
    if state := re.search(r"has not produced any output.*", report):
        return state[0]
    trace = re.split(r"\n-{10,}\n", report)[1:2] or [report or type(reason).__name__]
    return trace[0].strip().splitlines()[-1].rstrip(". ")


def _wait(group: Sequence[Any], before: int, total: int, progress: Progress) -> None:
    """Until all jobs of a group have ended, one way or the other."""
    while True:
        done = sum(job.done() for job in group)
        progress(before + done, total, f"{done} of {len(group)} jobs done")
        if done == len(group):
            return
        time.sleep(POLL_S)
