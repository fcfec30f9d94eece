"""HTTP: ``/metrics`` and ``/sd/targets`` for Prometheus, ``/api/v1`` for programs, ``/`` for people.

Handlers ask the read model and write down what it says. Every error of ``/api`` is JSON,
``{"error": {"code": …, "message": …}}``, with the status that fits.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
from collections.abc import Awaitable, Callable, Collection
from typing import Any

from aiohttp import web
from google.protobuf import json_format, timestamp_pb2
from google.protobuf.message import Message

from boardbench.collector.dispatch import Dispatcher
from boardbench.collector.errors import Ambiguous, CollectorError, InvalidRequest, NotFound, StoreError
from boardbench.collector.expose import Scrapes
from boardbench.collector.look import MAX_PAGE_SIZE, ReadModel
from boardbench.collector.web.page import STYLE, index_page
from boardbench.v1 import collector_pb2, job_pb2, result_pb2

_log = logging.getLogger(__name__)

_PROBE_SECONDS = 5.0
"""A store that takes no write within this time is not healthy: agents would pile up."""

_RECENT_RESULTS = 50
"""Results on the page."""

_RECENT_JOBS = 50
"""Jobs on the page."""

_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; base-uri 'none'; form-action 'none';"
    " frame-ancestors 'none'",
    "Cache-Control": "no-store",
}

_STATUS: tuple[tuple[type[CollectorError], int, str], ...] = (
    (InvalidRequest, 400, "invalid_request"),
    (Ambiguous, 400, "ambiguous"),
    (NotFound, 404, "not_found"),
    (StoreError, 503, "store_unavailable"),
)
"""What a caller is told, the first match counts."""

_NO_LABEL = re.compile(r"[^a-zA-Z0-9_]")

_LOOK: web.AppKey[ReadModel] = web.AppKey("look", ReadModel)
_SCRAPES: web.AppKey[Scrapes] = web.AppKey("scrapes", Scrapes)
_JOBS: web.AppKey[Dispatcher] = web.AppKey("jobs", Dispatcher)
_VERSION: web.AppKey[str] = web.AppKey("version", str)

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def create_app(look: ReadModel, scrapes: Scrapes, jobs: Dispatcher, *, version: str) -> web.Application:
    """Returns the application; whoever has it runs it."""
    app = web.Application(middlewares=[_answer], client_max_size=0)
    app[_LOOK], app[_SCRAPES], app[_JOBS], app[_VERSION] = look, scrapes, jobs, version
    app.on_response_prepare.append(_add_headers)
    app.router.add_get("/", _index)
    app.router.add_get("/style.css", _style)
    app.router.add_get("/metrics", _metrics)
    app.router.add_get("/sd/targets", _targets)
    app.router.add_get("/healthz", _healthz)
    app.router.add_get("/api/v1/devices", _devices)
    app.router.add_get("/api/v1/jobs", _jobs)
    app.router.add_get("/api/v1/jobs/{job_id}", _job)
    app.router.add_get("/api/v1/results", _results)
    app.router.add_get("/api/v1/results/{run_id}", _result)
    return app


async def _add_headers(_request: web.Request, response: web.StreamResponse) -> None:
    response.headers["Server"] = "boardbench-collector"
    for name, value in _HEADERS.items():
        response.headers.setdefault(name, value)


@web.middleware
async def _answer(request: web.Request, handler: _Handler) -> web.StreamResponse:
    """Turns every error into JSON with a status; the one place where that is done."""
    try:
        return await handler(request)
    except CollectorError as error:
        for kind, status, code in _STATUS:
            if isinstance(error, kind):
                return _error(status, code, str(error))
        _log.exception("%s %s failed", request.method, request.path)
        return _error(500, "internal", "the collector failed; its log says how")
    except web.HTTPNotFound:
        return _error(404, "not_found", f"there is nothing at {request.path}; see / for what there is")
    except web.HTTPMethodNotAllowed as error:
        allowed = ", ".join(sorted(error.allowed_methods))
        response = _error(405, "method_not_allowed", f"{request.path} answers {allowed} only")
        response.headers["Allow"] = allowed
        return response
    except web.HTTPException as error:
        return _error(error.status, "http", error.reason)
    except Exception:
        _log.exception("%s %s failed", request.method, request.path)
        return _error(500, "internal", "the collector failed; its log says how")


async def _index(request: web.Request) -> web.Response:
    _check_parameters(request, ())
    look = request.app[_LOOK]
    listing = await look.results(collector_pb2.ListResultsRequest(page_size=_RECENT_RESULTS, summary=True))
    jobs = await request.app[_JOBS].page(job_pb2.ListJobsRequest(page_size=_RECENT_JOBS))
    text = index_page(
        await look.devices(),
        listing.results,
        jobs.jobs,
        version=request.app[_VERSION],
        now=time.time(),
    )
    return web.Response(text=text, content_type="text/html")


async def _style(_request: web.Request) -> web.Response:
    return web.Response(text=STYLE, content_type="text/css")


async def _metrics(request: web.Request) -> web.Response:
    zipped = _takes_gzip(request.headers.get("Accept-Encoding", ""))
    body, content_type = await request.app[_SCRAPES].answer(request.headers.get("Accept", ""), zipped=zipped)
    headers = {"Content-Type": content_type, "Vary": "Accept, Accept-Encoding"}
    if zipped:
        headers["Content-Encoding"] = "gzip"
    return web.Response(body=body, headers=headers)


async def _targets(request: web.Request) -> web.Response:
    """Boards that serve metrics of their own, as Prometheus's http_sd_configs reads them."""
    _check_parameters(request, ())
    groups = []
    for view in await request.app[_LOOK].views():
        hello = view.hello
        # One that is gone stays a target: its `up` is 0 then, which is what it is for.
        if hello.metrics_address:
            labels = {
                "device": view.device_id,
                "board": hello.board.model,
                "soc": hello.board.soc,
                "up": "1" if view.up else "0",
                **{f"label_{name}": value for name, value in hello.board.labels.items()},
            }
            named = {f"__meta_boardbench_{_NO_LABEL.sub('_', name)}": text for name, text in labels.items()}
            groups.append({"targets": [hello.metrics_address], "labels": named})
    return _json(groups)


