"""Jobs: against submitit itself where it is installed, else against a stand-in that keeps its documented rules."""

import contextlib
import pickle
import shutil
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from ssat_probe import analysis, cluster
from ssat_probe.carbon import Supply
from ssat_probe.cluster import Submitted, as_jobs

PARAMETERS = {"name", "timeout_min", "cpus_per_task", "gpus_per_node", "mem_gb", "slurm_partition"}


RAISED = """Job (task=0) failed during processing with trace:
----------------------
Traceback (most recent call last):
  File "submission.py", line 76, in process_job
    result = delayed.result()
{}
----------------------
You can check full logs with 'job.stderr(0)' and 'job.stdout(0)'or at paths:
  - jobs/7_0_log.err
  - jobs/7_0_log.out"""
"What submitit 1.5 says of a job that raised."

KILLED = """Job {} (task: 0) with path jobs/7_0_result.pkl
has not produced any output (state: OUT_OF_MEMORY)
Error stream produced:
----------------------------------------
slurmstepd: error: Detected 1 oom_kill event"""
"What it says of one that was killed."


class UncompletedJobError(RuntimeError):
    """As submitit's."""


class Job:
    """Runs what was pickled when it is asked twice, as a job does between two looks; unknown until its batch ends."""

    def __init__(self, number: int, content: bytes, executor: "Executor") -> None:
        self.job_id, self._content, self._executor, self._looks = f"7_{number}", content, executor, 0
        self._result: Any = None
        self._error: Exception | None = None

    def done(self) -> bool:
        assert not self._executor.is_batching, "the jobs of a batch are unknown until it ends"
        self._looks += 1
        if self._looks == 2:
            try:
                self._result = pickle.loads(self._content)()
            except SystemExit:
                self._error = UncompletedJobError(KILLED.format(self.job_id))
            except Exception as error:
                self._error = RuntimeError(RAISED.format(f"{type(error).__name__}: {error}"))
        return self._looks >= 2

    def exception(self) -> Exception | None:
        return self._error

    def result(self) -> Any:
        if self._error is not None:
            raise self._error
        return self._result


class Executor:
    """As submitit.AutoExecutor."""

    made: list["Executor"] = []  # noqa: RUF012

    def __init__(self, folder: str, cluster: str | None = None) -> None:
        self.folder, self.cluster, self.is_batching = folder, cluster, False
        self.parameters: dict[str, Any] = {}
        self.batches: list[int] = []
        self.made.append(self)

    def update_parameters(self, **parameters: Any) -> None:
        for name in parameters:
            if name not in PARAMETERS and not name.startswith("slurm_array"):
                raise NameError(f"Unknown argument {name!r}")
        if not isinstance(parameters.get("timeout_min", 1), int):
            raise AssertionError("Parameter \"timeout_min\" expected type <class 'int'>")
        self.parameters |= parameters

    @contextlib.contextmanager
    def batch(self) -> Iterator[None]:
        self.is_batching = True
        self.batches.append(0)
        yield
        self.is_batching = False

    def submit(self, function: Any) -> Job:
        assert self.is_batching
        self.batches[-1] += 1
        return Job(self.batches[-1], pickle.dumps(function), self)


class Delayed:
    def __init__(self, function: Any) -> None:
        self.function = function


@pytest.fixture
def submitit(monkeypatch: pytest.MonkeyPatch) -> type[Executor]:
    stand_in = types.ModuleType("submitit")
    stand_in.AutoExecutor = Executor  # type: ignore[attr-defined]
    utils = types.SimpleNamespace(UncompletedJobError=UncompletedJobError)
    stand_in.core = types.SimpleNamespace(utils=utils)  # type: ignore[attr-defined]
    stand_in.helpers = types.SimpleNamespace(DelayedSubmission=Delayed)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "submitit", stand_in)
    monkeypatch.setattr(cluster, "POLL_S", 0.0)
    monkeypatch.setattr(Executor, "made", [])
    return Executor


