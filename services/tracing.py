"""OpenTelemetry traces: request, job, shard, call of an inference service, and access to the storage.

Traces are off unless the standard environment variables of OpenTelemetry name an exporter. While they are off, `span` and its
siblings return one shared object and create nothing. While they are on, a span is created only within another one, so that
probes and periodic work create none; the first ones are those of requests.

Attributes contain neither personal data nor secrets: no tenant, no subject, no address, no name of an uploaded file, no query,
and ids of datasets and projections only with their first characters. Messages of exceptions are left out for the same reason;
a span that failed has the type of the exception.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dermis import __version__
from dermis.addresses import is_loopback_url
from services.logs import without_whole_ids
from services.settings import SettingsError

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span, SpanKind, Tracer

Attribute = str | int | float | bool

_OFF: AbstractContextManager[None] = nullcontext()
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_MISSING = "traces need a package that is not installed: pip install 'dermis[otel]', or unset the variable"

_STOP_SECONDS = 1.5  # the supervisor kills inference services after two

_tracer: Tracer | None = None
_provider: TracerProvider | None = None


def exporter_names(environment: Mapping[str, str] = os.environ) -> list[str]:
    """The exporters that the environment names: "otlp", "console"; empty if there are to be no traces.

    Raises:
        SettingsError: A variable has a value that this service does not support.
    """
    if environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return []
    chosen = environment.get("OTEL_TRACES_EXPORTER", "").strip()
    if not chosen:
        chosen = "otlp" if any(environment.get(name, "").strip() for name in _ENDPOINTS) else "none"
    names = [name.strip().lower() for name in chosen.split(",") if name.strip()]
    for name in names:
        if name not in ("otlp", "console", "none"):
            raise SettingsError(f"OTEL_TRACES_EXPORTER: {name[:40]!r} is not supported; use otlp, console or none")
    protocol = next((value for name in _PROTOCOLS if (value := environment.get(name, "").strip())), "http/protobuf")
    if "otlp" in names and protocol != "http/protobuf":
        raise SettingsError(f"OTEL_EXPORTER_OTLP_PROTOCOL: {protocol[:40]!r} is not supported; use http/protobuf")
    return [name for name in names if name != "none"]


def check_exporters() -> None:
    """Check that the exporters that the environment names can be used.

    Raises:
        SettingsError: One of them is not supported or not installed.
    """
    for name in exporter_names():
        _exporter(name)


def configure(process: str) -> None:
    """Begin to record spans in this process, if the environment asks for traces.

    Args:
        process: The name of the process within the service, such as "gateway" or "generator".
    """
    names = exporter_names()
    if names:
        start(process, [_exporter(name) for name in names])


def start(process: str, exporters: list[SpanExporter]) -> None:
    """Begin to record spans in this process and to export them in the background.

    Args:
        process: The name of the process within the service.
        exporters: Where the spans go.
    """
    global _tracer, _provider
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    # Without this, a receiver that does not answer causes a line for each attempt, and not only for each batch that is lost.
    logging.getLogger("opentelemetry.exporter").setLevel(logging.ERROR)
    # OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES replace or complete these, OTEL_TRACES_SAMPLER chooses the sampler.
    own = {"service.name": "dermis", "service.version": __version__, "dermis.process": process}
    named = {"service.name"} if os.environ.get("OTEL_SERVICE_NAME") else set()
    resource = Resource.create({key: value for key, value in own.items() if key not in named})
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    for exporter in exporters:
        provider.add_span_processor(BatchSpanProcessor(exporter))
    _tracer, _provider = provider.get_tracer("dermis", __version__), provider


def stop() -> None:
    """Record no more spans in this process, and export the recorded ones if the receiver answers soon.

    Uvicorn ends a process by the signal that it received, so that functions registered with `atexit` are not called.
    """
    global _tracer, _provider
    provider, _tracer, _provider = _provider, None, None
    if provider is not None:
        ending = threading.Thread(target=provider.shutdown, daemon=True)
        ending.start()
        ending.join(_STOP_SECONDS)


def _exporter(name: str) -> SpanExporter:
    try:
        if name == "console":
            from opentelemetry.sdk.trace.export import ConsoleSpanExporter

            return ConsoleSpanExporter(formatter=lambda span: span.to_json(indent=None) + "\n")
        import requests
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        session = None
        endpoint = next((value for each in _ENDPOINTS if (value := os.environ.get(each))), "http://localhost:4318")
        if is_loopback_url(endpoint):
            # A proxy of the environment is for other machines: it would see the headers of OTEL_EXPORTER_OTLP_HEADERS.
            session = requests.Session()
            session.trust_env = False
        exporter: SpanExporter = OTLPSpanExporter(session=session)
        return exporter
    except ImportError:
        raise SettingsError(f"OTEL_TRACES_EXPORTER={name}: {_MISSING}") from None


def span(name: str, **attributes: Attribute) -> AbstractContextManager[Span | None]:
    """A span within the current one; nothing if there is none.

    Args:
        name: The name, of which there must be few.
        **attributes: Attributes without personal data, by their name with `__` for each dot.
    """
    return _OFF if _tracer is None else _child(_tracer, name, None, attributes)


def client_span(name: str, **attributes: Attribute) -> AbstractContextManager[Span | None]:
    """The same for a call of another process."""
    if _tracer is None:
        return _OFF
    from opentelemetry.trace import SpanKind

    return _child(_tracer, name, SpanKind.CLIENT, attributes)


def job_span(name: str, carrier: str | None, **attributes: Attribute) -> AbstractContextManager[Span | None]:
    """A span of work on a job, within the trace of the request that created the job.

    Args:
        name: The name.
        carrier: What `carrier` returned when the job was created; None creates a trace of its own.
        **attributes: As for `span`.
    """
    if _tracer is None:
        return _OFF
    from opentelemetry.trace import SpanKind

    context = _context_of({} if carrier is None else {"traceparent": carrier})
    return _recorded(_tracer, name, SpanKind.CONSUMER, context, attributes)


def carrier() -> str | None:
    """The current span as a W3C `traceparent`, to be stored with a job; None without one."""
    if _tracer is None:
        return None
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    fields: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(fields)
    return fields.get("traceparent")


def _child(
    tracer: Tracer, name: str, kind: SpanKind | None, attributes: Mapping[str, Attribute]
) -> AbstractContextManager[Span | None]:
    from opentelemetry.trace import SpanKind, get_current_span

    if not get_current_span().get_span_context().is_valid:
        return _OFF
    return _recorded(tracer, name, SpanKind.INTERNAL if kind is None else kind, None, attributes)


@contextmanager
def _recorded(
    tracer: Tracer, name: str, kind: SpanKind, context: Context | None, attributes: Mapping[str, Attribute]
) -> Iterator[Span]:
    shown = {
        key.replace("__", "."): without_whole_ids(value) if isinstance(value, str) else value
        for key, value in attributes.items()
    }
    with tracer.start_as_current_span(
        name, context, kind, attributes=shown, record_exception=False, set_status_on_exception=False
    ) as current:
        try:
            yield current
        except Exception as error:  # the end of a process or of a task is no failure
            fail(current, type(error).__name__)
            raise


def fail(current: Span | None, error_type: str) -> None:
    """Mark a span as failed."""
    if current is None:
        return
    from opentelemetry.trace import StatusCode

    current.set_status(StatusCode.ERROR)
    current.set_attribute("error.type", error_type)


def _context_of(fields: Mapping[str, str]) -> Context:
    """The context of a W3C `traceparent` and `tracestate`; an empty one if they are missing or not valid."""
    from opentelemetry.context import Context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator().extract(fields, Context())


def request_span(scope: Scope, name: str) -> AbstractContextManager[Span | None]:
    """The span of a request, within that of its caller if it sent one.

    Args:
        scope: The request.
        name: The name, such as that of the method while the route is not known yet.
    """
    if _tracer is None:
        return _OFF
    from opentelemetry.trace import SpanKind

    fields = {key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"] if key in _W3C_HEADERS}
    return _recorded(_tracer, name, SpanKind.SERVER, _context_of(fields), {})


_W3C_HEADERS = (b"traceparent", b"tracestate")


class TraceCalls:
    """ASGI middleware of an inference service: a span for each call that belongs to a trace.

    Args:
        app: The application.
        service: The name of the service.
    """

    def __init__(self, app: ASGIApp, service: str) -> None:
        self._app = app
        self._service = service.lower()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        traced = scope["type"] == "http" and any(name == b"traceparent" for name, _ in scope["headers"])
        if not traced or _tracer is None:
            await self._app(scope, receive, send)
            return
        with request_span(scope, f"{self._service} {scope['path'].strip('/')}") as current:

            async def send_and_note(message: Message) -> None:
                if message["type"] == "http.response.start" and message["status"] >= 500:
                    fail(current, str(message["status"]))
                await send(message)

            await self._app(scope, receive, send_and_note)


def disable_spans_of_bentoml() -> None:
    """Let BentoML create no spans. Its spans contain whole paths, and those of projections are secret."""
    from bentoml._internal.configuration.containers import BentoMLContainer
    from opentelemetry.trace import NoOpTracerProvider

    BentoMLContainer.tracer_provider.set(NoOpTracerProvider())