async def _healthz(request: web.Request) -> web.Response:
    try:
        await asyncio.wait_for(request.app[_LOOK].probe(), _PROBE_SECONDS)
    except asyncio.TimeoutError:
        return _error(503, "store_unavailable", f"the store took no write within {_PROBE_SECONDS:.0f} s")
    return _json({"status": "ok", "version": request.app[_VERSION]})


async def _devices(request: web.Request) -> web.Response:
    _check_parameters(request, ("on",), repeated=("on",))
    devices = await request.app[_LOOK].devices(request.query.getall("on", []))
    return _message(collector_pb2.ListDevicesResponse(devices=devices))


async def _jobs(request: web.Request) -> web.Response:
    _check_parameters(request, ("device", "batch", "state", "page_size", "page_token"), repeated=("state",))
    given = request.query
    question = job_pb2.ListJobsRequest(page_token=given.get("page_token", ""))
    question.page_size = _page_size(given.get("page_size", ""))
    question.filter.device_id, question.filter.batch_id = given.get("device", ""), given.get("batch", "")
    for state in given.getall("state", []):
        name = f"JOB_STATE_{state.upper().removeprefix('JOB_STATE_')}"
        known = job_pb2.JobState.DESCRIPTOR.values_by_name
        if name not in known or name == "JOB_STATE_UNSPECIFIED":
            raise InvalidRequest(f"state={state}: write queued, leased, running, done, cancelled or dead")
        question.filter.states.append(job_pb2.JobState.Value(name))
    return _message(await request.app[_JOBS].page(question))


