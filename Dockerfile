# syntax=docker/dockerfile:1
# docker build -t geocentroids .                              CPU
# docker build -t geocentroids:gpu --build-arg VARIANT=gpu .  NVIDIA GPU (run with --gpus all)

FROM node:20-bookworm-slim AS viewer
WORKDIR /src/static
COPY static/package.json static/package-lock.json static/.npmrc ./
RUN npm ci --no-audit --no-fund
COPY static/ ./
RUN npm run build

FROM python:3.13-slim-bookworm AS wheel
WORKDIR /src
COPY pyproject.toml hatch_build.py README.md LICENSE ./
COPY geocentroids_tiler/ geocentroids_tiler/
COPY --from=viewer /src/static/dist static/dist
RUN --mount=type=bind,source=locks,target=/locks \
    pip install --no-cache-dir --require-hashes --no-deps --only-binary :all: -r /locks/build.txt \
    && pip wheel --no-cache-dir --no-build-isolation --no-deps --no-index --wheel-dir /wheels .

FROM python:3.13-slim-bookworm
ARG VARIANT=cpu
RUN --mount=type=bind,source=locks,target=/locks \
    --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    pip install --no-cache-dir --require-hashes --no-deps --only-binary :all: -r "/locks/${VARIANT}.txt" \
    && pip install --no-cache-dir --no-deps --no-index /wheels/*.whl \
    && pip check \
    && useradd --create-home --uid 10001 geocentroids
USER 10001
ENV PYTHONUNBUFFERED=1 \
    GEOCENTROIDS_CODEBOOKS_DIR=/home/geocentroids/codebooks
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/readyz', timeout=4)"]
ENTRYPOINT ["geocentroids"]
CMD ["serve", "--host", "0.0.0.0", "--port", "8000"]
