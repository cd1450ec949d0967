# docker build -t lumina .
# mkdir -p data runs                                             (Docker makes mounted folders that are missing, for root only)
# docker run --gpus all --user $(id -u):$(id -g) -v $(pwd)/data:/app/data -v $(pwd)/runs:/app/runs lumina
#                                                                (without a GPU: leave out --gpus all)
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
    && chown lumina:lumina data runs \
    && chmod 1777 data runs /home/lumina

USER lumina
# for any user of --user, who has no entry in /etc/passwd: a home that can be written to, and a name
ENV LUMINA_RUNS=/app/runs HOME=/home/lumina USER=lumina
VOLUME ["/app/data", "/app/runs"]
CMD ["lumina-engine", "train"]
