# The image of dermis: the command line `dermis`, the service in each of its roles, and the demo bundle.
#
#   docker build -t registry.example.com/dermis:0.2.0 .
#   docker build -t registry.example.com/dermis-gpu:0.2.0 --build-arg VARIANT=gpu .
#   docker build -t registry.example.com/dermis-federation:0.2.0 --target federation --build-arg EXTRAS=federated,train .
#
# `buildah bud` and `podman build` take the same arguments. Versions are those of constraints.txt; docs/kubernetes.md says how to
# pin the base image by its digest, which a tag does not do:
#   --build-arg PYTHON_IMAGE=docker.io/library/python:3.11-slim-bookworm@sha256:...
ARG PYTHON_IMAGE=docker.io/library/python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
# cpu or gpu: the extra that brings faiss and onnxruntime. The gpu variant takes torch with CUDA from the package index.
ARG VARIANT=cpu
ARG EXTRAS=s3,explain,otel,provenance,studio
# Where torch without CUDA comes from, for the cpu variant. Empty: the package index that pip is configured for.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
COPY pyproject.toml constraints.txt LICENSE ./
COPY docs/package.md docs/
COPY dermis dermis
COPY training training
COPY services services
COPY commands commands
COPY clients clients
RUN set -eu; \
    python3 -m venv /opt/venv; \
    if [ "$VARIANT" = cpu ] && [ -n "$TORCH_INDEX" ]; then set -- --extra-index-url "$TORCH_INDEX"; else set --; fi; \
    /opt/venv/bin/pip install -c constraints.txt "$@" setuptools wheel; \
    case ",$EXTRAS," in *,studio,*) set -- "$@" ./clients/python ./clients/studio;; esac; \
    /opt/venv/bin/pip install -c constraints.txt "$@" --no-build-isolation ".[${VARIANT},${EXTRAS}]"; \
    /opt/venv/bin/pip uninstall --yes wheel; \
    /opt/venv/bin/pip check
# The list of all Python packages in the image, with versions and licences (CycloneDX).
# pyproject.toml gets the version, because cyclonedx-py does not read one that the build computes.
RUN set -eu; \
    python3 -m venv /opt/sbom; \
    /opt/sbom/bin/pip install cyclonedx-bom==7.5.0; \
    sed "s/^dynamic = .*/version = \"$(/opt/venv/bin/dermis --version)\"/" pyproject.toml > /opt/sbom/pyproject.toml; \
    /opt/sbom/bin/cyclonedx-py environment --output-reproducible --pyproject /opt/sbom/pyproject.toml -o /src/sbom.cdx.json /opt/venv/bin/python

FROM ${PYTHON_IMAGE} AS system
ARG VARIANT=cpu
# On a GPU, torch.compile starts a C compiler for the code that launches its kernels.
RUN set -eu; \
    if [ "$VARIANT" = gpu ]; then \
        apt-get update; \
        apt-get install --yes --no-install-recommends gcc libc6-dev; \
        rm -rf /var/lib/apt/lists/*; \
    fi; \
    groupadd --gid 1034 dermis; \
    useradd --uid 1034 --gid 1034 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin dermis; \
    install --directory --owner 1034 --group 1034 --mode 0700 /data

# The list of all Debian packages in the image, in the same format. Its number is computed from the packages and its time is that of
# their last change, so that two builds of the CPU image have the same list.
FROM system AS debian-sbom
RUN set -eu; \
    python3 -m venv /opt/sbom; \
    /opt/sbom/bin/pip install "debsbom[cdx]==0.10.2"; \
    number=$(python3 -c "import uuid; print(uuid.uuid5(uuid.NAMESPACE_OID, open('/var/lib/dpkg/status').read()))"); \
    /opt/sbom/bin/debsbom generate --sbom-type cdx --with-licenses --distro-name dermis --cdx-serialnumber "$number" \
        --timestamp "$(date --utc --iso-8601=seconds --reference /var/lib/dpkg/status)" --out /opt/sbom/debian.cdx.json

FROM system AS runtime
COPY --from=build /opt/venv /opt/venv
COPY --from=build /src/sbom.cdx.json /usr/share/doc/dermis/sbom.cdx.json
COPY --from=debian-sbom /opt/sbom/debian.cdx.json /usr/share/doc/dermis/debian.cdx.json
COPY LICENSE /usr/share/doc/dermis/LICENSE
WORKDIR /opt/dermis
# The root file system can be read-only: only /data and /tmp are written.
ENV PATH=/opt/venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    HOME=/tmp PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1

# The server and the clients of a federation (k8s/federation).
FROM runtime AS federation
ENV FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1
USER 1034:1034
ENTRYPOINT ["dermis", "federate"]

FROM runtime AS service
COPY bundles bundles
# The commands find bundles by name, as in `--bundle demo`, beside the package `dermis`.
RUN ln -s /opt/dermis/bundles /opt/venv/lib/python3.11/site-packages/bundles
# A container listens on all of its addresses, so requests need a key; docs/security.md says where the first one comes from.
ENV DERMIS_HOST=0.0.0.0 DERMIS_AUTH=keys DERMIS_DATA_DIR=/data DERMIS_BUNDLES=/opt/dermis/bundles BENTOML_DO_NOT_TRACK=True
USER 1034:1034
EXPOSE 3000
ENTRYPOINT ["dermis"]
CMD ["serve"]
