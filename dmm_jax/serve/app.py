"""The web application: the interfaces, the page, probes and metrics. The guards see every request first."""

import pathlib

from fastapi import APIRouter, FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

import dmm_jax
from dmm_jax.serve import a1111_api, documents, faults, openai_api, own_api
from dmm_jax.serve.guards import Guards
from dmm_jax.serve.metrics import CONTENT_TYPE, Measured, Metrics
from dmm_jax.serve.service import Service

STATIC = pathlib.Path(__file__).parent / "static"
DESCRIPTION = "One resident student that draws in every style: OpenAI's images API, AUTOMATIC1111's, and our own."


def build_app(service: Service) -> ASGIApp:
    """Returns the whole application for a service."""
    app = FastAPI(
        title=f"dmm-jax serve: {service.engine.pipeline.name}",
        version=dmm_jax.__version__,
        description=DESCRIPTION,
        docs_url=None,  # FastAPI's own pages load scripts from another host.
        redoc_url=None,
    )
    metrics = Metrics(service.engine)
    for part in (own_api.router(service), openai_api.router(service), a1111_api.router(service)):
        app.include_router(part)
    app.include_router(_service_router(service, metrics))
    app.mount("/static", StaticFiles(directory=STATIC), name="static")

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(documents.render(app.openapi()))

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(STATIC / "index.html")

    faults.add_handlers(app)
    paths = {*app.openapi()["paths"], "/", "/docs", "/openapi.json"}
    guarded: ASGIApp = Guards(app, service.settings)
    if service.settings.cors:
        origins, headers = list(service.settings.cors), ["Authorization", "Content-Type"]
        guarded = CORSMiddleware(guarded, allow_origins=origins, allow_methods=["GET", "POST"], allow_headers=headers)
    return Measured(guarded, metrics, paths)


def _service_router(service: Service, metrics: Metrics) -> APIRouter:
    routes = APIRouter(tags=["Service"])

    @routes.get("/healthz")
    async def healthz() -> dict:
        """Tells that the process answers."""
        return {"status": "ok"}

    @routes.get("/readyz", response_model=None)
    async def readyz() -> JSONResponse:
        """Tells whether a request would be accepted now: 200, or 503 while programs compile or the server stops."""
        status = "ready" if service.ready else "stopping" if service.draining else "compiling"
        return JSONResponse({"status": status}, 200 if service.ready else 503)

    @routes.get("/metrics", response_model=None)
    async def all_metrics() -> Response:
        """Counts for Prometheus."""
        return Response(metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    return routes
