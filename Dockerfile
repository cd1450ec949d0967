# docker build -t lumina .
# docker run --gpus all -v $(pwd)/data:/app/data -v $(pwd)/runs:/app/runs lumina            (without a GPU: leave out --gpus all)
# docker run … lumina lumina-engine train --preset debug train_data_path=data/chats.jsonl
FROM python:3.11-slim

WORKDIR /app
COPY pyproject.toml README.md LICENSE tests/requirements.lock ./
COPY lumina_engine lumina_engine
COPY lumina_tui lumina_tui
COPY presets presets
RUN pip install --no-cache-dir -c requirements.lock . \
    && useradd --create-home --uid 1000 lumina \
    && mkdir data runs \
    && chown lumina:lumina data runs

USER lumina
ENV LUMINA_RUNS=/app/runs
VOLUME ["/app/data", "/app/runs"]
CMD ["lumina-engine", "train"]
