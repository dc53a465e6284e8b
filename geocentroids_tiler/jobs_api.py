"""Routes for background jobs, which label whole datasets."""

# No "from __future__ import annotations" here: FastAPI has to see the service's types in the routes' annotations.
from datetime import datetime
from typing import Annotated, Any

import attrs
from fastapi import Depends, Path, Query
from fastapi.responses import Response
from pydantic import BaseModel
from starlette.requests import Request
from titiler.core.factory import FactoryExtension, TilerFactory

from geocentroids_tiler.errors import InputError
from geocentroids_tiler.labels.job_files import JobRecord, JobState
from geocentroids_tiler.labels.jobs import Jobs
from geocentroids_tiler.labels.service import Service
from geocentroids_tiler.layers import find_codebook, find_image, run
from geocentroids_tiler.params import ReadParams, read_params


class JobInfo(BaseModel):
    """A job that labels a whole dataset: ``chunks_done`` of ``chunks`` have labels.

    ``seconds_left`` is known while it runs, ``error`` says why it failed.
    """

    id: str
    href: str
    state: JobState
    url: str
    codebook: str
    bidx: tuple[int, int, int] | None
    rescale: tuple[float, float] | None
    chunks: int
    chunks_done: int
    seconds_left: float | None
    error: str | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None


class JobList(BaseModel):
    """Jobs, newest first."""

    jobs: list[JobInfo]


def job_info(job: JobRecord, href: str) -> JobInfo:
    """Describe a job.

    Args:
        job: its record.
        href: its address.
    """
    return JobInfo(
        id=job.id,
        href=href,
        state=job.state,
        url=job.url,
        codebook=job.codebook_name,
        bidx=job.bidx,
        rescale=job.rescale,
        chunks=job.chunks,
        chunks_done=job.chunks_done,
        seconds_left=job.seconds_left,
        error=job.error,
        created_at=job.created_at,
        started_at=job.started_at,
        finished_at=job.finished_at,
    )


_NO_STORE = "no-store"
_ANSWER: dict[int | str, dict[str, Any]] = {
    400: {"description": "Something in the request cannot be used, or this server keeps no labels."},
    404: {"description": "There is no such image, codebook or job."},
}
_NEW_JOB: dict[int | str, dict[str, Any]] = {
    **_ANSWER,
    200: {"model": JobInfo, "description": "The dataset has a job already, or labels."},
    503: {"description": "There are too many unfinished jobs; see Retry-After."},
    507: {"description": "The labels may not fit in the server's folder."},
}
_CANCELLED: dict[int | str, dict[str, Any]] = {
    **_ANSWER,
    409: {"description": "The job is done, or has failed."},
}

_JobId = Annotated[str, Path(max_length=64, description="A job's id.")]


@attrs.define
class JobRoutes(FactoryExtension):
    """Adds ``/jobs`` to a ``TilerFactory``.

    Attributes:
        service: shared state.
    """

    service: Service

    def register(self, factory: TilerFactory) -> None:  # type: ignore[override]
        """Register the routes."""
        service, router = self.service, factory.router

        def operation(name: str) -> str:
            return f"{factory.operation_prefix}{name}"

        def address(request: Request, job_id: str) -> str:
            return factory.url_for(request, "job", job_id=job_id)

        @router.post(
            "/jobs", status_code=202, response_model=JobInfo, responses=_NEW_JOB, operation_id=operation("postJob")
        )
        async def new_job(
            request: Request,
            response: Response,
            url: str = Depends(factory.path_dependency),
            read: ReadParams = Depends(read_params),
        ) -> JobInfo:
            """Have a whole dataset labelled in the background, once; its tiles then need no computing."""
            jobs = _jobs(service)
            codebook = await find_codebook(service, read)
            dataset = await find_image(service, url, read, codebook)
            job, new = await run(service.working, jobs.submit, dataset, codebook, read.codebook)
            href = address(request, job.id)
            response.status_code = 202 if new else 200
            response.headers.update({"Location": href, "Cache-Control": _NO_STORE})
            return job_info(job, href)

        @router.get("/jobs", response_model=JobList, responses=_ANSWER, operation_id=operation("getJobs"))
        async def jobs_(
            request: Request,
            response: Response,
            limit: Annotated[int, Query(ge=1, le=1000, description="Jobs at most.")] = 100,
        ) -> JobList:
            """List jobs, newest first."""
            found = await run(service.working, _jobs(service).newest, limit)
            response.headers["Cache-Control"] = _NO_STORE
            return JobList(jobs=[job_info(job, address(request, job.id)) for job in found])

        @router.get(
            "/jobs/{job_id}", name="job", response_model=JobInfo, responses=_ANSWER, operation_id=operation("getJob")
        )
        async def job_(request: Request, response: Response, job_id: _JobId) -> JobInfo:
            """Return how far a job is."""
            job = await run(service.working, _jobs(service).get, job_id)
            response.headers["Cache-Control"] = _NO_STORE
            return job_info(job, address(request, job.id))

        @router.delete(
            "/jobs/{job_id}", response_model=JobInfo, responses=_CANCELLED, operation_id=operation("deleteJob")
        )
        async def cancel_job(request: Request, response: Response, job_id: _JobId) -> JobInfo:
            """Cancel a job; one that runs ends in a moment."""
            job = await run(service.working, _jobs(service).cancel, job_id)
            response.headers["Cache-Control"] = _NO_STORE
            return job_info(job, address(request, job.id))


def _jobs(service: Service) -> Jobs:
    """Return the jobs of a service, which run from the first request for one on if they did not before.

    Raises:
        InputError: if there are none.
    """
    if service.jobs is None:
        raise InputError(
            "this server keeps no labels of whole datasets; GEOCENTROIDS_LABELS_DIR (geocentroids serve --labels DIR) "
            "names a folder for them"
        )
    service.jobs.start()
    return service.jobs