async def _job(request: web.Request) -> web.Response:
    _check_parameters(request, ())
    question = job_pb2.ListJobsRequest(filter=job_pb2.JobFilter(job_ids=[request.match_info["job_id"]]))
    (job,) = (await request.app[_JOBS].page(question)).jobs
    return _message(job)


async def _results(request: web.Request) -> web.Response:
    return _message(await request.app[_LOOK].results(_query(request)))


async def _result(request: web.Request) -> web.Response:
    _check_parameters(request, ())
    return _message(await request.app[_LOOK].result(request.match_info["run_id"]))


def _query(request: web.Request) -> collector_pb2.ListResultsRequest:
    """Returns the question that the URL asks; InvalidRequest when it can't be one."""
    _check_parameters(
        request, ("device", "model", "runtime", "status", "since", "page_size", "page_token", "summary")
    )
    given = request.query
    question = collector_pb2.ListResultsRequest(
        device_id=given.get("device", ""),
        model=given.get("model", ""),
        runtime=given.get("runtime", ""),
        page_token=given.get("page_token", ""),
    )
    if status := given.get("status"):
        name = f"RUN_STATUS_{status.upper().removeprefix('RUN_STATUS_')}"
        if not result_pb2.RunStatus.DESCRIPTOR.values_by_name.get(name) or name == "RUN_STATUS_UNSPECIFIED":
            raise InvalidRequest(f"status={status}: write succeeded, failed or cancelled")
        question.status = result_pb2.RunStatus.Value(name)
    if since := given.get("since"):
        time_since = timestamp_pb2.Timestamp()
        try:
            time_since.FromJsonString(since)
        except ValueError as error:
            raise InvalidRequest(
                f"since={since}: write a time as 2026-01-31T12:00:00Z ('+' in a URL is %2B)"
            ) from error
        question.since.CopyFrom(time_since)
    question.page_size = _page_size(given.get("page_size", ""))
    if summary := given.get("summary"):
        if summary not in {"true", "false", "1", "0"}:
            raise InvalidRequest(f"summary={summary}: write true or false")
        question.summary = summary in {"true", "1"}
    return question


def _page_size(text: str) -> int:
    """Returns the number; 0 when none was given."""
    if not text:
        return 0
    if not (text.isascii() and text.isdigit()) or not 1 <= int(text) <= MAX_PAGE_SIZE:
        raise InvalidRequest(f"page_size={text}: write a number from 1 to {MAX_PAGE_SIZE}")
    return int(text)


def _check_parameters(
    request: web.Request, known: Collection[str], *, repeated: Collection[str] = ()
) -> None:
    """Returns when every parameter is known and there once: a misspelt filter must not return everything."""
    for name in request.query:
        if name not in known:
            takes = f"it takes {', '.join(known)}" if known else "it takes none"
            raise InvalidRequest(f"{request.path} has no parameter {name!r}; {takes}")
        if name not in repeated and len(request.query.getall(name)) > 1:
            raise InvalidRequest(f"{name!r} is there more than once")


def _takes_gzip(accept_encoding: str) -> bool:
    """Whether the Accept-Encoding header allows gzip (RFC 9110, 12.5.3)."""
    for part in accept_encoding.split(","):
        coding, _, parameters = part.partition(";")
        if coding.strip().lower() in {"gzip", "x-gzip", "*"}:
            name, _, weight = parameters.partition("=")
            return name.strip().lower() != "q" or weight.strip().rstrip("0") not in {"", "0."}
    return False


def _message(message: Message) -> web.Response:
    return _json(json_format.MessageToDict(message, preserving_proto_field_name=True))


def _error(status: int, code: str, message: str) -> web.Response:
    return _json({"error": {"code": code, "message": message}}, status=status)


def _json(value: Any, *, status: int = 200) -> web.Response:
    text = json.dumps(value, ensure_ascii=False) + "\n"
    return web.Response(text=text, status=status, content_type="application/json")