class Piece:
    """Writes its name, or fails."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name

    def __call__(self, told: Any) -> bool:
        told(1, 1, "nobody listens")
        if self.name == "killed always" or (self.name == "killed once" and not (self.folder / "before").exists()):
            if self.name == "killed once":
                (self.folder / "before").touch()
            raise SystemExit  # as near as a piece in this process gets to being killed
        if self.name.startswith("bad"):
            raise ValueError(f"{self.name} cannot be done")
        (self.folder / self.name).touch()
        return self.name != "old"


def jobs_of(folder: Path, *names: str, kind: str = "slurm", **options: Any) -> bool:
    told: list[tuple[int, int, str]] = []
    pieces = [Piece(folder, name) for name in names]
    arguments: Any = {"jobs": 0, "threads": 0, "options": {}} | options
    result = as_jobs(pieces, names, folder / "jobs", kind, progress=lambda *one: told.append(one), **arguments)
    assert told[-1][:2] == (len(names), len(names))
    return result


def test_all_pieces_are_one_array_of_slurm(tmp_path: Path, submitit: type[Executor]) -> None:
    options = {"timeout_min": 60, "slurm_partition": "gpu"}
    assert jobs_of(tmp_path, "a", "b", "old", jobs=2, threads=1, options=options)
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "old"}
    (made,) = submitit.made
    assert (made.cluster, made.batches, made.folder) == ("slurm", [3], str(tmp_path / "jobs"))
    assert made.parameters == options | {"name": "ssat-probe", "cpus_per_task": 1, "slurm_array_parallelism": 2}


def test_on_this_machine_they_go_one_after_another(tmp_path: Path, submitit: type[Executor]) -> None:
    assert not jobs_of(tmp_path, "old", "old", "old", kind="local")
    assert submitit.made[0].batches == [1, 1, 1]


def test_what_fails_is_named_and_the_others_are_done(tmp_path: Path, submitit: type[Executor]) -> None:
    sentence = (
        r"All 3 trainings must be done, got 1 that failed: bad seed \(job 7_2: ValueError: bad seed cannot be done\)\. "
        r"See the logs in .*jobs\. What is done is kept; the same command does these again and none of the others"
    )
    with pytest.raises(ChildProcessError, match=sentence):
        jobs_of(tmp_path, "a", "bad seed", "b")
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}


def test_a_job_that_was_killed_is_sent_once_more(tmp_path: Path, submitit: type[Executor]) -> None:
    assert jobs_of(tmp_path, "a", "killed once", "b")
    assert {path.name for path in tmp_path.iterdir()} == {"a", "before", "killed once", "b"}
    assert submitit.made[0].batches == [3, 1]


def test_a_job_that_is_killed_again_is_named_with_its_state(tmp_path: Path, submitit: type[Executor]) -> None:
    sentence = (
        r"got 1 that failed: killed always \(job 7_1: has not produced any output \(state: OUT_OF_MEMORY\)\)\. See"
    )
    with pytest.raises(ChildProcessError, match=sentence):
        jobs_of(tmp_path, "a", "killed always", "b")
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}
    assert submitit.made[0].batches == [3, 1]


def test_an_unknown_option_is_named(tmp_path: Path, submitit: type[Executor]) -> None:
    with pytest.raises(
        ValueError, match=r"must be those of submitit's executor, got {'partition': 'gpu'}: Unknown arg"
    ):
        jobs_of(tmp_path, "a", options={"partition": "gpu"})


def test_an_option_of_another_type_is_named(tmp_path: Path, submitit: type[Executor]) -> None:
    sentence = r"must be those of submitit's executor, got {'timeout_min': 'soon'}: Parameter \"timeout_min\" expected"
    with pytest.raises(ValueError, match=sentence):
        jobs_of(tmp_path, "a", options={"timeout_min": "soon"})


def test_without_slurm_a_sentence_says_so(
    tmp_path: Path, submitit: type[Executor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def undetected(self: Executor, folder: str, cluster: str) -> None:
        raise RuntimeError('Could not detect "srun", are you indeed on a slurm cluster?')

    monkeypatch.setattr(submitit, "__init__", undetected)
    with pytest.raises(ValueError, match='cluster slurm must be there, got from submitit: Could not detect "srun"'):
        jobs_of(tmp_path, "a")


def test_jobs_that_slurm_refuses_are_a_sentence(
    tmp_path: Path, submitit: type[Executor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(self: Executor, function: Any) -> Job:
        raise UncompletedJobError(
            "sbatch: error: invalid partition specified: gpu\nsbatch: error: Invalid partition name"
        )

    monkeypatch.setattr(submitit, "submit", refused)
    sentence = (
        "cluster slurm must take the jobs, got from it: sbatch: error: Invalid partition name; change --cluster-o"
    )
    with pytest.raises(ValueError, match=sentence):
        jobs_of(tmp_path, "a")


def test_without_submitit_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ValueError, match=r"cluster slurm needs submitit, .* pip install 'ssat-probe\[slurm\]'"):
        jobs_of(tmp_path, "a")


def test_a_job_that_is_preempted_is_queued_again_as_it_was(tmp_path: Path, submitit: type[Executor]) -> None:
    job = Submitted(Piece(tmp_path, "a"), 1)
    again = job.checkpoint()
    assert isinstance(again, Delayed)
    assert again.function is job


TINY = """
recipe: {model: vit_pico, data: digits, subset: 40, epochs: 1, batch_size: 20}
methods: [scratch, ssat]
seeds: [0]
vary: {mask_ratio: [0.5, 0.75]}
probes: {accuracy: {num_images: 30}}
measures: {accuracy: {probe: accuracy, column: accuracy}}
"""


@pytest.mark.parametrize(
    ("kind", "jobs", "batches"), [("local", 0, [2, 1]), ("local", 1, [1, 1, 1]), ("slurm", 0, [3])]
)
def test_the_jobs_of_the_file_are_those_of_one_machine(
    tmp_path: Path, submitit: type[Executor], kind: str, jobs: int, batches: list[int]
) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY + "jobs: 2\n", encoding="utf-8")
    with pytest.raises(ChildProcessError, match="All 3 trainings must be done, got 3 that failed"):  # at once
        analysis.run(analysis.read(path), tmp_path, tmp_path, device="none", jobs=jobs, cluster=kind)
    assert submitit.made[-1].batches == batches
    assert "slurm_array_parallelism" not in submitit.made[-1].parameters


def test_an_analysis_sends_only_what_is_not_done(tmp_path: Path, submitit: type[Executor]) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY, encoding="utf-8")
    chosen, out, runs = analysis.read(path), tmp_path / "out", tmp_path / "runs"
    first, _ = analysis.run(chosen, out, runs, device="cpu", cluster="slurm", supply=Supply(intensity=3.6e6))
    assert submitit.made[-1].batches == [3]
    spent = pd.read_csv(out / "cost.csv")
    assert (spent["carbon_energy_j"] > 0).all()
    pd.testing.assert_series_equal(spent["carbon_energy_j"], spent["co2e_g"], check_names=False)  # 1 g per joule
    (runs / "mask_ratio=0.5" / chosen.cells[1].recipe.name / "accuracy.csv").unlink()
    second, _ = analysis.run(chosen, out, runs, device="cpu", cluster="slurm")
    assert submitit.made[-1].batches == [1]
    analysis.run(chosen, out, runs, device="cpu", cluster="slurm")
    assert len(submitit.made) == 2
    assert first.equals(second)
    here, _ = analysis.run(chosen, out, tmp_path / "here", device="cpu", jobs=1)
    assert pd.read_csv(out / "cost.csv")[["carbon_energy_j", "co2e_g"]].isna().all(axis=None)
    assert first.equals(here)


def test_submitit_itself_runs_them_in_its_processes(tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    assert jobs_of(tmp_path, "a", "b", kind="local", options={"timeout_min": 5})
    assert {"a", "b"} <= {path.name for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"got {'timeout_min': 'soon'}: Parameter \"timeout_min\" expected type"):
        jobs_of(tmp_path, "a", kind="local", options={"timeout_min": "soon"})
    if shutil.which("srun") is None:
        with pytest.raises(ValueError, match="cluster slurm must be there, got from submitit: Could not detect"):
            jobs_of(tmp_path, "a", kind="slurm")
